"""Encoders as one pure function of nested dicts: BERT and RoBERTa, and ModernBERT.

Parameters, with layers stacked on a leading axis N and kernels stored (in, out):

    embed/{word,position,token_type}/embedding   embed/norm/{scale,bias}
    layers/attn/{q,k,v,o}_proj/{kernel,bias}     layers/attn_norm/{scale,bias}
    layers/mlp/{up,down}_proj/{kernel,bias}      layers/mlp_norm/{scale,bias}

ModernBERT has no biases, qkv_proj and gate_up_proj as one matrix each, rotary positions in place of
embedded ones, final_norm, and no attn_norm in its first layer: layers/attn_norm/scale (N - 1, D).
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import errors
from diq_jax.models import attention, config, families, layers
from diq_jax.models import rope as rope_lib
from diq_jax.trees import Array

Params = dict[str, Any]  # nested dicts of arrays


NAMES = {
    "embed/word/embedding": "embeddings.word_embeddings.weight",
    "embed/position/embedding": "embeddings.position_embeddings.weight",
    "embed/token_type/embedding": "embeddings.token_type_embeddings.weight",
    "embed/norm/scale": "embeddings.LayerNorm.weight",
    "embed/norm/bias": "embeddings.LayerNorm.bias",
} | {
    f"layers/{ours}/{leaf}": f"encoder.layer.{{i}}.{theirs}.{name}"
    for ours, theirs, leaves in (
        ("attn/q_proj", "attention.self.query", ("kernel", "bias")),
        ("attn/k_proj", "attention.self.key", ("kernel", "bias")),
        ("attn/v_proj", "attention.self.value", ("kernel", "bias")),
        ("attn/o_proj", "attention.output.dense", ("kernel", "bias")),
        ("attn_norm", "attention.output.LayerNorm", ("scale", "bias")),
        ("mlp/up_proj", "intermediate.dense", ("kernel", "bias")),
        ("mlp/down_proj", "output.dense", ("kernel", "bias")),
        ("mlp_norm", "output.LayerNorm", ("scale", "bias")),
    )
    for leaf, name in zip(leaves, ("weight", "bias"), strict=True)
}

MODERNBERT_NAMES = {
    "embed/word/embedding": "embeddings.tok_embeddings.weight",
    "embed/norm/scale": "embeddings.norm.weight",
    "layers/attn/qkv_proj/kernel": "layers.{i}.attn.Wqkv.weight",
    "layers/attn/o_proj/kernel": "layers.{i}.attn.Wo.weight",
    "layers/attn_norm/scale": "layers.{next}.attn_norm.weight",  # the first layer has none
    "layers/mlp/gate_up_proj/kernel": "layers.{i}.mlp.Wi.weight",
    "layers/mlp/down_proj/kernel": "layers.{i}.mlp.Wo.weight",
    "layers/mlp_norm/scale": "layers.{i}.mlp_norm.weight",
    "final_norm/scale": "final_norm.weight",
}
# What tensors begin with where a head stands beside the encoder.
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "modernbert": "model."}
HEADS = re.compile(r"lm_head\.|head\.(dense|norm)\.|decoder\.(weight|bias)$")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Holds what an encoder's program depends on."""

    family: str
    num_layers: int
    model_dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    num_token_types: int
    norm_eps: float
    activation: str  # gelu (exact) or gelu_tanh
    first_position: int = 0  # where the position embedding begins
    # ModernBERT's.
    rope: rope_lib.Rope | None = None
    sliding_rope: rope_lib.Rope | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_attention: int | None = None


