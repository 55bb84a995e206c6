"""Every decoder family equals transformers on torch: logits, padding, export and reload."""

import functools
import gc
import json
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from reference import torch
from torch_models import FAMILIES, load, torch_model

from diq_jax import errors, trees
from diq_jax.data import batches, example
from diq_jax.models import attention, checkpoint, config, decoder, hf, loss
from diq_jax.models import load as load_lib


@functools.partial(jax.jit, static_argnames="cfg")
def _forward(params, cfg, tokens, positions, mask):
    return decoder.logits(params, cfg, decoder.apply(params, cfg, tokens, positions, mask))


def jax_logits(params, cfg, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    return np.asarray(_forward(params, cfg, tokens, positions, mask.astype(np.int32)))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_torch(name, tmp_path):
    model = torch_model(name, tmp_path)
    params, cfg, _ = load(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, (2, 24))
    for padded in (slice(0), slice(-7, None), slice(None, 7)):
        mask = np.ones((2, 24), np.int64)
        mask[0, padded] = 0
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.no_grad():
            expected = model(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
            ).logits.numpy()
        got = jax_logits(params, cfg, tokens, mask)
        np.testing.assert_allclose(got[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)


MULTIMODAL = {
    "gemma3": (
        transformers.Gemma3ForConditionalGeneration, "vision_tower",
        dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        ),
        dict(mm_tokens_per_image=4),
    ),
    "qwen3_5": (
        transformers.Qwen3_5ForConditionalGeneration, "model.visual",
        dict(
            depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=32,
            patch_size=4, num_position_embeddings=16,
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("gemma3", "model.language_model."), ("gemma3", "language_model.model."),
        ("qwen3_5", "model.language_model."),
    ],
)  # fmt: skip
def test_the_language_model_of_a_multimodal_checkpoint(name, prefix, tmp_path):
    """Gemma 3 with an image encoder, as MedGemma is, by the names of new and old checkpoints; and
    Qwen3.5, which also has a head for several tokens at once.
    """
    text = torch_model(name).config.to_dict()
    kind, images, vision, more = MULTIMODAL[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(text_config=text, vision_config=vision, **more)).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "new")
    source = checkpoint.open_checkpoint(str(tmp_path / "new"), "model.path")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    whole = checkpoint.open_weights(tmp_path / "new" / checkpoint.WEIGHTS)
    tensors = {k: t.read() for k, t in whole.items()}
    assert any(images in name for name in tensors)
    named = {
        re.sub(r"^(model\.language_model|language_model\.model)\.", prefix, k): v
        for k, v in tensors.items()
    }
    if name == "qwen3_5":
        named["mtp.fc.weight"] = np.ones((32, 64), np.float32)
    checkpoint.save_checkpoint(tmp_path / "a", settings, named.items(), 10**9)
    params, cfg, hf_config = load(tmp_path / "a")
    assert hf_config["model_type"] == source.config["model_type"] == f"{name}_text"
    tokens, mask = np.arange(20)[None] + 3, np.ones((1, 20), np.int64)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    got = jax_logits(params, cfg, tokens, mask)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    hf.save_decoder(tmp_path / "b", params, hf_config, max_shard_bytes=10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits, expected, atol=1e-4)


def test_a_loaded_model_has_logits_and_ends_with_its_placement(tmp_path):
    torch_model("qwen3", tmp_path)
    model = load_lib.load_model(str(tmp_path))
    tokens, mask = np.arange(24).reshape(2, 12), np.ones((2, 12), np.int32)
    expected = jax_logits(model.params, model.cfg, tokens, mask)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)
    placement = tiny.placement()
    first = load_lib.load(str(tmp_path), "float32", placement)
    assert load_lib.load(str(tmp_path), "float32", placement) is first
    alive = weakref.ref(load_lib.load(str(tmp_path), "bfloat16", placement))
    del first, placement
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", FAMILIES)
def test_export_loads_in_transformers_and_here(name, tmp_path):
    torch_model(name, tmp_path / "a")
    params, cfg, hf_config = load(tmp_path / "a")
    hf.save_decoder(tmp_path / "b", params, hf_config, max_shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    tokens, mask = np.arange(24)[None], np.ones((1, 24), np.int64)
    before = jax_logits(params, cfg, tokens, mask)
    again, cfg_again, _ = load(tmp_path / "b")
    assert cfg_again == cfg
    np.testing.assert_allclose(jax_logits(again, cfg, tokens, mask), before, atol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(before, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_near_float32(tmp_path):
    torch_model("llama", tmp_path)
    exact, cfg, _ = load(tmp_path)
    rounded, _, _ = load(tmp_path, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
    tokens, mask = np.arange(24)[None], np.ones((1, 24), np.int64)
    a, b = jax_logits(exact, cfg, tokens, mask), jax_logits(rounded, cfg, tokens, mask)
    assert b.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=0.06 * np.abs(a).max())


def test_missing_unused_and_misshaped_tensors_are_reported_together(tmp_path):
    model = torch_model("llama", tmp_path)
    tensors = {k: v.numpy() for k, v in model.state_dict().items()}
    settings = checkpoint.open_checkpoint(str(tmp_path), "model.path").config
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.extra.weight"] = np.zeros(2, np.float32)
    checkpoint.save_checkpoint(tmp_path / "bad", settings, tensors.items(), 10**9)
    with pytest.raises(errors.UserError) as caught:
        load(tmp_path / "bad")
    for part in ("missing model.norm.weight", "(3, 3), expected (48, 32)", "unused model.extra"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt9"}, "model family 'gpt9' is not supported"),
        ({"model_type": "bert"}, "a decoder is needed"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rms_norm_eps": None}, "no 'rms_norm_eps'"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "with the length of a batch"),
    ],
)
def test_unsupported_configs_are_refused(change, message, tmp_path):
    torch_model("llama", tmp_path)
    settings = checkpoint.open_checkpoint(str(tmp_path), "model.path").config | change
    with pytest.raises(errors.UserError, match=r"model\.path") as caught:
        config.decoder_config(settings, "model.path")
    assert message in str(caught.value)


def test_attention_in_blocks_equals_attention_at_once(monkeypatch):
    key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key[0], (2, 37, 4, 8))
    k, v = (jax.random.normal(k, (2, 37, 2, 8)) for k in key[1:])
    segments = jnp.asarray(np.repeat([[1, 1, 2], [1, 2, 2]], [10, 10, 17], axis=1))
    whole = attention.attend(q, k, v, segments, causal=True)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    np.testing.assert_allclose(attention.attend(q, k, v, segments, causal=True), whole, atol=1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_in_loops_over_blocks_has_the_same_derivatives(monkeypatch, window):
    """37 tokens are 9 blocks of 4 in three loops, and one that is left over."""
    key = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(k, (2, 37, 4, 8)) for k in key[:2])
    k, v = (jax.random.normal(k, (2, 37, 2, 8)) for k in key[2:])
    segments = jnp.asarray(np.repeat([[1, 1, 2], [1, 2, 2]], [10, 10, 17], axis=1))
    positions = jnp.broadcast_to(jnp.arange(37), (2, 37))

    def total(q, k, v):
        out = attention.attend(q, k, v, segments, True, window, positions)
        return jnp.sum(out * weight.reshape(out.shape))

    at_once = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    monkeypatch.setattr(attention, "STRIPS", 3)
    found = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    tangent = jax.jvp(total, (q, k, v), (q, k, v))[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, at_once)
    jvp = sum(jnp.vdot(x, g) for x, g in zip((q, k, v), at_once[1], strict=True))
    np.testing.assert_allclose(tangent, jvp, atol=1e-4)


def test_segments_do_not_see_each_other():
    cfg = tiny.decoder_config()
    params = decoder.init(jax.random.key(0), cfg, jnp.float32)
    tokens = jnp.arange(12)[None]
    apart = [
        decoder.apply(params, cfg, tokens[:, s], jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
        for s in (slice(0, 6), slice(6, 12))
    ]
    packed = decoder.apply(
        params, cfg, tokens, jnp.tile(jnp.arange(6), 2)[None], jnp.repeat(jnp.array([[1, 2]]), 6, 1)
    )
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-5)


def test_causality_by_gradients():
    """The gradient of position t's hidden state is zero at every later token's embedding."""
    cfg = tiny.decoder_config()
    params = decoder.init(jax.random.key(0), cfg, jnp.float32)
    tokens = jnp.arange(10)[None]

    def at(embedding, t):
        shared = params | {"embed": {"embedding": embedding}}
        ones = jnp.ones((1, 10), jnp.int32)
        return decoder.apply(shared, cfg, tokens, jnp.arange(10)[None], ones)[0, t].sum()

    gradient = jax.grad(at)(params["embed"]["embedding"], 4)
    assert np.abs(gradient[:5]).min(axis=1).max() > 0
    assert not np.any(gradient[5:10])


def test_every_parameter_has_one_partition_rule_and_every_rule_a_parameter():
    names = set()
    biases = {"tied_head": False, "qkv_bias": True, "output_bias": True, "qk_norm": True}
    apart = (tiny.APART[name] for name in ("delta", "experts"))
    for extra in ({}, biases, {"fused": True, "norms": "around"}, *apart):
        shapes = trees.named_leaves(
            decoder.shapes(tiny.decoder_config(**extra)), lambda x: type(x) is tuple
        )
        names |= set(shapes)
        for name, shape in shapes.items():
            matches = [s for rule, s in decoder.PARTITION_RULES if re.fullmatch(rule, name)]
            assert len(matches) == 1 and len(matches[0]) == len(shape), name
    for rule, _ in decoder.PARTITION_RULES:
        assert any(re.fullmatch(rule, name) for name in names), rule


@pytest.fixture(name="losses_case")
def _losses_case():
    cfg = tiny.decoder_config()
    rng = np.random.default_rng(1)
    rows = []
    for i, (length, prompt) in enumerate([(9, 4), (14, 2), (5, 4)]):
        ids = rng.integers(0, 50, length).astype(np.int32)
        labels = np.where(np.arange(length) < prompt, -100, ids).astype(np.int32)
        rows.append(example.Encoded(str(i), ids, labels))
    return decoder.init(jax.random.key(0), cfg, jnp.float32), cfg, rows


def test_loss_equals_a_full_log_softmax(losses_case):
    params, cfg, rows = losses_case
    batch = batches.make_batch(rows, 4, 16, 16)
    got = {r: loss.example_losses(params, cfg, batch, r) for r in ("mean", "sum")}
    for i, row in enumerate(rows):
        logits = jax_logits(params, cfg, row.input_ids[None], np.ones((1, len(row.input_ids))))
        nll = -jax.nn.log_softmax(logits[0, :-1])[np.arange(len(row.labels) - 1), row.input_ids[1:]]
        scored = np.asarray(nll)[row.labels[1:] != -100]
        np.testing.assert_allclose(got["mean"][i], scored.mean(), rtol=1e-5)
        np.testing.assert_allclose(got["sum"][i], scored.sum(), rtol=1e-5)
    assert got["mean"][3] == got["sum"][3] == 0


def test_head_blocks_padding_side_and_remat_change_nothing(losses_case, monkeypatch):
    params, cfg, rows = losses_case
    whole = loss.token_losses(params, cfg, batches.make_batch(rows, 3, 16, 16))
    left = loss.token_losses(
        params, cfg, tiny.padded_left(batches.make_batch(rows, 3, 20, 16)), remat=True
    )
    monkeypatch.setattr(loss, "HEAD_BLOCK", 9)
    blocked = loss.token_losses(params, cfg, batches.make_batch(rows, 3, 16, 16))
    np.testing.assert_allclose(left, whole, atol=1e-5)
    np.testing.assert_allclose(blocked, whole, atol=1e-6)
