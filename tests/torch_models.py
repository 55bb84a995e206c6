"""Tiny random models of transformers, of every decoder family."""

import numpy as np
import torch
import transformers

from diq_jax.models import checkpoint, config, hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

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
}


def torch_model(name, folder=None):
    """A tiny random model; norms and biases are random too, so that a misplaced one shows."""
    family, extra = FAMILIES[name]
    cfg = getattr(transformers, f"{family}Config")(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(cfg).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.ndim == 1)
    if folder:
        model.save_pretrained(folder)
    return model


def load(folder, dtype=np.float32):
    source = checkpoint.open_checkpoint(str(folder), "model.path")
    cfg = config.decoder_config(source.config, "model.path")
    return hf.load_decoder(source, cfg, dtype, "model.path"), cfg, source.config
