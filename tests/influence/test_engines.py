"""Per-example gradients, probes, thin and several directions, packing: all equal to the oracle."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches, packing
from diq_jax.influence import direction, exact, factored, features, per_example, thin
from diq_jax.models import lora

BIASES = {"tied_head": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
FAMILIES = {"tied": {}, "untied-biases": BIASES, "qk-norm": {"qk_norm": True}, **tiny.APART}
ROWS = tiny.rows(6, 24, seed=1)
BATCH = batches.make_batch(ROWS, 8, 24, 24)  # two rows are padding


def make_space(model, **settings):
    settings = influence_config.Influence(**({"lora": influence_config.Lora(rank=2)} | settings))
    return direction.make_space(model, settings, tiny.placement())


def close(got, expected, tolerance=1e-4):
    np.testing.assert_allclose(
        got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@functools.partial(jax.jit, static_argnames=("cfg", "per_token"))
def score(space, v, batch, cfg, per_token=False):
    return exact.scores(space[0], v, space[1], batch, cfg, "mean", per_token)


@pytest.mark.parametrize(
    "parameters, limits",
    [
        ("all", (2**30, 2**24)),
        ("lora", (1, 2**24)),
        ("lora", (2**30, 48)),
        ("attn/(q|o)_proj|norm", (2**30, 2**24)),
    ],
)
def test_per_example_gradients_equal_the_oracle(parameters, limits):
    model = tiny.model(qkv_bias=True)
    space = make_space(model, parameters=parameters)
    settings = influence_config.Influence(gradient_bytes=limits[0], microbatch_tokens=limits[1])

    @jax.jit
    def flat(batch):
        return per_example.map_gradients(
            lambda g: jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(g)], 1),
            space, batch, model.cfg, "mean", settings, 2,
        )  # fmt: skip

    got, losses = flat(BATCH)
    expected = oracle.gradients(*space, BATCH, model.cfg)
    leaves = [np.asarray(x).reshape(8, -1) for x in jax.tree.leaves(expected)]
    close(got, np.concatenate(leaves, axis=1))
    np.testing.assert_array_equal(got[6:], 0)
    close(losses, direction.losses(*space, BATCH, model.cfg, "mean"))


@pytest.mark.parametrize(
    "family, parameters",
    [*((family, "all") for family in FAMILIES), ("tied", "mlp|embed")],
)
def test_factored_equals_the_two_sided_projection_of_the_oracle(family, parameters):
    """Lt G Rt, G the oracle's gradient of each matrix; gains and biases whole, then sketched."""
    model = tiny.model(**FAMILIES[family])
    space = make_space(model, parameters=parameters)
    layout = factored.make_layout(
        direction.shapes(space, tiny.placement()), influence_config.Projection(dim=800)
    )
    maps = factored.make_maps(layout)
    assert layout.rank >= 2 and layout.dim <= 800

    @jax.jit
    def features(batch):
        return factored.features(model.params, maps, batch, model.cfg, "mean", layout)

    got, losses = features(BATCH)
    found = oracle.gradients(*space, BATCH, model.cfg)
    close(got, factored.project_tree(found, maps, layout))
    np.testing.assert_array_equal(got[6:], 0)
    close(losses, direction.losses(*space, BATCH, model.cfg, "mean"))

    # By hand for one matrix: core = Lt G Rt.
    gradients = trees.named_leaves(found["params"])
    [name, *_] = (f"layers/{x}_proj/kernel" for x in ("attn/o", "mlp/down")
                  if f"layers/{x}_proj/kernel" in gradients)  # fmt: skip
    G = gradients[name]
    place = list(layout.matrices).index(name)
    before = sum(math.prod(s[:-2]) for s in list(layout.matrices.values())[:place])
    P = layout.rank
    core = got[:, before * P * P : (before + 2) * P * P].reshape(8, 2, P, P)
    for layer in range(2):
        left, right = (
            np.eye(P)[np.arange(len(s)) % P] * np.asarray(s)[:, None]
            for s in (maps[name]["left"][layer], maps[name]["right"][layer])
        )  # (in, P), (out, P): a sign in each row
        close(core[:, layer], np.einsum("ip,bio,or->bpr", left, G[:, layer], right))


