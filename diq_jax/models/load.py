"""A decoder with its config, on its devices, from any of the places `model.path` may name."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from diq_jax.models import checkpoint, config, decoder, hf
from diq_jax.run import devices


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Parameters placed by the partition rules, and what they were read from."""

    params: dict
    cfg: config.DecoderConfig
    hf_config: dict[str, Any]
    path: str


@functools.lru_cache(maxsize=1)
def load(path: str, dtype: str, placement: devices.Placement, field: str = "model.path") -> Model:
    """Loads a decoder; the last one is kept, since the stages of one run share it."""
    source = checkpoint.open_checkpoint(path, field)
    cfg = config.decoder_config(source.config, field)
    place = placement.place(decoder.PARTITION_RULES)
    params = hf.load_decoder(source, cfg, jnp.dtype(dtype), field, place)
    return Model(params, cfg, source.config, path)
