"""The alignment with the targets inside their span: by hand, and by an SVD of all gradients."""

import jax
import numpy as np
import oracle
import pytest
import tiny

from diq_jax import influence_config
from diq_jax.data import batches
from diq_jax.influence import direction, score, span

POOL, TARGETS = tiny.rows(9, 24, seed=1), tiny.rows(4, 20, seed=7)


def test_by_hand():
    # Targets (2, 0, 0) and (0, 1, 0): the leading direction is the first axis alone. Row (3, 4, 9)
    # is (3,) in it, the targets are (2,) and (0,): cosines 1 and 0. Row (-1, 0, 0): -1 and 0.
    targets = np.array([[2.0, 0, 0], [0, 1, 0]])
    rows = np.array([[3.0, 4, 9], [-1, 0, 0], [0, 0, 5]])
    found, record = span.align(rows @ targets.T, targets @ targets.T, np.array([0.5, 0.5]), 1)
    np.testing.assert_allclose(found, [0.5, -0.5, 0], atol=1e-7)
    assert record == {"directions": 1, "energy": pytest.approx(0.8)}
    # In both, the first row is (3, 4): cosines 0.6 and 0.8.
    found, record = span.align(rows @ targets.T, targets @ targets.T, np.array([0.25, 0.75]), 9)
    np.testing.assert_allclose(found, [0.25 * 0.6 + 0.75 * 0.8, -0.25, 0], atol=1e-7)
    assert record == {"directions": 2, "energy": pytest.approx(1.0)}


def test_equal_targets_span_one_direction():
    targets = np.array([[1.0, 2], [1, 2]])
    found, record = span.align(targets @ targets.T, targets @ targets.T, np.ones(2) / 2, 2)
    assert record["directions"] == 1 and found.tolist() == [1, 1]


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_alignment_is_that_of_an_svd_of_all_gradients(directions):
    settings = influence_config.Influence(batch_tokens=96, targets="example", span=directions)
    model = tiny.model()
    found = score.score(model, POOL, TARGETS, settings, tiny.placement())
    space = direction.make_space(model, settings, tiny.placement())
    rows, ends = (
        flat(oracle.gradients(*space, batches.make_batch(part, len(part), 24, 24), model.cfg))
        for part in (POOL, TARGETS)
    )
    basis = np.linalg.svd(ends, full_matrices=False)[2][:directions].T
    cosines = unit(rows @ basis) @ unit(ends @ basis).T
    np.testing.assert_allclose(found.alignment, cosines.mean(axis=1), atol=1e-4)
    assert found.span["directions"] == directions


def test_inner_products_of_thin_directions_are_those_of_whole_ones():
    model, settings = tiny.model(), influence_config.Influence()
    chosen, _ = direction.make_space(model, settings, tiny.placement())
    rng = np.random.default_rng(0)
    made = [jax.tree.map(lambda x: rng.normal(size=x.shape), chosen) for _ in range(3)]
    v = direction.stack(made, np.ones(3), rank=2)
    assert v.factors
    rows = dense(v)
    gram = np.asarray(direction.gram(v))
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-5 * np.abs(gram).max())


def flat(gradients):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def dense(v):
    parts = [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(v.whole)]
    for factors in v.factors.values():
        product = np.asarray(factors["a"]) @ np.asarray(factors["b"])
        parts.append(product.reshape(len(product), -1))
    return np.concatenate(parts, axis=1).astype(np.float64)


@pytest.mark.parametrize("normalize", ["dot", "cosine"])
def test_what_is_kept_of_the_gradients_gives_the_alignment(normalize):
    """Projected, at two checkpoints: the inner products add up as their shares say."""
    settings = influence_config.Influence(
        engine="projected", parameters="lora", batch_tokens=96, targets="task", normalize=normalize,
        projection=influence_config.Projection(dim=64),
        warmup=influence_config.Warmup(epochs=2, fraction=0.5, batch_size=4),
    )  # fmt: skip
    tasks = ["a", "b", "a", "c"]
    found = score.score(tiny.model(), POOL, TARGETS, settings, tiny.placement(), tasks)
    gram = np.zeros((3, 3))
    for joined, share in found.checkpoints:
        ends = joined.ends if normalize == "dot" else unit(joined.ends)
        gram += share * ends @ ends.T
    expected, record = span.align(found.by_target, gram, np.array([0.5, 0.25, 0.25]), 9)
    np.testing.assert_allclose(found.alignment, expected, atol=1e-5)
    assert found.span == pytest.approx(record)


def test_one_group_has_no_alignment():
    settings = influence_config.Influence(batch_tokens=96)
    found = score.score(tiny.model(), POOL, TARGETS, settings, tiny.placement())
    assert found.alignment is None and found.span == {}
