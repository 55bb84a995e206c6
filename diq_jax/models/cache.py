"""Generation on the devices: rows of prompts that are read at once and continued token by token.

A state has B rows of S columns: the prompt, left-padded, up to column P, then what is generated.
Every row stands at its own place, so that a finished one can be given another prompt while the
others go on; what a row computes depends on P, S and its own tokens only.

Dims: N layers, B rows, K kv heads, S columns, C head, P columns of the prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from diq_jax.models import attention, config, decoder, sampling
from diq_jax.trees import Array, Tree

Leaf = TypeVar("Leaf")
CHUNK = 16  # decode steps between two looks of the host
NOTHING = -1  # emitted by a row that has ended


@flax.struct.dataclass
class State(Generic[Leaf]):
    """Rows under way. The last token of a row is known, but not in the cache yet."""

    k: Leaf  # (N, B, K, S, C)
    v: Leaf  # (N, B, K, S, C)
    token: Leaf  # (B,) int32: the last one
    length: Leaf  # (B,) int32: tokens of the prompt
    generated: Leaf  # (B,) int32: tokens so far, `token` included
    live: Leaf  # (B,) bool: goes on
    prompt: Leaf  # (B,) uint32, sampling.prompt_number
    sample: Leaf  # (B,) int32
    delta: tuple[Leaf, Leaf] | None = None  # what delta layers keep (delta.mix)


@flax.struct.dataclass
class Prompts:
    """Prompts to begin, R rows; one that is no prompt has a slot beyond the state's rows."""

    tokens: Array  # (R, P) int32, left-padded
    length: Array  # (R,) int32, at least 1
    slot: Array  # (R,) int32: the row of the state to put it in
    prompt: Array  # (R,) uint32
    sample: Array  # (R,) int32


def shapes(
    cfg: config.DecoderConfig, rows: int, columns: int, dtype: DTypeLike
) -> State[jax.ShapeDtypeStruct]:
    """Returns the state's leaves as jax.ShapeDtypeStruct."""
    cache = jax.ShapeDtypeStruct(
        (cfg.num_layers // cfg.period, rows, cfg.num_kv_heads, columns, cfg.head_dim), dtype
    )
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    live = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    prompt = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    kept = None
    if cfg.delta is not None:
        from diq_jax.models import delta

        kept = delta.empty(cfg, rows, dtype)
    return State(cache, cache, number, number, number, live, prompt, number, kept)


def specs(cfg: config.DecoderConfig, model_devices: int) -> State[PartitionSpec]:
    """Splits rows over the data axis, and kv heads over the model axis where it divides them."""
    heads = "model" if cfg.num_kv_heads % model_devices == 0 else None
    cache, row = PartitionSpec(None, "data", heads, None, None), PartitionSpec("data")
    kept = None
    if cfg.delta is not None:
        heads = "model" if cfg.delta.value_heads % model_devices == 0 else None
        kept = PartitionSpec(None, "data"), PartitionSpec(None, "data", heads)
    return State(cache, cache, row, row, row, row, row, row, kept)


def begin(
    params: Tree,
    adapter: Tree | None,
    state: State[jax.Array],
    batch: Prompts,
    cfg: config.DecoderConfig,
    settings: sampling.Sampling,
    ends: Sequence[int],
) -> tuple[State[jax.Array], jax.Array]:
    """Reads prompts into rows of the state.

    Args:
        ends: the tokens that end an answer.

    Returns:
        The state, and the first token of each prompt (R,).
    """
    R, P = batch.tokens.shape
    columns = jnp.arange(P)[None, :] - (P - batch.length)[:, None]
    positions, segments = jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)

    def attend(q, k, v, window, _):
        out = attention.attend(q, k, v, segments, True, window, positions)
        return out, (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    past = {}
    if state.delta is not None:
        past["delta"] = jax.tree.map(
            lambda x: jnp.zeros((x.shape[0], R, *x.shape[2:]), x.dtype), state.delta
        )
    places = batch.tokens, positions, segments
    hidden, kept = decoder.through(params, cfg, *places, attend, adapter, past=past)
    k, v = kept["attn"]
    zeros = jnp.zeros(R, jnp.int32)
    logits = decoder.logits(params, cfg, hidden[:, -1:])[:, 0]
    first = sampling.pick(logits, batch.prompt, batch.sample, zeros, settings)

    def put(old, new):
        return old.at[batch.slot].set(new, mode="drop")

    def put_cache(old, new):
        return old.at[:, batch.slot, :, :P].set(new.astype(old.dtype), mode="drop")

    def put_kept(old, new):
        return old.at[:, batch.slot].set(new.astype(old.dtype), mode="drop")

    state = State(
        k=put_cache(state.k, k),
        v=put_cache(state.v, v),
        token=put(state.token, first),
        length=put(state.length, batch.length),
        generated=put(state.generated, zeros + 1),
        live=put(state.live, _goes_on(first, 1, settings, ends)),
        prompt=put(state.prompt, batch.prompt),
        sample=put(state.sample, batch.sample),
        delta=jax.tree.map(put_kept, state.delta, kept.get("delta")),
    )
    return state, first


def decode(
    params: Tree,
    adapter: Tree | None,
    state: State[jax.Array],
    cfg: config.DecoderConfig,
    settings: sampling.Sampling,
    ends: Sequence[int],
) -> tuple[State[jax.Array], jax.Array]:
    """Continues all rows by up to CHUNK tokens; fewer where every row has ended.

    What the chunk adds is kept apart until its end, in columns that all rows share: rows stand at
    different columns of the cache, and writing there costs a pass over the whole of it.

    Returns:
        The state, and the tokens (B, CHUNK) int32, NOTHING after a row's end.
    """
    start = state.k.shape[3] - _room(settings) + state.generated - 1
    recent = jnp.zeros((*state.k.shape[:3], CHUNK, state.k.shape[4]), state.k.dtype)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < CHUNK) & jnp.any(state.live)

    def step(carry):
        i, state, recent, tokens = carry
        logits, new = next_logits(params, adapter, state, recent, i, start, cfg, settings)
        recent = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, i, axis=3),
            recent, new["attn"],
        )  # fmt: skip
        token = sampling.pick(logits, state.prompt, state.sample, state.generated, settings)
        tokens = jax.lax.dynamic_update_index_in_dim(
            tokens, jnp.where(state.live, token, NOTHING), i, axis=1
        )
        generated = state.generated + state.live
        live = state.live & _goes_on(token, generated, settings, ends)
        more = {"token": token, "generated": generated, "live": live, "delta": new.get("delta")}
        state = dataclasses.replace(state, **more)
        return i + 1, state, recent, tokens

    tokens = jnp.full((len(state.token), CHUNK), NOTHING, jnp.int32)
    carry = (0, state, (recent, recent), tokens)
    _, state, recent, tokens = jax.lax.while_loop(unfinished, step, carry)

    # Mapped over rows, so that rows split over devices stay where they are; over layers outside of
    # that, so that nothing is turned.
    def merge(old, new, column):
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)

    merge = jax.vmap(jax.vmap(merge), in_axes=(0, 0, None))
    k, v = (merge(old, new, start) for old, new in zip((state.k, state.v), recent, strict=True))
    return dataclasses.replace(state, k=k, v=v), tokens


