"""The Gauss-Newton direction against dense linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from jax import flatten_util

from diq_jax import influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import curvature, direction
from diq_jax.models import decoder, loss

ROWS = tiny.rows(4, 10, 3)
BATCH = batches.make_batch(ROWS, 5, 10, 9)  # a padding row


def dense(space, batch, cfg, reduction):
    """The sum over examples of J^T H J, (D, D) float64, and the function that flattens a tree."""
    flat, unflatten = flatten_util.ravel_pytree(space[0])

    def logits(flat):
        both = trees.combine(unflatten(flat), space[1])
        hidden = loss.hidden_states(both["params"], cfg, batch, both["adapter"])
        return decoder.logits(both["params"], cfg, loss.at_answers(hidden, batch))

    p = np.asarray(jax.nn.softmax(logits(flat)), np.float64)
    J = np.asarray(jax.jacrev(logits)(flat), np.float64)
    weights = np.asarray(loss.token_weights(batch, reduction), np.float64)
    G = np.zeros((flat.size, flat.size))
    for row in range(p.shape[0]):
        for a in range(p.shape[1]):
            H = np.diag(p[row, a]) - np.outer(p[row, a], p[row, a])
            G += weights[row, a] * J[row, a].T @ H @ J[row, a]
    return G


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "family, parameters",
    [
        ({}, "embed|final_norm"),
        ({"tied_head": False, "qkv_bias": True}, "head|q_proj|attn_norm"),
        ({}, "lora"),
    ],
)
def test_a_product_equals_the_dense_matrix(family, parameters, reduction, monkeypatch):
    monkeypatch.setattr(loss, "HEAD_BLOCK", 15)  # several blocks, the last one padded
    model = tiny.model(**family)
    settings = influence_config.Influence(parameters=parameters)
    space = direction.make_space(model, settings, tiny.placement())
    v = oracle.random_like(space[0], 1)
    got = curvature.product(*space, v, BATCH, model.cfg, reduction)
    G = dense(space, BATCH, model.cfg, reduction)
    expected = G @ np.asarray(flatten_util.ravel_pytree(v)[0], np.float64)
    got = np.asarray(flatten_util.ravel_pytree(got)[0])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_conjugate_gradients_solve_the_system():
    """Two right sides at once. The reported residuals are the true ones, and bound the errors:
    |error| <= |residual| / lambda since no eigenvalue is below lambda.
    """
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 20))
    G, gbar = root @ root.T / 20, rng.normal(size=(2, 20)) * [[1.0], [30.0]]
    tree = {"a": jnp.asarray(gbar[:, :7], jnp.float32), "b": jnp.asarray(gbar[:, 7:], jnp.float32)}

    def multiply(v):
        image = jnp.concatenate([v["a"], v["b"]], axis=1) @ jnp.asarray(G, jnp.float32)
        return {"a": image[:, :7], "b": image[:, 7:]}

    for iterations, tolerance in ((3, 0.0), (60, 1e-4)):
        v, abouts = curvature.solve(multiply, tree, 0.1, iterations, tolerance)
        for found, g, about in zip(np.concatenate([v["a"], v["b"]], 1), gbar, abouts, strict=True):
            shift = 0.1 * (g @ G @ g) / (g @ g)
            damped = G + shift * np.eye(20)
            residual = np.linalg.norm(g - damped @ found)
            np.testing.assert_allclose(about["lambda"], shift, rtol=1e-5)
            reported = about["residuals"][-1] * np.linalg.norm(g)
            np.testing.assert_allclose(reported, residual, rtol=1e-2, atol=1e-6 * np.linalg.norm(g))
            assert np.linalg.norm(found - np.linalg.solve(damped, g)) <= residual / shift
            assert len(about["residuals"]) == 3 or about["residuals"][-1] <= 1e-4


def test_the_matrix_is_the_mean_over_examples_in_any_batches():
    model = tiny.model()
    place = tiny.placement()
    space = direction.make_space(model, influence_config.Influence(parameters="mlp"), place)
    v = oracle.random_like(space[0], 2)

    def product(tokens):
        def placed():
            for indices, batch in batches.iterate(batches.plan(ROWS, tokens, 1), ROWS):
                yield len(indices), place.batch(batch)

        one = jax.tree.map(lambda x: x[None], v)
        return curvature.make_product(space, placed, model.cfg, "mean", place)(one)

    whole = jax.tree.map(
        lambda g: g[None] / 4, curvature.product(*space, v, BATCH, model.cfg, "mean")
    )
    for tokens in (16, 64):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            product(tokens),
            whole,
        )
