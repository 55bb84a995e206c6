"""Parameters from Hugging Face tensor names and back: stacked over layers, kernels turned to (in,
out).
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from diq_jax.common import errors, trees
from diq_jax.models import checkpoint, decoder, encoder

# Path in the tree -> tensor name; {i} is the layer. Kernels are stored (out, in) on their side.
DECODER_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
} | {
    f"layers/{group}/{module}/{leaf}": f"model.layers.{{i}}.{theirs}.{module}.{name}"
    for group, theirs, modules in (
        ("attn", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", "mlp", ("gate_proj", "up_proj", "down_proj")),
    )
    for module in modules
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))
}
DECODER_NAMES |= {
    f"layers/attn/{norm}/scale": f"model.layers.{{i}}.self_attn.{norm}.weight"
    for norm in ("q_norm", "k_norm")
}

ENCODER_NAMES = {
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

# Tensors of other heads, buffers that are recomputed, and the pooler, which nothing here reads.
IGNORED = re.compile(r"rotary_emb\.inv_freq|position_ids$|^pooler\.|^cls\.|^classifier\.")


def load_decoder(
    source: checkpoint.Checkpoint, cfg, dtype, field: str, place: Callable | None = None
):
    """The parameters of a decoder; `place(path, array)` puts each leaf on its devices as it is
    read.

    Raises:
        UserError: missing, unused and misshaped tensors, all in one message.
    """
    ignored = {"lm_head.weight"} if cfg.tied_head else set()
    return _load(source, decoder.shapes(cfg), DECODER_NAMES, "", ignored, dtype, field, place)


def load_encoder(source: checkpoint.Checkpoint, cfg, dtype, field: str):
    """The parameters of an encoder, whether its tensors carry the prefix `bert.` or not."""
    prefix = "bert." if any(name.startswith("bert.") for name in source.names) else ""
    return _load(source, encoder.shapes(cfg), ENCODER_NAMES, prefix, set(), dtype, field, None)


def decoder_tensors(params) -> Iterator[tuple[str, np.ndarray]]:
    """(tensor name, array) of a decoder, one at a time, as transformers names and turns them."""
    return _tensors(params, DECODER_NAMES)


def encoder_tensors(params) -> Iterator[tuple[str, np.ndarray]]:
    return _tensors(params, ENCODER_NAMES)


def save_decoder(
    folder: str | os.PathLike, params, hf_config: dict[str, Any], max_shard_bytes: int
):
    """Writes a folder that transformers' AutoModelForCausalLM loads."""
    dtype = str(params["embed"]["embedding"].dtype)
    settings = {**hf_config, "dtype": dtype, "torch_dtype": dtype}
    checkpoint.save_checkpoint(folder, settings, decoder_tensors(params), max_shard_bytes)


def _load(source, shapes, names, prefix, ignored, dtype, field, place):
    wanted = trees.named_leaves(shapes, lambda x: isinstance(x, tuple))
    place = place or (lambda path, array: jnp.asarray(array))
    available = set(source.names)
    problems, used = [], set(ignored)
    for path, shape in wanted.items():
        for name, part in _parts(prefix + names[path], path, shape):
            used.add(name)
            if name not in available:
                problems.append(f"missing {name}")
            elif source.shape(name) != part:
                problems.append(f"{name} has shape {source.shape(name)}, expected {part}")
    unused = sorted(n for n in available - used if not IGNORED.search(n.removeprefix(prefix)))
    problems += [f"unused {name}" for name in unused]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise errors.UserError(
            f"{field}: the tensors of {source.path} do not fit its config.json: "
            f"{'; '.join(problems[:8])}{more}."
        )

    def read(path, shape):
        stacked = path.startswith("layers/")
        leaf = np.empty(shape, dtype)
        for i, (name, _) in enumerate(_parts(prefix + names[path], path, shape)):
            array = source.read(name)
            array = array.T if path.endswith("/kernel") else array
            if stacked:
                leaf[i] = array
            else:
                leaf = array.astype(dtype)
        return place(path, leaf)

    return trees.map_named(read, shapes, lambda x: isinstance(x, tuple))


def _parts(name, path, shape):
    """(tensor name, its shape as stored) for each layer of a leaf."""
    stacked = path.startswith("layers/")
    part = shape[1:] if stacked else shape
    part = part[::-1] if path.endswith("/kernel") else part
    count = shape[0] if stacked else 1
    return [(name.format(i=i), part) for i in range(count)]


def _tensors(params, names):
    for path, leaf in trees.named_leaves(params).items():
        parts = leaf if path.startswith("layers/") else [leaf]
        for i, part in enumerate(parts):
            array = np.asarray(part)
            yield (
                names[path].format(i=i),
                np.ascontiguousarray(array.T if path.endswith("/kernel") else array),
            )
