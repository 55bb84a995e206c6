"""Llama-family decoders (Llama, Mistral, Qwen2, Qwen3) as one pure function of nested dicts.

Parameters, with layers stacked on a leading axis N and kernels stored (in, out):

    embed/embedding (V, D)          layers/attn_norm/scale (N, D)      layers/mlp_norm/scale (N, D)
    final_norm/scale (D,)           layers/attn/{q,k,v,o}_proj/kernel
    layers/mlp/{gate,up,down}_proj/kernel head/kernel (D, V), untied
    layers/attn/{q,k}_norm/scale (N, C), Qwen3
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from diq_jax import trees
from diq_jax.data import batches
from diq_jax.models import config, layers

# First match decides; a leaf without a match, or a rule without a leaf where `always`, is an error.
PARTITION_RULES = (
    (r"embed/embedding", P("model", None)),
    (r"head/kernel", P(None, "model")),
    (r"layers/.*/(q|k|v|gate|up)_proj/kernel", P(None, None, "model")),
    (r"layers/.*/(q|k|v|gate|up)_proj/bias", P(None, "model")),
    (r"layers/.*/(o|down)_proj/kernel", P(None, "model", None)),
    (r"layers/.*/(o|down)_proj/bias", P(None, None)),
    (r"layers/.*norm/scale", P(None, None)),
    (r"final_norm/scale", P(None)),
)


def shapes(cfg: config.DecoderConfig) -> dict:
    """Returns the parameter tree with a shape tuple at each leaf."""
    N, D, F, C = cfg.num_layers, cfg.model_dim, cfg.ffn_dim, cfg.head_dim
    heads, kv_heads = cfg.num_heads * C, cfg.num_kv_heads * C

    def linear(n_in, n_out, bias):
        return {"kernel": (N, n_in, n_out)} | ({"bias": (N, n_out)} if bias else {})

    attn = {
        "q_proj": linear(D, heads, cfg.qkv_bias),
        "k_proj": linear(D, kv_heads, cfg.qkv_bias),
        "v_proj": linear(D, kv_heads, cfg.qkv_bias),
        "o_proj": linear(heads, D, cfg.output_bias),
    }
    if cfg.qk_norm:
        attn |= {"q_norm": {"scale": (N, C)}, "k_norm": {"scale": (N, C)}}
    mlp = {
        "gate_proj": linear(D, F, cfg.mlp_bias),
        "up_proj": linear(D, F, cfg.mlp_bias),
        "down_proj": linear(F, D, cfg.mlp_bias),
    }
    tree = {
        "embed": {"embedding": (cfg.vocab_size, D)},
        "layers": {
            "attn_norm": {"scale": (N, D)},
            "attn": attn,
            "mlp_norm": {"scale": (N, D)},
            "mlp": mlp,
        },
        "final_norm": {"scale": (D,)},
    }
    return tree if cfg.tied_head else tree | {"head": {"kernel": (D, cfg.vocab_size)}}


def init(key: jax.Array, cfg: config.DecoderConfig, dtype: DTypeLike) -> trees.Tree:
    """Draws random parameters (normal 0.02; norm gains one, biases zero), for tests and
    benchmarks.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        shapes(cfg), is_leaf=lambda x: isinstance(x, tuple)
    )

    def make(key, path, shape):
        kind = path[-1].key
        if kind == "scale":
            return jnp.ones(shape, dtype)
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
    tokens: batches.Array,
    positions: batches.Array,
    segment_ids: batches.Array,
    adapter: trees.Tree | None = None,
    remat: bool = False,
    parent_ids: batches.Array | None = None,
    probe: trees.Tree | None = None,
) -> jax.Array:
    """Computes the hidden states after the final norm.

    Args:
        tokens, positions, segment_ids: (B, T) int32; a token sees earlier tokens of its own
            segment.
        adapter: LoRA factors nested like the parameters (models/lora.py), or None.
        remat: recompute each layer in the backward pass. Otherwise that keeps what matrix products
            and attention gave, a third of the activations, and recomputes the cheap rest.
        parent_ids: (B, T) int32 or None, a second segment that a token sees (layers.attention).
        probe: nested like the parameters (models/layers.py), or None.

    Returns:
        (B, T, D) in the parameters' dtype. The residual stream between layers is float32: sums over
        layers in bfloat16 lose what a score is made of (docs/results.md).
    """

    def attend(q, k, v, _):
        window = cfg.sliding_window
        return layers.attention(q, k, v, segment_ids, True, window, positions, parent_ids), None

    return through(params, cfg, tokens, positions, attend, adapter, remat, probe=probe)[0]


