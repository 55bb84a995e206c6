"""Model shapes and constants from config.json, checked for type and range; nothing is assumed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from diq_jax import errors
from diq_jax.models import families
from diq_jax.models import rope as rope_lib
from diq_jax.run import reading

# The largest that a size may be; a wrong one is refused before anything of that size is made.
LARGEST = {
    "num_hidden_layers": 2**12, "hidden_size": 2**20, "intermediate_size": 2**22,
    "vocab_size": 2**26, "max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1,
    "type_vocab_size": 2**16, "local_attention": 2**31 - 1,
    "original_max_position_embeddings": 2**31 - 1, "moe_intermediate_size": 2**22,
}  # fmt: skip
MANY = 2**14  # likewise of heads, experts and what else is not above

SAME = ("norms", "qk_norm", "joint_qk_norm", "fused", "unit_offset")  # in Family and DecoderConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Holds what a decoder's program depends on."""

    family: str
    num_layers: int  # N
    model_dim: int  # D
    ffn_dim: int  # F, of each expert where there are some
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # C
    vocab_size: int  # V
    norm_eps: float
    rope: rope_lib.Rope
    max_positions: int
    tied_head: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None  # a query sees the last `sliding_window` positions, itself included
    # What some families have, as in `Family`; the defaults are what the others do.
    activation: str = "silu"
    norms: str = "before"
    joint_qk_norm: bool = False
    fused: bool = False
    unit_offset: bool = False
    sliding_layers: tuple[bool, ...] | None = None  # which have the window; None for all
    sliding_rope: rope_lib.Rope | None = None
    rotary_dim: int | None = None  # how many numbers of a head are rotated; None for all
    rotated_layers: tuple[bool, ...] | None = None
    num_experts: int | None = None  # E
    experts_per_token: int = 0
    norm_shares: bool = False  # the shares of a token's experts sum to 1
    delta: families.Delta | None = None  # its layers, and the gate of the others' attention
    # Factors, None for 1; `query_scale` comes beside head_dim**-0.5.
    embed_scale: float | None = None
    query_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float | None = None

    @property
    def period(self) -> int:
        """Returns of how many layers one has attention."""
        return self.delta.period if self.delta else 1


