"""The stage on a tiny model: its artifacts, what a kill leaves, and devices.

As a script, `test_finetune_stage.py WORKDIR JSON` runs the stage on a prepared folder, with the
arguments of make_context as an object.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

import folders
import forks
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import tiny
import transformers

from diq_jax import config, errors
from diq_jax.data import encoded, example
from diq_jax.finetune import stage
from diq_jax.models import config as model_config
from diq_jax.models import decoder, hf, lora
from diq_jax.run import artifacts, devices, reading, stages

CFG = model_config.decoder_config(tiny.HF_CONFIG, "test")
ROWS, CHOSEN = 20, 10
OUTPUTS = (
    "losses.jsonl",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "baselines/random/adapter_config.json",
    "baselines/random/adapter_model.safetensors",
)


# Full fine-tuning of one arm, with the targets' loss on the way.
FULL = {
    "parameters": "all", "dropout": 0.0, "learning_rate": 1e-3, "epochs": 6,
    "eval_every_steps": 4, "baselines": "",
}  # fmt: skip


def make_context(workdir, strategy="mesh", data=0, model=1, **settings) -> stages.Context:
    tree = config.default()
    tree.model.path = str(workdir / "model")
    tree.parallel.strategy, tree.parallel.data, tree.parallel.model = strategy, data, model
    defaults = {"epochs": 10, "batch_size": 4, "checkpoint_every_steps": 3, "dropout": 0.1}
    for name, value in {**defaults, "rank": 2, "learning_rate": 1e-2, **settings}.items():
        tree.finetune[name] = value
    resolved = config.resolve(tree)
    return stages.Context(resolved, workdir, devices.make_placement(resolved.parallel))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir as the earlier stages leave it, with a tiny model in it."""
    workdir = tmp_path_factory.mktemp("prepared")
    params = decoder.init(jax.random.key(0), CFG, jnp.float32)
    hf.save_decoder(workdir / "model", params, tiny.HF_CONFIG, 2**20)
    folders.tokenizer().save_pretrained(workdir / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        tokens = rng.integers(0, 64, rng.integers(12, 30)).astype(np.int32)
        labels = np.where(np.arange(len(tokens)) < 6, example.IGNORED, tokens).astype(np.int32)
        rows.append(example.Encoded(f"row-{i:02d}", tokens, labels))
    ids = pa.array([row.example_id for row in rows])
    artifacts.write_table(
        workdir / "prepare/pool.parquet", {"example_id": ids, **encoded.columns(rows)}
    )
    artifacts.write_table(
        workdir / "prepare/targets.parquet",
        {"example_id": ids[CHOSEN:], **encoded.columns(rows[CHOSEN:])},
    )
    rank = pa.array(np.argsort(rng.permutation(ROWS)).astype(np.int32) + 1)
    artifacts.write_table(
        workdir / "selection/selection.parquet",
        {"example_id": ids, "selected": pa.array(np.arange(ROWS) < CHOSEN)},
    )
    artifacts.write_table(
        workdir / "selection/baselines.parquet", {"example_id": ids, "random": rank}
    )
    return workdir


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The uninterrupted run: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, workdir)
    return workdir, stage.run(make_context(workdir, data=1))


@pytest.fixture(scope="module")
def full(prepared, tmp_path_factory):
    """The uninterrupted run of full fine-tuning: its workdir."""
    workdir = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(prepared, workdir)
    stage.run(make_context(workdir, data=1, tensorboard=True, **FULL))
    return workdir


def read(workdir, names=OUTPUTS):
    """The bytes of outputs, but for the folder, which is in the path of the base model."""
    out = {name: (workdir / "finetune" / name).read_bytes() for name in names}
    return {name: data.replace(str(workdir).encode(), b"") for name, data in out.items()}


def files(workdir):
    folder = workdir / "finetune"
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_writes_adapters_and_losses(whole):
    workdir, result = whole
    assert files(workdir) == sorted(OUTPUTS) and not (workdir / "finetune/state").exists()
    rows = reading.read_jsonl(workdir / "finetune/losses.jsonl")
    assert [row["step"] for row in rows] == [*range(30), *range(30)]
    assert [row["epoch"] for row in rows[:6]] == [0, 0, 0, 1, 1, 1]
    assert rows[0].keys() == {"arm", "step", "epoch", "loss", "learning_rate", "tokens"}
    pool = reading.read_table(workdir / "prepare/pool.parquet")
    lengths = [len(x) for x in pool["input_ids"].to_pylist()]
    assert sum(row["tokens"] for row in rows[:30]) == 10 * sum(lengths[:CHOSEN])
    assert result["rows"] == 2 * CHOSEN and result["resumed_tokens"] == 0
    assert result["tokens"] == sum(row["tokens"] for row in rows)
    assert result["arms"]["selected"] == {
        "rows": CHOSEN,
        "steps": 30,
        "answer_tokens": sum(lengths[:CHOSEN]) - 6 * CHOSEN,
        "first_loss": rows[0]["loss"],
        "last_loss": rows[29]["loss"],
    }
    assert result["arms"]["random"]["last_loss"] == rows[-1]["loss"]
    assert rows[0]["learning_rate"] == 2.5e-3 and rows[3]["learning_rate"] == 1e-2
    for arm, folder in (("selected", "adapter"), ("random", "baselines/random")):
        losses = [row["loss"] for row in rows if row["arm"] == arm]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
        adapter = lora.load_peft(workdir / "finetune" / folder, CFG, "test")
        assert set(adapter["layers"]["attn"]) == {"q_proj", "k_proj", "v_proj"}


