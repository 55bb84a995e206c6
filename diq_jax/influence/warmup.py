"""AdamW on a part of the pool before gradients are taken: checkpoints with Adam's moments.

Influence may be summed over the checkpoints of such a run, each by its learning rate (TracIn, and
LESS, arXiv 2402.04333), and Adam's moments make a direction or LESS's own features of it.
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax import influence_config, trees
from diq_jax.data import example, steps
from diq_jax.influence import direction, problems
from diq_jax.models import loop, training
from diq_jax.run import parts, sharding

WARMUP_RATIO = 0.03  # of the steps
FIELDS = ("chosen", "first", "second", "count")


class Epochs(Protocol):
    """Keeps the arrays of each epoch, {path: array}, by its number from 1."""

    @property
    def folder(self) -> pathlib.Path | None:
        """Returns where the train state of an epoch under way goes; None = nowhere."""

    def get(self, epoch: int, /) -> dict[str, np.ndarray] | None:
        """Returns what `add` kept of an epoch; None if nothing."""

    def __setitem__(self, epoch: int, arrays: dict[str, np.ndarray], /) -> None: ...


class EpochMemory(dict[int, dict[str, np.ndarray]]):
    """Keeps epochs that no later call continues, as `Epochs` does."""

    folder = None


def run(
    problem: problems.Problem,
    space: direction.Space,
    epochs: Epochs,
    field: str = "influence.warmup",
) -> list[tuple[direction.Point, float]]:
    """Trains and gives each epoch's end with its mean learning rate as a share of all.

    Args:
        epochs: those that are done; each is added as it ends, so that a killed run continues with
            the next one. Where SIGTERM comes, it continues after the last step.
        field: the section of the settings, for messages.

    Raises:
        UserError: a loss is not finite, or an epoch leaves parameters that are not.
    """
    settings, pool, placement = problem.settings, problem.pool, problem.placement
    planned = plan(pool, settings, placement.rows_multiple)
    warm = settings.warmup
    rising = math.ceil(WARMUP_RATIO * len(planned))
    rates = training.learning_rates(warm.learning_rate, len(planned), rising, "linear")
    train_step, state = make_step(problem, space)
    examples = [(row.example_id, len(row.input_ids)) for row in pool]
    advice = f"Try a lower {field}.learning_rate, or model.dtype=float32."
    made, shares = [], []
    for epoch in range(1, warm.epochs + 1):
        first, *_ = of_epoch = [k for k, step in enumerate(planned) if step.epoch == epoch - 1]

        def take(state, number, first=first):
            rows = [part.batch for part in steps.microbatches(pool, planned[first + number])]
            return train_step(space[1], None, state, rows, rates[first + number], None)

        folder = epochs.folder and epochs.folder / f"state-{epoch}"
        arrays = epochs.get(epoch)
        if arrays is None:
            state, _, _ = loop.train(
                f"{field}, epoch {epoch},", [planned[k].indices for k in of_epoch], examples, state,
                None, take, loop.Upkeep(folder, advice=advice),
            )  # fmt: skip
            epochs[epoch] = arrays = _to_arrays(state)
        if folder:
            parts.drop(folder)
        point = _checkpoint(arrays, state.factors)
        state = _state(point)
        made.append(point)
        shares.append(float(np.mean([rates[k] for k in of_epoch])))
    return [(point, share / sum(shares)) for point, share in zip(made, shares, strict=True)]


def make_step(
    problem: problems.Problem, space: direction.Space
) -> tuple[Callable, training.TrainState]:
    """Compiles the step of training (training.make_train_step), and gives the state before it."""
    settings, placement = problem.settings, problem.placement
    dtypes = jax.tree.map(lambda x: x.dtype, space[0])

    def sums(rest, chosen, frozen, key, batch):
        def total(chosen):
            losses = direction.losses(
                chosen, rest, batch, problem.model.cfg, settings.loss_reduction, settings.remat
            )
            return jnp.sum(losses)

        value, gradient = jax.value_and_grad(total)(chosen)
        examples = jnp.sum(~batch.is_padding, dtype=jnp.float32)
        return {"loss": value, "gradient": sharding.stored(gradient), "examples": examples}

    def place(rest, chosen, frozen):
        return placement.like(space[0], jax.tree.map(jnp.astype, chosen, dtypes))

    optimizer = training.adamw()
    step = training.make_train_step(sums, optimizer, placement, place)
    # Copies, as the first step uses them up.
    start = jax.tree.map(lambda x: jnp.array(x, jnp.float32), placement.single(space[0]))
    return step, training.TrainState(start, optimizer.init(start))


def plan(
    pool: Sequence[example.Encoded], settings: influence_config.Influence, rows_multiple: int
) -> list[steps.Step]:
    """Returns the steps of all epochs over the part of the pool that the seed draws."""
    warm = settings.warmup
    drawn = example.draw(pool, max(1, round(warm.fraction * len(pool))), warm.seed)
    longest = max(len(pool[i].input_ids) for i in drawn)
    most = max(1, settings.batch_tokens // longest) * rows_multiple
    size = min(warm.batch_size, most)
    planned = steps.plan(
        pool, {"warmup": drawn}, warm.epochs, warm.batch_size, size, warm.seed, rows_multiple
    )
    return planned["warmup"]


def _to_arrays(state):
    moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu", "count")]
    fields = dict(zip(FIELDS, [state.factors, *moments], strict=True))
    return {name: sharding.whole(x) for name, x in trees.named_leaves(fields).items()}


def _checkpoint(arrays, like):
    fields = {"chosen": like, "first": like, "second": like, "count": 0}
    return direction.Point(**trees.map_named(lambda k, _: jnp.asarray(arrays[k]), fields))


def _state(point):
    """Returns the state of training at a checkpoint, which the next step may use up."""
    point = jax.tree.map(jnp.copy, point)
    fresh = training.adamw().init(point.chosen)
    moments = {"mu": point.first, "nu": point.second, "count": point.count}
    return training.TrainState(point.chosen, optax.tree.set(fresh, **moments))
