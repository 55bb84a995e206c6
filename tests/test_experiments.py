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


def scored(made, name, workdir, *flags):
    """A script of the comparison, on labels that come with the pool."""
    return script(
        name, f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}",
        f"--config.model.path={made / 'decoder'}", "--config.model.max_tokens=256",
        f"--config.data.pool={made / 'pool.jsonl'}", "--config.difficulty.source=columns",
        f"--config.data.targets={made / 'targets.jsonl'}",
        f"--config.data.tests={made / 'tests.jsonl'}", *flags,
    )  # fmt: skip


@pytest.mark.slow
def test_comparison_scripts_share_scores_and_trainings(made, tmp_path):
    """The three scripts in one workdir: what one has trained the next does not train again."""
    run = tmp_path / "run"
    grid = ("--budgets=0.25", "--seeds=1")
    ended = scored(made, "compare_selection", run, "--preset=mini", "--methods=diq", *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "[2/2] diq 25 % seed 0: 6 examples" in ended.stdout
    ended = scored(made, "quadrant_pilot", run, *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "random 25 %" not in ended.stdout  # trained before
    rows = json.loads((run / "compare/results.json").read_text())["rows"]
    assert [r["method"] for r in rows[2:]] == [f"quadrant_{q}" for q in (1, 2, 3, 4)]
    ended = scored(made, "transfer", run, f"--scores={run}", *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "[1/" not in ended.stdout
    _, _, own, other = json.loads((run / "compare/results.json").read_text())["rows"]
    assert own["metrics"] == other["metrics"] and other["method"] == "diq_transferred"


@pytest.mark.slow
def test_a_selection_reruns_from_its_stage_json_to_identical_bytes(made, tmp_path):
    run = tmp_path / "run"
    stages = "--stages=prepare,difficulty,influence,selection"
    assert scored(made, "run_diq", run, stages).returncode == 0
    stage = f"--stage={run / 'selection/stage.json'}"
    ended = script("select_again", stage, f"--workdir={tmp_path / 'again'}")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "identical: baselines.parquet" in ended.stdout
    for name in ("selection.parquet", "selected.jsonl"):
        files = [folder / "selection" / name for folder in (run, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    ended = script("select_again", stage, f"--workdir={tmp_path / 'again'}")
    assert ended.returncode == 2 and "again is not empty" in ended.stderr
    selected = run / "selection/selected.jsonl"
    selected.write_text(selected.read_text().replace("we add", "we had", 1))
    ended = script("select_again", stage, f"--workdir={tmp_path / 'third'}")
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "different: selected.jsonl differs in row 0" in ended.stdout
    (run / "difficulty/difficulty.parquet").write_bytes(b"")
    ended = script("select_again", stage, f"--workdir={tmp_path / 'fourth'}")
    assert ended.returncode == 2 and "has changed since the selection read it" in ended.stderr


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
@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("ablate_projection", ["--kinds=radamacher"], "Did you mean 'rademacher'"),
        ("ablate_projection", ["--dims=many"], "--dims must be whole numbers above 0"),
        ("run_diq", ["--config=configs/huatuo_qwen3_8b.py:exct"], "Did you mean 'exact'"),
        ("score_targets", ["--targets=x", "--output=y"], "holds no finished influence stage"),
        ("compare_selection", ["--methods=digq"], "Did you mean 'diq'"),
        ("select_again", ["--stage=none.json"], "--stage: there is no file none.json"),
        ("check_pool", ["--pool=none.jsonl"], "--pool: there is no file none.jsonl"),
        ("check_pool", ["--pool=sample", "--near_similarity=2"], "near_similarity must be in"),
    ],
)
def test_a_mistake_is_one_sentence(name, flags, message, tmp_path):
    with_config = ("ablate_projection", "run_diq", "compare_selection")
    if name in with_config and not flags[0].startswith("--config="):
        flags = ["--config=configs/quickstart.py", *flags]
    if name != "check_pool":
        flags = [f"--workdir={tmp_path}", *flags]
    ended = script(name, *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert message in ended.stderr and "Traceback" not in ended.stderr
