"""torch.save's files without torch: equal to torch.load, and no pickle runs."""

import builtins
import collections
import json
import os
import pathlib
import pickle
import shutil
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from reference import torch

from diq_jax import errors
from diq_jax.models import checkpoint, torch_file

FIELD = "difficulty.encoder"
LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = {"zip": {}, "legacy": LEGACY, "protocol 4": {"pickle_protocol": 4}}


def _as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _random_tensor(rng):
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64,
              torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    shape = rng.integers(0 if rng.random() < 0.1 else 1, 6, rng.integers(0, 4)).tolist()
    tensor = torch.from_numpy(np.asarray(rng.normal(scale=40, size=shape)))
    tensor = tensor.to(dtypes[rng.integers(len(dtypes))])
    if tensor.ndim > 1 and rng.random() < 0.5:
        tensor = tensor.permute(*rng.permutation(tensor.ndim).tolist())
    if tensor.ndim and tensor.shape[0] > 1 and rng.random() < 0.5:
        tensor = tensor[1 :: rng.integers(1, 3)]
    return tensor


@pytest.mark.parametrize("layout", FORMATS)
def test_random_tensors_equal_torch_load(tmp_path, layout):
    rng = np.random.default_rng(0)
    file = tmp_path / "pytorch_model.bin"
    for _ in range(20):
        state = collections.OrderedDict((f"t{i}", _random_tensor(rng)) for i in range(8))
        state["shared"] = state["t0"].reshape(-1)[:1]  # another view of a storage
        state["parameter"] = torch.nn.Parameter(torch.ones(2, 3).t())
        state._metadata = {"": {"version": 1}}
        torch.save(state, file, **FORMATS[layout])
        opened, expected = torch_file.open_torch(file), torch.load(file, weights_only=False)
        assert set(opened) == set(expected)
        for name, tensor in expected.items():
            array, held = opened[name].read(), _as_numpy(tensor)
            assert array.dtype == held.dtype == np.dtype(opened[name].dtype)
            assert array.shape == held.shape == opened[name].shape
            np.testing.assert_array_equal(array, held, err_msg=name)
            array[...] = 0  # the caller's own, not the file's


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_torch_files_is_a_checkpoint(tmp_path, layout, sharded):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}
    (tmp_path / "config.json").write_text("{}")
    if sharded:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, key in zip(names, tensors, strict=True):
            torch.save({key: tensors[key]}, tmp_path / name, **FORMATS[layout])
        index = {"metadata": {}, "weight_map": dict(zip(tensors, names, strict=True))}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin", **FORMATS[layout])
    opened = checkpoint.open_checkpoint(tmp_path, FIELD)
    assert len(opened.files) == (4 if sharded else 2)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(opened.read(name), _as_numpy(tensor))
    before = opened.fingerprint
    torch.save({"b": tensors["b"] + 1, "a": tensors["a"]}, opened.files[-1], **FORMATS[layout])
    assert checkpoint.open_checkpoint(tmp_path, FIELD).fingerprint != before


def _save(file, value, **options):
    torch.save(value, file, **options)
    return file


def _refused(file, message=None):
    with pytest.raises(errors.UserError, match=message) as caught:
        torch_file.open_torch(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    return str(caught.value)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "system"),
        (builtins.eval, ("open({!r}, 'w')",), ".eval"),
        (builtins.exec, ("open({!r}, 'w')",), ".exec"),
        (builtins.getattr, (str, "join"), ".getattr"),
        (open, ("{}", "w"), "open"),
        (pickle.loads, (b"cos\nsystem\n(S'touch {}'\ntR.",), "pickle.loads"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (pathlib.Path.touch, (pathlib.PurePosixPath("x"),), ".getattr"),
        (np.frombuffer, (b"1234",), "numpy"),
    ],
)
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, options, function, arguments, named):
    touched = tmp_path / "touched"
    arguments = [a.format(touched) if isinstance(a, str) else a for a in arguments]
    for i, value in enumerate(
        (
            Call(function, *arguments),
            {"a": torch.ones(2), "b": Call(function, *arguments)},
            {"a": Call(collections.OrderedDict, state={"x": Call(function, *arguments)})},
            {"a": [Call(torch.Size, (Call(function, *arguments),))]},
        )
    ):
        message = _refused(_save(tmp_path / f"{i}.bin", value, **options))
        assert "its pickle names" in message and (named in message or "torch.Size" in message)
    assert not touched.exists()


