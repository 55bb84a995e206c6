"""Decoders as one pure function of nested dicts; models/families.py says how families differ.

Parameters, with layers stacked on a leading axis N and kernels stored (in, out):

    embed/embedding (V, D)          layers/attn_norm/scale (N, D)      layers/mlp_norm/scale (N, D)
    final_norm/scale (D,)           layers/attn/{q,k,v,o}_proj/kernel
    layers/mlp/{gate,up,down}_proj/kernel head/kernel (D, V), untied

Some have layers/attn/{q,k}_norm/scale, layers/{attn,mlp}_post_norm/scale of what attention and MLP
add, biases beside kernels, qkv_proj and gate_up_proj as one matrix, or in place of the MLP
layers/mlp/router/kernel (N, D, E) and layers/mlp/experts/{gate,up,down}_proj/kernel (N, E, in,
out). Where most layers have layers/delta (models/delta.py) in place of layers/attn, each of the two
is stacked over its own layers, and q_proj gives each head a query and a gate of what it reads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from diq_jax import trees
from diq_jax.data import batches
from diq_jax.models import attention, config, layers, rope
from diq_jax.run import sharding

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# First match decides; a leaf without a match, or a rule without a leaf where `always`, is an error.
PARTITION_RULES = (
    (r"embed/embedding", P("model", None)),
    (r"head/kernel", P(None, "model")),
    (r"layers/\w+/(q|k|v|qkv|z|a|b|gate|up|gate_up)_proj/kernel", P(None, None, "model")),
    (r"layers/\w+/(q|k|v|qkv|a|gate|up|gate_up)_proj/bias", P(None, "model")),
    (r"layers/\w+/(o|down)_proj/kernel", P(None, "model", None)),
    (r"layers/\w+/(o|down)_proj/bias", P(None, None)),
    (r"layers/mlp/experts/.*/kernel", P(None, "model", None, None)),
    (r"layers/mlp/router/kernel", P(None, None, None)),
    (r"layers/delta/conv/taps", P(None, None, None, "model")),
    (r"layers/(.*norm|delta/decay)/scale", P(None, None)),
    (r"final_norm/scale", P(None)),
)


def shapes(cfg: config.DecoderConfig) -> dict:
    """Returns the parameter tree with a shape tuple at each leaf."""
    N, D, F, C = cfg.num_layers, cfg.model_dim, cfg.ffn_dim, cfg.head_dim
    heads, kv_heads = cfg.num_heads * C, cfg.num_kv_heads * C

    def linear(n_in, n_out, bias, N=N):
        return {"kernel": (N, n_in, n_out)} | ({"bias": (N, n_out)} if bias else {})

    gates, n = 0 if cfg.delta is None else heads, cfg.num_layers // cfg.period
    widths = {"q_proj": heads + gates, "k_proj": kv_heads, "v_proj": kv_heads}
    ends = {"gate_proj": F, "up_proj": F}
    if cfg.fused:
        widths, ends = {"qkv_proj": sum(widths.values())}, {"gate_up_proj": 2 * F}
    attn = {name: linear(D, width, cfg.qkv_bias, n) for name, width in widths.items()}
    attn |= {"o_proj": linear(heads, D, cfg.output_bias, n)}
    if cfg.qk_norm:
        sizes = (heads, kv_heads) if cfg.joint_qk_norm else (C, C)
        attn |= {f"{x}_norm": {"scale": (n, size)} for x, size in zip("qk", sizes, strict=True)}
    mlp = {name: linear(D, end, cfg.mlp_bias) for name, end in ends.items()}
    mlp |= {"down_proj": linear(F, D, cfg.mlp_bias)}
    if cfg.num_experts:
        from diq_jax.models import experts

        mlp = experts.shapes(cfg)
    norms = {"before": ("",), "after": ("_post",), "around": ("", "_post")}[cfg.norms]
    tree = {
        "embed": {"embedding": (cfg.vocab_size, D)},
        "layers": {
            "attn": attn,
            "mlp": mlp,
            **{f"{block}{at}_norm": {"scale": (N, D)} for block in ("attn", "mlp") for at in norms},
        },
        "final_norm": {"scale": (D,)},
    }
    if cfg.delta is not None:
        from diq_jax.models import delta

        tree["layers"]["delta"] = delta.shapes(cfg)
    return tree if cfg.tied_head else tree | {"head": {"kernel": (D, cfg.vocab_size)}}


def size(cfg: config.DecoderConfig) -> int:
    """Returns the number of parameters."""
    return sum(map(math.prod, jax.tree.leaves(shapes(cfg), is_leaf=lambda x: isinstance(x, tuple))))


def activation_bytes(cfg: config.DecoderConfig, remat: bool) -> int:
    """Returns what a backward pass keeps of a token, all layers, in two-byte floats.

    That is the residual stream in float32, and without `remat` what the products gave.
    """
    stream = cfg.num_layers * 4 * cfg.model_dim
    if remat or cfg.num_experts:
        return stream
    leaves = trees.named_leaves(shapes(cfg)["layers"], lambda x: isinstance(x, tuple))
    kernels = {name: shape for name, shape in leaves.items() if name.endswith("kernel")}
    # Of o_proj the input too: what attention gave.
    kept = (n * (n_out + n_in * ("o_proj" in name)) for name, (n, n_in, n_out) in kernels.items())
    return stream + 2 * sum(kept)


def init(key: jax.Array, cfg: config.DecoderConfig, dtype: DTypeLike) -> trees.Tree:
    """Draws random parameters (normal 0.02; norms multiply by 1, biases are 0), for tests."""
    leaves, tree = jax.tree.flatten_with_path(shapes(cfg), lambda x: isinstance(x, tuple))

    def make(key, path, shape):
        kind = path[-1].key
        if kind == "scale":
            plain = not cfg.unit_offset or path[-2].key == "out_norm"
            return jnp.full(shape, 1 if plain else 0, dtype)
        if kind == "bias":
            return jnp.zeros(shape, dtype)
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)

    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        make(k, path, shape) for k, (path, shape) in zip(keys, leaves, strict=True)
    )


def apply(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    tokens: trees.Array,
    positions: trees.Array,
    segment_ids: trees.Array,
    adapter: trees.Tree | None = None,
    remat: bool = False,
    parent_ids: trees.Array | None = None,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Computes the hidden states after the final norm.

    Args:
        tokens, positions, segment_ids: (B, T) int32; a token sees earlier tokens of its own
            segment.
        adapter: LoRA factors nested like the parameters (models/lora.py), or None.
        remat: recompute each layer in the backward pass. Otherwise that keeps what matrix products
            and attention gave, a third of the activations, and recomputes the cheap rest.
        parent_ids: (B, T) int32 or None, a second segment that a token sees (attention.attend).
        probe: nested like the parameters (models/layers.py), or None.

    Returns:
        (B, T, D) in the parameters' dtype. The residual stream between layers is float32: sums over
        layers in bfloat16 lose what a score is made of (docs/results.md).
    """
    assert parent_ids is None or cfg.delta is None, "the state of a delta layer has one past"

    def attend(q, k, v, window, _):
        return attention.attend(q, k, v, segment_ids, True, window, positions, parent_ids), None

    places = tokens, positions, segment_ids
    return through(params, cfg, *places, attend, adapter, remat, probe=probe)[0]


