"""AdamW on a part of the pool before gradients are taken: checkpoints with Adam's moments.

Influence may be summed over the checkpoints of such a run, each by its learning rate (TracIn, and
LESS, arXiv 2402.04333), and Adam's moments make a direction or LESS's own features of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from diq_jax import errors, influence_config, trees
from diq_jax.data import example, steps
from diq_jax.influence import direction
from diq_jax.run import artifacts, devices, progress

B1, B2, EPS = 0.9, 0.999, 1e-8  # Adam's
WARMUP_RATIO = 0.03  # of the steps


@flax.struct.dataclass
class Checkpoint:
    """A point at which gradients are taken: float32 trees like `chosen`, without a device axis.

    Attributes:
        chosen: the trained leaves.
        first, second: Adam's running means of g and g^2, not corrected for their start at zero.
        count: () int32, steps done.
    """

    chosen: Any
    first: Any
    second: Any
    count: Any


def run(
    space,
    pool: Sequence[example.Encoded],
    settings: influence_config.Influence,
    cfg,
    placement: devices.Placement,
    folder,
) -> list[tuple[Checkpoint, float]]:
    """Trains and gives each epoch's end with its mean learning rate as a share of all.

    An epoch is kept in `folder` as it ends: a killed run continues with the next one.

    Raises:
        UserError: an epoch leaves parameters that are not finite.
    """
    warm = settings.warmup
    chosen = placement.single(space[0])
    state = Checkpoint(
        jax.tree.map(lambda x: x.astype(jnp.float32), chosen),
        *(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chosen) for _ in range(2)),
        jnp.zeros((), jnp.int32),
    )
    planned = _plan(pool, settings, placement.rows_multiple)
    rates = [schedule(warm, len(planned))(k) for k in range(len(planned))]
    train_step = make_step(space, settings, cfg, placement, len(planned))
    made, shares = [], []
    total = sum(len(step.indices) for step in planned)
    with progress.Progress("warm-up", total) as bar:
        for epoch in range(warm.epochs):
            file = folder / f"epoch-{epoch + 1}.safetensors"
            of_epoch = [k for k, step in enumerate(planned) if step.epoch == epoch]
            if file.exists():
                state = _read(file, state)
            else:
                for k in of_epoch:
                    state, loss = train_step(state, steps.microbatches(pool, planned[k]))
                    tokens = sum(len(pool[i].input_ids) for i in planned[k].indices)
                    bar.update(len(planned[k].indices), tokens, loss=f"{float(loss):.3f}")
                if bad := trees.not_finite(state.chosen):
                    raise errors.UserError(
                        f"The warm-up has parameters that are not finite after epoch {epoch + 1} "
                        f"({bad[0]}): try a lower influence.warmup.learning_rate, or "
                        "model.dtype=float32."
                    )
                _write(file, state)
            made.append(state)
            shares.append(float(np.mean([rates[k] for k in of_epoch])))
    return [(state, share / sum(shares)) for state, share in zip(made, shares, strict=True)]


def schedule(settings: influence_config.Warmup, total_steps: int) -> optax.Schedule:
    """Linear warm-up from the peak / (warm-up steps + 1), then linear to 0 after the last step."""
    rising = math.ceil(WARMUP_RATIO * total_steps)
    peak = settings.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / (rising + 1), peak, rising),
            optax.linear_schedule(peak, 0.0, total_steps - rising),
        ],
        [rising],
    )


def make_step(space, settings, cfg, placement, total_steps):
    """A function (state, microbatches) -> (state, mean loss)."""
    rest = space[1]
    dtypes = jax.tree.map(lambda x: x.dtype, space[0])
    adam = optax.scale_by_adam(B1, B2, EPS)
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
        return Checkpoint(chosen, after.mu, after.nu, after.count), sums["loss"] / sums["examples"]

    def train_step(state, microbatches):
        chosen = placement.like(space[0], jax.tree.map(jnp.astype, state.chosen, dtypes))
        total = None
        for rows in microbatches:
            part = gradients(chosen, rest, placement.batch(rows.batch))
            total = part if total is None else add(total, part)
        everywhere = total["examples"].sharding
        return update(jax.tree.map(lambda x: devices.put(x, everywhere), state), total)

    return train_step


def adam_direction(v, checkpoint: Checkpoint):
    """v / (sqrt(second moment) + eps), the moment corrected for its start at zero, as Adam divides.

    Where the moment is 0 the run has never seen a gradient and the direction is 0 (else a row of
    the embedding that no warm-up example reads would outweigh everything).
    """
    correction = 1 - B2 ** checkpoint.count.astype(jnp.float32)

    def divide(g, second):
        return jnp.where(second > 0, g / (jnp.sqrt(second / correction) + EPS), 0.0)

    return jax.tree.map(divide, v, checkpoint.second)


def less_features(gradients, first, second):
    """LESS's form of examples' gradients: the Adam update that each alone would make.

    The gradient enters both moments; as LESS has it, nothing is corrected for the start at zero and
    eps stands inside the root.

    Args:
        gradients: leaves (b, ...); first, second: a checkpoint's, leaves (...).
    """

    def update(g, m, s):
        g = g.astype(jnp.float32)
        return (B1 * m[None] + (1 - B1) * g) / jnp.sqrt(B2 * s[None] + (1 - B2) * g * g + EPS)

    return jax.tree.map(update, gradients, first, second)


def _plan(pool, settings, rows_multiple):
    warm = settings.warmup
    drawn = example.draw(pool, max(1, round(warm.fraction * len(pool))), warm.seed)
    longest = max(len(pool[i].input_ids) for i in drawn)
    size = max(1, min(warm.batch_size, settings.batch_tokens // longest))
    planned = steps.plan(
        pool, {"warmup": drawn}, warm.epochs, warm.batch_size, size, warm.seed, rows_multiple
    )
    return planned["warmup"]


def _write(file, state):
    tensors = {k: devices.whole(x) for k, x in trees.named_leaves(_fields(state)).items()}
    with artifacts.atomic(file) as temporary:
        safetensors.numpy.save_file(tensors, temporary)


def _read(file, like):
    tensors = safetensors.numpy.load_file(file)
    return Checkpoint(**trees.map_named(lambda name, _: jnp.asarray(tensors[name]), _fields(like)))


def _fields(state):
    return {name: getattr(state, name) for name in ("chosen", "first", "second", "count")}
