"""The research scripts as a user calls them, on a tiny model."""

import json
import signal

import folders
import forks
import pytest
import scripts

from diq_jax.difficulty import labels
from diq_jax.run import parts, reading


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    return scripts.make(tmp_path_factory.mktemp("made"))


@pytest.mark.slow
def test_ablation_compares_kinds_and_dimensions(made, tmp_path):
    flags = ("--kinds=sparse,factored", "--dims=64,1024", "--seeds=1")
    flags += ("--config.influence.parameters=attn|mlp",)
    ended = scripts.on_data("ablate_projection", made, tmp_path, *flags)
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
    ended = scripts.script(
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


def pass_rate_flags(made, out):
    return (
        f"--config={scripts.ROOT / 'configs/quickstart.py'}", f"--out={out}",
        f"--config.model.path={made / 'decoder'}", f"--rows={made / 'tests.jsonl'}",
        "--config.evaluate.max_new_tokens=8", "--samples=2", "--config.evaluate.temperature=1.0",
    )  # fmt: skip


KILLED = """
import os, signal, sys
from diq_jax.commands import cli
from diq_jax.run import parts
add = parts.Parts.add
def add_and_die(self, *batch):
    add(self, *batch)
    if len(self.done) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
parts.Parts.add = add_and_die
cli.main()
"""


@pytest.mark.slow
def test_pass_rates_are_labels_and_a_killed_run_continues(made, tmp_path):
    def pass_rate(*flags):
        return scripts.script("pass-rate", *flags)

    out, other = tmp_path / "rates.jsonl", tmp_path / "other.jsonl"
    flags = pass_rate_flags(made, out)
    ended = pass_rate(*flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = reading.read_jsonl(out)
    assert [row["id"] for row in rows] == [f"test-{i}" for i in range(4)]
    assert all(row["p_correct"] in (0, 0.5, 1) for row in rows)
    assert labels.labelled_rows(str(out))[1].shape == (4, 3)
    unparsable = tmp_path / "rates.unparsable.jsonl"
    assert all(row["letter"] is None for row in reading.read_jsonl(unparsable))
    assert "cut at evaluate.max_new_tokens=8" in ended.stdout
    assert not (tmp_path / "rates.partial").exists()
    again = pass_rate(*flags)
    assert again.returncode == 2 and "rates.jsonl exists; name another file" in again.stderr

    flags = pass_rate_flags(made, other)
    killed = forks.run(["-c", KILLED, "pass-rate", *flags])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(list((tmp_path / "other.partial/answer").glob("part-*"))) == 4
    refused = pass_rate(*flags, "--config.evaluate.seed=1")
    assert refused.returncode == 2 and "was begun with another model" in refused.stderr
    assert pass_rate(*flags).returncode == 0
    for ending in (".jsonl", ".unparsable.jsonl"):
        whole = out.with_suffix(ending).read_bytes()
        assert other.with_suffix(ending).read_bytes() == whole


@pytest.mark.slow
def test_generation_benchmark_prints_json(made):
    ended = scripts.script(
        "benchmark_generation", f"--model={made / 'decoder'}", f"--tests={made / 'tests.jsonl'}",
        "--batch=2", "--new_tokens=20", "--repeats=1", "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["same_tokens"] and found["ratio"] > 0
    assert [row["name"] for row in found["rows"]] == ["prefill", "decode"]


@pytest.mark.slow
def test_a_training_step_is_measured_beside_torch(made):
    flags = ("--json", "--batch=2", "--tokens=32", "--answers=8", "--repeats=1", "--rank=2")
    ended = scripts.script("benchmark_training", f"--model={made / 'decoder'}", *flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    # The script itself has compared both losses of the first step.
    for row, name in zip(json.loads(ended.stdout)["rows"], ("lora", "full"), strict=True):
        assert row["name"] == name and row["ours_seconds"] > 0 and row["torch_seconds"] > 0
        assert row["lowest_ratio"] <= row["ratio"] <= row["highest_ratio"]


def test_check_prints_pairs_side_by_side_and_writes_them(made, tmp_path):
    rows = folders.pool_rows(2)
    question = "which hormone falls when the lamp is lit late at night in the far north"
    pool = [rows[0] | {"question": question}, rows[1] | {"question": question.upper() + "?"}]
    tests = [folders.choice_rows(1, "t")[0] | {"question": question}]
    output = tmp_path / "pairs.jsonl"
    ended = scripts.script(
        "check", f"--pool={folders.write(tmp_path / 'pool.jsonl', pool)}",
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
def test_length_is_measured_from_a_store(made, tmp_path):
    flags = ("--stages=prepare,difficulty,influence", "--config.difficulty.source=columns")
    flags += ("--config.influence.engine=projected", "--config.influence.parameters=attn")
    flags += ("--config.influence.projection.dim=32",)
    ran = scripts.on_data("run_diq", made, tmp_path, *flags)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ended = scripts.script("measure_length", f"--workdir={tmp_path}", "--retention_ratio=0.25")
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = json.loads((tmp_path / "length/length.json").read_text())["rows"]
    assert rows[0]["name"] == "dot, mean loss" and len(rows) == 4
    assert rows[0]["kept_of_plain"] == 1 and {row["selected"] for row in rows} == {6}
    assert (tmp_path / "length/length.png").stat().st_size > 10_000


@pytest.mark.slow
def test_lds_is_measured_and_a_second_call_trains_nothing(made, tmp_path):
    flags = ("--rows=8", "--subsets=4", "--targets=2", "--width=16", "--layers=1", "--dims=64",
             "--epochs=2", "--base_epochs=1", "--tokens=250")  # fmt: skip
    first = scripts.on_data("measure_lds", made, tmp_path, *flags)
    assert first.returncode == 0, first.stderr[-2000:]
    found = without_seconds(json.loads((tmp_path / "lds.json").read_text()))
    assert {"exact, mean", "exact, gauss_newton", "random"} <= {r["name"] for r in found["rows"]}
    assert all(-1 <= r["low"] <= r["lds"] <= r["high"] <= 1 for r in found["rows"])
    trained = {path: path.read_bytes() for path in tmp_path.glob("trainings-*/seed-*/*")}
    assert sum(len(parts.Parts(tmp_path / seed).done) for seed in {p.parent for p in trained}) == 8
    (tmp_path / "lds.json").unlink()
    assert scripts.on_data("measure_lds", made, tmp_path, *flags).returncode == 0
    assert {p: p.read_bytes() for p in tmp_path.glob("trainings-*/seed-*/*")} == trained
    assert without_seconds(json.loads((tmp_path / "lds.json").read_text())) == found


def without_seconds(found):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found["rows"]]
    return found | {"rows": rows}


@pytest.mark.slow
def test_a_classifier_is_trained_once_and_scores_a_pool(made, tmp_path):
    folders.encoder(tmp_path / "encoder")
    flags = (
        f"--config={scripts.ROOT / 'configs/quickstart.py'}",
        f"--config.model.path={made / 'decoder'}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.pool={made / 'pool.jsonl'}", f"--config.data.tests={made / 'tests.jsonl'}",
        f"--config.data.targets={made / 'targets.jsonl'}",
    )  # fmt: skip
    ours = (
        f"--config.difficulty.encoder={tmp_path / 'encoder'}", "--config.difficulty.words=True",
        f"--config.difficulty.source={made / 'pool.jsonl'}",
    )  # fmt: skip
    ended = scripts.script("train-classifier", *flags, *ours)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "24 rows, 5 folds" in ended.stdout and "tf-idf + ridge" in ended.stdout
    again = scripts.script("train-classifier", *flags, *ours)
    assert "trained before" in again.stdout
    source = f"--config.difficulty.source={tmp_path / 'run/classifier'}"
    scored = scripts.script("run_diq", *flags, source, "--stages=prepare,difficulty")
    assert scored.returncode == 0, scored.stderr[-2000:]
    assert (tmp_path / "run/difficulty/difficulty.parquet").exists()
    refused = scripts.script("train-classifier", *flags, *ours[:2], source, "--overwrite")
    assert refused.returncode == 2 and "must be labelled rows" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("ablate_projection", ["--kinds=radamacher"], "Did you mean 'rademacher'"),
        ("ablate_projection", ["--dims=many"], "--dims must be whole numbers above 0"),
        ("run_diq", ["--config=configs/huatuo_qwen3_8b.py:exct"], "Did you mean 'exact'"),
        ("score", ["--targets=x", "--output=y"], "holds no finished influence stage"),
        ("compare_selection", ["--methods=digq"], "Did you mean 'diq'"),
        ("run_diq", ["--from=none"], "--from: none holds no finished selection stage"),
        ("measure_length", [], "holds no finished prepare stage"),
        ("measure_lds", ["--dims=0"], "--dims must be whole numbers above 0"),
        ("measure_targets", [], "influence.parquet is missing"),
        ("selection_lab", ["--budgets=2"], "--budgets must be shares of the pool below 1"),
        (
            "pass-rate",
            ["--config=configs/quickstart.py", "--rows=sample", "--out=x.jsonl"],
            "--samples=8 draws different answers",
        ),
        ("check", ["--pool=none.jsonl"], "--pool: there is no file none.jsonl"),
        ("check", ["--pool=sample", "--near_similarity=2"], "near_similarity must be in"),
    ],
)
def test_a_mistake_is_one_sentence(name, flags, message, tmp_path):
    takes_config = name in ("ablate_projection", "run_diq", "measure_lds", "compare_selection")
    if takes_config and not flags[0].startswith(("--config=", "--from=")):
        flags = ["--config=configs/quickstart.py", *flags]
    if name not in ("check", "pass-rate"):
        flags = [f"--workdir={tmp_path}", *flags]
    ended = scripts.script(name, *flags)
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_the_harness_without_its_extra_is_one_sentence():
    code = "import sys; sys.modules['lm_eval'] = None; from diq_jax.commands import cli; cli.main()"
    ended = forks.run(["-c", code, "harness", "--model=x", "--tasks=y"])
    assert ended.returncode == 2 and "pip install 'diq_jax[harness]'" in ended.stderr