def next_logits(
    params: Tree,
    adapter: Tree | None,
    state: State[jax.Array],
    recent: tuple[jax.Array, jax.Array],
    i: jax.Array | int,
    start: jax.Array,
    cfg: config.DecoderConfig,
    settings: sampling.Sampling,
) -> tuple[jax.Array, Tree]:
    """Runs the last token of every row, step i of a chunk.

    Args:
        recent: keys and values (N, B, K, CHUNK, C) of this chunk, of which the first i stand.
        start: (B,), the column where this chunk begins in each row.

    Returns:
        Logits (B, V), and {"attn": the token's keys and values (N, B, K, 1, C), "delta":
        State.delta with it, where there is one}.
    """
    first = state.k.shape[3] - _room(settings) - state.length
    columns, steps = jnp.arange(state.k.shape[3])[None, :], jnp.arange(CHUNK)[None, :]
    seen = (columns >= first[:, None]) & (columns < start[:, None])
    seen_recent = jnp.broadcast_to(steps < i, (len(first), CHUNK))
    itself = jnp.ones((len(first), 1), bool)

    def attend(q, k, v, window, past):
        (past_k, past_v), (recent_k, recent_v) = past
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        near, near_recent = seen, seen_recent
        if window is not None:
            near = near & (start[:, None] + i - columns < window)
            near_recent = near_recent & (i - steps < window)
        parts = (past_k, past_v, near), (recent_k, recent_v, near_recent), (k, v, itself)
        return attention.attend_to_parts(q, parts), (k, v)

    past: Tree = {"attn": ((state.k, state.v), recent)}
    if state.delta is not None:
        past["delta"] = state.delta
    positions = (start + i - first)[:, None]
    places = state.token[:, None], positions, jnp.ones_like(positions)
    hidden, new = decoder.through(params, cfg, *places, attend, adapter, past=past)
    return decoder.logits(params, cfg, hidden)[:, 0], new


def columns(prompt_columns: int, settings: sampling.Sampling) -> int:
    """Returns S: a row that ends early still goes through the rest of its chunk."""
    return prompt_columns + _room(settings)


def _room(settings):
    return settings.max_new_tokens + CHUNK


def _goes_on(token, generated, settings, ends):
    ended = jnp.isin(token, jnp.array([sampling.BROKEN, *ends], jnp.int32))
    return ~ended & (generated < settings.max_new_tokens)
