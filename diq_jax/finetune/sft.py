"""Supervised fine-tuning of LoRA factors: the gradient of a step and its update.

The loss of a step is the mean over its examples of each one's mean answer-token loss, which is the
loss that DIQ's influence is the derivative of. (A trainer that averages over the tokens of a batch
weighs long answers more.) Microbatches, padding and devices change nothing beyond float error:
everything is a sum over examples, divided once by their number.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from diq_jax.common import config, devices, trees
from diq_jax.data import steps
from diq_jax.models import config as model_config
from diq_jax.models import lora, loss


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds: `step` () int32, steps done; the trained leaves of the adapter (None
    at the others); optax's state.
    """

    step: Any
    factors: Any
    opt_state: Any


def plan(encoded, arms, settings: config.Finetune, rows_multiple: int):
    """All steps of each arm (data/steps.py) by finetune's settings."""
    size = settings.batch_size // settings.accumulation_steps
    return steps.plan(
        encoded, arms, settings.epochs, settings.batch_size, size, settings.seed, rows_multiple
    )


def schedule(settings: config.Finetune, total_steps: int) -> optax.Schedule:
    """Linear warm-up over ceil(warmup_ratio * total_steps) steps, then a cosine to 0 at
    `total_steps`.

    The warm-up begins at peak / (warm-up steps + 1), not at 0, so that no step is wasted.
    """
    warmup = min(math.ceil(settings.warmup_ratio * total_steps), total_steps - 1)
    peak = settings.learning_rate
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, total_steps)
    return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, total_steps)


def make_optimizer(settings: config.Finetune, total_steps: int) -> optax.GradientTransformation:
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


def example_sums(cfg: model_config.DecoderConfig, settings: config.Finetune) -> Callable:
    """A function (params, factors, frozen, step, rows) -> sums over the rows' examples.

    It gives {"loss": () float32, "gradient": like factors, "examples": () float32}. Padding rows
    add 0. Dropout depends on (seed, step, a row's place in the step) and the layer only, so that
    neither microbatches nor devices change it.
    """

    def sums(params, factors, frozen, step, rows):
        def total(factors):
            adapter = trees.combine(factors, frozen)
            if settings.dropout > 0:
                key = jax.random.fold_in(split_key(settings.seed)[1], step)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.places)
                adapter = lora.with_dropout(adapter, keys, settings.dropout)
            return jnp.sum(
                loss.example_losses(params, cfg, rows.batch, "mean", adapter, settings.remat)
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
    settings: config.Finetune,
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
    """As `make_train_step`, of one `example_sums`: jax compiles it once for all train steps that
    are made of it.
    """
    gradients = placement.compile(sums, rows=False)
    add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right))

    @jax.jit
    def update(state, sums):
        gradient = jax.tree.map(lambda g: g / sums["examples"], sums["gradient"])
        change, opt_state = optimizer.update(gradient, state.opt_state, state.factors)
        metrics = {
            "loss": sums["loss"] / sums["examples"],
            "gradient_norm": jnp.sqrt(trees.vdot(gradient, gradient)),
        }
        factors = optax.apply_updates(state.factors, change)
        return TrainState(state.step + 1, factors, opt_state), metrics

    def train_step(params, frozen, state, microbatches):
        replicated = placement.replicate((state.factors, frozen, state.step))
        sums = None
        for rows in microbatches:
            part = gradients(params, *replicated, placement.batch(rows))
            sums = part if sums is None else add(sums, part)
        # From the first step on the state lies where the sums do, so that `update` compiles once.
        return update(jax.device_put(state, sums["examples"].sharding), sums)

    return train_step
