"""The layers, as functions of their parameters. Every matrix product of a layer goes through
`linear`.

What influence is taken with (influence/exact.py, influence/factored.py) travels beside the
parameters, as the argument `probe`, nested like them; at a parameter it is one of

    {a (in, R), b (R, out), scale ()}: a low-rank direction of a matrix; the output's derivative in
        `scale`, which is 0, is (x a) b.
    {left (in,), core (B, P, P), right (out,)}, signs on both sides of a matrix: the gradient of the
        core, which is 0, is each example's own gradient of the matrix, folded by `fold`.
    {core (B, out)}: the same for a norm's gain and a bias.

Dims: B batch, T tokens, D model, H query heads, K kv heads, G = H // K, C head, R rank.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint

from diq_jax.data import batches
from diq_jax.trees import Tree

UNSEEN = -1e30  # added to a score: exp gives exactly 0; a position always sees itself
QUERY_BLOCK = 256  # queries of one attention block: scores are (B, H, QUERY_BLOCK, T) at most
# Attention over more blocks is so many loops over them: each reads the keys up to its own end. One
# loop would read all keys for every block; none would be a program that grows with the tokens.
STRIPS = 8


def checkpointed(layer: Callable, remat: bool = False) -> Callable:
    """Wraps a layer for `lax.scan`: its backward pass keeps the results of matrix products and of
    `kept`, a third of all, and recomputes the rest, or with `remat` everything. Keeping less is
    also faster on a CPU, where fresh memory costs more than arithmetic (docs/results.md).
    """
    policies = jax.checkpoint_policies
    some = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("kept")
    )
    # A scan needs no barrier against common subexpressions.
    return jax.checkpoint(layer, prevent_cse=False, policy=None if remat else some)


def kept(x: jax.Array) -> jax.Array:
    """Returns x, and marks it as kept by the backward pass of a `checkpointed` layer."""
    return ad_checkpoint.checkpoint_name(x, "kept")


def linear(
    params: Tree, x: jax.Array, adapter: Tree | None = None, probe: Tree | None = None
) -> jax.Array:
    """Computes y = x W + b, plus a LoRA adapter's (x A) B * scale.

    Args:
        params: kernel (in, out), and bias (out,) where the family has one.
        x: (B, T, in).
        adapter: a (in, R), b (R, out), scale (); with a0 (in, R) and b0 (R, out), an origin, what
            is added is x (A B - A0 B0) * scale; with dropout_keys (B,) and dropout_rate, inverted
            dropout on the adapter's input as PEFT applies it, drawn for each row by its own key:
            the same on any number of devices and in any microbatch.
        probe: of kernel and bias, or None.
    """
    probe = probe or {}
    # Cut off from x: what passes on to x goes through the kernel alone.
    fixed = jax.lax.stop_gradient(x)
    # One product of B T rows: a kernel's gradient is then one too, without a copy of dy.
    y = (x.reshape(-1, x.shape[-1]) @ params["kernel"]).reshape(*x.shape[:-1], -1)
    y = probed(
        probe.get("kernel"),
        y,
        lambda a: fixed @ a.astype(x.dtype),
        lambda signs, size: fold(fixed, signs, size),
    )
    if "bias" in params:
        y = y + _vector(params["bias"], probe.get("bias"), y)
    if adapter is not None:
        z = x
        if "dropout_keys" in adapter:
            keep = 1.0 - adapter["dropout_rate"]
            draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))
            kept = draw(adapter["dropout_keys"])
            z = jnp.where(kept, x / keep.astype(x.dtype), 0)
        a, b = _factors(adapter)
        y = y + z @ a.astype(x.dtype) @ b.astype(x.dtype) * adapter["scale"].astype(x.dtype)
    return y


def _factors(adapter):
    """Returns the two factors of an adapter's change of the kernel.

    With an origin it is A B - A0 B0 = (A - A0) B + A0 (B - B0), as one product of rank 2 R: exactly
    0 at the origin, where a difference of two products would leave their rounding.
    """
    a, b = adapter["a"], adapter["b"]
    if "a0" not in adapter:
        return a, b
    a0, b0 = adapter["a0"], adapter["b0"]
    return jnp.concatenate([a - a0, a0], -1), jnp.concatenate([b, b - b0], -2)


def probed(
    probe: Mapping[str, jax.Array] | None,
    y: jax.Array,
    enter: Callable[[jax.Array], jax.Array],
    enter_folded: Callable[[jax.Array, int], jax.Array],
    transposed: bool = False,
) -> jax.Array:
    """Returns y = x W, with what the matrix's probe, if it has one, adds to derivatives alone.

    Args:
        enter: a -> x a, for a factor a (in, R) on x's side.
        enter_folded: (signs, P) -> x folded, (B, T, P).
        transposed: the product is with the transposed matrix, as a tied head's.
    """
    if probe is None:
        return y
    if "core" not in probe:
        a, b = (probe["b"].T, probe["a"].T) if transposed else (probe["a"], probe["b"])
        return _along(y, enter(a), b, probe["scale"])
    left, core, right = probe["left"], probe["core"], probe["right"]
    if transposed:
        left, core, right = right, core.swapaxes(-1, -2), left
    return _probed(y, enter_folded(left, core.shape[-1]), core, right)


def fold(x: jax.Array, signs: jax.Array, size: int) -> jax.Array:
    """Adds coordinate i of the last axis, times its sign, to place i mod `size`: (..., size)
    float32.

    With random signs the inner product of two folded vectors is unbiased for that of the vectors:
    a projection without a matrix.
    """
    places = jax.nn.one_hot(jnp.arange(x.shape[-1]) % size, size, dtype=x.dtype)
    signed = places * signs[:, None].astype(x.dtype)  # 0, 1 and -1 are exact in every dtype
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, signed, precision=exact, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _along(y, low, b, scale):
    """Computes y + low b * scale at scale = 0: the product is formed for the tangent alone."""
    return y


@_along.defjvp
def _along_jvp(primals, tangents):
    y, low, b, _ = primals
    thin = low @ b.astype(low.dtype)
    return y, tangents[0] + thin.astype(y.dtype) * tangents[3].astype(y.dtype)


@jax.custom_vjp
def _probed(y, low, core, right):
    """Computes y + (low core) spread by `right` at core = 0, for the gradient of the core alone."""
    return y


def _probed_forward(y, low, core, right):
    return y, (low, right)


def _probed_backward(residuals, dy):
    low, right = residuals
    return dy, None, jnp.einsum("btp,btq->bpq", low, fold(dy, right, low.shape[-1])), None


_probed.defvjp(_probed_forward, _probed_backward)


def rms_norm(
    params: Tree, x: jax.Array, eps: float, probe: Tree | None = None, unit_offset: bool = False
) -> jax.Array:
    """Divides by the root of the mean square over the last axis, in float32 because squares of
    bfloat16 lose the mean; the result has the gain's dtype.

    Args:
        unit_offset: multiply by 1 + the gain, in float32, as Gemma does.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = _vector(params["scale"], (probe or {}).get("scale"), x)
    if unit_offset:
        return (x32 * (1.0 + scale.astype(jnp.float32))).astype(scale.dtype)
    return x32.astype(scale.dtype) * scale


