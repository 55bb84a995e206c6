"""The layers, as functions of their parameters. Every matrix product of a layer goes through
`linear`.

Dims: B batch, T tokens, D model, H query heads, K kv heads, G = H // K, C head, R rank.
"""

import jax
import jax.numpy as jnp

from diq_jax.models import config

UNSEEN = -1e30  # added to a score: exp gives exactly 0; a position always sees itself
QUERY_BLOCK = 256  # queries of one attention block: scores are (B, H, QUERY_BLOCK, T) at most


def linear(params, x, adapter=None):
    """y = x W + b, plus a LoRA adapter's (x A) B * scale.

    Args:
        params: kernel (in, out), and bias (out,) where the family has one.
        x: (B, T, in).
        adapter: a (in, R), b (R, out), scale (); with dropout_keys (B,) and dropout_rate,
            inverted dropout on the adapter's input as PEFT applies it, drawn for each row by its
            own key: the same on any number of devices and in any microbatch.
    """
    y = x @ params["kernel"]
    if "bias" in params:
        y = y + _along_last(params["bias"], y)
    if adapter is not None:
        z = x
        if "dropout_keys" in adapter:
            keep = 1.0 - adapter["dropout_rate"]
            draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))
            kept = draw(adapter["dropout_keys"])
            z = jnp.where(kept, x / keep.astype(x.dtype), 0)
        low = z @ adapter["a"].astype(x.dtype)
        y = y + low @ adapter["b"].astype(x.dtype) * adapter["scale"].astype(x.dtype)
    return y


def rms_norm(params, x, eps):
    """Root-mean-square norm over the last axis, in float32 because squares of bfloat16 lose the
    mean.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * _along_last(params["scale"], x)


def layer_norm(params, x, eps):
    """Layer norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale, bias = _along_last(params["scale"], x), _along_last(params["bias"], x)
    return x32.astype(x.dtype) * scale + bias


def _along_last(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rope_frequencies(rope: config.Rope, head_dim: int):
    """Inverse frequencies, (C // 2,) float32, after the scaling that the checkpoint names."""
    settings = dict(rope.settings)
    inverse = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return inverse / settings["factor"]
    if rope.kind == "gguf_factors":
        return inverse / jnp.asarray(settings["factors"], jnp.float32)
    if rope.kind == "llama3":
        # Llama 3.1: wavelengths beyond the trained context are stretched by `factor`, short ones
        # are kept.
        context = settings["original_max_position_embeddings"]
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = context * inverse / (2 * jnp.pi)
        smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * inverse / settings["factor"] + smooth * inverse
    return inverse


def rotate(x, positions, frequencies):
    """Rotary embedding, half-split layout.

    Args:
        x: (B, T, heads, C).
        positions: (B, T) int32.
        frequencies: (C // 2,) float32; angles stay float32 since bfloat16 cannot count to 8192.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(q, k, v, segment_ids, causal, window=None, positions=None, parent_ids=None):
    """Softmax attention inside segments, in blocks of queries, so that no (T, T) array of all heads
    exists at once.

    A causal block reads only the keys up to its own end. Plain jnp, so that it can be
    differentiated in forward mode; in reverse mode each block is recomputed.

    Args:
        q: (B, T, H, C); k, v: (B, T, K, C); query head h reads kv head h // (H // K).
        segment_ids: (B, T) int32; a position sees its own segment only. Segment 0 is padding.
        causal: a query sees no key behind it in the array.
        window: how many positions back a query sees, itself included; None for all.
        positions: (B, T) int32, by which a window counts; only a window needs them.
        parent_ids: (B, T) int32, a second segment that a position sees, -1 for none: options that
            share one prompt have it as their parent. None where no position has a parent.

    Returns:
        (B, T, H * C).
    """
    B, T, H, C = q.shape
    K = k.shape[2]
    # Heads before tokens, and a kv head's queries as rows of one matrix: batched matrix products
    # run two to three times as fast on a CPU as with the heads inside.
    q = (q * C**-0.5).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def block(q, k, v, queries, keys, start):
        *heads, Q, _ = q.shape
        rows = q.reshape(B, K, -1, C)
        scores = jnp.einsum("bkqc,bksc->bkqs", rows, k, preferred_element_type=jnp.float32)
        key_segments = keys["segment_ids"][:, None, :]
        seen = queries["segment_ids"][:, :, None] == key_segments
        if parent_ids is not None:
            seen = seen | (queries["parent_ids"][:, :, None] == key_segments)
        if causal:
            index = start + jnp.arange(Q)[:, None]
            seen = seen & (jnp.arange(k.shape[2])[None, :] <= index)[None]
        if window is not None:
            distance = queries["positions"][:, :, None] - keys["positions"][:, None, :]
            seen = seen & (distance < window)
        hidden = jnp.where(seen, 0.0, UNSEEN)[:, None, None]
        scores = scores.reshape(*heads, Q, -1) + hidden
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkqs,bksc->bkqc", weights.reshape(*rows.shape[:3], -1), v)
        return out.reshape(*heads, Q, C)

    places = {"segment_ids": segment_ids}
    if window is not None:
        places["positions"] = positions
    if parent_ids is not None:
        places["parent_ids"] = parent_ids
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        end = stop if causal else T
        step = block if T <= QUERY_BLOCK else jax.checkpoint(block, static_argnums=(5,))
        queries = {name: ids[:, start:stop] for name, ids in places.items()}
        keys = {name: ids[:, :end] for name, ids in places.items()}
        outputs.append(
            step(q[:, :, :, start:stop], k[:, :, :end], v[:, :, :end], queries, keys, start)
        )
    out = jnp.concatenate(outputs, axis=3)  # (B, K, G, T, C)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H * C)
