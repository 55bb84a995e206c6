"""Supervised fine-tuning of LoRA factors: which examples form a step, its gradient, its update.

The loss of a step is the mean over its examples of each one's mean answer-token loss, which is the
loss that DIQ's influence is the derivative of. (A trainer that averages over the tokens of a batch
weighs long answers more.) Microbatches, padding and devices change nothing beyond float error:
everything is a sum over examples, divided once by their number.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax.common import config, devices, trees
from diq_jax.data import batches, example
from diq_jax.models import config as model_config
from diq_jax.models import lora, loss

# A compile costs about as much as this many microbatches gain from a tighter shape.
MICROBATCHES_PER_SHAPE, FEWEST_SHAPES, MOST_SHAPES = 50, 2, 8


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds: `step` () int32, steps done; the trained leaves of the adapter (None
    at the others); optax's state.
    """

    step: Any
    factors: Any
    opt_state: Any


@flax.struct.dataclass
class Rows:
    """A microbatch, and each row's place (B,) int32 in the step's examples, which its dropout is
    drawn from.
    """

    batch: batches.Batch
    places: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step: its epoch, from 0, and its microbatches as indices and shapes."""

    epoch: int
    groups: tuple[batches.Group, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(group.indices for group in self.groups))


def plan(
    encoded: Sequence[example.Encoded],
    arms: Mapping[str, Sequence[int]],
    settings: config.Finetune,
    rows_multiple: int,
) -> dict[str, list[Step]]:
    """All steps of each arm, with a few shapes that all arms share.

    An epoch's order is a permutation of the arm's examples, sorted by id, that depends on (seed,
    epoch) and the ids alone. Its last step may hold fewer examples. Inside a step, examples go to
    microbatches by length: that saves padding and leaves the sum as it is.

    Args:
        arms: {arm: indices into `encoded`}.
        rows_multiple: microbatches are padded to a multiple of so many rows.
    """
    lengths = np.array([len(e.input_ids) for e in encoded])
    answers = np.array([e.answer_tokens for e in encoded])
    size = settings.batch_size // settings.accumulation_steps
    rows = -(-size // rows_multiple) * rows_multiple

    cut = {
        arm: [
            (epoch, _split(sorted(batch, key=lambda i: lengths[i]), size))
            for epoch in range(settings.epochs)
            for batch in _split(_order(encoded, chosen, settings.seed, epoch), settings.batch_size)
        ]
        for arm, chosen in arms.items()
    }
    micro = [m for steps in cut.values() for _, parts in steps for m in parts]
    longest = [lengths[m].max() for m in micro]
    worth = len(micro) // MICROBATCHES_PER_SHAPE
    edges = batches.bucket_edges(longest, int(np.clip(worth, FEWEST_SHAPES, MOST_SHAPES)))
    most_answers = np.zeros(len(edges), int)
    np.maximum.at(most_answers, np.searchsorted(edges, longest), [answers[m].max() for m in micro])

    def group(indices):
        bucket = np.searchsorted(edges, lengths[indices].max())
        scored = -(-int(most_answers[bucket]) // batches.ANSWER_STEP) * batches.ANSWER_STEP
        return batches.Group(tuple(indices), rows, edges[bucket], min(scored, edges[bucket]))

    return {
        arm: [Step(epoch, tuple(map(group, parts))) for epoch, parts in steps]
        for arm, steps in cut.items()
    }


def _order(encoded, chosen, seed, epoch):
    by_id = sorted(chosen, key=lambda i: encoded[i].example_id)
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    return [by_id[i] for i in rng.permutation(len(by_id))]


def _split(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


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
    """A function (params, frozen, state, microbatches of Rows) -> (state, metrics).

    metrics are {"loss", "gradient_norm"}, () float32: of the whole step, before its update and
    before clipping. Nothing waits for the device.
    """
    gradients = placement.compile(example_sums(cfg, settings), rows=False)
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


def microbatches(encoded: Sequence[example.Encoded], step: Step) -> list[Rows]:
    """The numpy rows of a step."""
    out, start = [], 0
    for group in step.groups:
        chosen = [encoded[i] for i in group.indices]
        batch = batches.make_batch(chosen, group.rows, group.tokens, group.answers)
        out.append(Rows(batch, np.arange(start, start + group.rows, dtype=np.int32)))
        start += len(chosen)
    return out