def through(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    tokens: trees.Array,
    positions: trees.Array,
    segment_ids: trees.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    adapter: trees.Tree | None = None,
    remat: bool = False,
    past: trees.Tree | None = None,
    probe: trees.Tree | None = None,
) -> tuple[jax.Array, Any]:
    """Runs the decoder around any way to attend: `apply`, and generation (models/cache.py).

    Args:
        segment_ids: for delta layers alone; `attend` knows what a query sees.
        attend: (q (B, T, H, C), k and v (B, T, K, C), the layer's window, its part of `past`) ->
            what the queries read (B, T, H * C), and what to keep of the layer.
        past: {"attn": a tree of arrays stacked over the layers with attention, "delta": what
            delta.mix kept, stacked over its layers}, one of them, or None.

    Returns:
        Hidden states after the final norm (B, T, D), and what was kept, as `past`: of delta layers
        where they had a past.
    """
    probe = probe or {}
    norm = functools.partial(layers.rms_norm, eps=cfg.norm_eps, unit_offset=cfg.unit_offset)
    alike, apart = attention.places(cfg)
    x = _between(embed(params["embed"], cfg, tokens, probe.get("embed")))
    adapted = adapter["layers"] if adapter else {}
    stacked = (params["layers"], adapted, probe.get("layers", {}), past or {}, apart)
    # What all experts' products give is more than any memory: they are always recomputed.
    layer = functools.partial(_layer, cfg, norm, alike, positions, segment_ids, attend)
    layer = layers.checkpointed(layer, remat or bool(cfg.num_experts))
    scan = jax.lax.scan
    if cfg.delta is not None:
        from diq_jax.models import delta

        scan = functools.partial(delta.scan, period=cfg.delta.period)
    x, kept = scan(layer, x, stacked)
    return _inside(norm(params["final_norm"], x, probe=probe.get("final_norm"))), kept


def _layer(cfg, norm, alike, positions, segment_ids, attend, x, stacked):
    """Runs a layer on the residual stream x (B, T, D); `stacked` is its part of what is scanned."""
    p, adapted, probes, before, place = (*stacked[:-1], alike | stacked[-1])
    p = sharding.stored(p, "layers")

    def linear(group, name, x):
        beside = (tree.get(group, {}).get(name) for tree in (adapted, probes))
        return _placed(cfg, name, layers.linear(p[group][name], x, *beside))

    def block_norm(name, x):
        if name in p:
            return norm(p[name], x, probe=probes.get(name))
        return x.astype(jax.tree.leaves(p["mlp"])[0].dtype)

    def head_norm(name, x):
        return norm(p["attn"][name], x, probe=probes.get("attn", {}).get(name))

    h = _inside(block_norm("attn_norm", x))
    if "delta" in p:
        from diq_jax.models import delta

        own = p["delta"], probes.get("delta", {})
        h, kept = delta.mix(cfg, linear, *own, h, segment_ids, before)
    else:
        h, kept = _attention(cfg, linear, head_norm, h, positions, place, attend, before)
    scale = 1.0 if cfg.residual_scale is None else cfg.residual_scale
    x = x + block_norm("attn_post_norm", h) * scale
    own = (tree.get("mlp", {}) for tree in (p, adapted, probes))
    h = _mlp(cfg, linear, _inside(block_norm("mlp_norm", x)), *own)
    return _between(x + block_norm("mlp_post_norm", h) * scale), kept


