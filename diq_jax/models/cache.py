"""Generation on the devices: rows of prompts that are read at once and continued token by token.

A state has B rows of S columns: the prompt, left-padded, up to column P, then what is generated.
Every row stands at its own place, so that a finished one can be given another prompt while the
others go on; what a row computes depends on P, S and its own tokens only.

Dims: N layers, B rows, K kv heads, S columns, C head, P columns of the prompt.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diq_jax.models import config, decoder, layers, sampling

CHUNK = 16  # decode steps between two looks of the host
NOTHING = -1  # emitted by a row that has ended


@flax.struct.dataclass
class State:
    """Rows under way. The last token of a row is known, but not in the cache yet."""

    k: jax.Array  # (N, B, K, S, C)
    v: jax.Array  # (N, B, K, S, C)
    token: jax.Array  # (B,) int32: the last one
    length: jax.Array  # (B,) int32: tokens of the prompt
    generated: jax.Array  # (B,) int32: tokens so far, `token` included
    live: jax.Array  # (B,) bool: goes on
    prompt: jax.Array  # (B,) uint32, sampling.prompt_number
    sample: jax.Array  # (B,) int32


@flax.struct.dataclass
class Prompts:
    """Prompts to begin, R rows; one that is no prompt has a slot beyond the state's rows."""

    tokens: jax.Array  # (R, P) int32, left-padded
    length: jax.Array  # (R,) int32, at least 1
    slot: jax.Array  # (R,) int32: the row of the state to put it in
    prompt: jax.Array  # (R,) uint32
    sample: jax.Array  # (R,) int32


def shapes(cfg: config.DecoderConfig, rows: int, columns: int, dtype) -> State:
    """The state's leaves as jax.ShapeDtypeStruct."""
    cache = jax.ShapeDtypeStruct(
        (cfg.num_layers, rows, cfg.num_kv_heads, columns, cfg.head_dim), dtype
    )
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    live = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    prompt = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    return State(cache, cache, number, number, number, live, prompt, number)


def specs(cfg: config.DecoderConfig, model_devices: int) -> State:
    """Rows over the data axis, and kv heads over the model axis where it divides them."""
    heads = "model" if cfg.num_kv_heads % model_devices == 0 else None
    cache, row = PartitionSpec(None, "data", heads, None, None), PartitionSpec("data")
    return State(cache, cache, row, row, row, row, row, row)


def begin(params, adapter, state, batch, cfg, settings, ends):
    """Reads prompts into rows of the state.

    Args:
        batch: Prompts.
        ends: the tokens that end an answer.

    Returns:
        The state, and the first token of each prompt (R,).
    """
    R, P = batch.tokens.shape
    columns = jnp.arange(P)[None, :] - (P - batch.length)[:, None]
    positions, segments = jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)

    def attend(q, k, v, _):
        window = cfg.sliding_window
        out = layers.attention(q, k, v, segments, True, window, positions)
        return out, (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    hidden, (k, v) = decoder.through(params, cfg, batch.tokens, positions, attend, adapter)
    zeros = jnp.zeros(R, jnp.int32)
    logits = decoder.logits(params, cfg, hidden[:, -1:])[:, 0]
    first = sampling.pick(logits, batch.prompt, batch.sample, zeros, settings)

    def put(old, new):
        return old.at[batch.slot].set(new, mode="drop")

    def put_cache(old, new):
        return old.at[:, batch.slot, :, :P].set(new.astype(old.dtype), mode="drop")

    state = State(
        k=put_cache(state.k, k),
        v=put_cache(state.v, v),
        token=put(state.token, first),
        length=put(state.length, batch.length),
        generated=put(state.generated, zeros + 1),
        live=put(state.live, _goes_on(first, 1, settings, ends)),
        prompt=put(state.prompt, batch.prompt),
        sample=put(state.sample, batch.sample),
    )
    return state, first


def decode(params, adapter, state, cfg, settings, ends):
    """Continues all rows by up to CHUNK tokens; fewer where every row has ended.

    Returns:
        The state, and the tokens (B, CHUNK) int32, NOTHING after a row's end.
    """

    def unfinished(carry):
        i, state, _ = carry
        return (i < CHUNK) & jnp.any(state.live)

    def step(carry):
        i, state, tokens = carry
        state, token = _step(params, adapter, state, cfg, settings, ends)
        return i + 1, state, jax.lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)

    tokens = jnp.full((len(state.token), CHUNK), NOTHING, jnp.int32)
    _, state, tokens = jax.lax.while_loop(unfinished, step, (0, state, tokens))
    return state, tokens


def next_logits(params, adapter, state, cfg, prompt_columns: int):
    """Runs the last token of every row: its logits (B, V), and the keys and values (N, B, K, 1, C)
    that belong in column prompt_columns + generated - 1.
    """
    first = (prompt_columns - state.length)[:, None]
    columns = jnp.arange(state.k.shape[3])[None, :]
    column = (prompt_columns + state.generated - 1)[:, None]
    seen = (columns >= first) & (columns < column)
    if cfg.sliding_window is not None:
        seen = seen & (column - columns < cfg.sliding_window)

    def attend(q, k, v, past):
        out = layers.attention_to_past(q, k, v, *past, seen)
        return out, (k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    hidden, kept = decoder.through(
        params, cfg, state.token[:, None], column - first, attend, adapter, past=(state.k, state.v)
    )
    return decoder.logits(params, cfg, hidden)[:, 0], kept


def _step(params, adapter, state, cfg, settings, ends):
    prompt_columns = state.k.shape[3] - settings.max_new_tokens
    logits, (k, v) = next_logits(params, adapter, state, cfg, prompt_columns)
    column = prompt_columns + state.generated - 1

    # Mapped over rows, so that rows split over devices stay where they are.
    def write(old, new, column):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), column, axis=2)

    write = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    token = sampling.pick(logits, state.prompt, state.sample, state.generated, settings)
    generated = state.generated + state.live
    new = state.replace(
        k=write(state.k, k, column),
        v=write(state.v, v, column),
        token=token,
        generated=generated,
        live=state.live & _goes_on(token, generated, settings, ends),
    )
    return new, jnp.where(state.live, token, NOTHING)


def _goes_on(token, generated, settings, ends):
    ended = jnp.isin(token, jnp.array([sampling.BROKEN, *ends], jnp.int32))
    return ~ended & (generated < settings.max_new_tokens)
