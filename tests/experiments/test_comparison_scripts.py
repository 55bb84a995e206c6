"""The scripts that compare selections, and the one that repeats a selection."""

import json

import pytest
import scripts


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    return scripts.make(tmp_path_factory.mktemp("made"))


def scored(made, name, workdir, *flags):
    """On labels that come with the pool."""
    flags = ("--config.model.max_tokens=256", "--config.difficulty.source=columns", *flags)
    return scripts.on_data(name, made, workdir, *flags)


@pytest.mark.slow
def test_comparison_scripts_share_scores_and_trainings(made, tmp_path):
    """Three comparisons in one workdir: what one has trained the next does not train again."""
    run = tmp_path / "run"
    grid = ("--budgets=0.25", "--seeds=1")
    preset = ("--preset=mini", "--methods=diq", "--config.finetune.accumulation_steps=1")
    ended = scored(made, "compare_selection", run, *preset, *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "[2/2] diq 25 % seed 0: 6 examples" in ended.stdout
    ended = scored(made, "compare_selection", run, "--preset=quadrants", *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "random 25 %" not in ended.stdout  # trained before
    rows = json.loads((run / "compare/results.json").read_text())["rows"]
    assert [r["method"] for r in rows[2:]] == [f"quadrant_{q}" for q in (1, 2, 3, 4)]
    transfer = ("--methods=diq", f"--rankings=transferred={run}:diq")
    ended = scored(made, "compare_selection", run, *transfer, *grid)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "[1/" not in ended.stdout
    _, _, own, other = json.loads((run / "compare/results.json").read_text())["rows"]
    assert own["metrics"] == other["metrics"] and other["method"] == "transferred"


@pytest.mark.slow
def test_a_selection_is_repeated_from_its_record_to_identical_bytes(made, tmp_path):
    run = tmp_path / "run"
    stages = "--stages=prepare,difficulty,influence,selection"
    assert scored(made, "run_diq", run, stages).returncode == 0

    def repeat(name, *flags):
        return scripts.script("run_diq", f"--from={run}", f"--workdir={tmp_path / name}", *flags)

    ended = repeat("again", "--stages=selection")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "identical: baselines.parquet" in ended.stdout
    for name in ("selection.parquet", "selected.jsonl"):
        files = [folder / "selection" / name for folder in (run, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    ended = repeat("again")
    assert ended.returncode == 2 and "again is not empty" in ended.stderr
    selected = run / "selection/selected.jsonl"
    selected.write_text(selected.read_text().replace("we add", "we had", 1))
    ended = repeat("third")
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "different: selected.jsonl differs in row 0" in ended.stdout
    (run / "difficulty/difficulty.parquet").write_bytes(b"")
    ended = repeat("fourth")
    assert ended.returncode == 2 and "has changed since the selection read it" in ended.stderr
    ended = repeat("fifth", "--stages=finetune")
    assert ended.returncode == 2 and "--from repeats a selection" in ended.stderr
