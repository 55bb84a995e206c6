"""Supervised fine-tuning of LoRA factors or of parameters: the gradient of a step and its update.

The loss of a step is the mean over its examples of each one's mean answer-token loss, which is the
loss that DIQ's influence is the derivative of. (A trainer that averages over the tokens of a batch
weighs long answers more.) Microbatches, padding and devices change nothing beyond float error:
everything is a sum over examples, divided once by their number.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from diq_jax import finetune_config, trees
from diq_jax.data import steps
from diq_jax.models import config as model_config
from diq_jax.models import lora, loss
from diq_jax.run import devices


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds: `step` () int32, steps done; the trained leaves in float32 (None at
    the others), of the adapter or of the parameters; optax's state.
    """

    step: Any
    factors: Any
    opt_state: Any


def plan(encoded, arms, settings: finetune_config.Finetune, rows_multiple: int):
    """All steps of each arm (data/steps.py) by finetune's settings."""
    size, parts, seed = settings.batch_size, settings.accumulation_steps, settings.seed
    epochs = settings.epochs
    if settings.max_steps:
        fewest = min(-(-len(chosen) // size) for chosen in arms.values())
        epochs = -(-settings.max_steps // fewest)
    if settings.packing:
        planned = steps.plan_packed(encoded, arms, epochs, size, parts, seed, rows_multiple)
    else:
        planned = steps.plan(encoded, arms, epochs, size, size // parts, seed, rows_multiple)
    return {arm: cut[: settings.max_steps or None] for arm, cut in planned.items()}


def schedule(settings: finetune_config.Finetune, total_steps: int) -> optax.Schedule:
    """Linear warm-up over ceil(warmup_ratio * total_steps) steps, then a cosine to 0 at
    `total_steps`.

    The warm-up begins at peak / (warm-up steps + 1), not at 0, so that no step is wasted.
    """
    warmup = min(math.ceil(settings.warmup_ratio * total_steps), total_steps - 1)
    peak = settings.learning_rate
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, total_steps)
    return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, total_steps)


def make_optimizer(
    settings: finetune_config.Finetune, total_steps: int
) -> optax.GradientTransformation:
    """AdamW on the schedule, after clipping by the global norm where clip_norm > 0."""
    adamw = optax.adamw(
        schedule(settings, total_steps),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=settings.weight_decay,
    )
    if settings.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)


def init_state(adapter, optimizer: optax.GradientTransformation) -> tuple[TrainState, Any]:
    """The state before the first step, and the adapter's leaves that stay as they are."""
    factors, frozen = trees.partition(adapter, lora.is_factor)
    return TrainState(jnp.zeros((), jnp.int32), factors, optimizer.init(factors)), frozen


def init_weights(params, pattern: str, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of training parameters themselves: float32 copies of them,
    since an update of 1e-4 vanishes in bfloat16.

    Args:
        pattern: finetune.parameters, `all` or a regex over parameter paths; UserError where it
            matches none.
    """
    names = trees.named_leaves(params).keys()
    if pattern != "all":
        names = trees.matching(names, pattern, "finetune.parameters")
    chosen, _ = trees.partition(params, names.__contains__)
    factors = jax.tree.map(lambda x: jnp.array(x, jnp.float32), chosen)
    return TrainState(jnp.zeros((), jnp.int32), factors, optimizer.init(factors))


def merge(params, factors, frozen):
    """The weights at a state, (parameters, adapter): a pure function.

    Args:
        frozen: the rest of the adapter; None where `factors` are parameters, which then replace the
            model's in its dtype.
    """
    if frozen is not None:
        return params, trees.combine(factors, frozen)
    cast = jax.tree.map(
        lambda new, old: old if new is None else new.astype(old.dtype),
        factors, params, is_leaf=lambda x: x is None,
    )  # fmt: skip
    return cast, None


def example_sums(cfg: model_config.DecoderConfig, settings: finetune_config.Finetune) -> Callable:
    """A function (params, factors, frozen, step, rows) -> sums over the rows' examples.

    It gives {"loss": () float32, "gradient": like factors, "examples": () float32}. Padding rows
    add 0. Dropout depends on (seed, step, a row's place in the step) and the layer only, so that
    neither microbatches nor devices change it.
    """

    def sums(params, factors, frozen, step, rows):
        def total(factors):
            weights, adapter = merge(params, factors, frozen)
            if settings.dropout > 0:
                key = jax.random.fold_in(split_key(settings.seed)[1], step)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.places)
                adapter = lora.with_dropout(adapter, keys, settings.dropout)
            return jnp.sum(
                loss.example_losses(weights, cfg, rows.batch, "mean", adapter, settings.remat)
            )

        value, gradient = jax.value_and_grad(total)(factors)
        examples = jnp.sum(~rows.batch.is_padding, dtype=jnp.float32)
        return {"loss": value, "gradient": gradient, "examples": examples}

    return sums


def split_key(seed: int):
    """The keys of the adapter's initial factors and of dropout."""
    return jax.random.split(jax.random.key(seed))


def make_train_step(
    cfg: model_config.DecoderConfig,
    settings: finetune_config.Finetune,
    optimizer: optax.GradientTransformation,
    placement: devices.Placement,
) -> Callable:
    """A function (params, frozen, state, microbatches of steps.Rows) -> (state, metrics).

    metrics are {"loss", "gradient_norm"}, () float32: of the whole step, before its update and
    before clipping. Nothing waits for the device.
    """
    return train_step_of(example_sums(cfg, settings), optimizer, placement)


def train_step_of(
    sums: Callable, optimizer: optax.GradientTransformation, placement: devices.Placement
) -> Callable:
    """As `make_train_step` for any `sums` of its form, compiled once for all train steps that are
    made of it: each further sum, divided by the examples, is a metric. `state` is used up: its
    moments' memory is taken for the new ones.
    """
    gradients = placement.compile(sums, rows=False)
    add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right))

    @functools.partial(jax.jit, donate_argnums=2)
    def update(step, factors, opt_state, sums):
        means = jax.tree.map(lambda x: x / sums["examples"], sums)
        change, opt_state = optimizer.update(means["gradient"], opt_state, factors)
        metrics = {k: x for k, x in means.items() if k not in ("gradient", "examples")}
        metrics["gradient_norm"] = jnp.sqrt(trees.vdot(means["gradient"], means["gradient"]))
        return TrainState(step + 1, optax.apply_updates(factors, change), opt_state), metrics

    def train_step(params, frozen, state, microbatches):
        factors = place_factors(params, state.factors, frozen, placement)
        fixed = placement.replicate((frozen, state.step))
        total = None
        for rows in microbatches:
            part = gradients(params, factors, *fixed, placement.batch(rows))
            total = part if total is None else add(total, part)
        return update(*_beside(total, factors, state, optimizer, placement))

    return train_step


def place_factors(params, factors, frozen, placement: devices.Placement):
    """The trained leaves on the devices: LoRA's factors on each, parameters by their rules."""
    if frozen is not None:
        return placement.replicate(factors)
    return placement.like(trees.partition_like(params, factors)[0], factors)


def _beside(sums, factors, state, optimizer, placement):
    """`update`'s arguments, each leaf and its moments where its gradient is wanted, and from the
    first step on where the last update left it, so that it compiles once.
    """
    everywhere = sums["examples"].sharding
    if placement.strategy == "pmap":
        where = jax.tree.map(lambda _: everywhere, state.factors)
    else:
        where = jax.tree.map(lambda x: x.sharding, factors)
    opt_state = optax.tree_map_params(
        optimizer, jax.device_put, state.opt_state, where,
        transform_non_params=lambda x: jax.device_put(x, everywhere),
    )  # fmt: skip
    sums = sums | {"gradient": jax.device_put(sums["gradient"], where)}
    placed = jax.device_put(state.factors, where)
    return jax.device_put(state.step, everywhere), placed, opt_state, sums