def test_a_finished_stage_trains_nothing(whole, monkeypatch):
    workdir, result = whole
    monkeypatch.setattr(stage, "_train_arms", None)
    again = stage.run(make_context(workdir, data=1))
    assert again == {**result, "resumed_tokens": result["tokens"]}


def start(workdir, count=1, **settings):
    # conftest's flags are inherited: what is compiled otherwise differs in its last bits.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return forks.Running([__file__, workdir, json.dumps(settings)], environment)


def kill(process, state, least):
    """Ends a run, whatever it is at, once it holds a checkpoint of so many steps."""
    while not any(int(p.name) >= least for p in state.glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(process):
    assert process.wait() == 0, process.communicate()


@pytest.mark.slow
def test_killed_and_resumed_is_identical(whole, prepared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    state = workdir / "finetune/state"
    # Once in the first arm, once in the second, whatever is being written at that moment.
    for arm, least in (("selected", 6), ("random", 15)):
        kill(start(workdir), state / arm, least)
        assert not (workdir / "finetune/losses.jsonl").exists()
    finish(start(workdir))
    assert files(workdir) == sorted(OUTPUTS)
    assert read(workdir) == read(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_eight_devices_equal_one(whole, prepared, tmp_path, strategy):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    finish(start(workdir, count=8, strategy=strategy))
    ones, eights = (
        reading.read_jsonl(folder / "finetune/losses.jsonl") for folder in (whole[0], workdir)
    )
    np.testing.assert_allclose(
        [row["loss"] for row in ones], [row["loss"] for row in eights], atol=1e-5
    )
    adapters = [
        lora.load_peft(folder / "finetune/adapter", CFG, "test") for folder in (whole[0], workdir)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *adapters)


def test_all_parameters_with_the_best_kept_beside_the_last(full):
    assert {"model", "best_model", "losses.jsonl", "tensorboard"} == {
        path.name for path in (full / "finetune").iterdir()
    }
    rows = reading.read_jsonl(full / "finetune/losses.jsonl")
    found = {row["step"]: row["target_loss"] for row in rows if "target_loss" in row}
    assert list(found) == [3, 7, 11, 15, 17] and rows[-1]["loss"] < rows[0]["loss"]
    folders_of = ("model", "finetune/model", "finetune/best_model")
    base, last, best = (target_loss(full, full / name) for name in folders_of)
    np.testing.assert_allclose(last, found[17], rtol=1e-5)
    np.testing.assert_allclose(best, min(found.values()), rtol=1e-5)
    assert best != base
    (events,) = (full / "finetune/tensorboard/selected").iterdir()
    assert b"target_loss" in events.read_bytes() and b"gradient_norm" in events.read_bytes()


def target_loss(workdir, folder):
    """The targets' mean loss by transformers, of a model as the stage writes it."""
    from reference import torch  # seconds, which the forks of this file need not spend

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = encoded.from_table(reading.read_table(workdir / "prepare/targets.parquet"))
    with torch.no_grad():
        return np.mean([
            float(model(torch.from_numpy(r.input_ids)[None].long(),
                        labels=torch.from_numpy(r.labels)[None].long()).loss)
            for r in rows
        ])  # fmt: skip


FULL_OUTPUTS = ("losses.jsonl", "model/model.safetensors", "best_model/model.safetensors")


@pytest.mark.slow
def test_full_fine_tuning_killed_and_resumed_is_identical(full, prepared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    kill(start(workdir, **FULL), workdir / "finetune/state/selected", 6)
    finish(start(workdir, **FULL))
    assert read(workdir, FULL_OUTPUTS) == read(full, FULL_OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"data": 4, "model": 2}, {"strategy": "pmap"}])
def test_full_fine_tuning_over_eight_devices_equals_one(full, prepared, tmp_path, parallel):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    finish(start(workdir, count=8, **parallel, **FULL))
    ones, eights = (
        reading.read_jsonl(folder / "finetune/losses.jsonl") for folder in (full, workdir)
    )
    for name in ("loss", "target_loss"):
        np.testing.assert_allclose(
            [row[name] for row in ones if name in row],
            [row[name] for row in eights if name in row],
            atol=1e-5,
        )
    weights = [
        safetensors.numpy.load_file(folder / "finetune/model/model.safetensors")
        for folder in (full, workdir)
    ]
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], atol=1e-5)


def test_curves_need_their_package(prepared, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(errors.UserError, match=r"finetune.tensorboard=True needs pip install"):
        stage.run(make_context(workdir, data=1, tensorboard=True))


def test_a_loss_that_is_not_finite_is_explained(prepared, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prepared, workdir)
    message = r"finetune selected has loss .* at step \d+ \(examples row-.*learning_rate"
    with pytest.raises(errors.UserError, match=message):
        stage.run(make_context(workdir, data=1, learning_rate=1e30, clip_norm=0.0))


def test_fingerprint_is_that_of_the_weights(prepared):
    found = stage.fingerprints(make_context(prepared))
    assert found.keys() == {"model.path"} and len(found["model.path"]) == 64


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    stage.run(make_context(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2])))
