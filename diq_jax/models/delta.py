"""Gated delta layers (arXiv 2412.06464) for attention, in all layers but each period's last.

Whatever the length of a row, a head keeps a state S (Ck, Cv), which starts at 0:

    S_t = exp(d_t) S_(t-1) + b_t k_t (v_t - exp(d_t) k_t S_(t-1)),    y_t = q_t S_t,

with unit k and q, a decay d_t < 0 and a step 0 < b_t < 1. Queries, keys and values are convolutions
of each channel over W tokens. Inside a chunk the sums over its tokens are one triangular system,
solved for all chunks at once; from chunk to chunk S is carried. What another segment left decays by
exp(-inf) = 0, so that every segment of a packed row starts anew, exactly.

All of this is float32 at the highest precision: a few percent of the work of a layer.

Dims: B batch, T tokens, H value heads, Ck and Cv of a key and a value head, W taps of the
convolution, n chunks of c tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diq_jax.models import attention, config, families, layers
from diq_jax.trees import Array, Tree

CHUNK = 64
UNIT_EPS = 1e-6  # beside the squares of a query or key, as the models were trained
FULL, LINEAR = "full_attention", "linear_attention"

_multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def read(config: Any) -> families.Delta:
    """Reads what a config.json says.

    Args:
        config: a config.Reader.

    Raises:
        UserError: layers in another order, or heads that do not divide.
    """
    config.expect("attn_output_gate", (True, None))
    period = config.size("full_attention_interval")
    count = config.size("num_hidden_layers")
    types = [LINEAR if (i + 1) % period else FULL for i in range(count)]
    given = config.get("layer_types", list, types)
    if FULL in given:  # it comes before the interval, as in transformers
        period = given.index(FULL) + 1
        types = [LINEAR if (i + 1) % period else FULL for i in range(count)]
    if given != types or count % period or period < 2:
        raise config.wrong(
            "layer_types" if "layer_types" in config.config else "full_attention_interval",
            f"so many {LINEAR} layers before each {FULL} layer, which divide the {count} layers",
        )
    keys, values = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    if values % keys:
        raise config.wrong("linear_num_value_heads", f"a multiple of the {keys} key heads")
    sizes = (config.size(f"linear_{x}_dim") for x in ("key_head", "value_head", "conv_kernel"))
    return families.Delta(period, keys, values, *sizes)


def shapes(cfg: config.DecoderConfig) -> Tree:
    """Returns the parameters with a shape tuple at each leaf, stacked over the delta layers."""
    d, D, N = cfg.delta, cfg.model_dim, cfg.num_layers - cfg.num_layers // cfg.period
    assert d is not None
    H, values = d.value_heads, d.value_heads * d.value_dim
    channels = 2 * d.key_heads * d.key_dim + values
    tree: Tree = {
        f"{name}_proj": {"kernel": (N, D, size)}
        for name, size in (("qkv", channels), ("z", values), ("a", H), ("b", H))
    }
    tree["a_proj"]["bias"] = (N, H)
    return tree | {
        "o_proj": {"kernel": (N, values, D)},
        "conv": {"taps": (N, d.taps, 1, channels)},
        "decay": {"scale": (N, H)},
        "out_norm": {"scale": (N, d.value_dim)},
    }


def empty(
    cfg: config.DecoderConfig, rows: int, dtype: DTypeLike
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the layers' state before the first token, float32 but for the inputs.

    The convolution's last inputs (N, B, W - 1, channels), and states (N, B, H, Ck, Cv).
    """
    d, shape = cfg.delta, shapes(cfg)["conv"]["taps"]
    assert d is not None
    inputs = (shape[0], rows, d.taps - 1, shape[-1])
    states = (shape[0], rows, d.value_heads, d.key_dim, d.value_dim)
    return jax.ShapeDtypeStruct(inputs, dtype), jax.ShapeDtypeStruct(states, jnp.float32)