def layer_norm(params: Tree, x: jax.Array, eps: float) -> jax.Array:
    """Normalizes over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    x = x32.astype(x.dtype) * _along_last(params["scale"], x)
    return x + _along_last(params["bias"], x) if "bias" in params else x


def _vector(vector, probe, x):
    """Returns a gain or bias as it broadcasts along the last axis of x, its probe's core (B, out)
    added.
    """
    vector = _along_last(vector, x)
    if probe is None:
        return vector
    core = probe["core"]
    core = core.reshape(core.shape[0], *(1,) * (x.ndim - 2), core.shape[1])
    return vector + core.astype(vector.dtype)


def _along_last(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: batches.Array,
    causal: bool,
    window: int | None = None,
    positions: batches.Array | None = None,
    parent_ids: batches.Array | None = None,
) -> jax.Array:
    """Computes softmax attention inside segments, in blocks of queries, so that no (T, T) array of
    all heads exists at once.

    Where it is causal, blocks read only the keys up to the end of their strip. Plain jnp, so that
    it can be differentiated in forward mode; in reverse mode each block is recomputed.

    Args:
        q: (B, T, H, C); k, v: (B, T, K, C); query head h reads kv head h // (H // K).
        segment_ids: (B, T) int32; a position sees its own segment only. Segment 0 is padding.
        causal: a query sees no key behind it in the array.
        window: how many positions back a query sees, and ahead where not causal, itself included;
            None for all.
        positions: (B, T) int32, by which a window counts; only a window needs them.
        parent_ids: (B, T) int32, a second segment that a position sees, -1 for none: options that
            share one prompt have it as their parent. None where no position has a parent.

    Returns:
        (B, T, H * C).
    """
    (B, T, H, C), K = q.shape, k.shape[2]
    # Heads before tokens, a kv head's queries as one matrix: 2 to 3 times as fast on a CPU.
    q = (q * C**-0.5).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def block(q, k, v, queries, keys, start):
        *heads, Q, _ = q.shape
        rows = q.reshape(B, K, -1, C)
        scores = jnp.einsum("bkqc,bksc->bkqs", rows, k, preferred_element_type=jnp.float32)
        seen = _seen(queries, keys, start if causal else None, window)
        hidden = jnp.where(seen, 0.0, UNSEEN)[:, None, None]
        scores = scores.reshape(*heads, Q, -1) + hidden
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkqs,bksc->bkqc", weights.reshape(*rows.shape[:3], -1), v)
        return out.reshape(*heads, Q, C)

    places = {"segment_ids": segment_ids, "parent_ids": parent_ids}
    places |= {} if window is None else {"positions": positions}
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
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H * C)


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
    """Runs `attention`'s block over a strip of several."""
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


def _seen(queries, keys, start, window):
    """Marks which keys each query sees, (B, Q, S) bool, by the places of both; see `attention`.

    Args:
        start: the place of the first query among the keys where none sees a later one, else None.
    """
    key_segments = keys["segment_ids"][:, None, :]
    seen = queries["segment_ids"][:, :, None] == key_segments
    if "parent_ids" in queries:
        seen = seen | (queries["parent_ids"][:, :, None] == key_segments)
    if start is not None:
        index = start + jnp.arange(queries["segment_ids"].shape[1])[:, None]
        seen = seen & (jnp.arange(keys["segment_ids"].shape[1])[None, :] <= index)[None]
    if window is not None:
        distance = queries["positions"][:, :, None] - keys["positions"][:, None, :]
        distance = distance if start is not None else jnp.abs(distance)
        seen = seen & (distance < window)
    return seen


def attention_to_parts(
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
    return sum(read).reshape(B, 1, H * C)