def decoder_config(config: dict[str, Any], field: str) -> DecoderConfig:
    """Reads a Hugging Face config of a decoder of one of `families.DECODERS`.

    Raises:
        UserError: another family, quantised weights, something that is not built here, or a value
            of a wrong type or range.
    """
    read = Reader(config, field, families.DECODERS, "a decoder")
    family = families.DECODERS[read.name]
    key, activation = family.activation
    read.expect(key, (activation,))
    read.expect("use_sliding_window", (False, None))
    for key in family.unset:
        if config.get(key):
            raise read.wrong(key, "unset, as that part is not built here")
    num_heads, model_dim = read.size("num_attention_heads"), read.size("hidden_size")
    num_kv_heads = read.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise read.wrong("num_key_value_heads", f"a divisor of the {num_heads} attention heads")
    head_dim = read.size("head_dim", None) or read.head_dim(model_dim, num_heads)
    if head_dim % 2:
        raise errors.UserError(f"{field}: config.json gives heads of odd size {head_dim}.")
    rotary_dim = _rotary_dim(read, family, head_dim)
    attention_bias = read.flag("attention_bias")
    scales = family.scales(read, model_dim, head_dim) if family.scales else {}
    kept: dict[str, Any] = {k: None if scale == 1 else scale for k, scale in scales.items()}
    if family.experts:
        from diq_jax.models import experts

        kept |= experts.read(read)
    return DecoderConfig(
        family=read.name,
        num_layers=read.size("num_hidden_layers"),
        model_dim=model_dim,
        ffn_dim=read.size("moe_intermediate_size" if family.experts else "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=read.size("vocab_size"),
        norm_eps=read.epsilon("rms_norm_eps"),
        rope=rope_lib.read_rope(read, rotary_dim),
        max_positions=read.size("max_position_embeddings"),
        # transformers leaves this key out where it equals the library's default for the family.
        tied_head=read.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=family.output_bias and attention_bias,
        mlp_bias=family.mlp_bias and read.flag("mlp_bias"),
        activation=activation,
        **{name: getattr(family, name) for name in SAME},
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        **_layers_apart(read, family, rotary_dim),
        **kept,
    )


def _rotary_dim(read: "Reader", family: families.Family, head_dim: int) -> int:
    where = read.over(read.get("rope_parameters", dict, {}))
    part = where.get("partial_rotary_factor", float, 1.0)
    if part != 1.0 and not family.partial_rotary:
        raise where.wrong("partial_rotary_factor", f"1: {read.name} models rotate whole heads")
    dim = int(head_dim * part) if 0 < part <= 1 else 0
    if dim < 2 or dim % 2:
        raise where.wrong("partial_rotary_factor", f"an even share of the {head_dim} of a head")
    return dim


def _layers_apart(read: "Reader", family: families.Family, rotary_dim: int) -> dict[str, Any]:
    """Returns the fields of DecoderConfig that say how layers differ from each other."""
    count = read.size("num_hidden_layers")
    if family.delta:
        from diq_jax.models import delta

        return {"sliding_window": None, "delta": delta.read(read)}
    # null is no window; without the key there is the family's.
    window = read.size("sliding_window", None) if family.sliding_window else None
    found: dict[str, Any] = {"sliding_window": window}
    types = read.get("layer_types", list, None)
    more = (rope_lib.SLIDING,) * bool(window is not None and family.layer_types)
    allowed = (rope_lib.FULL, *more)
    if types is not None and (family.layer_types or not family.sliding_window):
        known = all(kind in allowed for kind in types)
        if not known or (family.layer_types and len(types) != count):
            expected = " or ".join(sorted(allowed))
            raise read.wrong("layer_types", f"{expected} for each layer")
    if family.layer_types and window is not None:
        every = read.get("sliding_window_pattern", int, family.full_every)
        if every is not None and every < 1:
            raise read.wrong("sliding_window_pattern", "at least 1")
        if types is not None:
            sliding = tuple(kind == rope_lib.SLIDING for kind in types)
        else:
            sliding = tuple(every is None or (i + 1) % every != 0 for i in range(count))
        found["sliding_layers"] = None if all(sliding) else sliding
        if family.sliding_theta:
            own = rope_lib.read_rope(read, rotary_dim, rope_lib.SLIDING, family.sliding_theta)
            found["sliding_rope"] = own
    if family.unrotated_every:
        every = read.get("no_rope_layer_interval", int, family.unrotated_every)
        if every < 1:
            raise read.wrong("no_rope_layer_interval", "at least 1")
        plain = [int((i + 1) % every != 0) for i in range(count)]
        rotated = read.get("no_rope_layers", list, plain)
        if len(rotated) != count or not all(type(x) is int and x in (0, 1) for x in rotated):
            raise read.wrong("no_rope_layers", f"a list of {count} numbers, each 0 or 1")
        found["rotated_layers"] = tuple(x == 1 for x in rotated)
    return found


_REQUIRED = object()


class Reader:
    """Reads typed values of a config.json of one of the families `built`."""

    def __init__(
        self, config: dict[str, Any], field: str, built: dict[str, families.Family], what: str
    ) -> None:
        self.config, self.field, self.built, self.what = config, field, built, what
        name = config.get("model_type")
        if not isinstance(name, str) or name not in built:
            from diq_jax.models import unsupported

            missing = unsupported.MISSING.get(name) if isinstance(name, str) else None
            has = f" (it has {missing}, which is not built here)" if missing else ""
            raise errors.UserError(
                f"{field}: model family {reading.shorten(name)} is not supported here{has}:"
                f" {what} is needed, one of {', '.join(built)}."
            )
        self.name = name
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
            default = self.built[self.name].defaults.get(key, default)
            if default is _REQUIRED:
                raise errors.UserError(f"{self.field}: config.json has no {key!r}.")
            return default
        reading.check_record(self.config, f"{self.field}: config.json", {}, {key: kinds})
        return value

    def over(self, values: dict[str, Any]) -> "Reader":
        """Returns a reader for which `values` come before the config's own."""
        return Reader({**self.config, **values}, self.field, self.built, self.what)

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        """Returns a whole number from 1 to what LARGEST says."""
        value = self.get(key, int, default)
        most = LARGEST.get(key, MANY)
        if value is not None and not 1 <= value <= most:
            raise self.wrong(key, f"between 1 and {most:,}")
        return value

    def flag(self, key: str) -> bool:
        """Returns true or false; false without a value."""
        return self.get(key, bool, False)

    def positive(self, key: str) -> float:
        """Returns a number above 0."""
        value = float(self.get(key, float))
        if not 0 < value < math.inf:
            raise self.wrong(key, "positive")
        return value

    def epsilon(self, key: str) -> float:
        """Returns a number from 0 to below 1."""
        value = float(self.get(key, float))
        if not 0 <= value < 1:
            raise self.wrong(key, "a small number that is not negative")
        return value

    def head_dim(self, model_dim: int, num_heads: int) -> int:
        """Returns the size of a head where all share the width of the model."""
        if model_dim % num_heads:
            raise self.wrong("hidden_size", f"a multiple of the {num_heads} attention heads")
        return model_dim // num_heads

    def expect(self, key: str, allowed: Sequence[Any]) -> None:
        """Raises UserError for another value; without one it is the first."""
        value = self.config.get(key, allowed[0])
        if value not in allowed:
            raise errors.UserError(
                f"{self.field}: config.json has {key}={reading.shorten(value)}; supported:"
                f" {', '.join(str(a) for a in allowed if a is not None)}."
            )

    def wrong(self, key: str, expected: str) -> errors.UserError:
        """Returns the error that says what a value must be."""
        shown = reading.shorten(self.config.get(key))
        return errors.UserError(
            f"{self.field}: config.json has {key}={shown}; it must be {expected}."
        )
