"""Adam's moments, the directions and features that are made of them, and LESS by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches, steps
from diq_jax.influence import direction, features, kinds, problems, stage, warmup
from diq_jax.models import training

POOL = tiny.rows(12, 24, seed=2)


def settings(**changes):
    values = {
        "engine": "projected",
        "parameters": "lora",
        "normalize": "cosine",
        "direction": "less",
        "lora": influence_config.Lora(rank=2),
        "projection": influence_config.Projection(dim=64),
        "warmup": influence_config.Warmup(epochs=2, fraction=0.5, batch_size=3, learning_rate=1e-2),
    }
    return influence_config.Influence(**(values | changes))


def problem(model, settings):
    return problems.Problem(model, POOL, [], {}, settings, tiny.placement())


@pytest.fixture(scope="module", name="warm")
def _warm(tmp_path_factory):
    model, epochs = tiny.model(), stage.EpochFiles(tmp_path_factory.mktemp("warm"))
    space = direction.make_space(model, settings(), tiny.placement())
    points = warmup.run(problem(model, settings()), space, epochs)
    return model, space, points, epochs


def test_steps_are_adams(warm):
    """Six examples, two epochs of two steps: parameters and moments equal optax.adam's."""
    model, (chosen, rest), points, _ = warm
    planned = warmup.plan(POOL, settings(), 1)
    assert [len(step.indices) for step in planned] == [3, 3, 3, 3]
    rates = training.learning_rates(1e-2, 4, 1, "linear")  # one of four steps rises
    rate = lambda k: jnp.asarray(rates)[k]  # noqa: E731
    optimizer = optax.adam(rate)
    state = optimizer.init(chosen)

    @jax.jit
    def gradient(chosen, batch):
        def mean(chosen):
            return direction.losses(chosen, rest, batch, model.cfg, "mean").sum() / 3

        return jax.grad(mean)(chosen)

    for k, step in enumerate(planned):
        parts = [gradient(chosen, rows.batch) for rows in steps.microbatches(POOL, step)]
        change, state = optimizer.update(jax.tree.map(lambda *g: sum(g), *parts), state)
        chosen = optax.apply_updates(chosen, change)
        if k in (1, 3):
            point = points[k // 2][0]
            for got, expected in (
                (point.chosen, chosen),
                (point.first, optax.tree.get(state, "mu")),
                (point.second, optax.tree.get(state, "nu")),
            ):
                jax.tree.map(
                    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
                    got,
                    expected,
                )
    shares = np.array([share for _, share in points])
    rates = np.array([float(rate(k)) for k in range(4)]).reshape(2, 2).mean(axis=1)
    np.testing.assert_allclose(shares, rates / rates.sum(), rtol=1e-6)


def test_a_finished_epoch_is_read_back(warm):
    model, space, points, epochs = warm
    assert epochs.get(1) and epochs.get(2) and epochs.get(3) is None
    again = warmup.run(problem(model, settings()), space, warmup.EpochMemory({1: epochs.get(1)}))
    for (before, _), (after, _) in zip(points, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_sigterm_at_every_step_costs_no_step(warm, tmp_path, sigterm):
    model, space, points, epochs = warm
    kept = stage.EpochFiles(tmp_path)
    for folder, files in (("state-1", 0), ("state-1", 0), ("state-2", 1), ("state-2", 1)):
        with sigterm():
            warmup.run(problem(model, settings()), space, kept)
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [folder]
        assert len(list(tmp_path.glob("*.safetensors"))) == files
    again = warmup.run(problem(model, settings()), space, kept)
    for (before, _), (after, _) in zip(points, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    names = [f"epoch-{epoch}.safetensors" for epoch in (1, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == epochs.folder.joinpath(name).read_bytes()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_epoch_is_trained_again(warm, tmp_path, harm, caplog):
    model, space, points, epochs = warm
    kept = stage.EpochFiles(tmp_path)
    for epoch in (1, 2):
        kept[epoch] = epochs.get(epoch)
    file = tmp_path / "epoch-2.safetensors"
    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    file.write_bytes({"flip": flipped, "cut": whole[:-5], "empty": b""}[harm])
    again = warmup.run(problem(model, settings()), space, kept)
    assert "epoch-2.safetensors is damaged" in caplog.text and file.read_bytes() == whole
    for (before, _), (after, _) in zip(points, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_step_that_ruins_the_parameters_is_named_and_kept_nowhere(warm, tmp_path):
    """The first of two steps moves each number by 1e38."""
    model, space, _, _ = warm
    once = influence_config.Warmup(epochs=1, fraction=0.5, batch_size=3, learning_rate=2e38)
    with pytest.raises(errors.UserError, match=r"epoch 1, has loss nan .* step 1 .*learning_rate"):
        epochs = stage.EpochFiles(tmp_path)
        warmup.run(problem(model, settings(warmup=once)), space, epochs)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_adam_direction_by_hand():
    """g / (sqrt(v / (1 - 0.999^2)) + 1e-8) after two steps; 0 where Adam has seen nothing."""
    point = direction.Point({}, {}, {"w": jnp.array([0.001999 * 4.0, 0.0])}, jnp.array(2))
    got = kinds.adam({"w": jnp.array([6.0, 6.0])}, point)
    np.testing.assert_allclose(got["w"], [3.0, 0.0], rtol=1e-5)  # 6 / sqrt(4)


def test_adam_is_linear_in_the_gradient(warm):
    _, space, points, _ = warm
    v = oracle.random_like(space[0], 1)
    point = points[1][0]
    once, twice = (kinds.adam(jax.tree.map(lambda x, c=c: c * x, v), point) for c in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-6), once, twice)


def test_less_equals_float64(warm):
    """Features and cosines of LESS, computed again in numpy float64 from the oracle's gradients."""
    model, _, points, _ = warm
    point = points[1][0]
    space = direction.make_space(model, settings(), tiny.placement())
    space = (point.chosen, space[1])
    batch = batches.make_batch(POOL[:5], 5, 24, 24)
    found = oracle.gradients(*space, batch, model.cfg)
    engine = features.open_features(space, settings(), model.cfg, tiny.placement(), point)
    rows, _ = engine.step(batch)

    P = []  # the projection as a matrix, leaf by leaf, from the identity
    for name, leaf in trees.named_leaves(space[0]).items():
        eye = jnp.eye(leaf.size).reshape(leaf.size, *leaf.shape)
        one = trees.map_named(
            lambda n, x, name=name, eye=eye: (
                eye if n == name else jnp.zeros((eye.shape[0], *x.shape))
            ),
            space[0],
        )
        P.append(np.asarray(engine.project(one), np.float64))
    expected = 0
    leaves = (
        jax.tree.leaves(found), jax.tree.leaves(point.first), jax.tree.leaves(point.second), P,
    )  # fmt: skip
    for g, m, s, matrix in zip(*leaves, strict=True):
        g, m, s = (np.asarray(x, np.float64) for x in (g, m, s))
        update = (0.9 * m + 0.1 * g) / np.sqrt(0.999 * s + 0.001 * g**2 + 1e-8)
        expected = expected + update.reshape(5, -1) @ matrix
    scale = np.abs(expected).max()
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": "exact", "normalize": "dot"}, "needs engine=projected and normalize=cosine"),
        ({"normalize": "dot"}, "needs engine=projected and normalize=cosine"),
        ({"warmup": influence_config.Warmup()}, r"direction=less needs Adam's moments"),
        ({"direction": "adma"}, "Did you mean 'adam'"),
        ({"direction": "mean", "per_token": True}, r"per_token belongs to engine=exact"),
        ({"engine": "factored", "direction": "mean"}, "with parameters=lora use projected"),
    ],
)
def test_settings_at_odds_are_refused(changes, message):
    with pytest.raises(errors.UserError, match=message):
        settings(**changes)