def through(
    params: trees.Tree,
    cfg: config.DecoderConfig,
    tokens: batches.Array,
    positions: batches.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    adapter: trees.Tree | None = None,
    remat: bool = False,
    past: Any = None,
    probe: trees.Tree | None = None,
) -> tuple[jax.Array, Any]:
    """Runs the decoder around any way to attend: `apply`, and generation with a cache
    (models/cache.py).

    Args:
        attend: (q (B, T, H, C), k and v (B, T, K, C), the layer's part of `past`) -> what the
            queries read (B, T, H * C), and what to keep of the layer.
        past: a tree of arrays stacked over the layers (N, ...), or None.

    Returns:
        Hidden states after the final norm (B, T, D), and what was kept, stacked over the layers.
    """
    frequencies = layers.rope_frequencies(cfg.rope, cfg.head_dim)
    B, T = tokens.shape
    probe = probe or {}

    def layer(x, stacked):
        p, adapted, probes, before = stacked

        def linear(group, name, x):
            beside = (tree.get(group, {}).get(name) for tree in (adapted, probes))
            return layers.linear(p[group][name], x, *beside)

        def head_norm(name, x):
            return layers.rms_norm(
                p["attn"][name], x, cfg.norm_eps, probes.get("attn", {}).get(name)
            )

        h = layers.rms_norm(p["attn_norm"], x, cfg.norm_eps, probes.get("attn_norm"))
        q, k, v = (
            linear("attn", name, h).reshape(B, T, -1, cfg.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if cfg.qk_norm:
            q, k = head_norm("q_norm", q), head_norm("k_norm", k)
        q = layers.rotate(q, positions, frequencies)
        k = layers.rotate(k, positions, frequencies)
        h, kept = attend(q, k, v, before)
        x = x + linear("attn", "o_proj", layers.kept(h))

        h = layers.rms_norm(p["mlp_norm"], x, cfg.norm_eps, probes.get("mlp_norm"))
        gate, up = linear("mlp", "gate_proj", h), linear("mlp", "up_proj", h)
        x = x + linear("mlp", "down_proj", jax.nn.silu(gate) * up)
        return x, kept

    x = embed(params["embed"], tokens, probe.get("embed"))
    adapter_layers = {} if adapter is None else adapter["layers"]
    stacked = (params["layers"], adapter_layers, probe.get("layers", {}), past)
    x, kept = jax.lax.scan(layers.checkpointed(layer, remat), x, stacked)
    return layers.rms_norm(params["final_norm"], x, cfg.norm_eps, probe.get("final_norm")), kept


def embed(params: trees.Tree, tokens: batches.Array, probe: trees.Tree | None = None) -> jax.Array:
    """Returns rows of the embedding as the residual stream, (B, T, D) float32."""
    x = params["embedding"][tokens].astype(jnp.float32)

    def enter(a):
        return a[tokens].astype(x.dtype)

    def folded(signs, size):  # of a one-hot row
        return signs[tokens][..., None] * jax.nn.one_hot(tokens % size, size)

    return layers.probed((probe or {}).get("embedding"), x, enter, folded)


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
    return layers.probed(node, y, through, folded, transposed=cfg.tied_head)
