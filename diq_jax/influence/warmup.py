"""AdamW on a part of the pool before gradients are taken: checkpoints with Adam's moments.

Influence may be summed over the checkpoints of such a run, each by its learning rate (TracIn, and
LESS, arXiv 2402.04333), and Adam's moments make a direction or LESS's own features of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax import errors, influence_config, trees
from diq_jax.data import example, steps
from diq_jax.influence import direction, problems
from diq_jax.run import devices, progress

WARMUP_RATIO = 0.03  # of the steps
FIELDS = ("chosen", "first", "second", "count")


class Epochs(Protocol):
    """Keeps the arrays of each epoch, {path: array}, by its number from 1; a dict is one."""

    def __contains__(self, epoch: int, /) -> bool: ...

    def __getitem__(self, epoch: int, /) -> dict[str, np.ndarray]: ...

    def __setitem__(self, epoch: int, arrays: dict[str, np.ndarray], /) -> None: ...


def run(
    problem: problems.Problem, space: direction.Space, epochs: Epochs
) -> list[tuple[direction.Checkpoint, float]]:
    """Trains and gives each epoch's end with its mean learning rate as a share of all.

    Args:
        epochs: those that are done; each is added as it ends, so that a killed run continues with
            the next one.

    Raises:
        UserError: an epoch leaves parameters that are not finite.
    """
    settings, pool, placement = problem.settings, problem.pool, problem.placement
    chosen = placement.single(space[0])
    state = direction.Checkpoint(
        jax.tree.map(lambda x: x.astype(jnp.float32), chosen),
        *(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chosen) for _ in range(2)),
        jnp.zeros((), jnp.int32),
    )
    planned = plan(pool, settings, placement.rows_multiple)
    rates = [schedule(settings.warmup, len(planned))(k) for k in range(len(planned))]
    train_step = make_step(space, settings, problem.model.cfg, placement, len(planned))
    made, shares = [], []
    total = sum(len(step.indices) for step in planned)
    with progress.Progress("warm-up", total) as bar:
        for epoch in range(1, settings.warmup.epochs + 1):
            of_epoch = [k for k, step in enumerate(planned) if step.epoch == epoch - 1]
            if epoch in epochs:
                state = _from_arrays(epochs[epoch], state)
            else:
                for k in of_epoch:
                    state, loss = train_step(state, steps.microbatches(pool, planned[k]))
                    tokens = sum(len(pool[i].input_ids) for i in planned[k].indices)
                    bar.update(len(planned[k].indices), tokens, loss=f"{float(loss):.3f}")
                if bad := trees.not_finite(state.chosen):
                    raise errors.UserError(
                        f"The warm-up has parameters that are not finite after epoch {epoch} "
                        f"({bad[0]}): try a lower influence.warmup.learning_rate, or "
                        "model.dtype=float32."
                    )
                epochs[epoch] = _to_arrays(state)
            made.append(state)
            shares.append(float(np.mean([rates[k] for k in of_epoch])))
    return [(state, share / sum(shares)) for state, share in zip(made, shares, strict=True)]


def schedule(settings: influence_config.Warmup, total_steps: int) -> optax.Schedule:
    """Rises linearly from the peak / (warm-up steps + 1), then falls to 0 after the last step."""
    rising = math.ceil(WARMUP_RATIO * total_steps)
    peak = settings.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / (rising + 1), peak, rising),
            optax.linear_schedule(peak, 0.0, total_steps - rising),
        ],
        [rising],
    )


def make_step(
    space: direction.Space,
    settings: influence_config.Influence,
    cfg,
    placement: devices.Placement,
    total_steps: int,
) -> Callable:
    """Compiles a function (state, microbatches) -> (state, mean loss)."""
    rest = space[1]
    dtypes = jax.tree.map(lambda x: x.dtype, space[0])
    adam = optax.scale_by_adam(direction.B1, direction.B2, direction.EPS)
    rate = schedule(settings.warmup, total_steps)

    def sums(chosen, rest, batch):
        def total(chosen):
            losses = direction.losses(
                chosen, rest, batch, cfg, settings.loss_reduction, settings.remat
            )
            return jnp.sum(losses)

        value, gradient = jax.value_and_grad(total)(chosen)
        examples = jnp.sum(~batch.is_padding, dtype=jnp.float32)
        return {"loss": value, "gradient": gradient, "examples": examples}

    gradients = placement.compile(sums, rows=False)
    add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right))

    @jax.jit
    def update(state, sums):
        gradient = jax.tree.map(
            lambda g: g.astype(jnp.float32) / sums["examples"], sums["gradient"]
        )
        before = optax.ScaleByAdamState(state.count, state.first, state.second)
        change, after = adam.update(gradient, before)
        eta = rate(state.count)
        chosen = jax.tree.map(lambda p, c: p - eta * c, state.chosen, change)
        return direction.Checkpoint(chosen, after.mu, after.nu, after.count), sums["loss"] / sums[
            "examples"
        ]

    def train_step(state, microbatches):
        chosen = placement.like(space[0], jax.tree.map(jnp.astype, state.chosen, dtypes))
        total = None
        for rows in microbatches:
            part = gradients(chosen, rest, placement.batch(rows.batch))
            total = part if total is None else add(total, part)
        everywhere = total["examples"].sharding
        return update(jax.tree.map(lambda x: devices.put(x, everywhere), state), total)

    return train_step


def plan(
    pool: Sequence[example.Encoded], settings: influence_config.Influence, rows_multiple: int
) -> list[steps.Step]:
    """Returns the steps of all epochs over the part of the pool that the seed draws."""
    warm = settings.warmup
    drawn = example.draw(pool, max(1, round(warm.fraction * len(pool))), warm.seed)
    longest = max(len(pool[i].input_ids) for i in drawn)
    size = max(1, min(warm.batch_size, settings.batch_tokens // longest))
    planned = steps.plan(
        pool, {"warmup": drawn}, warm.epochs, warm.batch_size, size, warm.seed, rows_multiple
    )
    return planned["warmup"]


def _to_arrays(state: direction.Checkpoint) -> dict[str, np.ndarray]:
    fields = {name: getattr(state, name) for name in FIELDS}
    return {name: devices.whole(x) for name, x in trees.named_leaves(fields).items()}


def _from_arrays(arrays, like: direction.Checkpoint) -> direction.Checkpoint:
    fields = {name: getattr(like, name) for name in FIELDS}
    return direction.Checkpoint(**trees.map_named(lambda k, _: jnp.asarray(arrays[k]), fields))
