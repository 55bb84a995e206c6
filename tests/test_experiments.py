"""The research scripts as a user calls them, on a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import folders
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(24))
    folders.write(base / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(4, "test"))
    return base


def script(name, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / f"experiments/{name}.py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def ablation(made, workdir, *flags):
    return script(
        "ablate_projection", f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}",
        f"--config.model.path={made / 'decoder'}", f"--config.data.pool={made / 'pool.jsonl'}",
        f"--config.data.targets={made / 'targets.jsonl'}",
        f"--config.data.tests={made / 'tests.jsonl'}", *flags,
    )  # fmt: skip


@pytest.mark.slow
def test_ablation_compares_kinds_and_dimensions(made, tmp_path):
    flags = ("--kinds=sparse,factored", "--dims=64,1024", "--seeds=1")
    ended = ablation(made, tmp_path, *flags, "--config.influence.parameters=attn|mlp")
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    found = {(row["kind"], row["dim"]): row for row in rows}
    assert len(found) == 5 and rows[-1]["kind"] == "shortest answers"
    for kind in ("sparse", "factored"):
        assert found[kind, 64]["spearman"] < found[kind, 1024]["spearman"] <= 1
        assert found[kind, 1024]["pearson"] > 0.8
    assert found["sparse", 1024]["predicted_pearson"] > found["sparse", 64]["predicted_pearson"]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert "sparse" in ended.stdout and "shortest answers" in ended.stdout


@pytest.mark.slow
def test_benchmark_prints_the_contract_as_json(made):
    ended = script(
        "benchmark_influence", f"--model={made / 'decoder'}", "--json", "--batch=2", "--tokens=32",
        "--answers=8", "--repeats=1", "--rank=2", "--dim=64", "--factored_dim=400",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = {row["name"]: row for row in json.loads(ended.stdout)["rows"]}
    for name in ("forward", "exact/all", "exact/lora", "projected/lora sparse 64"):
        row = rows[name]
        assert row["examples_per_s"] > 0 and row["peak_bytes"] > 0
        assert row["tokens_per_s"] == pytest.approx(32 * row["examples_per_s"])
    assert rows["forward"]["ratio_to_forward"] == 1
    assert rows["projected/lora sparse 64"]["floats_per_example"] == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("ablate_projection", ["--kinds=radamacher"], "Did you mean 'rademacher'"),
        ("ablate_projection", ["--dims=many"], "--dims must be whole numbers above 0"),
        ("run_diq", ["--config=configs/huatuo_qwen3_8b.py:exct"], "Did you mean 'exact'"),
        ("score_targets", ["--targets=x", "--output=y"], "holds no finished influence stage"),
    ],
)
def test_a_mistake_is_one_sentence(name, flags, message, tmp_path):
    if not any(flag.startswith("--config=") for flag in flags) and name != "score_targets":
        flags = ["--config=configs/quickstart.py", *flags]
    ended = script(name, f"--workdir={tmp_path}", *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert message in ended.stderr and "Traceback" not in ended.stderr
