"""One gradient for each example: vmap(grad), in microbatches, handed on before the next is made."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diq_jax.common import trees
from diq_jax.influence import direction


def gradients(chosen, rest, batch, cfg, reduction, remat=False):
    """Each example's gradient and loss.

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
    apply: Callable, space, batch, cfg, reduction, remat: bool, gradient_bytes: int, shards: int
):
    """apply(gradients of some rows) for all rows, a few at a time.

    Args:
        apply: maps a tree of leaves (b, ...) to an array (b, ...).
        gradient_bytes: of gradients held at once on a device.
        shards: devices that share the rows; each gets as many of every microbatch.

    Returns:
        (B, ...), and the losses (B,).
    """
    rows = batch.is_padding.shape[0] // shards
    most = max(1, gradient_bytes // (4 * trees.size(space[0])))
    size = max(b for b in range(1, rows + 1) if rows % b == 0 and b <= most)

    def step(part):
        found, losses = gradients(*space, part, cfg, reduction, remat)
        return apply(found), losses

    if size == rows:
        return step(batch)

    # Every (rows // size)-th row, so that a microbatch lies on the devices as the batch does.
    def split(x):
        return jnp.moveaxis(x.reshape(shards * size, rows // size, *x.shape[1:]), 1, 0)

    out = jax.lax.map(step, jax.tree.map(split, batch))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)
