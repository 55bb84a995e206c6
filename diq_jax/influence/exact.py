"""The exact engine: forward mode. One jvp along v gives <g(z), v> for every example of a batch.

No example's gradient is ever formed, nothing is projected or stored. Along a whole direction the
cost is about three forward passes for all parameters; along one of low rank, about two. Several
directions share one primal pass.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from diq_jax import trees
from diq_jax.data import batches
from diq_jax.influence import direction
from diq_jax.models import config, loss


@flax.struct.dataclass
class BatchScores:
    """Holds what the engine gives for a batch, float32; exactly 0 on padding.

    Attributes:
        influence: (B, Q), or (B, S, Q) of a packed batch.
        loss: (B,) or (B, S).
        tokens: (B, A), each answer token's share of the mean direction's influence, or None.
    """

    influence: jax.Array
    loss: jax.Array
    tokens: jax.Array | None = None


def scores(
    chosen: trees.Tree,
    v: direction.Direction,
    rest: trees.Tree,
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
    per_token: bool = False,
) -> BatchScores:
    """Computes influence and loss of each example of a batch.

    Args:
        chosen, rest: a space (influence/direction.py).
        v: Q directions in that space, in any float dtype.
        batch: data.batches.Batch of B rows.
        per_token: also give each answer token's share; the shares sum to the influence.
    """
    # Whole leaves move along themselves; a matrix in two factors moves by their scale.
    moved, still = trees.partition_like(chosen, v.whole)
    scales = {name: jnp.zeros(f["a"].shape[1:-2], jnp.float32) for name, f in v.factors.items()}

    def along(v):
        def token_losses(moved, scales):
            both = trees.combine(trees.combine(moved, still), rest)
            probe = direction.as_probe(v.factors, scales)
            return loss.token_losses(both["params"], cfg, batch, both["adapter"], probe=probe)

        # A tangent must have its primal's dtype: in bfloat16 the direction is rounded here and
        # only here.
        whole = jax.tree.map(lambda p, t: t.astype(p.dtype), moved, v.whole)
        ones = jax.tree.map(jnp.ones_like, scales)
        return jax.jvp(token_losses, (moved, scales), (whole, ones))

    if v.weights.size == 1:  # vmap over one costs a quarter more time and memory
        values, tangents = along(jax.tree.map(lambda x: x[0], v))
        tangents = tangents[None]
    else:
        # Only tangents differ between directions, so that the primal pass is made once.
        axes = dataclasses.replace(v, whole=0, factors=0, weights=None)
        values, tangents = jax.vmap(along, (axes,), (None, 0))(v)
    weights = loss.token_weights(batch, reduction)
    tangents = tangents.astype(jnp.float32) * weights[None]
    return BatchScores(
        jnp.moveaxis(jax.vmap(lambda t: loss.by_example(t, batch))(tangents), 0, -1),
        loss.by_example(values * weights, batch),
        jnp.einsum("q,qba->ba", v.weights, tangents) if per_token else None,
    )
