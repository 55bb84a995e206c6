"""Model shapes and constants, read from a checkpoint's config.json and checked for type and range;
nothing is assumed that neither it nor its family's documentation says.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from diq_jax import errors
from diq_jax.run import reading


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes what the decoders of one model_type have, beside what each config.json says."""

    architecture: str  # the class in transformers
    # What transformers documents for a config.json without the key, as early conversions are.
    defaults: dict[str, Any]
    qkv_bias: bool = False  # always; otherwise where attention_bias is true
    output_bias: bool = False  # where attention_bias is true
    mlp_bias: bool = False  # where mlp_bias is true
    qk_norm: bool = False
    sliding_window: bool = False


# A new family is a row here, what its layer needs in decoder.py, and its tensors' names in hf.py
# (and gguf_file.py).
DECODERS = {
    "llama": Family(
        "LlamaForCausalLM", {"rope_theta": 1e4, "max_position_embeddings": 2048},
        output_bias=True, mlp_bias=True,
    ),
    "mistral": Family(
        "MistralForCausalLM", {"rope_theta": 1e4, "sliding_window": 4096}, sliding_window=True
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"rope_theta": 1e4}, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", {"rope_theta": 1e4}, output_bias=True, qk_norm=True),
}  # fmt: skip
ENCODERS = {"bert": Family("BertModel", {})}
# The largest that a size may be; a wrong one is refused before anything of that size is made.
LARGEST = {
    "num_hidden_layers": 2**12, "hidden_size": 2**20, "intermediate_size": 2**22,
    "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
    "vocab_size": 2**26, "max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1,
    "type_vocab_size": 2**16, "original_max_position_embeddings": 2**31 - 1,
}  # fmt: skip
# What each kind of rotary scaling reads.
ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "gguf_factors": ("factors",),
}  # fmt: skip
# The rotary settings that are read apart, or that no kind above but llama3 uses.
ROPE_COMMON = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """Describes the rotary embedding. `kind` is default, linear, llama3 or gguf_factors; `settings`
    are its sorted constants.
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


def decoder_config(config: dict[str, Any], field: str) -> DecoderConfig:
    """Reads a Hugging Face config of a decoder of one of `DECODERS`.

    Raises:
        UserError: another family, quantised weights, something that is not built here, or a value
            of a wrong type or range.
    """
    read = _Reader(config, field, DECODERS, "a decoder")
    family = DECODERS[read.name]
    read.expect("hidden_act", ("silu",))
    read.expect("use_sliding_window", (False, None))
    if not family.sliding_window and set(read.get("layer_types", list, [])) - {"full_attention"}:
        raise read.wrong("layer_types", "full_attention for each layer")
    num_heads, model_dim = read.size("num_attention_heads"), read.size("hidden_size")
    num_kv_heads = read.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise read.wrong("num_key_value_heads", f"a divisor of the {num_heads} attention heads")
    head_dim = read.size("head_dim", None) or read.head_dim(model_dim, num_heads)
    if head_dim % 2:
        raise errors.UserError(f"{field}: config.json gives heads of odd size {head_dim}.")
    attention_bias = read.flag("attention_bias")
    return DecoderConfig(
        family=read.name,
        num_layers=read.size("num_hidden_layers"),
        model_dim=model_dim,
        ffn_dim=read.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=read.size("vocab_size"),
        norm_eps=read.epsilon("rms_norm_eps"),
        rope=_rope(read, head_dim),
        max_positions=read.size("max_position_embeddings"),
        # transformers leaves this key out where it equals the library's default, False for all.
        tied_head=read.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=family.output_bias and attention_bias,
        mlp_bias=family.mlp_bias and read.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        # null is no window; without the key there is the family's.
        sliding_window=read.size("sliding_window", None) if family.sliding_window else None,
    )


def encoder_config(config: dict[str, Any], field: str) -> EncoderConfig:
    """Reads a Hugging Face config of a BERT encoder. Raises UserError as `decoder_config`."""
    read = _Reader(config, field, ENCODERS, "an encoder")
    read.expect("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"))
    read.expect("position_embedding_type", ("absolute",))
    read.expect("is_decoder", (False, None))
    num_heads, model_dim = read.size("num_attention_heads"), read.size("hidden_size")
    return EncoderConfig(
        family=read.name,
        num_layers=read.size("num_hidden_layers"),
        model_dim=model_dim,
        ffn_dim=read.size("intermediate_size"),
        num_heads=num_heads,
        head_dim=read.head_dim(model_dim, num_heads),
        vocab_size=read.size("vocab_size"),
        max_positions=read.size("max_position_embeddings"),
        num_token_types=read.size("type_vocab_size"),
        norm_eps=read.epsilon("layer_norm_eps"),
        activation="gelu" if read.get("hidden_act", str) == "gelu" else "gelu_tanh",
    )


_REQUIRED = object()


class _Reader:
    """Reads typed values of a config.json of one of `families`."""

    def __init__(self, config: dict[str, Any], field: str, families: dict[str, Family], what: str):
        self.config, self.field, self.families = config, field, families
        self.name = config.get("model_type")
        if self.name not in tuple(families):
            raise errors.UserError(
                f"{field}: model family {reading.shorten(self.name)} is not supported here:"
                f" {what} is needed, one of {', '.join(families)}."
            )
        for key in ("quantization_config", "compression_config"):
            if config.get(key):
                method = config[key].get("quant_method") if isinstance(config[key], dict) else None
                raise errors.UserError(
                    f"{field}: config.json has {key} ({reading.shorten(method or config[key])}):"
                    " quantised weights are not read; expected the model's float32, float16 or"
                    " bfloat16 checkpoint, or a GGUF file."
                )

    def get(self, key: str, kinds: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Returns the value, of one of JSON's types `kinds`. Null is as good as no value."""
        value = self.config.get(key)
        if value is None:
            if key in self.config and default is not _REQUIRED:
                return default
            default = self.families[self.name].defaults.get(key, default)
            if default is _REQUIRED:
                raise errors.UserError(f"{self.field}: config.json has no {key!r}.")
            return default
        reading.check_record(self.config, f"{self.field}: config.json", {}, {key: kinds})
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a whole number from 1 to LARGEST."""
        value = self.get(key, int, default)
        if value is not None and not 1 <= value <= LARGEST[key]:
            raise self.wrong(key, f"between 1 and {LARGEST[key]:,}")
        return value

    def flag(self, key: str) -> bool:
        return self.get(key, bool, False)

    def epsilon(self, key: str) -> float:
        value = float(self.get(key, float))
        if not 0 <= value < 1:
            raise self.wrong(key, "a small number that is not negative")
        return value

    def head_dim(self, model_dim: int, num_heads: int) -> int:
        if model_dim % num_heads:
            raise self.wrong("hidden_size", f"a multiple of the {num_heads} attention heads")
        return model_dim // num_heads

    def expect(self, key: str, allowed: Sequence[Any]) -> None:
        value = self.config.get(key, allowed[0])
        if value not in allowed:
            raise errors.UserError(
                f"{self.field}: config.json has {key}={reading.shorten(value)}; supported:"
                f" {', '.join(str(a) for a in allowed if a is not None)}."
            )

    def wrong(self, key: str, expected: str) -> errors.UserError:
        shown = reading.shorten(self.config.get(key))
        return errors.UserError(
            f"{self.field}: config.json has {key}={shown}; it must be {expected}."
        )


def _rope(read: _Reader, head_dim: int) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    merged = {**read.get("rope_scaling", dict, {}), **read.get("rope_parameters", dict, {})}
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in tuple(ROPE_SETTINGS):
        raise errors.UserError(
            f"{read.field}: rope scaling {reading.shorten(kind)} is not supported; expected one of"
            f" {', '.join(ROPE_SETTINGS)}."
        )
    inner = _Reader({**read.config, **merged}, read.field, read.families, "a decoder")
    if inner.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise inner.wrong("partial_rotary_factor", "1: others are not built here")
    known = {*ROPE_COMMON, *ROPE_SETTINGS[kind]}
    if unknown := sorted(k for k in merged if k not in known and merged[k] is not None):
        raise errors.UserError(
            f"{read.field}: config.json has the rope setting {unknown[0]!r}, which {kind!r} scaling"
            f" does not read; it reads {', '.join(ROPE_SETTINGS[kind]) or 'none'}."
        )
    settings = {}
    for key in ("rope_theta", *ROPE_SETTINGS[kind]):
        whole = key == "original_max_position_embeddings"
        value = inner.size(key) if whole else inner.get(key, list if key == "factors" else float)
        values = value if key == "factors" else [value]
        if not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
            raise inner.wrong(key, "positive")
        if key == "factors" and len(values) != head_dim // 2:
            raise inner.wrong(key, f"a list of {head_dim // 2} numbers")
        settings[key] = tuple(value) if key == "factors" else value
    theta = float(settings.pop("rope_theta"))
    if kind == "llama3" and not settings["low_freq_factor"] < settings["high_freq_factor"]:
        raise inner.wrong("high_freq_factor", "larger than low_freq_factor")
    return Rope(theta=theta, kind=kind, settings=tuple(sorted(settings.items())))
