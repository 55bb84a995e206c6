"""Projections: equal to their matrix, blind to blocks and batches, unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diq_jax import errors, influence_config
from diq_jax.influence import projection

SIZE, DIM = 600, 64


def matrix(kind, seed=0, block_bytes=2**28):
    """P as a matrix (SIZE, DIM), by projecting the identity."""
    settings = influence_config.Projection(kind=kind, dim=DIM, seed=seed, block_bytes=block_bytes)
    eye = jnp.eye(SIZE).reshape(SIZE, 20, 30)
    return np.asarray(jax.jit(lambda g: projection.project({"w": g}, settings))(eye))


@pytest.mark.parametrize("kind", influence_config.PROJECTIONS)
def test_equals_the_matrix_and_blocks_change_nothing(kind):
    g = np.random.default_rng(0).normal(size=(5, SIZE)).astype(np.float32)
    P = matrix(kind)
    tree = {"w": jnp.asarray(g).reshape(5, 20, 30)}
    for block_bytes in (1, 2**14, 2**28):
        settings = influence_config.Projection(kind=kind, dim=DIM, block_bytes=block_bytes)
        got = projection.project(tree, settings)
        np.testing.assert_allclose(got, g @ P, atol=1e-5)
        alone = projection.project(jax.tree.map(lambda x: x[3:4], tree), settings)
        np.testing.assert_allclose(alone[0], got[3], atol=1e-5)


@pytest.mark.parametrize("kind", influence_config.PROJECTIONS)
def test_seed_and_path_decide_the_matrix(kind):
    settings = influence_config.Projection(kind=kind, dim=DIM)
    g = jnp.ones((1, SIZE))
    one = projection.project({"w": g}, settings)
    other_path = projection.project({"u": g}, settings)
    other_seed = projection.project(
        {"w": g}, influence_config.Projection(kind=kind, dim=DIM, seed=1)
    )
    assert not np.allclose(one, other_path) and not np.allclose(one, other_seed)
    both = projection.project({"u": g, "v": None, "w": g}, settings)
    np.testing.assert_allclose(both, one + other_path, atol=1e-5)


@pytest.mark.parametrize("kind", influence_config.PROJECTIONS)
def test_unbiased_with_the_variance_that_the_docstring_gives(kind):
    """Over 200 seeds the mean of <Px, Py> is <x, y> within 3 standard errors."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=SIZE)
    y = 0.5 * x + rng.normal(size=SIZE)

    @jax.jit
    def products(seeds):
        def one(seed):
            key = jax.random.fold_in(jax.random.key(7), seed)
            out = projection.sketch(kind, key, jnp.asarray([x, y], jnp.float32), DIM, 2**28)
            return out[0] @ out[1]

        return jax.lax.map(one, seeds)

    found = np.asarray(products(jnp.arange(200)), np.float64)
    exact = x @ y
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - exact) < 3 * error
    variance = ((x @ x) * (y @ y) + exact**2 - 2 * np.sum(x**2 * y**2)) / DIM
    assert 0.6 < found.var() / variance < 1.4  # 200 draws know a variance to about 10 %


def test_sparse_has_two_signed_places_for_each_coordinate():
    P = matrix("sparse")
    assert ((P != 0).sum(axis=1) == projection.BUCKETS).all()
    np.testing.assert_allclose(np.abs(P[P != 0]), 1 / np.sqrt(projection.BUCKETS), rtol=1e-6)
    places = DIM // projection.BUCKETS
    assert ((P[:, :places] != 0).sum(axis=1) == 1).all()


def test_rademacher_is_signs():
    np.testing.assert_allclose(np.abs(matrix("rademacher")), 1 / np.sqrt(DIM), rtol=1e-6)


def test_a_dimension_above_the_parameters_is_refused():
    with pytest.raises(errors.UserError, match=r"projection\.dim=4096 is larger than the 600"):
        projection.check(influence_config.Projection(), SIZE)
    with pytest.raises(errors.UserError, match="Did you mean 'rademacher'"):
        influence_config.Projection(kind="radamacher")
    with pytest.raises(errors.UserError, match="must be even with kind=sparse"):
        influence_config.Projection(kind="sparse", dim=4095)


@pytest.mark.parametrize("kind", influence_config.PROJECTIONS)
def test_the_matrix_never_stands_in_memory(kind):
    """16 gradients of 4.7 million numbers to 8,192: the whole matrix would take 154 GB. Compiled,
    not run: what XLA plans to hold beyond the gradients.
    """
    gradients = {
        name: jax.ShapeDtypeStruct((16, *shape), jnp.float32)
        for name, shape in {"wide": (30, 576, 192), "tall": (1_382_240,), "b": (4,)}.items()
    }
    settings = influence_config.Projection(kind=kind, dim=8192)
    compiled = jax.jit(lambda g: projection.project(g, settings)).lower(gradients).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 16 * 4 * 4_700_004
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 2**31