def _with_pickle(tmp_path, code):
    """A file of torch.save whose data.pkl is another."""
    whole, file = tmp_path / "whole.bin", tmp_path / "changed.bin"
    torch.save({"a": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = code if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
    return file


ODICT = b"ccollections\nOrderedDict\n"
STORAGE = (
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def _tensor(offset=b"K\x00", shape=b"(K\x04t", strides=b"(K\x01t"):
    """A pickle of {"a": tensor} over the storage of `_with_pickle`."""
    tensor = REBUILD + STORAGE + offset + shape + strides + b"\x89" + ODICT + b")RtR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."


DEEP = b"\x80\x02)" + b"q\x00h\x00\x86" * 60
ODD = {
    "no dict": (b"\x80\x02]." , "no dict of tensors"),
    "a number": (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is a int"),
    "a name of its own": (b"\x80\x02cos\nsystem\n.", "names 'os.system'"),
    "an escape": (b"\x80\x02cos\\q\nsystem\n.", "names"),
    "a dotted name": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "names"),
    "a name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names 'os.system'"),
    "a name of numbers": (b"\x80\x04K\x01K\x02\x93.", "is damaged"),
    "an instance": (b"(ios\nsystem\n.", "the opcode INST"),
    "an object": (b"(cos\nsystem\no.", "names"),
    "an extension": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "a class made new": (b"\x80\x02" + ODICT + b")\x81.", "the opcode NEWOBJ"),
    "a call of a tensor type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls a function"),
    "a call with arguments": (b"\x80\x02" + ODICT + b"(]tR.", "calls a function"),
    "a call of a number": (b"\x80\x02K\x01)R.", "calls a function"),
    "state of a name": (b"\x80\x02" + ODICT + b"}b.", "sets the state"),
    "state of a list": (b"\x80\x02]}b.", "sets the state"),
    "a large memo": (b"\x80\x02}r\xff\xff\xff\xff.", None),
    "an absent memo": (b"\x80\x02h\x07.", "is damaged"),
    "long bytes": (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "is damaged"),
    "a long text": (b"\x80\x02X\xff\xff\xff\x7f.", "is damaged"),
    "a long number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "the opcode LONG4"),
    "a doubling tuple": (DEEP + b".", "no dict of tensors"),
    "a doubling key": (b"\x80\x02}" + DEEP[2:] + b"K\x01s.", "neither texts nor numbers"),
    "a doubling name": (b"\x80\x02cos\n" + b"x" * 10**5 + b"\n.", "names 'os.xxx"),
    "an empty stack": (b"\x80\x020.", "opcode POP"),
    "no mark": (b"\x80\x02}}u.", "is damaged"),
    "no end": (b"\x80\x02}", "is damaged"),
    "nothing": (b"", "is damaged"),
    "many opcodes": (b"\x80\x02" + b"N" * 2**20 + b".", "no dict of tensors"),
    "many bytes": (b"\x80\x02" + b"N" * 2**23 + b".", "bytes; expected at most"),
    "another persistent id": (b"\x80\x02X\x01\x00\x00\x00xQ.", "no storage of a plain type"),
    "an offset beyond": (_tensor(offset=b"K\x01"), "'a' reaches beyond its storage of 4"),
    "a negative offset": (_tensor(offset=b"J\xff\xff\xff\xff"), "calls a function"),
    "a size beyond": (_tensor(shape=b"(K\x05t"), "'a' reaches beyond"),
    "a stride beyond": (_tensor(shape=b"(K\x02t", strides=b"(K\x04t"), "'a' reaches beyond"),
    "a large size of stride 0": (_tensor(shape=b"(J\0\0\0\x40t", strides=b"(K\x00t"), "reaches"),
    "a negative stride": (_tensor(strides=b"(J\xff\xff\xff\xfft"), "calls a function"),
    "a real size": (_tensor(shape=b"(G@\x10\0\0\0\0\0\0t"), "calls a function"),
    "lists as sizes": (_tensor(shape=b"]"), "calls a function"),
    "sizes and strides": (_tensor(shape=b"(K\x02K\x02t"), "calls a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pickles(tmp_path, name):
    code, message = ODD[name]
    file = _with_pickle(tmp_path, code)
    start = time.perf_counter()
    if message is None:
        assert torch_file.open_torch(file) == {}
    else:
        _refused(file, message)
    assert time.perf_counter() - start < 5


def test_the_pickles_above_are_of_the_right_form(tmp_path):
    opened = torch_file.open_torch(_with_pickle(tmp_path, _tensor()))
    np.testing.assert_array_equal(opened["a"].read(), np.ones(4, np.float32))


def test_types_that_are_no_plain_numbers_are_refused(tmp_path):
    for tensor, named in (
        (torch.ones(4).to(torch.float8_e4m3fn), "torch"),
        (torch.ones(4, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(4).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ):
        assert named in _refused(_save(tmp_path / "x.bin", {"a": tensor}), "its pickle names")


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 3, 40, 400, -400, -9, -1])
def test_truncated_files(tmp_path, options, keep):
    file = _save(tmp_path / "x.bin", {"a": torch.ones(200), "b": torch.ones(3)}, **options)
    file.write_bytes(file.read_bytes()[:keep])
    _refused(file)


def test_archives_that_torch_does_not_write(tmp_path):
    whole = _save(tmp_path / "whole.bin", {"a": torch.ones(4)})
    file = tmp_path / "x.bin"

    def rewritten(change, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w", method) as new:
            for entry in old.infolist():
                for name, content in change(entry.filename, old.read(entry)):
                    new.writestr(name, content)
        return file

    _refused(rewritten(lambda n, c: [(n, c)], zipfile.ZIP_DEFLATED), "compresses or encrypts")
    _refused(rewritten(lambda n, c: [(n.replace("data.pkl", "x"), c)]), "no data.pkl")
    big = rewritten(lambda n, c: [(n, b"big" if n.endswith("byteorder") else c)])
    _refused(big, "byte order")
    _refused(rewritten(lambda n, c: [] if "/data/" in n else [(n, c)]), "missing or shorter")
    _refused(rewritten(lambda n, c: [(n, c[:-1] if "/data/" in n else c)]), "missing or shorter")
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(lambda n, c: [(n, c)] * 2)
    _refused(file, "twice")
    file.write_bytes(b"<html>Not found</html>")
    _refused(file, "is no file of torch.save")


def test_old_names_of_norms(tmp_path):
    """The first BERT checkpoints call a norm's gain gamma and its bias beta."""
    import transformers

    from diq_jax.models import encoder, hf

    settings = transformers.BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(settings)
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    state = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "old" / "pytorch_model.bin", **LEGACY)
    loaded = []
    for folder in ("new", "old"):
        source = checkpoint.open_checkpoint(tmp_path / folder, FIELD)
        cfg = encoder.encoder_config(source.config, FIELD)
        loaded.append(dict(hf.encoder_tensors(hf.load_encoder(source, cfg, np.float32, FIELD))))
    for name, array in loaded[0].items():
        np.testing.assert_array_equal(loaded[1][name], array)
