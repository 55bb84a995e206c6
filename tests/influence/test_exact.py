"""Forward mode equals the oracle, <vmap(grad), v>, and first order holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import direction, exact

BIASES = {"tied_head": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
CASES = {
    "tied": ({}, "all", "mean"),
    "untied-biases": (BIASES, "all", "sum"),
    "qk-norm": ({"qk_norm": True}, "all", "mean"),
    "window": ({"sliding_window": 3}, "all", "mean"),
    "lora": ({}, "lora", "mean"),
    "regex": ({}, "final_norm|attn/(q|o)_proj", "sum"),
    "embedding": ({}, "embed", "mean"),
    "gemma-lora": (tiny.APART["gemma"], "lora", "mean"),
    **{name: (changes, "all", "mean") for name, changes in tiny.APART.items()},
}


def settings(**changes):
    return influence_config.Influence(**({"lora": influence_config.Lora(rank=2)} | changes))


def batch_of(rows, b=None, t=24):
    return batches.make_batch(rows, b or len(rows), t, t)


@functools.partial(jax.jit, static_argnames=("cfg", "reduction"))
def oracle(chosen, rest, v, batch, cfg, reduction):
    """<g(z), v> from one gradient an example: what the engines must equal."""

    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        return jax.grad(lambda c: direction.losses(c, rest, row, cfg, reduction)[0])(chosen)

    return jax.vmap(lambda row: trees.vdot(one(row), v))(batch)


@functools.partial(jax.jit, static_argnames=("cfg", "reduction"))
def score(chosen, v, rest, batch, cfg, reduction):
    """(influence (B,), loss (B,)) along one whole direction."""
    out = exact.scores(chosen, direction.stack([v], [1.0]), rest, batch, cfg, reduction)
    return out.influence[:, 0], out.loss


def make_direction(model, space, reduction="mean"):
    targets = tiny.rows(5, 20, seed=7)
    pairs = [(3, batch_of(targets[:3], b=4, t=20)), (2, batch_of(targets[3:], b=4, t=20))]
    return direction.mean_gradient(space, pairs, model.cfg, reduction, tiny.placement())


def random_direction(space):
    leaves, tree = jax.tree.flatten(space[0])
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return tree.unflatten(jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_exact_equals_the_oracle(case):
    changes, parameters, reduction = CASES[case]
    model = tiny.model(**changes)
    space = direction.make_space(model, settings(parameters=parameters), tiny.placement())
    v = random_direction(space)
    batch = batch_of(tiny.rows(6, 24, seed=1), b=8)
    got, _ = score(space[0], v, space[1], batch, model.cfg, reduction)
    expected = oracle(*space, v, batch, model.cfg, reduction)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)
    assert scale > 1e-2
    np.testing.assert_array_equal(got[6:], 0.0)


def test_direction_is_the_mean_of_the_targets_gradients():
    model = tiny.model()
    chosen, rest = direction.make_space(model, settings(), tiny.placement())
    v = make_direction(model, (chosen, rest))

    @jax.jit
    def gradient(batch):
        return jax.grad(lambda c: direction.losses(c, rest, batch, model.cfg, "mean")[0])(chosen)

    gradients = [gradient(batch_of([row], t=20)) for row in tiny.rows(5, 20, seed=7)]
    mean = jax.tree.map(lambda *g: sum(g) / 5, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), v, mean)


def test_batch_order_size_and_padding_change_nothing():
    model = tiny.model()
    space = direction.make_space(model, settings(), tiny.placement())
    v = random_direction(space)
    rows = tiny.rows(6, 24, seed=1)

    def scores(batch):
        return np.asarray(score(space[0], v, space[1], batch, model.cfg, "mean")[0])

    together = scores(batch_of(rows))
    largest = np.abs(together).max()
    np.testing.assert_allclose(scores(batch_of(rows[::-1]))[::-1], together, atol=1e-5 * largest)
    np.testing.assert_allclose(scores(batch_of(rows, 8, 32))[:6], together, atol=1e-5 * largest)
    np.testing.assert_allclose(
        scores(tiny.padded_left(batch_of(rows))), together, atol=1e-5 * largest
    )
    alone = np.concatenate([scores(batch_of([row])) for row in rows])
    np.testing.assert_allclose(alone, together, atol=1e-5 * largest)


def test_zero_b_blinds_the_gradient_of_a_and_a_fresh_b_does_not():
    model = tiny.model()
    for zero_b in (True, False):
        lora = influence_config.Lora(rank=2, zero_b=zero_b)
        space = direction.make_space(
            model, settings(parameters="lora", lora=lora), tiny.placement()
        )
        v = trees.named_leaves(make_direction(model, space))
        norms = {name[-1]: float(jnp.abs(leaf).max()) for name, leaf in v.items()}
        assert norms["b"] > 0
        assert (norms["a"] == 0) == zero_b


def test_one_sgd_step_changes_the_target_loss_by_minus_eta_dot():
    """DESIGN section 2: the change is -eta * Dot(z) + O(eta^2)."""
    model = tiny.model()
    space = direction.make_space(model, settings(), tiny.placement())
    chosen, rest = space
    v = make_direction(model, space)
    targets = batch_of(tiny.rows(5, 20, seed=7))
    rows = tiny.rows(24, 24, seed=3)
    dots = np.asarray(score(chosen, v, rest, batch_of(rows), model.cfg, "mean")[0])

    @jax.jit
    def change(batch, eta):
        def mean_target_loss(chosen):
            return direction.losses(chosen, rest, targets, model.cfg, "mean").mean()

        g = jax.grad(lambda c: direction.losses(c, rest, batch, model.cfg, "mean")[0])(chosen)
        stepped = jax.tree.map(lambda p, g: p - eta * g, chosen, g)
        return mean_target_loss(stepped) - mean_target_loss(chosen)

    # Small enough for first order, large enough for float32 to see the change of the loss.
    eta = 2e-3
    measured = np.array([change(batch_of([row]), eta) for row in rows])
    assert np.corrcoef(measured, -eta * dots)[0, 1] > 0.99
    np.testing.assert_allclose(measured.std(), (eta * dots).std(), rtol=0.1)


def test_parameters_that_match_nothing_are_refused():
    with pytest.raises(errors.UserError, match=r"influence.parameters: 'q_prj' matches none"):
        direction.make_space(tiny.model(), settings(parameters="q_prj"), tiny.placement())
    with pytest.raises(errors.UserError, match="not a valid regex"):
        direction.make_space(tiny.model(), settings(parameters="(q"), tiny.placement())


def test_cosine_is_refused_with_the_reason():
    with pytest.raises(errors.UserError, match="gradient norm"):
        settings(normalize="cosine")
