"""The exact engine: forward mode. One jvp along v gives <g(z), v> for every example of a batch.

No example's gradient is ever formed, nothing is projected or stored. The cost is about three
forward passes for all parameters; the memory is that of a forward pass plus v.
"""

import jax
import jax.numpy as jnp

from diq_jax.influence import direction


def scores(chosen, v, rest, batch, cfg, reduction):
    """Influence and loss of each example of a batch.

    Args:
        chosen, rest: a space (influence/direction.py).
        v: the direction, nested like `chosen`, in any float dtype.
        batch: data.batches.Batch of B rows.

    Returns:
        (influence (B,), loss (B,)), float32; exactly 0 on padding rows.
    """
    # A tangent must have its primal's dtype: in bfloat16 the direction is rounded here and only
    # here.
    v = jax.tree.map(lambda p, t: t.astype(p.dtype), chosen, v)
    value, tangent = jax.jvp(
        lambda chosen: direction.losses(chosen, rest, batch, cfg, reduction), (chosen,), (v,)
    )
    return tangent.astype(jnp.float32), value