def test_factored_is_unbiased():
    """The mean of inner products over 200 seeds is the whole one within 3 standard errors."""
    model = tiny.model(num_layers=1)
    space = make_space(model, parameters="mlp")
    found = oracle.gradients(*space, BATCH, model.cfg)
    layout = factored.make_layout(
        direction.shapes(space, tiny.placement()), influence_config.Projection(dim=48)
    )

    @jax.jit
    def product(seed):
        drawn = dataclasses.replace(layout, seed=seed)
        out = factored.project_tree(found, factored.make_maps(drawn), drawn)
        return out[0] @ out[1]

    products = jax.lax.map(product, jnp.arange(200))
    exact_product = oracle.dots(found, jax.tree.map(lambda g: g[1], found))[0]
    error = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - exact_product) < 3 * error


@pytest.mark.parametrize(
    "dim, rank, message",
    [
        (10, 0, r"projection\.dim=10 has no room for"),
        (4096, 9, r"projection\.rank=9 exceeds the smallest matrix, which has a side of 8"),
        (100, 4, r"projection\.dim=100 has no room for"),
    ],
)
def test_a_factored_projection_without_room_is_refused(dim, rank, message):
    shapes = direction.shapes(make_space(tiny.model()), tiny.placement())
    with pytest.raises(errors.UserError, match=message):
        factored.make_layout(shapes, influence_config.Projection(dim=dim, rank=rank))


@pytest.mark.parametrize(
    "family", ["tied", "untied-biases", "gemma", "phi-granite", "experts", "delta"]
)
def test_a_thin_direction_scores_as_its_own_product(family):
    """Rank 3: <g, A B> for matrices, gains and biases whole; full rank: the direction itself."""
    model = tiny.model(**FAMILIES[family])
    space = make_space(model)
    found = oracle.gradients(*space, BATCH, model.cfg)
    v = oracle.random_like(space[0], 5)
    _, factors = thin.truncate(v, 3)
    assert set(factors) == {n for n in trees.named_leaves(v) if n.endswith(thin.MATRICES)}
    named = {n: f["a"] @ f["b"] for n, f in factors.items()}
    product = trees.map_named(lambda n, x: named.get(n, x), v)
    got = score(space, direction.stack([v], [1.0], 3), BATCH, model.cfg)
    close(got.influence[:, 0], oracle.dots(found, product))
    np.testing.assert_array_equal(got.influence[6:], 0)
    got = score(space, direction.stack([v], [1.0], 99), BATCH, model.cfg)
    close(got.influence[:, 0], oracle.dots(found, v))


