"""Tiny random models of transformers, of every decoder family."""

import numpy as np
import transformers
from reference import torch

from diq_jax.models import checkpoint, config, hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# Of three layers the second sees everything.
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES = {
    "llama": ("Llama", {}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-yarn": ("Qwen3", {"rope_parameters": YARN}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-plain-shares": (
        "Qwen3Moe",
        {
            "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
            "attention_bias": True, "tie_word_embeddings": True,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "num_hidden_layers": 6, "full_attention_interval": 3, "head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        },
    ),
    "qwen3_5-biases-tied": (
        "Qwen3_5",
        {
            "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 24, "linear_num_key_heads": 3, "linear_num_value_heads": 3,
            "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3,
            "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {
                "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
                "mrope_section": [2, 2, 2], "mrope_interleaved": True,
            },
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 5, "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **MIXED,
        },
    ),
    "ministral": ("Ministral", {"sliding_window": 5, "head_dim": 8, **MIXED}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4, "pad_token_id": None}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 5, "pad_token_id": None,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            **MIXED,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 5, "pad_token_id": None}),
    "phi4-partial": (
        "Phi3", {"partial_rotary_factor": 0.75, "pad_token_id": None, "tie_word_embeddings": True},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "pad_token_id": None}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.3, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


def torch_model(name, folder=None):
    """A tiny random model; norms and biases are random too, so that a misplaced one shows."""
    family, extra = FAMILIES[name]
    kind = f"{family}Text" if family in ("Gemma3", "Qwen3_5") else family
    cfg = getattr(transformers, f"{kind}Config")(**SHAPE | extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(cfg).eval()
    for name, parameter in model.named_parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.ndim == 1)
        if name.endswith("A_log"):
            parameter.data -= 3  # or a state would forget within two tokens
    if folder:
        model.save_pretrained(folder)
    return model


def load(folder, dtype=np.float32):
    source = checkpoint.open_checkpoint(str(folder), "model.path")
    cfg = config.decoder_config(source.config, "model.path")
    return hf.load_decoder(source, cfg, dtype, "model.path"), cfg, source.config
