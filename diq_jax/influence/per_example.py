"""One gradient for each example: vmap(grad), in microbatches, handed on to a projection."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import direction, problems
from diq_jax.models import config


def gradients(
    chosen: trees.Tree,
    rest: trees.Tree,
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
    remat: bool = False,
) -> tuple:
    """Gives each example's gradient and loss.

    Args:
        chosen, rest: a space (influence/direction.py).
        batch: data.batches.Batch of B rows, one example a row.

    Returns:
        A tree like `chosen` of leaves (B, ...) in its dtype, and (B,) float32; both are 0 on
        padding rows.
    """

    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        return jax.value_and_grad(
            lambda chosen: direction.losses(chosen, rest, row, cfg, reduction, remat)[0]
        )(chosen)

    losses, found = jax.vmap(one)(batch)
    return found, losses


def map_gradients(
    apply: Callable,
    space: direction.Space,
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
    settings: influence_config.Influence,
    shards: int,
) -> tuple:
    """Computes apply(gradients) for all rows: in microbatches, joined as gradient_bytes hold.

    A dense projection costs the same for one gradient as for a hundred.

    Args:
        apply: maps a tree of leaves (b, ...) to an array (b, ...).
        shards: devices that share the rows; each gets as many of every part.

    Returns:
        (B, ...), and the losses (B,).
    """
    rows = batch.tokens.shape[0] // shards
    held = _divisor(rows, settings.gradient_bytes // (4 * trees.size(space[0])))

    def some(part):
        return gradients(*space, part, cfg, reduction, settings.remat)

    def step(part):
        found, losses = in_microbatches(some, part, settings, shards)
        return apply(found), losses

    return _in_parts(step, batch, held, shards)


def in_microbatches(
    fn: Callable, batch: batches.Batch, settings: influence_config.Influence, shards: int
) -> Any:
    """Computes fn(batch), of outputs (B, ...), on as many rows as `microbatch_tokens` hold."""
    rows, tokens = batch.tokens.shape[0] // shards, batch.tokens.shape[1]
    return _in_parts(
        fn, batch, _divisor(rows, problems.microbatch_tokens(settings) // tokens), shards
    )


def _divisor(rows: int, most: int) -> int:
    """Returns the largest divisor of `rows` up to `most`, at least 1."""
    return max(b for b in range(1, rows + 1) if rows % b == 0 and b <= max(most, 1))


def _in_parts(fn, batch, size, shards):
    """Computes fn on `size` rows of each shard at a time, and joins its outputs (b, ...)."""
    rows = jax.tree.leaves(batch)[0].shape[0] // shards
    if size == rows:
        return fn(batch)

    # Every (rows // size)-th row, so that a part lies on the devices as the batch does.
    def split(x):
        return jnp.moveaxis(x.reshape(shards * size, rows // size, *x.shape[1:]), 1, 0)

    out = jax.lax.map(fn, jax.tree.map(split, batch))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)