def encoder_config(hf_config: dict[str, Any], field: str) -> EncoderConfig:
    """Reads a Hugging Face config of an encoder of one of `families.ENCODERS`.

    Raises:
        UserError: as `decoder_config`.
    """
    read = config.Reader(hf_config, field, families.ENCODERS, "an encoder")
    key = families.ENCODERS[read.name].activation[0]
    modern = read.name == "modernbert"
    if modern:
        read.expect(key, ("gelu",))
        for unset in families.ENCODERS[read.name].unset:
            read.expect(unset, (None, False))
    else:
        read.expect(key, ("gelu", "gelu_new", "gelu_pytorch_tanh"))
        read.expect("position_embedding_type", ("absolute",))
        read.expect("is_decoder", (False, None))
    num_heads, model_dim = read.size("num_attention_heads"), read.size("hidden_size")
    head_dim, positions = read.head_dim(model_dim, num_heads), read.size("max_position_embeddings")
    first = 0
    if read.name == "roberta":
        first = read.get("pad_token_id", int) + 1
        if not 0 <= first < positions:
            raise read.wrong("pad_token_id", f"below the {positions} position embeddings")
    return EncoderConfig(
        family=read.name,
        num_layers=read.size("num_hidden_layers"),
        model_dim=model_dim,
        ffn_dim=read.size("intermediate_size"),
        num_heads=num_heads,
        head_dim=head_dim,
        vocab_size=read.size("vocab_size"),
        max_positions=positions - first,
        num_token_types=0 if modern else read.size("type_vocab_size"),
        norm_eps=read.epsilon("norm_eps" if modern else "layer_norm_eps"),
        activation="gelu" if read.get(key, str, "gelu") == "gelu" else "gelu_tanh",
        first_position=first,
        **(_modern(read, head_dim) if modern else {}),
    )


def _modern(read: config.Reader, head_dim: int) -> dict[str, Any]:
    """Returns the fields of EncoderConfig that ModernBERT has."""
    if head_dim % 2:
        raise errors.UserError(f"{read.field}: config.json gives heads of odd size {head_dim}.")
    count = read.size("num_hidden_layers")
    every = read.get("global_attn_every_n_layers", int, families.ENCODERS[read.name].full_every)
    if every < 1:
        raise read.wrong("global_attn_every_n_layers", "at least 1")
    default = [rope_lib.SLIDING if i % every else rope_lib.FULL for i in range(count)]
    types = read.get("layer_types", list, default)
    if len(types) != count or not all(kind in (rope_lib.FULL, rope_lib.SLIDING) for kind in types):
        raise read.wrong("layer_types", f"{rope_lib.FULL} or {rope_lib.SLIDING} for each layer")
    return {
        "rope": rope_lib.read_rope(read, head_dim, rope_lib.FULL, "global_rope_theta"),
        "sliding_rope": rope_lib.read_rope(read, head_dim, rope_lib.SLIDING, "local_rope_theta"),
        "sliding_layers": tuple(kind == rope_lib.SLIDING for kind in types),
        "local_attention": read.size("local_attention"),
    }


