"""In LoRA space the gradient is of both factors and the function is the model itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from diq_jax import influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import direction, engines, exact, features, problems, warmup
from diq_jax.models import lora, loss

ROWS = tiny.rows(6, 24, seed=1)
BATCH = batches.make_batch(ROWS, 8, 24, 24)
LORA = influence_config.Lora(rank=2)
SETTINGS = influence_config.Influence(
    parameters="lora", lora=LORA, projection=influence_config.Projection(dim=64)
)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def as_dtype(model, dtype):
    return dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), model.params))


def literal_losses(factors, origin, params, batch, cfg):
    """Losses with each adapted kernel written out as W + s (A B - A0 B0), by nothing of lora.py."""
    merged = jax.tree.map(lambda x: x, params)
    for group, linears in factors["adapter"]["layers"].items():
        for name, f in linears.items():
            o = origin["adapter"]["layers"][group][name]
            change = jnp.einsum("nir,nro->nio", f["a"], f["b"])
            change -= jnp.einsum("nir,nro->nio", o["a0"], o["b0"])
            node = merged["layers"][group][name]
            kernel = node["kernel"] + LORA.alpha / LORA.rank * change
            merged["layers"][group] = merged["layers"][group] | {name: node | {"kernel": kernel}}
    return loss.example_losses(merged, cfg, batch, "mean")


def moved(space, scale):
    """The space at other factors than its origin's."""
    chosen, rest = space
    step = oracle.random_like(chosen, 3)
    return jax.tree.map(lambda x, d: x + scale * d, chosen, step), rest


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_gradient_equals_autograd_of_the_written_out_form(scale):
    model = tiny.model()
    space = moved(direction.make_space(model, SETTINGS, tiny.placement()), scale)
    chosen, rest = space

    @jax.jit
    def literal(factors):
        one = functools.partial(literal_losses, factors, rest, model.params, cfg=model.cfg)
        return one(BATCH)

    expected = jax.jacobian(literal)(chosen)
    got = oracle.gradients(chosen, rest, BATCH, model.cfg)
    np.testing.assert_allclose(
        direction.losses(chosen, rest, BATCH, model.cfg, "mean"), literal(chosen), atol=1e-6
    )
    jax.tree.map(close, got, expected)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(got)) > 1e-3  # both factors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["exact", "projected", "losses"])
def test_the_loss_is_the_base_models_to_the_last_digit(engine, dtype):
    model = as_dtype(tiny.model(), dtype)
    placement = tiny.placement()
    found = {}
    for parameters in ("lora", "attn/q_proj"):
        settings = dataclasses.replace(SETTINGS, parameters=parameters)
        space = direction.make_space(model, settings, placement)
        if engine == "exact":
            v = direction.stack([oracle.random_like(space[0], 1)], [1.0])
            step = engines.exact_step(space, v, settings, model.cfg, placement)
            found[parameters] = step(placement.batch(BATCH)).loss
        elif engine == "projected":
            rows = features.open_features(space, settings, model.cfg, placement, None)
            found[parameters] = rows.step(placement.batch(BATCH))[1]
        else:
            losses = functools.partial(direction.losses, cfg=model.cfg, reduction="mean")
            found[parameters] = jax.jit(losses)(*space, BATCH)
    np.testing.assert_array_equal(found["lora"], found["attn/q_proj"])


def test_the_warm_up_starts_at_the_base_model():
    model, placement = tiny.model(), tiny.placement()
    warm = influence_config.Warmup(epochs=1, fraction=1.0, batch_size=6, learning_rate=1e-2)
    settings = dataclasses.replace(SETTINGS, warmup=warm)
    space = direction.make_space(model, settings, placement)
    problem = problems.Problem(model, ROWS, [], {}, settings, placement)
    step, state = warmup.make_step(problem, space)
    _, metrics = step(space[1], None, state, [BATCH], 1e-2, None)
    mean = metrics["loss"]
    base = loss.example_losses(model.params, model.cfg, BATCH, "mean")
    np.testing.assert_allclose(float(mean), float(jnp.sum(base)) / 6, rtol=1e-6)


def test_an_adapter_of_the_users_is_part_of_the_model(tmp_path):
    model = tiny.model()
    adapter = lora.init(jax.random.key(3), model.cfg, "q_proj", 2, 4.0, False, "test")
    lora.save_peft(tmp_path, adapter, model.cfg, 4.0, 0.0, "tiny")
    settings = dataclasses.replace(SETTINGS, lora=influence_config.Lora(path=str(tmp_path)))
    space = direction.make_space(model, settings, tiny.placement())
    got = direction.losses(*space, BATCH, model.cfg, "mean")
    expected = loss.example_losses(model.params, model.cfg, BATCH, "mean", adapter)
    base = loss.example_losses(model.params, model.cfg, BATCH, "mean")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert float(jnp.abs(got - base).max()) > 1e-2
    assert not any(name.endswith("0") for name in trees.named_leaves(space[1]["adapter"]))


def test_exact_equals_the_oracle_away_from_the_origin():
    model = tiny.model()
    chosen, rest = moved(direction.make_space(model, SETTINGS, tiny.placement()), 0.1)
    v = oracle.random_like(chosen, 5)
    out = exact.scores(chosen, direction.stack([v], [1.0]), rest, BATCH, model.cfg, "mean")
    expected = oracle.dots(oracle.gradients(chosen, rest, BATCH, model.cfg), v)
    close(out.influence[:, 0], expected)
