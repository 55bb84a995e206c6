"""Trained weights as a folder that transformers loads: tokenizer, safetensors, config.json."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import errors, trees
from diq_jax.models import hf, tokenizer
from diq_jax.run import artifacts

MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    folder: str | os.PathLike, params: hf.Params, hf_config: dict[str, Any], base: str, field: str
) -> None:
    """Writes a whole model beside the tokenizer of `base`, a model path that `field` names.

    config.json comes last (checkpoint.save_checkpoint): a folder that has one is whole.

    Raises:
        UserError: `base` has no tokenizer; or a parameter is not finite, perhaps since its last
            cast: then nothing is written.
    """
    if bad := trees.not_finite(params):
        raise errors.UserError(
            f"{folder} is not written: {bad[0]} holds numbers that are NaN or infinite in the "
            "model's dtype; try a lower learning_rate, or model.dtype=float32."
        )
    tokenizer.load_tokenizer(base, field).save_pretrained(folder)
    artifacts.sync_tree(folder)
    hf.save_decoder(folder, params, hf_config, MAX_SHARD_BYTES)


@jax.jit
def merge_adapter(params: hf.Params, adapter: dict[str, Any]) -> hf.Params:
    """Returns the parameters with W + A B scale in place of each adapted W, summed in float32."""
    merged = jax.tree.map(lambda x: x, params)
    for group, linears in adapter["layers"].items():
        for name, leaves in linears.items():
            node = merged["layers"][group][name]
            change = jnp.einsum("nir,nro->nio", leaves["a"], leaves["b"])
            change = change * leaves["scale"][:, None, None]
            kernel = node["kernel"]
            node["kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return merged
