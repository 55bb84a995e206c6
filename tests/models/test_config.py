"""config.json: every value has a type and a range, and what it leaves out is what transformers
documents.
"""

import numpy as np
import pytest
import tiny
import transformers

from diq_jax import errors
from diq_jax.models import config, encoder, families, rope, unsupported

FIELD = "model.path"
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 64, "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    "max_position_embeddings": 128, "hidden_act": "gelu",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ODD = [0, -1, 10**12, 2**64, 2.5, 32.0, "32", True, [32], {}, 1e308]
SIZES = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
]  # fmt: skip

EXPERTS = tiny.HF_CONFIG | {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip


def _refused(read, settings, message):
    with pytest.raises(errors.UserError, match=rf"^{FIELD}: .*{message}") as caught:
        read(settings, FIELD)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("value", ODD, ids=str)
def test_sizes_of_decoders_are_checked(key, value):
    _refused(config.decoder_config, tiny.HF_CONFIG | {key: value}, key)


@pytest.mark.parametrize("key", [*SIZES, "type_vocab_size"])
@pytest.mark.parametrize("value", ODD, ids=str)
def test_sizes_of_encoders_are_checked(key, value):
    _refused(encoder.encoder_config, BERT | {key: value}, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30; it must be a multiple of the 4 attention heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3; it must be a divisor of the 4"),
        ({"head_dim": 7}, "heads of odd size 7"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05"),
        ({"rms_norm_eps": 1}, "rms_norm_eps=1; it"),
        ({"rope_theta": 0}, "rope_theta=0; it must be positive"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor=0.0; it must be positive"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "'mscale'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "larger than low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1.5}}, "whole number"),
        ({"rope_scaling": {"rope_type": "gguf_factors", "factors": [1.0]}}, "list of 4 numbers"),
        ({"rope_scaling": {"rope_type": "gguf_factors", "factors": ["x"] * 4}}, "positive"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act=\\['silu'\\]; supported: silu"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "=50.0; it must be unset"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "the length of a batch"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "full_attention for each"),
    ],
)
def test_values_of_decoders_are_checked(change, message):
    _refused(config.decoder_config, tiny.HF_CONFIG | change, message)


@pytest.mark.parametrize(
    "family", ["gemma3", "gpt9", "mixtral", "llama4", "Llama", "", None, 3, ["llama"]]
)
def test_families_that_are_not_supported_are_refused_without_a_guess(family):
    with pytest.raises(errors.UserError) as caught:
        config.decoder_config(tiny.HF_CONFIG | {"model_type": family}, FIELD)
    has = unsupported.MISSING.get(family) if isinstance(family, str) else None
    part = f" (it has {has}, which is not built here)" if has else ""
    assert (has is not None) == (family in ("mixtral", "llama4"))
    assert str(caught.value) == (
        f"model.path: model family {family!r} is not supported here{part}: a decoder is needed, one"
        f" of {', '.join(families.DECODERS)}."
    )
    with pytest.raises(errors.UserError, match="an encoder is needed, one of bert, roberta"):
        encoder.encoder_config(BERT | {"model_type": family}, FIELD)


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused_by_name(method):
    for read, base in ((config.decoder_config, tiny.HF_CONFIG), (encoder.encoder_config, BERT)):
        settings = base | {"quantization_config": QUANTISED[method]}
        _refused(read, settings, f"quantization_config \\('{method}'\\): quantised weights are not")
    _refused(config.decoder_config, tiny.HF_CONFIG | {"compression_config": {"x": 1}}, "quantised")
    _refused(config.decoder_config, tiny.HF_CONFIG | {"quantization_config": "int8"}, "'int8'")


def test_what_a_config_leaves_out_is_what_transformers_documents():
    def without(family, *keys):
        settings = {k: v for k, v in EXPERTS.items() if k not in keys}
        settings["model_type"] = family
        made = transformers.AutoConfig.for_model(**settings | {"pad_token_id": None})
        return config.decoder_config(settings, FIELD), made

    for family in families.DECODERS:
        ours, theirs = without(family, "rope_theta")
        documented = theirs.rope_parameters
        expected = documented.get("full_attention", documented)["rope_theta"]
        assert ours.rope == rope.Rope(expected, "default", ())
        if ours.sliding_rope:
            assert ours.sliding_rope.theta == documented["sliding_attention"]["rope_theta"]
    ours, theirs = without("llama", "max_position_embeddings")
    assert ours.max_positions == theirs.max_position_embeddings == 2048
    ours, theirs = without("mistral", "sliding_window")
    assert ours.sliding_window == theirs.sliding_window == 4096
    settings = tiny.HF_CONFIG | {"model_type": "mistral", "sliding_window": None}
    assert config.decoder_config(settings, FIELD).sliding_window is None
    for key in ("rms_norm_eps", "vocab_size"):
        settings = {k: v for k, v in tiny.HF_CONFIG.items() if k != key}
        _refused(config.decoder_config, settings, f"config.json has no '{key}'")


def test_an_encoder_that_masks_the_future_is_refused():
    _refused(encoder.encoder_config, BERT | {"is_decoder": True}, "is_decoder=True")
    assert np.isclose(encoder.encoder_config(BERT, FIELD).norm_eps, 1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5; it must be at most the 4 experts"),
        ({"num_experts": 0}, "num_experts=0; it must be between 1"),
        ({"num_experts": None}, "no 'num_experts'"),
        ({"moe_intermediate_size": None}, "no 'moe_intermediate_size'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2; supported: 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]; supported: \[\]"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    ],
)
def test_values_of_experts_are_checked(change, message):
    cfg = config.decoder_config(EXPERTS, FIELD)
    assert (cfg.num_experts, cfg.experts_per_token, cfg.norm_shares, cfg.ffn_dim) == (
        4,
        2,
        True,
        24,
    )
    with pytest.raises(errors.UserError, match=message):
        config.decoder_config(EXPERTS | change, FIELD)
