"""GGUF files of llama.cpp: metadata as a Hugging Face config, tensors under Hugging Face names.

Format, and what an absent key means: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from diq_jax import errors
from diq_jax.models import families, gguf_header, stored
from diq_jax.run import reading

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
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes what files of one general.architecture hold."""

    model_type: str
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # beside LAYER_NAMES
    # llama.cpp rotates neighbouring rows of these; Hugging Face rotates the two halves.
    paired_rows: bool = False
    # {key of the file: key of config.json}, numbers
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)


# Mistral files carry the architecture llama.
ARCHITECTURES = {
    "llama": Architecture("llama", paired_rows=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3": Architecture(
        "gemma3_text", POST_NORMS, numbers={"rope.freq_base_swa": "rope_local_base_freq"}
    ),
    "olmo2": Architecture("olmo2", POST_NORMS),
    "phi3": Architecture("phi3", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "granite": Architecture(
        "granite", paired_rows=True,
        numbers={
            "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
        },
    ),
    "smollm3": Architecture("smollm3", paired_rows=True),
}  # fmt: skip
# gemma3 files leave these out; llama.cpp has them as constants (src/models/gemma3.cpp).
GEMMA3_27B_LAYERS, GEMMA3_PATTERN = 62, 6
ROPE_FACTORS = "rope_freqs.weight"
PLAIN = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.BF16: stored.BFLOAT16,
}


def open_gguf(path: pathlib.Path) -> tuple[dict, dict[str, stored.Tensor]]:
    """Opens a file without reading its weights.

    Returns:
        The config (config.json with Hugging Face names) and the tensors by Hugging Face name:
        float32, float16 and bfloat16 as stored, quantised types dequantised to float32.

    Raises:
        UserError: damaged file, unknown architecture or tensor.
    """
    header = gguf_header.read_header(path)
    config = _config(path, header)
    kind = ARCHITECTURES[header.metadata["general.architecture"]]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    permuted = heads if kind.paired_rows else {}
    offset = families.DECODERS[kind.model_type].unit_offset

    def tensor(name, listed):
        module = name.split(".")[-2]

        def read(part: stored.Part = ()):
            array = _values(path, header, listed)
            if offset and module.endswith("norm"):
                array = array - 1  # llama.cpp stores 1 + the gain
            if module in permuted:
                array = _half_split_rows(array, permuted[module])
            return array[part]

        return stored.Tensor(listed.shape, _dtype(listed.kind), read)

    tensors = {}
    for listed in header.tensors.values():
        if listed.name != ROPE_FACTORS:
            name = _name(path, listed.name, kind)
            tensors[name] = tensor(name, listed)
    return config, tensors


