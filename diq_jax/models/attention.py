"""Softmax attention in blocks of queries, and of one query to several arrays of keys.

Dims: B batch, T tokens, H query heads, K kv heads, G = H // K, C head.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax.models import config, rope
from diq_jax.trees import Array, Tree

UNSEEN = -1e30  # added to a score: exp gives exactly 0; a position always sees itself
QUERY_BLOCK = 256  # queries of one attention block: scores are (B, H, QUERY_BLOCK, T) at most
# Attention over more blocks is so many loops over them: each reads the keys up to its own end. One
# loop would read all keys for every block; none would be a program that grows with the tokens.
STRIPS = 8


def places(cfg: config.DecoderConfig) -> tuple[Tree, Tree]:
    """Returns how layers look and rotate, {window, frequencies, amplitude}, stacked if unlike."""
    dim = cfg.rotary_dim or cfg.head_dim

    def turn(r):
        return {"frequencies": rope.frequencies(r, dim), "amplitude": rope.amplitude(r)}

    alike = {"window": cfg.sliding_window, **turn(cfg.rope)}
    slides = cfg.sliding_layers or (cfg.sliding_window is not None,) * cfg.num_layers
    apart = {}
    if cfg.sliding_layers is not None and cfg.sliding_window is not None:
        apart["window"] = jnp.where(jnp.array(slides), cfg.sliding_window, jnp.int32(2**31 - 1))
    if cfg.sliding_rope is not None:
        own = turn(cfg.sliding_rope)
        by_layer = [own if slide else alike for slide in slides]
        apart |= {name: jnp.stack([jnp.asarray(x[name]) for x in by_layer]) for name in own}
    if cfg.rotated_layers is not None:
        rotated = jnp.array(cfg.rotated_layers, jnp.float32)
        apart["frequencies"] = rotated[:, None] * alike["frequencies"][None]
    return alike, apart


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: Array,
    causal: bool,
    window: int | None = None,
    positions: Array | None = None,
    parent_ids: Array | None = None,
) -> jax.Array:
    """Computes softmax attention inside segments, in blocks of queries: never (T, T) of all heads.

    Where it is causal, blocks read only the keys up to the end of their strip. Plain jnp, so that
    it can be differentiated in forward mode; in reverse mode each block is recomputed.

    Args:
        q: (B, T, H, C); k, v: (B, T, K, C); query head h reads kv head h // (H // K).
        segment_ids: (B, T) int32; a position sees its own segment only. Segment 0 is padding.
        causal: a query sees no key behind it in the array.
        window: positions back that a query sees, itself included, and ahead where not causal.
        positions: (B, T) int32, by which a window counts; only a window needs them.
        parent_ids: (B, T) int32, a second segment that a position sees, -1 for none: options that
            share one prompt have it as their parent. None where no position has a parent.

    Returns:
        (B, T, H * C).
    """
    (B, T, H, C), K = q.shape, k.shape[2]
    # Heads before tokens, a kv head's queries as one matrix: 2 to 3 times as fast on a CPU.
    q = (q * C**-0.5).transpose(0, 2, 1, 3).reshape(B, K, H // K, T, C)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def block(q, k, v, queries, keys, start):
        # Places are told again for each head of a group: laid out as the scores are, the mask is
        # made where it is added, and on TPUs not written out for all heads.
        rows = q.reshape(B, K, -1, C)
        scores = jnp.einsum("bkqc,bksc->bkqs", rows, k, preferred_element_type=jnp.float32)
        queries = {name: jnp.tile(ids, (1, H // K)) for name, ids in queries.items()}
        index = jnp.tile(start + jnp.arange(q.shape[3]), H // K) if causal else None
        seen = _seen(queries, keys, index, window)
        hidden = jnp.where(seen, 0.0, UNSEEN)[:, None]
        weights = jax.nn.softmax(scores + hidden, axis=-1).astype(v.dtype)
        return jnp.einsum("bkqs,bksc->bkqc", weights, v).reshape(q.shape)

    places = {"segment_ids": segment_ids, "parent_ids": parent_ids}
    places |= {"positions": None if window is None else positions}
    places = {name: ids for name, ids in places.items() if ids is not None}

    def strip(start, stop):
        end = stop if causal else T
        queries = {name: ids[:, start:stop] for name, ids in places.items()}
        keys = {name: ids[:, :end] for name, ids in places.items()}
        parts = q[:, :, :, start:stop], k[:, :, :end], v[:, :, :end], queries, keys, start
        if stop - start > QUERY_BLOCK:
            return _loop(block, *parts)
        step = block if T <= QUERY_BLOCK else jax.checkpoint(block, static_argnums=(5,))
        return step(*parts)

    out = jnp.concatenate([strip(*ends) for ends in _strips(T)], axis=3)  # (B, K, G, T, C)
    return out.reshape(B, H, T, C).transpose(0, 2, 1, 3).reshape(B, T, H * C)


def _strips(T):
    """Yields (start, stop) of what attention takes at a time: a block, or as many as are a loop."""
    blocks = T // QUERY_BLOCK
    size = QUERY_BLOCK * max(1, -(-blocks // STRIPS))
    whole = blocks * QUERY_BLOCK
    for start in range(0, whole, size):
        yield start, min(start + size, whole)
    if whole < T:
        yield whole, T


def _loop(block, q, k, v, queries, keys, start):
    """Runs `attend`'s block over a strip of several."""
    count = q.shape[3] // QUERY_BLOCK

    def split(x, axis):
        x = x.reshape(*x.shape[:axis], count, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def one(_, part):
        q, queries, start = part
        again = jax.checkpoint(block, prevent_cse=False)  # a scan needs no barrier
        return None, again(q, k, v, queries, keys, start)

    starts = start + QUERY_BLOCK * jnp.arange(count)
    parts = split(q, 3), {name: split(ids, 1) for name, ids in queries.items()}, starts
    _, out = jax.lax.scan(one, None, parts)
    return jnp.moveaxis(out, 0, 3).reshape(q.shape)


def _seen(queries, keys, index, window):
    """Marks which keys each query sees, (B, Q, S) bool, by the places of both; see `attend`.

    Args:
        index: the places (Q,) of the queries among the keys where none sees a later one, else None.
    """
    key_segments = keys["segment_ids"][:, None, :]
    seen = queries["segment_ids"][:, :, None] == key_segments
    if "parent_ids" in queries:
        seen = seen | (queries["parent_ids"][:, :, None] == key_segments)
    if index is not None:
        seen = seen & (jnp.arange(keys["segment_ids"].shape[1])[None] <= index[:, None])[None]
    if window is not None:
        distance = queries["positions"][:, :, None] - keys["positions"][:, None, :]
        distance = distance if index is not None else jnp.abs(distance)
        seen = seen & (distance < window)
    return seen


def attend_to_parts(
    q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]]
) -> jax.Array:
    """Computes softmax attention of one query a row, to keys that lie in several arrays.

    Args:
        q: (B, 1, H, C).
        parts: (k (B, K, S, C), v (B, K, S, C), seen (B, S) bool) of each, S its own.

    Returns:
        (B, 1, H * C).
    """
    B, _, H, C = q.shape
    K = parts[0][0].shape[1]
    q = (q * C**-0.5).reshape(B, K, H // K, C)
    scores = []
    for k, _, seen in parts:
        score = jnp.einsum("bkgc,bksc->bkgs", q, k, preferred_element_type=jnp.float32)
        scores.append(score + jnp.where(seen, 0.0, UNSEEN)[:, None, None])
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    ends = np.cumsum([k.shape[2] for k, _, _ in parts])[:-1]
    weights = jnp.split(weights, ends, axis=-1)
    read = (
        jnp.einsum("bkgs,bksc->bkgc", w, v) for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    return functools.reduce(jnp.add, read).reshape(B, 1, H * C)
