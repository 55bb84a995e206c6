"""The model families that are built, one row each, and what stands in the way of some others."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Delta:
    """Describes the gated delta layers of a model (delta.py)."""

    period: int  # layers, the last with attention
    key_heads: int
    value_heads: int  # H, a multiple of the key heads
    key_dim: int  # Ck
    value_dim: int  # Cv
    taps: int  # W


@dataclasses.dataclass(frozen=True)
class Family:
    """Describes what the models of one model_type have, beside what each config.json says."""

    architecture: str  # the class in transformers
    # What transformers documents for a config.json without the key, as early conversions are.
    defaults: dict[str, Any]
    activation: tuple[str, str] = ("hidden_act", "silu")  # its key, and the one that is built
    norms: str = "before"  # before attention and MLP, after them, or around them
    qk_norm: bool = False
    joint_qk_norm: bool = False  # one norm over all heads
    qkv_bias: bool = False  # always; otherwise where attention_bias is true
    output_bias: bool = False  # where attention_bias is true
    mlp_bias: bool = False  # where mlp_bias is true
    fused: bool = False  # one matrix for q, k and v, and one for gate and up
    unit_offset: bool = False  # norms multiply by 1 + their gain
    sliding_window: bool = False  # in all layers, or in those that layer_types names
    layer_types: bool = False
    full_every: int | None = None  # without layer_types, which layers see everything
    sliding_theta: str | None = None  # the key of the sliding layers' own rope_theta
    partial_rotary: bool = False
    unrotated_every: int | None = None  # without no_rope_layers, which layers are not rotated
    experts: bool = False  # a mixture of them in each layer, in place of the MLP
    delta: bool = False  # gated delta layers, and between them attention with a gate
    scales: Callable[[Any, int, int], dict[str, float]] | None = None
    unset: tuple[str, ...] = ()  # keys of parts that are not built here


def _gemma_scales(read: Any, model_dim: int, head_dim: int) -> dict[str, float]:
    scalar = read.positive("query_pre_attn_scalar")
    return {"embed_scale": model_dim**0.5, "query_scale": (head_dim / scalar) ** 0.5}


def _granite_scales(read: Any, model_dim: int, head_dim: int) -> dict[str, float]:
    return {
        "embed_scale": read.positive("embedding_multiplier"),
        "residual_scale": read.positive("residual_multiplier"),
        "query_scale": read.positive("attention_multiplier") * head_dim**0.5,
        "logit_scale": 1.0 / read.positive("logits_scaling"),
    }


# A new family is a row here, what its layer needs in decoder.py, and its tensors' names in hf.py
# (and gguf_names.py).
DECODERS = {
    "llama": Family(
        "LlamaForCausalLM", {"rope_theta": 1e4, "max_position_embeddings": 2048},
        output_bias=True, mlp_bias=True,
    ),
    "mistral": Family(
        "MistralForCausalLM", {"rope_theta": 1e4, "sliding_window": 4096}, sliding_window=True
    ),
    "ministral": Family(
        "MinistralForCausalLM", {"rope_theta": 1e4, "sliding_window": 4096},
        sliding_window=True, layer_types=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"rope_theta": 1e4}, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", {"rope_theta": 1e4}, output_bias=True, qk_norm=True),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", {"rope_theta": 1e4, "num_key_value_heads": 4},
        output_bias=True, qk_norm=True, experts=True,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        {
            # As of Gemma 3 below.
            "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
            "head_dim": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4, "partial_rotary_factor": 0.25, "full_attention_interval": 4,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
        output_bias=True, qk_norm=True, unit_offset=True, partial_rotary=True, delta=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            # The text_config of a multimodal checkpoint leaves out what equals these.
            "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
            "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096,
            "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"), norms="around", qk_norm=True,
        output_bias=True, unit_offset=True, sliding_window=True, layer_types=True, full_every=6,
        sliding_theta="rope_local_base_freq", scales=_gemma_scales,
        unset=(
            "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"rope_theta": 1e4, "max_position_embeddings": 2048},
        norms="after", qk_norm=True, joint_qk_norm=True, output_bias=True,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"rope_theta": 5e5, "max_position_embeddings": 2048, "sliding_window": 4096},
        norms="after", qk_norm=True, joint_qk_norm=True, output_bias=True, sliding_window=True,
        layer_types=True, full_every=4, sliding_theta="rope_theta",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rope_theta": 1e4, "max_position_embeddings": 4096, "sliding_window": None},
        fused=True, sliding_window=True, partial_rotary=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"rope_theta": 2e6, "num_key_value_heads": 4, "tie_word_embeddings": True},
        output_bias=True, mlp_bias=True, unrotated_every=4,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "rope_theta": 1e4, "max_position_embeddings": 2048, "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
        },
        output_bias=True, mlp_bias=True, scales=_granite_scales,
    ),
}  # fmt: skip
ENCODERS = {
    "bert": Family("BertModel", {}),
    # Positions begin behind the number of the padding token.
    "roberta": Family("RobertaModel", {"pad_token_id": 1}),
    "modernbert": Family(
        "ModernBertModel",
        {
            "norm_eps": 1e-5, "local_attention": 128, "rope_theta": 160000.0,
            "local_rope_theta": 10000.0, "global_rope_theta": 160000.0,
        },
        activation=("hidden_activation", "gelu"), layer_types=True, full_every=3,
        unset=("attention_bias", "mlp_bias", "norm_bias"),
    ),
}  # fmt: skip
