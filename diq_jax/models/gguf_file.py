"""GGUF files of llama.cpp: metadata as a Hugging Face config, tensors under Hugging Face names.

Format, and what an absent key means: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from diq_jax.common import errors

# general.architecture -> transformers class. Mistral files carry the architecture llama.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(
    path: pathlib.Path,
) -> tuple[dict, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Opens a file without reading its weights.

    Returns:
        The config (config.json with Hugging Face names), the shape (out, in) of each tensor by
        Hugging Face name, and a function that reads one tensor by that name: float32, float16 and
        bfloat16 as stored, quantised types dequantised to float32.

    Raises:
        UserError: damaged file, unknown architecture or tensor, a type that gguf cannot dequantise.
    """
    metadata, stored = _read(path)
    config = _config(path, metadata, stored)
    tensors = {_name(path, t.name): t for t in stored.values() if t.name != ROPE_FACTORS}
    shapes = {name: _shape(t) for name, t in tensors.items()}
    # llama.cpp rotates neighbouring rows of llama models; Hugging Face rotates the two halves.
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    permuted = heads if config["model_type"] == "llama" else {}

    def read(name: str) -> np.ndarray:
        array = _values(path, tensors[name])
        module = name.split(".")[-2]
        return _half_split_rows(array, permuted[module]) if module in permuted else array

    return config, shapes, read


def read_metadata(path: pathlib.Path) -> dict[str, Any]:
    """All key-value pairs of the file. Raises UserError where it is damaged."""
    return _read(path)[0]


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as e:
        raise errors.UserError(
            f"{path} is not a whole GGUF file of version 2 or 3: it ends after"
            f" {path.stat().st_size} bytes and cannot be read to the end of what its header lists"
            f" ({e})."
        ) from None
    if reader.byte_order != "I":
        raise errors.UserError(f"{path} has the byte order of another kind of machine.")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(path: pathlib.Path, metadata: dict[str, Any], tensors: dict) -> dict:
    architecture = metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise errors.UserError(
            f"{path} has the architecture {architecture!r}; expected {', '.join(ARCHITECTURES)}."
            f"{errors.nearest(architecture, ARCHITECTURES)}"
        )

    def required(key: str) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise errors.UserError(f"{path} lacks the metadata key {architecture}.{key}.")
        return metadata[f"{architecture}.{key}"]

    def optional(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if "token_embd.weight" not in tensors:
        raise errors.UserError(f"{path} holds no token_embd.weight: it is not a whole model.")
    width, heads = required("embedding_length"), required("attention.head_count")
    head_dim = optional("attention.key_length", optional("rope.dimension_count", width // heads))
    config = {
        "model_type": architecture,
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "hidden_size": width,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _shortest_float(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_float(optional("rope.freq_base", 10000.0)),  # the format's default
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if (scaling := _rope_scaling(path, optional, tensors, config)) is not None:
        config["rope_scaling"] = scaling
    if (window := optional("attention.sliding_window")) is not None:
        config["sliding_window"] = window
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token_id
    return config


def _rope_scaling(
    path: pathlib.Path, optional: Callable, tensors: dict, config: dict
) -> dict | None:
    """Linear and YaRN scaling are metadata; Llama 3's is a tensor of divisors, one a frequency.

    Published Llama 3.1 to 3.3 are recognised by their divisors and get rope_type "llama3", which
    transformers knows. Others get {"rope_type": "gguf_factors", "factors": [...]} with
    inverse_frequency[i] = rope_theta ** (-2 i / head_dim) / factors[i].
    """
    if ROPE_FACTORS in tensors:
        factors = _values(path, tensors[ROPE_FACTORS])
        llama3 = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        known = _llama3_factors(config["rope_theta"], config["head_dim"], llama3)
        if known.shape == factors.shape and np.allclose(known, factors, rtol=1e-4):
            return llama3
        return {"rope_type": "gguf_factors", "factors": factors.tolist()}
    kind = optional("rope.scaling.type", "linear" if optional("rope.scale_linear") else "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind}
    scaling["factor"] = optional("rope.scaling.factor", optional("rope.scale_linear", 1.0))
    if (length := optional("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict) -> np.ndarray:
    """The divisors (head_dim / 2,) that llama.cpp's converter writes for a Llama 3 config."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _shortest_float(value: float) -> float:
    """1e-05 for a float32 that Python shows as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _name(path: pathlib.Path, stored: str) -> str:
    """The Hugging Face name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
    if match is not None:
        layer, module, kind = match.groups()
        if layer is None and module in NAMES:
            return f"{NAMES[module]}.{kind}"
        if layer is not None and module in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[module]}.{kind}"
    raise errors.UserError(
        f"{path} holds the tensor {stored!r}, which a dense {', '.join(ARCHITECTURES)} model lacks."
    )


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _values(path: pathlib.Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    kind = gguf.GGMLQuantizationType
    if tensor.tensor_type in (kind.F32, kind.F16):
        return np.array(tensor.data)
    if tensor.tensor_type == kind.BF16:
        return np.array(tensor.data).view(ml_dtypes.bfloat16)
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise errors.UserError(
            f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which the gguf package"
            " cannot dequantise."
        ) from None


def _half_split_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or a bias) of each head from pairs (0, C/2, 1, C/2 + 1, ...) back to (0, 1, 2, ...)."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
