"""BERT-family encoders as one pure function of nested dicts.

Parameters, with layers stacked on a leading axis N and kernels stored (in, out):

    embed/{word,position,token_type}/embedding   embed/norm/{scale,bias}
    layers/attn/{q,k,v,o}_proj/{kernel,bias}     layers/attn_norm/{scale,bias}
    layers/mlp/{up,down}_proj/{kernel,bias}      layers/mlp_norm/{scale,bias}
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax.models import config, layers

Params = dict[str, Any]  # nested dicts of arrays


def shapes(cfg: config.EncoderConfig) -> dict:
    """Returns the parameter tree with a shape tuple at each leaf."""
    N, D, F = cfg.num_layers, cfg.model_dim, cfg.ffn_dim

    def linear(n_in, n_out):
        return {"kernel": (N, n_in, n_out), "bias": (N, n_out)}

    norm = {"scale": (N, D), "bias": (N, D)}
    return {
        "embed": {
            "word": {"embedding": (cfg.vocab_size, D)},
            "position": {"embedding": (cfg.max_positions, D)},
            "token_type": {"embedding": (cfg.num_token_types, D)},
            "norm": {"scale": (D,), "bias": (D,)},
        },
        "layers": {
            "attn": {name: linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "attn_norm": dict(norm),
            "mlp": {"up_proj": linear(D, F), "down_proj": linear(F, D)},
            "mlp_norm": dict(norm),
        },
    }


def apply(
    params: Params, cfg: config.EncoderConfig, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Computes the hidden states of the last layer, token type 0 throughout.

    Args:
        tokens: (B, T) int32.
        mask: (B, T), 1 on real tokens.

    Returns:
        (B, T, D).
    """
    return _layers(params, cfg, tokens, mask, lambda x: None)[0]


def layer_means(
    params: Params, cfg: config.EncoderConfig, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Computes every layer's mean-pooled hidden states, side by side from the bottom.

    See `apply`. Returns (B, N * D) float32.
    """
    pooled = _layers(params, cfg, tokens, mask, lambda x: mean_pool(x, mask))[1]  # (N, B, D)
    return jnp.moveaxis(pooled, 0, 1).reshape(len(tokens), -1)


def _layers(params, cfg, tokens, mask, keep):
    """Returns the hidden states of the last layer, and keep(hidden states) of each, stacked."""
    B, T = tokens.shape
    embed = params["embed"]
    x = embed["word"]["embedding"][tokens] + embed["position"]["embedding"][None, :T]
    x = x + embed["token_type"]["embedding"][0][None, None]
    x = layers.layer_norm(embed["norm"], x, cfg.norm_eps)
    segment_ids = mask.astype(jnp.int32)
    activate = functools.partial(jax.nn.gelu, approximate=cfg.activation == "gelu_tanh")

    def layer(x, p):
        q, k, v = (
            layers.linear(p["attn"][name], x).reshape(B, T, cfg.num_heads, cfg.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = layers.attention(q, k, v, segment_ids, causal=False)
        h = layers.linear(p["attn"]["o_proj"], layers.kept(h))
        x = layers.layer_norm(p["attn_norm"], x + h, cfg.norm_eps)
        h = activate(layers.linear(p["mlp"]["up_proj"], x))
        h = layers.linear(p["mlp"]["down_proj"], h)
        x = layers.layer_norm(p["mlp_norm"], x + h, cfg.norm_eps)
        return x, keep(x)

    return jax.lax.scan(layers.checkpointed(layer), x, params["layers"])


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages the hidden states over real tokens: (B, T, D) and (B, T) -> (B, D) float32."""
    weights = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * weights, axis=1)
    return total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
