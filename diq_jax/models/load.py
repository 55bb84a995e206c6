"""A decoder with its config, on its devices, from any of the places `model.path` may name."""

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config as run_config
from diq_jax.models import checkpoint, config, decoder, hf
from diq_jax.run import devices

# The last model of each placement, which the stages of one run share; it ends with the placement.
_last: weakref.WeakKeyDictionary[devices.Placement, tuple[Any, "Model"]]
_last = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Parameters placed by the partition rules, and what they were read from."""

    params: dict[str, Any]
    cfg: config.DecoderConfig
    hf_config: dict[str, Any]
    path: str

    def logits(self, tokens: np.ndarray | jax.Array) -> jax.Array:
        """Computes next-token logits: (B, T) int -> (B, T, V) float32.

        Every token sees itself and all tokens before it in its row, so that padding belongs at the
        end of a row.
        """
        return _logits(self.params, jnp.asarray(tokens, jnp.int32), self.cfg)


def load_model(path: str, dtype: str = "float32", field: str = "path") -> Model:
    """Loads a decoder and spreads it over all devices of this process.

    Args:
        path: a folder, a GGUF file, package:NAME/FILE or a hub id (checkpoint.resolve).
        dtype: of the parameters: float32, bfloat16 or float16.
        field: what names `path` in messages.

    Raises:
        UserError: there is no such model, or one that cannot be read or is not supported.
    """
    return _read(path, dtype, devices.make_placement(run_config.Parallel()), field)


def load(path: str, dtype: str, placement: devices.Placement, field: str = "model.path") -> Model:
    """Loads a decoder on `placement`, or returns it if it was the last one loaded there."""
    key, model = _last.pop(placement, (None, None))
    if key != (path, dtype):
        model = _read(path, dtype, placement, field)
    _last[placement] = (path, dtype), model
    return model


def _read(path: str, dtype: str, placement: devices.Placement, field: str) -> Model:
    source = checkpoint.open_checkpoint(path, field)
    cfg = config.decoder_config(source.config, field)
    place = placement.place(decoder.PARTITION_RULES, decoder.size(cfg) * jnp.dtype(dtype).itemsize)
    params = hf.load_decoder(source, cfg, jnp.dtype(dtype), field, place)
    return Model(params, cfg, source.config, path)


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, tokens, cfg):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = decoder.apply(params, cfg, tokens, positions, jnp.ones_like(tokens))
    return decoder.logits(params, cfg, hidden)
