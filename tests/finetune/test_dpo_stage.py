"""The stage dpo on a tiny model: its artifacts, what a kill leaves, devices, and mistakes.

As a script, `test_dpo_stage.py WORKDIR [STRATEGY]` runs the stage on a prepared folder.
"""

import os
import pathlib
import shutil
import signal
import sys
import time

import folders
import forks
import jax
import numpy as np
import pytest
import tiny

from diq_jax import config, errors
from diq_jax.finetune import dpo_stage
from diq_jax.models import checkpoint, lora
from diq_jax.models import config as model_config
from diq_jax.run import devices, parts, reading, stages

PAIRS = 20
OUTPUTS = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "losses.jsonl",
    "reference.parquet",
)


def make_context(workdir, strategy="mesh", data=0, **settings) -> stages.Context:
    tree = config.default()
    tree.model.path = str(workdir / "model")
    tree.parallel.strategy, tree.parallel.data = strategy, data
    tree.evaluate.batch_tokens = 512  # several batches of the reference
    tree.finetune.checkpoint_every_steps, tree.finetune.rank = 3, 2
    tree.finetune.dpo.data = str(workdir / "pairs.jsonl")
    defaults = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-2}
    for name, value in {**defaults, **settings}.items():
        tree.finetune.dpo[name] = value
    resolved = config.resolve(tree)
    return stages.Context(resolved, workdir, devices.make_placement(resolved.parallel))


def shape(workdir):
    opened = checkpoint.open_checkpoint(workdir / "model", "test")
    return model_config.decoder_config(opened.config, "test")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir with a tiny model, the adapter that finetune leaves, and preferences."""
    workdir = tmp_path_factory.mktemp("prepared")
    folders.decoder(workdir / "model")
    adapter = lora.init(jax.random.key(0), shape(workdir), "(q|v)_proj", 2, 4.0, False, "test")
    lora.save_peft(workdir / "finetune/adapter", adapter, shape(workdir), 4.0, 0.0, "tiny")
    folders.write(workdir / "pairs.jsonl", folders.preference_rows(PAIRS))
    return workdir


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The uninterrupted run: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, workdir)
    return workdir, dpo_stage.run(make_context(workdir, data=1))


def read(workdir):
    """The bytes of all outputs, but for the folder, which is in the path of the base model."""
    out = {name: (workdir / "dpo" / name).read_bytes() for name in OUTPUTS}
    return {name: data.replace(str(workdir).encode(), b"") for name, data in out.items()}


def files(workdir):
    folder = workdir / "dpo"
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_writes_an_adapter_whose_margin_rose(whole):
    workdir, result = whole
    assert files(workdir) == sorted(OUTPUTS)
    rows = reading.read_jsonl(workdir / "dpo/losses.jsonl")
    assert [row["step"] for row in rows] == [*range(30)]
    assert result["rows"] == PAIRS and result["resumed_tokens"] == 0
    assert result["tokens"] == sum(row["tokens"] for row in rows)
    # Policy and reference are the same adapter before the first step.
    np.testing.assert_allclose(result["first_loss"], np.log(2), atol=1e-5)
    assert result["last_margin"] > 0.5 and result["last_loss"] < result["first_loss"]
    before, after = (
        lora.load_peft(workdir / name, shape(workdir), "test")
        for name in ("finetune/adapter", "dpo/adapter")
    )
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), before, after)
    leaves = before["layers"]["attn"]["q_proj"], after["layers"]["attn"]["q_proj"]
    np.testing.assert_array_equal(leaves[0]["scale"], leaves[1]["scale"])
    assert np.abs(leaves[0]["b"] - leaves[1]["b"]).max() > 0.01


def test_a_fresh_adapter_may_be_the_beginning(prepared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir, ignore=shutil.ignore_patterns("finetune"))
    context = make_context(workdir, data=1, start="base", epochs=1, limit=8)
    assert dpo_stage.reads(context) == ()
    result = dpo_stage.run(context)
    assert result["rows"] == 8
    np.testing.assert_allclose(result["first_loss"], np.log(2), atol=1e-5)


def start(workdir, strategy="mesh", count=1):
    # conftest's flags are inherited: what is compiled otherwise differs in its last bits.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return forks.Running([__file__, workdir, strategy], environment)


@pytest.mark.slow
def test_killed_and_resumed_is_identical(whole, prepared, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)

    # Once while the reference is scored, in this process ...
    add = parts.Parts.add

    def stop_at_the_second(finished, rows, columns):
        if finished.done:
            raise KeyboardInterrupt
        add(finished, rows, columns)

    monkeypatch.setattr(parts.Parts, "add", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        dpo_stage.run(make_context(workdir, data=1))
    assert [name.split("-")[:2] for name in files(workdir)] == [["partial/part", "00000000"]]
    # ... and once, really killed, while it trains.
    process = start(workdir)
    state = workdir / "dpo/state"
    while not any(int(p.name) >= 6 for p in state.glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "dpo/losses.jsonl").exists()
    process = start(workdir)
    assert process.wait() == 0, process.communicate()
    assert files(workdir) == sorted(OUTPUTS)
    assert read(workdir) == read(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_eight_devices_equal_one(whole, prepared, tmp_path, strategy):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    process = start(workdir, strategy, count=8)
    assert process.wait() == 0, process.communicate()
    ones, eights = (
        reading.read_jsonl(folder / "dpo/losses.jsonl") for folder in (whole[0], workdir)
    )
    for name in ("loss", "margin"):
        np.testing.assert_allclose(
            [row[name] for row in ones], [row[name] for row in eights], atol=1e-4
        )


def test_an_adapter_of_another_model_is_refused(prepared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    other = model_config.decoder_config(tiny.HF_CONFIG, "test")
    adapter = lora.init(jax.random.key(0), other, "q_proj", 2, 4.0, False, "test")
    lora.save_peft(workdir / "finetune/adapter", adapter, other, 4.0, 0.0, "tiny")
    with pytest.raises(errors.UserError, match=r"^finetune.dpo.start=sft: .* of another model"):
        dpo_stage.run(make_context(workdir, data=1))


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    dpo_stage.run(make_context(pathlib.Path(sys.argv[1]), sys.argv[2]))