def mix(
    cfg: config.DecoderConfig,
    linear: Callable[[str, str, jax.Array], jax.Array],
    params: Tree,
    probe: Tree,
    h: jax.Array,
    segment_ids: Array,
    past: Tree,
) -> tuple[jax.Array, Tree]:
    """Computes what a delta layer adds to the residual stream.

    Args:
        linear: ("delta", name of a projection, its input) -> its output, with what the layer's
            adapter and probe add.
        params, probe: of the layer; `probe` as layers.py says.
        h: (B, T, D), normed.
        segment_ids: (B, T) int32, each segment in one piece.
        past: {"delta": what was kept of the tokens before, which are of the first token's segment},
            or nothing, where there are none and nothing is to be kept.

    Returns:
        (B, T, D), and what to keep of the last segment where there is a past, {"delta": ((B, W - 1,
        channels), (B, H, Ck, Cv))}.
    """
    d = cfg.delta
    assert d is not None
    (B, T, _), H = h.shape, d.value_heads
    none = None, jnp.zeros((B, H, d.key_dim, d.value_dim), jnp.float32)
    inputs, state = past.get("delta", none)
    taps = params["conv"]["taps"], probe.get("conv", {}).get("taps")
    x, inputs = _convolve(*taps, linear("delta", "qkv_proj", h), segment_ids, inputs)
    keys = d.key_heads * d.key_dim
    q, k, v = (y.reshape(B, T, -1, y.shape[-1] // n) for y, n in zip(
        jnp.split(x, [keys, 2 * keys], axis=-1), (d.key_heads, d.key_heads, H), strict=True
    ))  # fmt: skip
    q, k = (jnp.repeat(_unit(y), H // d.key_heads, axis=2) for y in (q, k))
    a, b = (linear("delta", f"{name}_proj", h) for name in "ab")
    rate = layers.vector(params["decay"]["scale"], probe.get("decay", {}).get("scale"), a)
    decay = -jnp.exp(rate.astype(jnp.float32)) * jax.nn.softplus(a.astype(jnp.float32))
    step = jax.nn.sigmoid(b.astype(jnp.float32))
    y, state = delta_rule(q * d.key_dim**-0.5, k, v, decay, step, segment_ids, state)
    y = layers.rms_norm(params["out_norm"], y, cfg.norm_eps, probe.get("out_norm"))
    z = linear("delta", "z_proj", h).reshape(y.shape).astype(jnp.float32)
    y = (y * jax.nn.silu(z)).astype(y.dtype).reshape(B, T, -1)
    y = linear("delta", "o_proj", layers.kept(y))
    return y, {"delta": (inputs, state)} if "delta" in past else {}


def _convolve(taps, probe, x, segment_ids, before):
    """Sums channels of x (B, T, channels) over W tokens, float32; also the last W - 1 inputs."""
    W, T = taps.shape[0], x.shape[1]
    if before is None:
        before = jnp.zeros((x.shape[0], W - 1, x.shape[2]), x.dtype)
    x = jnp.concatenate([before, x], axis=1)
    ids = jnp.concatenate([jnp.repeat(segment_ids[:, :1], W - 1, axis=1), segment_ids], axis=1)
    y = jnp.zeros((), jnp.float32)
    for w in range(W):
        own = {"core": probe["core"][w, 0]} if probe else None
        tap = layers.vector(taps[w, 0], own, x).astype(jnp.float32)
        near = (ids[:, w : w + T] == segment_ids)[..., None]
        y += jnp.where(near, x[:, w : w + T].astype(jnp.float32), 0.0) * tap
    last = (ids[:, T:] == segment_ids[:, -1:])[..., None]
    return jax.nn.silu(y), jnp.where(last, x[:, T:], 0)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    step: jax.Array,
    segment_ids: Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes y_t and the last S of the recurrence above, in chunks.

    Args:
        q, k: (B, T, H, Ck) float32; v: (B, T, H, Cv) float32.
        decay, step: (B, T, H) float32.
        segment_ids: (B, T) int32, each segment in one piece.
        state: (B, H, Ck, Cv) float32, before the first token, of its segment.

    Returns:
        (B, T, H, Cv), and the state after the last token, of its segment.
    """
    T, size = q.shape[1], min(CHUNK, q.shape[1])

    def chunks(x, mode="constant"):  # (n, B, H, c, ...); without heads (n, B, c)
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2), mode)
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
        return x.swapaxes(2, 3) if x.ndim > 3 else x

    # A token beyond the end neither decays nor adds: its decay, key and step are 0.
    ids = chunks(jnp.asarray(segment_ids), "edge")
    before = jnp.concatenate([ids[:1, :, 0], ids[:-1, :, -1]])[..., None]
    q, k, v, decay, step = (chunks(x) for x in (q, k, v, decay, step))

    def decayed(seen, log):
        return jnp.exp(jnp.where(seen, log, attention.UNSEEN))

    seen = (ids[..., :, None] == ids[..., None, :]) & jnp.tri(size, dtype=bool)[None, None]
    # Summed from where a token's segment begins in the chunk: what is before it leaves no rounding.
    decay = _multiply(seen[:, :, None].astype(decay.dtype), decay[..., None])[..., 0]
    between = decayed(seen[:, :, None], decay[..., :, None] - decay[..., None, :])  # j to i
    entered = decayed((ids == before)[:, :, None], decay)  # from before the chunk to i
    left = decayed((ids == ids[..., -1:])[:, :, None], decay[..., -1:] - decay)  # j to its end
    stepped = k * step[..., None]
    system = _multiply(stepped, k.swapaxes(-1, -2)) * between  # its diagonal counts as 1
    right = jnp.concatenate([v * step[..., None], stepped * entered[..., None]], axis=-1)
    solved = jax.scipy.linalg.solve_triangular(system, right, lower=True, unit_diagonal=True)
    added, read = jnp.split(solved, [v.shape[-1]], axis=-1)
    within = _multiply(q, k.swapaxes(-1, -2)) * between
    parts = added, read, within, q * entered[..., None], k * left[..., None], entered[..., -1]

    def chunk(state, part):
        added, read, within, q, k, kept = part
        added = added - _multiply(read, state)
        y = _multiply(q, state) + _multiply(within, added)
        return state * kept[..., None, None] + _multiply(k.swapaxes(-1, -2), added), y

    state, y = jax.lax.scan(chunk, state, parts)
    y = jnp.moveaxis(y.swapaxes(2, 3), 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :T], state


def scan(
    layer: Callable[[jax.Array, tuple], tuple[jax.Array, Tree]],
    x: jax.Array,
    stacked: tuple[Tree, ...],
    period: int,
) -> tuple[jax.Array, Tree]:
    """Runs all layers as `lax.scan` does, a period at a time.

    Args:
        layer: keeps {"delta": ...} or nothing of a delta layer, {"attn": ...} of another.
        stacked: trees of leaves stacked over the layers, those in `delta` and `attn` over the
            layers that have them.
    """

    def split(tree, size):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)

    def periods(tree):
        sizes = {"attn": 1, "delta": period - 1}
        return {name: split(child, sizes.get(name, period)) for name, child in tree.items()}

    def at(tree, i):
        return jax.tree.map(lambda leaf: leaf[i], tree)

    def of_layer(tree, i):
        other, places = ("attn", {}) if i < period - 1 else ("delta", {"attn": 0})
        return {name: at(x, places.get(name, i)) for name, x in tree.items() if name != other}

    def run(x, trees):
        kept = []
        for i in range(period):
            x, new = layer(x, tuple(of_layer(tree, i) for tree in trees))
            kept.append(new)
        *states, last = kept
        return x, last | jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    x, kept = jax.lax.scan(run, x, tuple(map(periods, stacked)))
    if "delta" in kept:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept["delta"])
        kept = kept | {"delta": flat}
    return x, kept