def shapes(cfg: EncoderConfig) -> dict:
    """Returns the parameter tree with a shape tuple at each leaf."""
    N, D, F = cfg.num_layers, cfg.model_dim, cfg.ffn_dim
    if cfg.rope is not None:
        return {
            "embed": {"word": {"embedding": (cfg.vocab_size, D)}, "norm": {"scale": (D,)}},
            "layers": {
                "attn": {
                    "qkv_proj": {"kernel": (N, D, 3 * D)}, "o_proj": {"kernel": (N, D, D)},
                },
                "mlp": {
                    "gate_up_proj": {"kernel": (N, D, 2 * F)}, "down_proj": {"kernel": (N, F, D)},
                },
                "attn_norm": {"scale": (N - 1, D)},
                "mlp_norm": {"scale": (N, D)},
            },
            "final_norm": {"scale": (D,)},
        }  # fmt: skip

    def linear(n_in, n_out):
        return {"kernel": (N, n_in, n_out), "bias": (N, n_out)}

    norm = {"scale": (N, D), "bias": (N, D)}
    return {
        "embed": {
            "word": {"embedding": (cfg.vocab_size, D)},
            "position": {"embedding": (cfg.first_position + cfg.max_positions, D)},
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


def apply(params: Params, cfg: EncoderConfig, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the hidden states of the last layer, token type 0 throughout.

    Args:
        tokens: (B, T) int32.
        mask: (B, T), 1 on real tokens.

    Returns:
        (B, T, D).
    """
    return _layers(params, cfg, tokens, mask, lambda x: None)[0]


def layer_means(params: Params, cfg: EncoderConfig, tokens: Array, mask: Array) -> jax.Array:
    """Computes every layer's mean-pooled hidden states, side by side from the bottom.

    See `apply`. Returns (B, N * D) float32.
    """
    pooled = _layers(params, cfg, tokens, mask, lambda x: mean_pool(x, mask))[1]  # (N, B, D)
    return jnp.moveaxis(pooled, 0, 1).reshape(len(tokens), -1)


def _layers(params, cfg, tokens, mask, keep):
    """Returns the hidden states of the last layer, and keep(hidden states) of each, stacked."""
    if cfg.rope is not None:
        return _modern_layers(params, cfg, tokens, mask, keep)
    B, T = tokens.shape
    embed, start = params["embed"], cfg.first_position
    x = embed["word"]["embedding"][tokens]
    x = x + embed["position"]["embedding"][None, start : start + T]
    x = x + embed["token_type"]["embedding"][0][None, None]
    x = layers.layer_norm(embed["norm"], x, cfg.norm_eps)
    segment_ids = mask.astype(jnp.int32)

    def layer(x, p):
        q, k, v = (
            layers.linear(p["attn"][name], x).reshape(B, T, cfg.num_heads, cfg.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = attention.attend(q, k, v, segment_ids, causal=False)
        h = layers.linear(p["attn"]["o_proj"], layers.kept(h))
        x = layers.layer_norm(p["attn_norm"], x + h, cfg.norm_eps)
        h = _activate(cfg, layers.linear(p["mlp"]["up_proj"], x))
        h = layers.linear(p["mlp"]["down_proj"], h)
        x = layers.layer_norm(p["mlp_norm"], x + h, cfg.norm_eps)
        return x, keep(x)

    return jax.lax.scan(layers.checkpointed(layer), x, params["layers"])


def _modern_layers(params, cfg, tokens, mask, keep):
    """Runs ModernBERT (arXiv 2412.13663). See `_layers`."""
    B, T = tokens.shape
    segment_ids = mask.astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    norm = functools.partial(layers.layer_norm, eps=cfg.norm_eps)
    x = norm(params["embed"]["norm"], params["embed"]["word"]["embedding"][tokens])
    ropes = [cfg.sliding_rope if slides else cfg.rope for slides in cfg.sliding_layers]
    stacked = {
        "p": params["layers"] | {"attn_norm": _with_first(params["layers"]["attn_norm"])},
        "first": jnp.arange(cfg.num_layers) == 0,
        "frequencies": jnp.stack([rope_lib.frequencies(r, cfg.head_dim) for r in ropes]),
        # As far as `local_attention` // 2 on each side.
        "window": jnp.where(jnp.array(cfg.sliding_layers), cfg.local_attention // 2 + 1, T),
    }

    def layer(x, own):
        p = own["p"]
        h = jnp.where(own["first"], x, norm(p["attn_norm"], x))
        qkv = layers.linear(p["attn"]["qkv_proj"], h)
        q, k, v = jnp.split(qkv.reshape(B, T, 3 * cfg.num_heads, cfg.head_dim), 3, axis=2)
        q, k = (rope_lib.rotate(y, positions, own["frequencies"]) for y in (q, k))
        h = attention.attend(q, k, v, segment_ids, False, own["window"], positions)
        x = x + layers.linear(p["attn"]["o_proj"], layers.kept(h))
        h = layers.linear(p["mlp"]["gate_up_proj"], norm(p["mlp_norm"], x))
        gate, up = jnp.split(h, 2, axis=-1)
        x = x + layers.linear(p["mlp"]["down_proj"], _activate(cfg, gate) * up)
        return x, keep(x)

    x, kept = jax.lax.scan(layers.checkpointed(layer), x, stacked)
    return norm(params["final_norm"], x), kept


def _with_first(norm):
    """Puts a gain that is not used before those of the other layers."""
    return jax.tree.map(lambda x: jnp.concatenate([jnp.ones_like(x[:1]), x]), norm)


def _activate(cfg, x):
    return jax.nn.gelu(x, approximate=cfg.activation == "gelu_tanh")


def mean_pool(hidden: jax.Array, mask: Array) -> jax.Array:
    """Averages the hidden states over real tokens: (B, T, D) and (B, T) -> (B, D) float32."""
    weights = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * weights, axis=1)
    return total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
