"""Llama-family decoders (Llama, Mistral, Qwen2, Qwen3) as one pure function of nested dicts.

Parameters, with layers stacked on a leading axis N and kernels stored (in, out):

    embed/embedding (V, D)          layers/attn_norm/scale (N, D)      layers/mlp_norm/scale (N, D)
    final_norm/scale (D,)           layers/attn/{q,k,v,o}_proj/kernel
    layers/mlp/{gate,up,down}_proj/kernel head/kernel (D, V), untied
    layers/attn/{q,k}_norm/scale (N, C), Qwen3
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

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
    """The parameter tree with a shape tuple at each leaf."""
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


def init(key, cfg: config.DecoderConfig, dtype) -> dict:
    """Random parameters (normal 0.02; norm gains one, biases zero), for tests and benchmarks."""
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


def apply(params, cfg, tokens, positions, segment_ids, adapter=None, remat=False, parent_ids=None):
    """Hidden states after the final norm.

    Args:
        tokens, positions, segment_ids: (B, T) int32; a token sees earlier tokens of its own
            segment.
        adapter: LoRA factors nested like the parameters (models/lora.py), or None.
        remat: recompute each layer in the backward pass. Otherwise that keeps what matrix products
            and attention gave, a third of the activations, and recomputes the cheap rest.
        parent_ids: (B, T) int32 or None, a second segment that a token sees (layers.attention).

    Returns:
        (B, T, D) in the parameters' dtype. The residual stream between layers is float32: sums over
        layers in bfloat16 lose what a score is made of (docs/results.md).
    """

    def attend(q, k, v, _):
        window = cfg.sliding_window
        return layers.attention(q, k, v, segment_ids, True, window, positions, parent_ids), None

    return through(params, cfg, tokens, positions, attend, adapter, remat)[0]


def through(params, cfg, tokens, positions, attend, adapter=None, remat=False, past=None):
    """The decoder around any way to attend: `apply`, and generation with a cache (models/cache.py).

    Args:
        attend: (q (B, T, H, C), k and v (B, T, K, C), the layer's part of `past`) -> what the
            queries read (B, T, H * C), and what to keep of the layer.
        past: a tree of arrays stacked over the layers (N, ...), or None.

    Returns:
        Hidden states after the final norm (B, T, D), and what was kept, stacked over the layers.
    """
    frequencies = layers.rope_frequencies(cfg.rope, cfg.head_dim)
    B, T = tokens.shape

    def layer(x, stacked):
        p, a, before = stacked
        attn, mlp = a.get("attn", {}), a.get("mlp", {})

        h = layers.rms_norm(p["attn_norm"], x, cfg.norm_eps)
        q, k, v = (
            layers.linear(p["attn"][name], h, attn.get(name)).reshape(B, T, -1, cfg.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if cfg.qk_norm:
            q = layers.rms_norm(p["attn"]["q_norm"], q, cfg.norm_eps)
            k = layers.rms_norm(p["attn"]["k_norm"], k, cfg.norm_eps)
        q = layers.rotate(q, positions, frequencies)
        k = layers.rotate(k, positions, frequencies)
        h, kept = attend(q, k, v, before)
        x = x + layers.linear(p["attn"]["o_proj"], layers.kept(h), attn.get("o_proj"))

        h = layers.rms_norm(p["mlp_norm"], x, cfg.norm_eps)
        gate = layers.linear(p["mlp"]["gate_proj"], h, mlp.get("gate_proj"))
        up = layers.linear(p["mlp"]["up_proj"], h, mlp.get("up_proj"))
        h = jax.nn.silu(gate) * up
        x = x + layers.linear(p["mlp"]["down_proj"], h, mlp.get("down_proj"))
        return x, kept

    x = embed(params["embed"], tokens)
    adapter_layers = {} if adapter is None else adapter["layers"]
    stacked = (params["layers"], adapter_layers, past)
    x, kept = jax.lax.scan(layers.checkpointed(layer, remat), x, stacked)
    return layers.rms_norm(params["final_norm"], x, cfg.norm_eps), kept


def embed(params, tokens):
    """Rows of the embedding as the residual stream, (B, T, D) float32."""
    x = params["embedding"][tokens].astype(jnp.float32)
    x = layers.with_direction(params, x, lambda a: a[tokens].astype(x.dtype))

    def folded(signs, size):  # of a one-hot row
        return signs[tokens][..., None] * jax.nn.one_hot(tokens % size, size)

    return layers.with_probe(params, x, folded)


def logits(params, cfg, hidden):
    """(B, A, D) -> (B, A, V) float32."""
    fixed = jax.lax.stop_gradient(hidden)

    def through(a):
        return jnp.matmul(fixed, a.astype(fixed.dtype), preferred_element_type=jnp.float32)

    def folded(signs, size):
        return layers.fold(fixed, signs, size)

    if cfg.tied_head:
        p = params["embed"]
        y = jnp.einsum("bad,vd->bav", hidden, p["embedding"], preferred_element_type=jnp.float32)
    else:
        p = params["head"]
        y = jnp.matmul(hidden, p["kernel"], preferred_element_type=jnp.float32)
    y = layers.with_direction(p, y, through, transposed=cfg.tied_head)
    return layers.with_probe(p, y, folded, transposed=cfg.tied_head)