def _config(path: pathlib.Path, header: gguf_header.Header) -> dict:
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise errors.UserError(
            f"{path} has the architecture {reading.shorten(architecture)}, which is not supported;"
            f" supported are {', '.join(ARCHITECTURES)}."
        )

    def required(key: str, kind: type) -> Any:
        if f"{architecture}.{key}" not in metadata:
            raise errors.UserError(f"{path} lacks the metadata key {architecture}.{key}.")
        return optional(key, kind)

    def optional(key: str, kind: type, default: Any = None) -> Any:
        name = f"{architecture}.{key}"
        reading.check_record(metadata, str(path), {}, {name: kind})
        return metadata.get(name, default)

    if "token_embd.weight" not in tensors:
        raise errors.UserError(f"{path} holds no token_embd.weight: it is not a whole model.")
    width, heads = required("embedding_length", int), required("attention.head_count", int)
    rotated = optional("rope.dimension_count", int, width // max(heads, 1))
    head_dim = optional("attention.key_length", int, rotated)
    if rotated != head_dim and "attention.key_length" in metadata:
        raise errors.UserError(
            f"{path} rotates {rotated} of the {head_dim} numbers of a head; expected all."
        )
    epsilon = required("attention.layer_norm_rms_epsilon", float)
    kind = ARCHITECTURES[architecture]
    family = families.DECODERS[kind.model_type]
    config = {
        "model_type": kind.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": required("feed_forward_length", int),
        "num_hidden_layers": required("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        family.activation[0]: family.activation[1],
        "max_position_embeddings": required("context_length", int),
        "rms_norm_eps": _shortest_float(epsilon),
        # 10,000 is the format's default.
        "rope_theta": _shortest_float(optional("rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    if (scaling := _rope_scaling(path, optional, header, config)) is not None:
        config["rope_scaling"] = scaling
    for key, name in kind.numbers.items():
        if (number := optional(key, float)) is not None:
            config[name] = _shortest_float(number)
    if kind.model_type == "gemma3_text":
        config["sliding_window_pattern"] = GEMMA3_PATTERN
        largest = config["num_hidden_layers"] == GEMMA3_27B_LAYERS
        config["query_pre_attn_scalar"] = width // heads if largest else head_dim
    config |= _window(path, architecture, optional("attention.sliding_window", int), config)
    config["architectures"] = [families.DECODERS[config["model_type"]].architecture]
    return config | _special_tokens(path, metadata)


def _window(path: pathlib.Path, architecture: str, window: int | None, config: dict) -> dict:
    """Returns what a sliding window adds to the config. Raises UserError where none is built."""
    family = families.DECODERS[config["model_type"]]
    if not window or not (family.layer_types or window < config["max_position_embeddings"]):
        return {}
    if architecture != "llama" and not family.sliding_window:
        raise errors.UserError(
            f"{path} has a sliding window of {window} positions, which is not built here for"
            f" {architecture}."
        )
    moved = {"model_type": "mistral"} if architecture == "llama" else {}
    return {**moved, "sliding_window": window}


def _special_tokens(path: pathlib.Path, metadata: dict) -> dict[str, int]:
    stored_as = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")}
    reading.check_record(metadata, str(path), {}, dict.fromkeys(stored_as.values(), int))
    found = {name: metadata[key] for name, key in stored_as.items() if key in metadata}
    return {f"{name[:3]}_token_id": token for name, token in found.items()}


def _rope_scaling(
    path: pathlib.Path, optional: Callable, header: gguf_header.Header, config: dict
) -> dict | None:
    """Reads the scaling of rotary frequencies.

    Linear and YaRN scaling are metadata; Llama 3's is a tensor of divisors, one a frequency.

    Published Llama 3.1 to 3.3 are recognised by their divisors and get rope_type "llama3", which
    transformers knows. Others get {"rope_type": "gguf_factors", "factors": [...]} with
    inverse_frequency[i] = rope_theta ** (-2 i / head_dim) / factors[i].
    """
    if ROPE_FACTORS in header.tensors:
        factors = _values(path, header, header.tensors[ROPE_FACTORS])
        if factors.shape != (config["head_dim"] // 2,) or not factors.min() > 0:
            raise errors.UserError(
                f"{path} has the divisors {ROPE_FACTORS} of shape {factors.shape}; expected"
                f" {config['head_dim'] // 2} positive numbers."
            )
        llama3 = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        with np.errstate(all="ignore"):  # rope_theta is not checked yet
            known = _llama3_factors(config["rope_theta"], config["head_dim"], llama3)
        if np.allclose(known, factors, rtol=1e-4):
            return llama3
        return {"rope_type": "gguf_factors", "factors": factors.tolist()}
    old = optional("rope.scale_linear", float)
    kind = optional("rope.scaling.type", str, "linear" if old else "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind}
    scaling["factor"] = optional("rope.scaling.factor", float, old or 1.0)
    if (length := optional("rope.scaling.original_context_length", int)) is not None:
        scaling["original_max_position_embeddings"] = length
    for ours in ("beta_fast", "beta_slow"):
        if (beta := optional(f"rope.scaling.yarn_{ours}", float)) is not None:
            scaling[ours] = beta
    if optional("rope.scaling.attn_factor", float) is not None:
        raise errors.UserError(
            f"{path} has rope.scaling.attn_factor, which converters mean in several ways; expected"
            " the model's safetensors folder."
        )
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict) -> np.ndarray:
    """Returns the divisors (head_dim / 2,) that llama.cpp writes for a Llama 3 config."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _shortest_float(value: float) -> float:
    """Gives 1e-05 for a float32 that Python shows as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _name(path: pathlib.Path, stored: str, kind: Architecture) -> str:
    """Renames blk.3.attn_q.weight to model.layers.3.self_attn.q_proj.weight."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
    if match is not None:
        layer, module, leaf = match.groups()
        if layer is None and module in NAMES:
            return f"{NAMES[module]}.{leaf}"
        names = LAYER_NAMES | kind.names
        if layer is not None and module in names:
            return f"model.layers.{layer}.{names[module]}.{leaf}"
    raise errors.UserError(
        f"{path} holds the tensor {stored!r}, which a dense {kind.model_type} model lacks."
    )


def _dtype(kind: gguf.GGMLQuantizationType) -> str:
    """Returns the dtype that `_values` gives, or the name of a type that it does not read."""
    if kind in PLAIN:
        return PLAIN[kind].name
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return "float32" if block > 1 else kind.name


def _values(
    path: pathlib.Path, header: gguf_header.Header, listed: gguf_header.Listed
) -> np.ndarray:
    count = math.prod(listed.shape)
    if listed.kind in PLAIN:
        array = np.frombuffer(header.data, PLAIN[listed.kind], count, listed.start)
        return array.reshape(listed.shape).copy()
    rows = np.frombuffer(header.data, np.uint8, listed.size, listed.start)
    try:
        shape = gguf.quants.quant_shape_to_byte_shape(listed.shape, listed.kind)
        with np.errstate(all="ignore"):  # who loads the numbers checks that they are finite
            return gguf.quants.dequantize(rows.reshape(shape), listed.kind)
    except NotImplementedError:
        raise errors.UserError(
            f"{path} stores {listed.name} as {listed.kind.name}, which the gguf package"
            " cannot dequantise."
        ) from None


def _half_split_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows (or bias) of each head, (0, C/2, 1, C/2 + 1, ...), in order (0, 1, 2, ...)."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
