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


def test_check_pool_prints_pairs_side_by_side_and_writes_them(made, tmp_path):
    rows = folders.pool_rows(2)
    question = "which hormone falls when the lamp is lit late at night in the far north"
    pool = [rows[0] | {"question": question}, rows[1] | {"question": question.upper() + "?"}]
    tests = [folders.choice_rows(1, "t")[0] | {"question": question}]
    output = tmp_path / "pairs.jsonl"
    ended = script(
        "check_pool", f"--pool={folders.write(tmp_path / 'pool.jsonl', pool)}",
        f"--against={folders.write(tmp_path / 'tests.jsonl', tests)}", f"--output={output}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(p["example_id"], p["other"], p["other_in"], p["kind"]) for p in found] == [
        ("ex-000", "t-0", "products", "near"),
        ("ex-001", "ex-000", "pool", "exact"),
        ("ex-001", "t-0", "products", "near"),
    ]
    assert "which hormone falls" in ended.stdout and "WHICH HORMONE" in ended.stdout
    assert "2 pool rows, 1 against: 2 rows in a pair, 2 that" in ended.stdout


@pytest.mark.slow
def test_a_classifier_is_trained_once_and_scores_a_pool(made, tmp_path):
    folders.encoder(tmp_path / "encoder")
    flags = (
        f"--config={ROOT / 'configs/quickstart.py'}",
        f"--config.model.path={made / 'decoder'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.pool={made / 'pool.jsonl'}", f"--config.data.tests={made / 'tests.jsonl'}",
        f"--config.data.targets={made / 'targets.jsonl'}",
    )  # fmt: skip
    ours = (
        f"--config.difficulty.encoder={tmp_path / 'encoder'}", "--config.difficulty.words=True",
        f"--config.difficulty.source={made / 'pool.jsonl'}",
    )  # fmt: skip
    ended = script("train_difficulty", *flags, *ours)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "24 rows, 5 folds" in ended.stdout and "tf-idf + ridge" in ended.stdout
    again = script("train_difficulty", *flags, *ours)
    assert "trained before" in again.stdout
    source = f"--config.difficulty.source={tmp_path / 'run/classifier'}"
    scored = script("run_diq", *flags, source, "--stages=prepare,difficulty")
    assert scored.returncode == 0, scored.stderr[-2000:]
    assert (tmp_path / "run/difficulty/difficulty.parquet").exists()
    refused = script("train_difficulty", *flags, *ours[:2], source, "--overwrite")
    assert refused.returncode == 2 and "must be labelled rows" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("ablate_projection", ["--kinds=radamacher"], "Did you mean 'rademacher'"),
        ("ablate_projection", ["--dims=many"], "--dims must be whole numbers above 0"),
        ("run_diq", ["--config=configs/huatuo_qwen3_8b.py:exct"], "Did you mean 'exact'"),
        ("score_targets", ["--targets=x", "--output=y"], "holds no finished influence stage"),
        ("check_pool", ["--pool=none.jsonl"], "--pool: there is no file none.jsonl"),
        ("check_pool", ["--pool=sample", "--near_similarity=2"], "near_similarity must be in"),
    ],
)
def test_a_mistake_is_one_sentence(name, flags, message, tmp_path):
    if name in ("ablate_projection", "run_diq") and not flags[0].startswith("--config="):
        flags = ["--config=configs/quickstart.py", *flags]
    if name != "check_pool":
        flags = [f"--workdir={tmp_path}", *flags]
    ended = script(name, *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert message in ended.stderr and "Traceback" not in ended.stderr