def test_truncation_is_the_truncated_svd():
    """A matrix with a clear spectrum: the factors' product is that of the exact SVD."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(2, 60, 40)))[0]
    w = np.linalg.qr(rng.normal(size=(2, 40, 40)))[0]
    s = 0.7 ** np.arange(40)
    kernel = (u * s) @ w.swapaxes(-1, -2)
    v = {"layers": {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.ones((2, 3))}}
    whole, factors = thin.truncate(v, 5)
    f = factors["layers/kernel"]
    assert f["a"].shape == (2, 60, 5) and f["b"].shape == (2, 5, 40)
    best = (u[..., :5] * s[:5]) @ w[..., :5].swapaxes(-1, -2)
    np.testing.assert_allclose(f["a"] @ f["b"], best, atol=1e-5)
    assert whole["layers"]["kernel"] is None and whole["layers"]["scale"].shape == (2, 3)


def test_a_gradient_of_rank_one_is_truncated_exactly():
    """A single short target may give one; fewer columns than OVERSAMPLE must not break it."""
    keys = jax.random.split(jax.random.key(1), 2)
    kernel = jax.random.normal(keys[0], (4, 576, 1)) @ jax.random.normal(keys[1], (4, 1, 800))
    f = thin.truncate({"kernel": kernel}, 16)[1]["kernel"]
    np.testing.assert_allclose(f["a"] @ f["b"], kernel, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_several_directions_equal_one_at_a_time_and_tokens_sum_to_the_score(rank):
    model = tiny.model()
    space = make_space(model)
    vs = [oracle.random_like(space[0], seed) for seed in (1, 2, 3)]
    together = score(space, direction.stack(vs, [1, 2, 1], rank), BATCH, model.cfg, True)
    assert together.influence.shape == (8, 3)
    for q, v in enumerate(vs):
        alone = score(space, direction.stack([v], [1.0], rank), BATCH, model.cfg)
        close(together.influence[:, q], alone.influence[:, 0])
    mean = together.influence @ jnp.array([0.25, 0.5, 0.25])
    close(together.tokens.sum(axis=1), mean)
    np.testing.assert_array_equal(together.tokens[BATCH.loss_mask == 0], 0)


def test_a_peft_adapter_is_a_direction(tmp_path):
    """Its score is minus the derivative of the loss along the adapter's update."""
    model = tiny.model()
    adapter = lora.init(jax.random.key(3), model.cfg, "(q|v)_proj|mlp", 2, 4.0, False, "test")
    lora.save_peft(tmp_path, adapter, model.cfg, 4.0, 0.0, "tiny")
    space = make_space(model)
    got = score(space, direction.from_peft(str(tmp_path), model.cfg, space[0]), BATCH, model.cfg)
    update = jax.tree.map(jnp.zeros_like, space[0])
    named = trees.named_leaves(adapter)
    products = {
        f"params/{n.removesuffix('/a')}/kernel": -2.0 * a @ named[n.removesuffix("a") + "b"]
        for n, a in named.items()
        if n.endswith("/a")
    }
    update = trees.map_named(lambda n, x: products.get(n, x), update)
    close(got.influence[:, 0], oracle.dots(oracle.gradients(*space, BATCH, model.cfg), update))


@pytest.mark.parametrize("rank", [0, 3])
def test_packed_rows_score_as_bucketed_ones(rank):
    model = tiny.model(sliding_window=5)
    space = make_space(model)
    v = direction.stack([oracle.random_like(space[0], 5)], [1.0], rank)
    rows = tiny.rows(11, 24, seed=4)
    alone = score(space, v, batches.make_batch(rows, 11, 24, 24), model.cfg, True)
    groups = packing.plan(rows, batch_tokens=96)
    assert max(group.examples for group in groups) > 1
    assert sum(group.rows * group.tokens for group in groups) < 11 * 24
    assert sorted(i for g in groups for i in g.indices) == list(range(11))
    for group in groups:
        out = score(space, v, batches.group_batch(rows, group), model.cfg, True)
        for field in ("influence", "loss"):
            got = np.asarray(getattr(out, field)).reshape(group.rows * group.examples, -1)
            expected = np.asarray(getattr(alone, field)).reshape(11, -1)
            np.testing.assert_allclose(
                got[group.slots], expected[list(group.indices)], atol=1e-5 * np.abs(expected).max()
            )
        close(out.tokens.sum(), alone.tokens[np.array(group.indices)].sum())


def test_lora_and_regex_engines_agree_with_exact():
    """projected: <P g, P v> is unbiased for exact's score, with error about |g| |v| / sqrt(dim)."""
    model = tiny.model()
    settings = influence_config.Influence(
        engine="projected",
        projection=influence_config.Projection(kind="sparse", dim=512),
        lora=influence_config.Lora(rank=8),
        parameters="lora",
    )
    space = direction.make_space(model, settings, tiny.placement())
    engine = features.open_features(space, settings, model.cfg, tiny.placement(), None)
    v = oracle.random_like(space[0], 5)
    rows, _ = engine.step(BATCH)
    end = engine.project(jax.tree.map(lambda x: x[None], v))[0]
    found = oracle.gradients(*space, BATCH, model.cfg)
    expected = np.asarray(oracle.dots(found, v))
    squares = jax.vmap(lambda g: trees.vdot(g, g))(found)
    bound = np.sqrt(squares * trees.vdot(v, v) / 512)
    assert (np.abs(rows @ end - expected) <= 5 * bound + 1e-6).all()
