"""Rotary embedding: what a config.json says about it, the frequencies, and the turn itself."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import errors
from diq_jax.run import reading
from diq_jax.trees import Array

# What each kind of rotary scaling reads, and what it may read.
SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "gguf_factors": ("factors",),
}  # fmt: skip
LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
YARN_OPTIONS = (
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
# The settings that are read apart, or that other kinds have.
COMMON = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings",
    "mrope_section", "mrope_interleaved",  # of images; a text's three positions are one
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"  # config.json may give each its own


@dataclasses.dataclass(frozen=True)
class Rope:
    """Describes a rotary embedding, a kind of `SETTINGS` with its sorted constants."""

    theta: float
    kind: str
    settings: tuple[tuple[str, Any], ...]


def read_rope(read: Any, dim: int, layers: str = FULL, theta_key: str = "rope_theta") -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        read: a config.Reader.
        dim: how many numbers of a head are turned.
        layers: FULL or SLIDING, where the two differ; only FULL has the scaling of `rope_scaling`.
        theta_key: the key of theta outside `rope_parameters`.

    Raises:
        UserError: a kind of scaling or a setting that is not built here, or of a wrong type.
    """
    given = read.get("rope_parameters", dict, {})
    if set(given) & {FULL, SLIDING}:
        given = given.get(layers) or {}
        if not isinstance(given, dict):
            raise read.wrong("rope_parameters", f"an object for {layers}")
    merged = {**(read.get("rope_scaling", dict, {}) if layers == FULL else {}), **given}
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = read.get(theta_key, float)
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in tuple(SETTINGS):
        why = " (its frequencies change with the length of a batch)" * (kind in LENGTH_DEPENDENT)
        raise errors.UserError(
            f"{read.field}: rope scaling {reading.shorten(kind)} is not supported{why}; expected"
            f" one of {', '.join(SETTINGS)}."
        )
    if kind in ("yarn", "llama3") and merged.get("original_max_position_embeddings") is None:
        merged["original_max_position_embeddings"] = read.size("max_position_embeddings")
    inner = read.over(merged)
    options = YARN_OPTIONS if kind == "yarn" else ()
    known = {*COMMON, *SETTINGS[kind], *options}
    if unknown := sorted(k for k in merged if k not in known and merged[k] is not None):
        raise errors.UserError(
            f"{read.field}: config.json has the rope setting {unknown[0]!r}, which {kind!r} scaling"
            f" does not read; it reads {', '.join((*SETTINGS[kind], *options)) or 'none'}."
        )
    settings = {key: _setting(inner, key, dim) for key in ("rope_theta", *SETTINGS[kind])}
    theta = float(settings.pop("rope_theta"))
    if kind == "llama3" and not settings["low_freq_factor"] < settings["high_freq_factor"]:
        raise inner.wrong("high_freq_factor", "larger than low_freq_factor")
    if kind == "yarn":
        if theta <= 1:
            raise inner.wrong("rope_theta", "above 1")
        settings |= _yarn(inner, theta, dim, settings)
    return Rope(theta=theta, kind=kind, settings=tuple(sorted(settings.items())))


def _setting(read: Any, key: str, dim: int) -> Any:
    whole = key == "original_max_position_embeddings"
    value = read.size(key) if whole else read.get(key, list if key == "factors" else float)
    values = value if key == "factors" else [value]
    if not all(type(v) in (int, float) and 0 < v < math.inf for v in values):
        raise read.wrong(key, "positive")
    if key == "factors" and len(values) != dim // 2:
        raise read.wrong(key, f"a list of {dim // 2} numbers")
    return tuple(value) if key == "factors" else value


def _yarn(read: Any, theta: float, dim: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what YaRN (arXiv 2309.00071) derives from its settings.

    Between the frequencies that turn `beta_fast` and `beta_slow` times within the trained context,
    the scaling fades in; queries and keys grow by `attention_factor`.
    """
    given = {
        key: _setting(read, key, dim)
        for key in YARN_OPTIONS
        if key != "truncate" and read.config.get(key) is not None
    }

    def growth(scale):
        return 1.0 if settings["factor"] <= 1 else 0.1 * scale * math.log(settings["factor"]) + 1.0

    def place(turns):
        context = settings["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    factor = growth(1.0)
    if "mscale" in given and "mscale_all_dim" in given:
        factor = growth(given["mscale"]) / growth(given["mscale_all_dim"])
    low, high = place(given.get("beta_fast", 32.0)), place(given.get("beta_slow", 1.0))
    if read.get("truncate", bool, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does: no division by 0
    return {"low": low, "high": high, "attention_factor": given.get("attention_factor", factor)}


def frequencies(rope: Rope, dim: int) -> jax.Array:
    """Computes inverse frequencies, (dim // 2,) float32, scaled as the checkpoint says."""
    settings = dict(rope.settings)
    inverse = rope.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if rope.kind == "linear":
        return inverse / settings["factor"]
    if rope.kind == "gguf_factors":
        return inverse / jnp.asarray(settings["factors"], jnp.float32)
    if rope.kind == "llama3":
        # Llama 3.1: wavelengths beyond the trained context are stretched by `factor`, short ones
        # are kept.
        context = settings["original_max_position_embeddings"]
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = context * inverse / (2 * jnp.pi)
        smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * inverse / settings["factor"] + smooth * inverse
    if rope.kind == "yarn":
        low, high = settings["low"], settings["high"]
        scaled = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return scaled * inverse / settings["factor"] + (1 - scaled) * inverse
    return inverse


def amplitude(rope: Rope) -> float:
    """Returns what queries and keys grow by as they are turned."""
    return dict(rope.settings).get("attention_factor", 1.0)


def rotate(
    x: jax.Array, positions: Array, frequencies: jax.Array, amplitude: jax.Array | float = 1.0
) -> jax.Array:
    """Turns queries or keys, half-split layout.

    Args:
        x: (B, T, heads, C).
        positions: (B, T) int32.
        frequencies: (R // 2,) float32: the first R numbers of a head are turned, the rest pass.
            Angles stay float32 since bfloat16 cannot count to 8192.
        amplitude: what the turned part is multiplied by.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    if not (isinstance(amplitude, float) and amplitude == 1.0):
        cos, sin = cos * amplitude, sin * amplitude
    half = frequencies.shape[0]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    if 2 * half < x.shape[-1]:
        turned = jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
    return turned
