"""Example losses, with the vocabulary head on answer positions only, in blocks of them."""

import jax
import jax.numpy as jnp

from diq_jax import trees
from diq_jax.data import batches
from diq_jax.models import config, decoder
from diq_jax.run import sharding
from diq_jax.trees import Array

# Answer tokens of one block, of each data shard: logits are (HEAD_BLOCK, V) float32 there.
HEAD_BLOCK = 512


def token_losses(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    batch: batches.Batch,
    adapter: trees.Tree | None = None,
    remat: bool = False,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Computes the negative log-likelihood of each answer token, in nats.

    Args:
        batch: data.batches.Batch of B rows with A answer positions each.
        adapter, probe: nested like the parameters (models/lora.py, models/layers.py), or None.

    Returns:
        (B, A) float32, 0 where loss_mask is 0.
    """
    hidden = hidden_states(params, cfg, batch, adapter, remat, probe)
    return answer_losses(params, cfg, hidden, batch, probe)


def hidden_states(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    batch: batches.Batch,
    adapter: trees.Tree | None = None,
    remat: bool = False,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Runs a batch through the decoder: (B, T, D) after the final norm."""
    places = batch.tokens, batch.positions, batch.segment_ids
    return decoder.apply(params, cfg, *places, adapter, remat, batch.parent_ids, probe)


def at_answers(hidden: jax.Array, batch: batches.Batch) -> jax.Array:
    """Picks hidden states at answers, (B, T, D) -> (B, A, D); a row's stay on its device."""
    return jnp.take_along_axis(hidden, batch.loss_positions[..., None], axis=1)


def _with_gathered_head(params: trees.Tree, cfg: config.DecoderConfig) -> trees.Tree:
    """Returns the parameters with the head gathered along the data axis, once for all blocks."""
    if cfg.tied_head:
        table = sharding.pinned(params["embed"]["embedding"], "model", None)
        return params | {"embed": params["embed"] | {"embedding": table}}
    kernel = sharding.pinned(params["head"]["kernel"], None, "model")
    return params | {"head": params["head"] | {"kernel": kernel}}


def answer_losses(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    hidden: jax.Array,
    batch: batches.Batch,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Computes `token_losses` from hidden states (B, T, D) after the final norm."""
    params = _with_gathered_head(params, cfg)

    @jax.checkpoint
    def block(hidden_and_labels):
        hidden, labels = hidden_and_labels
        logits = decoder.logits(params, cfg, hidden, probe)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    hidden = at_answers(hidden, batch)
    B, A, _ = hidden.shape
    losses = jax.lax.map(block, (head_blocks(hidden), head_blocks(batch.loss_labels)))
    return jnp.moveaxis(losses, 0, 1).reshape(B, -1)[:, :A] * batch.loss_mask


def top_scores(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    batch: batches.Batch,
    top: int,
    adapter: trees.Tree | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes for each scored token its negative log-likelihood, and the likeliest tokens there.

    Returns:
        (B, A) float32 in nats, 0 at padding; (B, A, top) int32, the likeliest first, of equals that
        with the lower id; (B, A, top) float32, their log-likelihoods.
    """
    hidden = at_answers(hidden_states(params, cfg, batch, adapter), batch)
    B, A, _ = hidden.shape

    def block(hidden_and_labels):
        hidden, labels = hidden_and_labels
        scores = jax.nn.log_softmax(decoder.logits(params, cfg, hidden), axis=-1)
        chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
        values, ids = jax.lax.top_k(scores, top)
        return -chosen, ids, values

    found = jax.lax.map(block, (head_blocks(hidden), head_blocks(batch.loss_labels)))
    losses, ids, values = (jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :A] for x in found)
    return losses * batch.loss_mask, ids, values


def head_blocks(x: Array) -> jax.Array:
    """Splits (B, A, ...) into what the head takes at a time, padded: (blocks, B, size, ...)."""
    B, A = x.shape[:2]
    # One row is a row of each shard, in a function that is mapped over rows.
    rows = max(1, B // sharding.devices_along("data"))
    size = min(A, max(1, HEAD_BLOCK // rows))
    blocks = -(-A // size)
    x = jnp.pad(x, ((0, 0), (0, blocks * size - A)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, blocks, size, *x.shape[2:]), 1, 0)


def token_weights(batch: batches.Batch, reduction: str) -> Array:
    """Returns an answer token's weight, (B, A) float32: 1, or 1 / tokens with `mean`; padding 0."""
    if reduction == "sum":
        return batch.loss_mask
    count = by_example(batch.loss_mask, batch)
    if batch.loss_examples is None:
        count = count[:, None]
    else:
        count = jnp.take_along_axis(count, batch.loss_examples, axis=1)
    return batch.loss_mask / jnp.maximum(count, 1.0)


def by_example(values: Array, batch: batches.Batch) -> jax.Array:
    """Sums (B, A) over each example's answer tokens: (B,), or (B, S) of a packed batch."""
    if batch.loss_examples is None:
        return jnp.sum(values, axis=1)
    member = batch.loss_examples[..., None] == jnp.arange(batch.is_padding.shape[1])[None, None, :]
    return jnp.einsum("ba,bas->bs", values, member.astype(values.dtype))


def example_losses(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    batch: batches.Batch,
    reduction: str,
    adapter: trees.Tree | None = None,
    remat: bool = False,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Computes each example's loss in nats: `mean` of its answer tokens (DIQ, trainers) or `sum`.

    Returns:
        (B,) float32, or (B, S) of a packed batch. An example without answer tokens has loss 0 and
        gradient 0.
    """
    values = token_losses(params, cfg, batch, adapter, remat, probe)
    return by_example(values * token_weights(batch, reduction), batch)