def _heads(cfg, x, name="", norm=None):
    """Splits what a projection gave into heads, normed where the family does that."""
    whole = x.reshape(*x.shape[:2], -1, cfg.head_dim)
    if not cfg.qk_norm or norm is None:
        return whole
    return norm(name, x if cfg.joint_qk_norm else whole).reshape(whole.shape)


def _placed(cfg, name, y):
    """Splits what a matrix gave over the model axis: columns, or tokens where columns are summed.

    Keys and values of fewer heads than the axis has devices are whole on each.
    """
    if name in ("o_proj", "down_proj"):
        return _between(y)
    few = cfg.num_kv_heads % sharding.devices_along("model") and name in ("k_proj", "v_proj")
    return _inside(y) if few else sharding.pinned(y, "data", None, "model")


def _between(x):
    """Splits the residual stream's tokens over the model axis (sequence parallelism)."""
    return sharding.pinned(x, "data", "model", None)


def _inside(x):
    """Gathers all tokens of a row for the products with matrices that are split over `model`."""
    return sharding.pinned(x, "data", None, None)


def _attention(cfg, linear, head_norm, h, positions, place, attend, past):
    """Computes the attention of h (B, T, D), and what `attend` keeps."""
    if cfg.fused:
        sizes = [cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim]
        q, k, v = jnp.split(linear("attn", "qkv_proj", h), [sizes[0], sum(sizes)], axis=-1)
    else:
        q, k, v = (linear("attn", f"{x}_proj", h) for x in "qkv")
    gate = None
    if cfg.delta is not None:
        q, gate = jnp.split(q.reshape(*q.shape[:2], cfg.num_heads, -1), 2, axis=-1)
    q, k = _heads(cfg, q, "q_norm", head_norm), _heads(cfg, k, "k_norm", head_norm)
    q, k = (rope.rotate(y, positions, place["frequencies"], place["amplitude"]) for y in (q, k))
    q = q if cfg.query_scale is None else q * cfg.query_scale
    h, kept = attend(q, k, _heads(cfg, v), place["window"], past.get("attn"))
    h = h if gate is None else h * jax.nn.sigmoid(gate.reshape(h.shape))
    return linear("attn", "o_proj", layers.kept(h)), {"attn": kept}


def _mlp(cfg, linear, h, *own):
    """Computes the MLP, or the mixture of experts in its place, of h (B, T, D)."""
    activation = ACTIVATIONS[cfg.activation]
    if cfg.num_experts:
        from diq_jax.models import experts

        return _between(experts.mix(cfg, activation, h, *own))
    if cfg.fused:
        gate, up = jnp.split(linear("mlp", "gate_up_proj", h), 2, axis=-1)
    else:
        gate, up = linear("mlp", "gate_proj", h), linear("mlp", "up_proj", h)
    return linear("mlp", "down_proj", activation(gate) * up)


def embed(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    tokens: batches.Array,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Returns rows of the embedding as the residual stream, (B, T, D) float32."""
    x = params["embedding"][tokens].astype(jnp.float32)

    def enter(a):
        return a[tokens].astype(x.dtype)

    def folded(signs, size):  # of a one-hot row
        return signs[tokens][..., None] * jax.nn.one_hot(tokens % size, size)

    x = layers.probed((probe or {}).get("embedding"), x, enter, folded)
    if cfg.embed_scale is None:
        return x
    # Rounded as the model was trained: sqrt(5376) is 73.5 in bfloat16.
    return x * jnp.asarray(cfg.embed_scale, params["embedding"].dtype).astype(x.dtype)


def logits(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    hidden: jax.Array,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Maps (B, A, D) to (B, A, V) float32.

    Args:
        params, probe: of the whole decoder.
    """
    fixed = jax.lax.stop_gradient(hidden)

    def through(a):
        return jnp.matmul(fixed, a.astype(fixed.dtype), preferred_element_type=jnp.float32)

    def folded(signs, size):
        return layers.fold(fixed, signs, size)

    group, leaf = ("embed", "embedding") if cfg.tied_head else ("head", "kernel")
    equation = "bad,vd->bav" if cfg.tied_head else "bad,dv->bav"
    y = jnp.einsum(equation, hidden, params[group][leaf], preferred_element_type=jnp.float32)
    node = (probe or {}).get(group, {}).get(leaf)
    y = layers.probed(node, y, through, folded, transposed=cfg.tied_head)
    return y if cfg.logit_scale is None else y * cfg.logit_scale
