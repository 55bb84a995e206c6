"""Model shapes and constants, read from a checkpoint's config.json; nothing is assumed that it
does not say.
"""

import dataclasses
from typing import Any

from diq_jax.common import errors

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert",)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding. `kind` is default, linear, llama3 or gguf_factors; `settings` are its
    sorted constants.
    """

    theta: float
    kind: str
    settings: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    family: str
    num_layers: int  # N
    model_dim: int  # D
    ffn_dim: int  # F
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # C
    vocab_size: int  # V
    norm_eps: float
    rope: Rope
    max_positions: int
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None  # a query sees the last `sliding_window` positions, itself included


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
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


def family(config: dict[str, Any], field: str) -> str:
    """The model family of a config.json; raises UserError for one that is not supported."""
    name = config.get("model_type")
    known = DECODERS + ENCODERS
    if name not in known:
        raise errors.UserError(
            f"{field}: model family {name!r} is not supported; expected one of {', '.join(known)}."
            f"{errors.nearest(str(name), known)}"
        )
    return name


def decoder_config(config: dict[str, Any], field: str) -> DecoderConfig:
    """Reads a Hugging Face config of a Llama, Mistral, Qwen2 or Qwen3 decoder."""
    name = family(config, field)
    if name not in DECODERS:
        raise errors.UserError(f"{field}: a decoder is needed ({', '.join(DECODERS)}); got {name}.")
    get = _getter(config, field)
    _expect(config, field, "hidden_act", ("silu",))
    if config.get("use_sliding_window"):
        raise errors.UserError(f"{field}: use_sliding_window=true is not supported for {name}.")
    num_heads, model_dim = get("num_attention_heads"), get("hidden_size")
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        family=name,
        num_layers=get("num_hidden_layers"),
        model_dim=model_dim,
        ffn_dim=get("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or model_dim // num_heads,
        vocab_size=get("vocab_size"),
        norm_eps=float(get("rms_norm_eps")),
        rope=_rope(config, field),
        max_positions=get("max_position_embeddings"),
        # transformers leaves this key out where it equals the library's default, which is False for
        # all four.
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=name == "qwen2" or attention_bias,
        output_bias=name in ("llama", "qwen3") and attention_bias,
        mlp_bias=name == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=name == "qwen3",
        sliding_window=config.get("sliding_window") if name == "mistral" else None,
    )


def encoder_config(config: dict[str, Any], field: str) -> EncoderConfig:
    """Reads a Hugging Face config of a BERT encoder."""
    name = family(config, field)
    if name not in ENCODERS:
        raise errors.UserError(
            f"{field}: an encoder is needed ({', '.join(ENCODERS)}); got {name}."
        )
    get = _getter(config, field)
    _expect(config, field, "hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"))
    _expect(config, field, "position_embedding_type", ("absolute",))
    return EncoderConfig(
        family=name,
        num_layers=get("num_hidden_layers"),
        model_dim=get("hidden_size"),
        ffn_dim=get("intermediate_size"),
        num_heads=get("num_attention_heads"),
        head_dim=get("hidden_size") // get("num_attention_heads"),
        vocab_size=get("vocab_size"),
        max_positions=get("max_position_embeddings"),
        num_token_types=get("type_vocab_size"),
        norm_eps=float(get("layer_norm_eps")),
        activation="gelu" if get("hidden_act") == "gelu" else "gelu_tanh",
    )


def _getter(config, field):
    def get(key):
        if config.get(key) is None:
            raise errors.UserError(f"{field}: config.json has no {key!r}.")
        return config[key]

    return get


def _expect(config, field, key, allowed):
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise errors.UserError(
            f"{field}: config.json has {key}={value!r}; supported: {', '.join(map(str, allowed))}."
        )


def _rope(config, field):
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    merged = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = merged.pop("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise errors.UserError(f"{field}: config.json has no 'rope_theta'.")
    kind = merged.pop("rope_type", merged.pop("type", "default"))
    merged.pop("type", None)
    known = ("default", "linear", "llama3", "gguf_factors")
    if kind not in known:
        raise errors.UserError(
            f"{field}: rope scaling {kind!r} is not supported; expected one of {', '.join(known)}."
        )
    if merged.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise errors.UserError(f"{field}: partial_rotary_factor other than 1 is not supported.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()}
    return Rope(theta=float(theta), kind=kind, settings=tuple(sorted(settings.items())))
