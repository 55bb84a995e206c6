"""Trained weights as a folder that transformers loads."""

import collections
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import errors, trees
from diq_jax.models import checkpoint, hf, tokenizer
from diq_jax.run import artifacts, processes, reading

MAX_SHARD_BYTES = 5 * 10**9
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"


def save_model(
    folder: str | os.PathLike, params: hf.Params, hf_config: dict[str, Any], base: str, field: str
) -> None:
    """Writes a whole model beside the tokenizer of `base`, a model path that `field` names.

    config.json comes last (checkpoint.save_checkpoint): a folder that has one is whole.

    Raises:
        UserError: `base` has no tokenizer, or a damaged generation_config.json; or a parameter is
            not finite, perhaps since its last cast: then nothing is written.
    """
    if bad := trees.not_finite(params):
        raise errors.UserError(
            f"{folder} is not written: {bad[0]} holds numbers that are NaN or infinite in the "
            "model's dtype; try a lower learning_rate, or model.dtype=float32."
        )
    tok = tokenizer.load_tokenizer(base, field)
    if not processes.is_first():
        collections.deque(hf.decoder_tensors(params), 0)  # of each it may hold a part
        return
    generation = _generation_config(checkpoint.resolve(base, field), tok)
    _write_tokenizer(pathlib.Path(folder), tok)
    artifacts.sync_tree(folder)
    artifacts.write_json(pathlib.Path(folder) / GENERATION, generation)
    hf.save_decoder(folder, params, hf_config, MAX_SHARD_BYTES)


def _write_tokenizer(folder: pathlib.Path, tok: Any) -> None:
    """Writes the tokenizer, in names that transformers 4 knows too."""
    tok.save_pretrained(folder)
    found = reading.read_record(folder / TOKENIZER, {})
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    artifacts.write_json(folder / TOKENIZER, found)


def _generation_config(base: pathlib.Path, tok: Any) -> dict[str, Any]:
    """Returns the base's own, or else the tokens that begin, end and pad a text."""
    if (base / GENERATION).is_file():
        return reading.read_record(base / GENERATION, {})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(tok, name) for name in names}
    return {name: token for name, token in found.items() if token is not None}


@jax.jit
def merge_adapter(params: hf.Params, adapter: dict[str, Any]) -> hf.Params:
    """Returns the parameters with W + A B scale in place of each adapted W, summed in float32."""
    if "scale" not in adapter:
        return params | {name: merge_adapter(params[name], adapter[name]) for name in adapter}
    kernel, scale = params["kernel"], adapter["scale"][..., None, None]
    change = jnp.einsum("...ir,...ro->...io", adapter["a"], adapter["b"]) * scale
    return params | {"kernel": (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
