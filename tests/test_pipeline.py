"""The pipeline as a user meets it: every stage, skip, refuse, kill and resume, and bad input."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import folders
import pyarrow.parquet as pq
import pytest
import scripts

from diq_jax import config, errors, pipeline, preflight
from diq_jax.evaluate import generation
from diq_jax.run import artifacts, parts, reading
from diq_jax.selection import methods

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A tiny decoder, encoder, pool, targets and tests."""
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.encoder(base / "encoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(24))
    folders.write(base / "preferences.jsonl", folders.preference_rows(6))
    folders.write(base / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(8, "test"))
    return base


def make_config(made, **changes):
    c = config.default()
    values = {
        "model.path": str(made / "decoder"),
        "model.max_tokens": 256,
        "data.pool": str(made / "pool.jsonl"),
        "data.targets": str(made / "targets.jsonl"),
        "data.tests": str(made / "tests.jsonl"),
        "difficulty.source": "columns",
        "finetune.epochs": 1,
        "selection.retention_ratio": 0.25,
    } | {k.replace("__", "."): v for k, v in changes.items()}
    for name, value in values.items():
        section, field = name.rsplit(".", 1)
        node = c
        for part in section.split("."):
            node = node[part]
        node[field] = value
    return c


def run(made, workdir, stages="prepare", overwrite=False, **changes):
    cfg = config.resolve(make_config(made, **changes))
    pipeline.run(cfg, workdir, pipeline.parse_stages(stages), overwrite)


def test_all_stages_and_the_contract(made, tmp_path, capsys):
    labels = {"difficulty__source": str(made / "pool.jsonl")}
    changes = labels | {"difficulty__encoder": str(made / "encoder"), "difficulty__epochs": 1}
    changes |= {"difficulty__folds": 2, "finetune__dpo__data": str(made / "preferences.jsonl")}
    run(made, tmp_path, "", **changes)

    columns = {
        "difficulty/difficulty.parquet": "example_id knowledge reasoning overall",
        "influence/influence.parquet": "example_id influence loss tokens",
        "selection/selection.parquet": "example_id difficulty influence quadrant rank selected why",
    }
    for name, expected in columns.items():
        table = pq.read_table(tmp_path / name)
        assert table.column_names == expected.split() and table.num_rows == 24
    rows = reading.read_jsonl(tmp_path / "selection/selected.jsonl")
    originals = {row["id"]: row for row in folders.pool_rows(24)}
    assert len(rows) == 6 and all(row == originals[row["id"]] for row in rows)
    results = json.loads((tmp_path / "evaluate/results.json").read_text())
    assert set(results["models"]) == {"base", "selected", "random", "dpo"}
    for name in (
        "finetune/adapter/adapter_model.safetensors", "dpo/losses.jsonl",
        "evaluate/predictions.jsonl", "report/report.html", "report/quadrants.png",
    ):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0
    for name in pipeline.STAGES:
        record = json.loads((tmp_path / name / "stage.json").read_text())
        assert record["status"] == "done" and record["rows"] > 0 and record["seconds"] >= 0
        assert record["versions"]["jax"] and record["config"]["model"]["path"]
        assert not list((tmp_path / name).rglob("*partial*"))

    capsys.readouterr()
    run(made, tmp_path, "", **changes)
    assert capsys.readouterr().out.count("done before") == len(pipeline.STAGES)
    with pytest.raises(errors.UserError, match=r"retention_ratio was 0\.25, is now 0\.5"):
        run(made, tmp_path, "selection", selection__retention_ratio=0.5, **changes)
    run(made, tmp_path, "selection", overwrite=True, selection__retention_ratio=0.5, **changes)
    assert (
        pq.read_table(tmp_path / "selection/selection.parquet")["selected"].to_pylist().count(True)
        == 12
    )
    with pytest.raises(errors.UserError, match=r"selection/selection\.parquet was .*, is now"):
        run(made, tmp_path, "finetune", selection__retention_ratio=0.5, **changes)


def test_a_pool_row_with_options_has_the_tokens_of_the_target(made, tmp_path):
    target = folders.choice_rows(6, "target")[0]
    pool = folders.write(tmp_path / "pool.jsonl", [target | {"difficulty_overall": 3}])
    run(made, tmp_path / "run", data__pool=pool)
    mine, theirs = (
        pq.read_table(tmp_path / f"run/prepare/{name}.parquet").to_pylist()[0]
        for name in ("pool", "targets")
    )
    for column in ("input_ids", "labels"):
        assert mine[column] == theirs[column]
    assert mine["question"] == theirs["question"] + "\n\nA. 1\nB. 0\nC. none of these"
    assert json.loads(mine["row"]) == target | {"difficulty_overall": 3}


@pytest.mark.slow
def test_methods_that_read_more_become_arms(made, tmp_path):
    """Model scores and the gradient store reach selection, and their methods the baselines."""
    changes = {
        "difficulty__model_scores": True,
        "influence__engine": "factored",
        "influence__projection__dim": 64,
        "selection__method": "middle_perplexity",
        "finetune__baselines": "ifd,k_center",
    }
    run(made, tmp_path, "prepare,difficulty,influence,selection,finetune", **changes)
    inputs = reading.read_json(tmp_path / "selection/stage.json")["inputs"]
    assert {"difficulty/model_scores.parquet", "influence/store/manifest.json"} <= set(inputs)
    table = pq.read_table(tmp_path / "selection/baselines.parquet")
    asked_apart = {"by_target", "color", "temp", "file"}  # not asked for here
    there = [name for name in methods.METHODS if not asked_apart & set(methods.parts(name))]
    assert table.column_names == ["example_id", *there]
    arms = reading.read_json(tmp_path / "finetune/stage.json")["arms"]
    assert list(arms) == ["selected", "ifd", "k_center"]
    assert {arm["rows"] for arm in arms.values()} == {6}


def test_a_stage_without_its_input_names_the_stage_to_run(made, tmp_path):
    with pytest.raises(errors.UserError, match="run with --stages=prepare,influence"):
        run(made, tmp_path, "influence")


def test_dpo_is_left_out_unless_asked_for(made, tmp_path):
    assert "dpo" in pipeline.parse_stages("")
    with pytest.raises(errors.UserError, match=r"Stage 'dpo' needs preference rows"):
        run(made, tmp_path, "dpo", finetune__dpo__start="base")
    with pytest.raises(errors.UserError, match="run with --stages=finetune,dpo"):
        run(made, tmp_path, "dpo", finetune__dpo__data=str(made / "preferences.jsonl"))


def test_changed_data_are_named(made, tmp_path):
    pool = tmp_path / "pool.jsonl"
    folders.write(pool, folders.pool_rows(5))
    run(made, tmp_path / "run", data__pool=str(pool))
    folders.write(pool, folders.pool_rows(6))
    with pytest.raises(errors.UserError, match=r"data\.pool was .*, is now"):
        run(made, tmp_path / "run", data__pool=str(pool))


def bad_pool(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    return {"data__pool": str(path)}


ROW = '{"id": "a", "question": "q", "answer": "x"}\n'
TOKENS = '{"id": "t", "input_ids": [1, 9999], "labels": [-100, 9999]}\n'


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: {"data__pool": str(d / "none.jsonl")}, r"data\.pool: there is no file"),
        (lambda d: bad_pool(d, ROW + "{broken\n"), r"bad\.jsonl:2"),
        (lambda d: bad_pool(d, '{"id": "a", "answer": "x"}\n'), r"bad\.jsonl:1.*question"),
        (lambda d: bad_pool(d, ""), r"data\.pool"),
        (lambda d: bad_pool(d, ROW + ROW), r"bad\.jsonl:1.*bad\.jsonl:2|bad\.jsonl:2.*:1"),
        (lambda d: bad_pool(d, TOKENS), r"token 9999; the model's vocabulary ends at"),
        (lambda d: {"data__columns": "huatou"}, "Did you mean 'huatuo'"),
        (
            lambda d: {"finetune__dpo__data": bad_pool(d, ROW)["data__pool"]},
            r"finetune\.dpo\.data: .*bad\.jsonl:1: chosen is missing",
        ),
        (lambda d: {"data__targets": str(d / "none.jsonl")}, r"data\.targets"),
        (lambda d: {"model__path": str(d / "nowhere")}, r"model\.path"),
        (lambda d: {"model__max_tokens": 1024}, r"model\.max_tokens must be at most 512"),
        (
            lambda d: {"model__max_tokens": 32, "model__truncation": "error"},
            r"ex-000.* tokens, over model\.max_tokens = 32",
        ),
        (
            lambda d: {"model__max_tokens": 16, "model__truncation": "drop"},
            "all 24 examples are longer",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, message, made, tmp_path):
    with pytest.raises(errors.UserError, match=message) as caught:
        run(made, tmp_path / "run", **make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.parquet"))


@pytest.mark.parametrize("policy", ["end", "prompt", "drop"])
def test_long_examples_are_counted(policy, made, tmp_path, caplog):
    pool = tmp_path / "pool.jsonl"
    rows = folders.pool_rows(4)
    rows[1]["reasoning" if policy == "end" else "question"] = "x" * 300
    folders.write(pool, rows)
    run(made, tmp_path / "run", data__pool=str(pool), model__truncation=policy)
    record = json.loads((tmp_path / "run/prepare/stage.json").read_text())
    counts = record["examples"]["pool"]
    expected = {"whole": 3, "cut": 1, "dropped": 0}
    if policy == "drop":
        expected = {"whole": 3, "cut": 0, "dropped": 1, "dropped_ids": ["ex-001"]}
    assert counts == expected
    assert pq.read_table(tmp_path / "run/prepare/pool.parquet").num_rows == 4 - (policy == "drop")


DOSE = "[DOSE]"  # a token that the tokenizer has and the embedding has not


@pytest.fixture(scope="module", name="extended")
def _extended(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended") / "decoder"
    shutil.copytree(made / "decoder", folder)
    tokenizer = folders.tokenizer()
    tokenizer.add_tokens([DOSE])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("field", "rows", "message"),
    [
        ("data.pool", folders.pool_rows(2), "data.pool: example 'ex-001'"),
        ("data.targets", folders.choice_rows(2, "target"), "data.targets: example 'target-1'"),
        ("data.tests", folders.choice_rows(2, "test"), "The prompt of question 'test-1'"),
        ("finetune.dpo.data", folders.preference_rows(2),
         "finetune.dpo.data: the chosen side of pair 'pair-01'"),
    ],
)  # fmt: skip
def test_a_token_without_embedding_is_refused(field, rows, message, made, extended, tmp_path):
    rows[1]["question"] += DOSE
    path = folders.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(errors.UserError, match=r"has token 261 \('\[DOSE\]'\)") as caught:
        run(made, tmp_path / "run", model__path=str(extended), **{field: path})
    assert str(caught.value).startswith(message)
    run(made, tmp_path / "unused", model__path=str(extended))  # does no harm


def test_a_token_of_the_question_that_generation_adds_is_refused(
    made, extended, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "INSTRUCTION", DOSE)
    changes = {"model__path": str(extended), "evaluate__protocol": "generate"}
    with pytest.raises(errors.UserError, match=r"^The prompt of example 'test-0' has token 261"):
        run(made, tmp_path / "run", **changes)


def test_what_decides_tokens_is_recorded(made, tmp_path):
    """The same tokens on every day; another template, tokenizer or date is another run."""
    model, workdir = tmp_path / "decoder", tmp_path / "run"
    shutil.copytree(made / "decoder", model)
    dated = folders.tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b') }}" + folders.CHAT
    dated.save_pretrained(model)
    run(made, workdir, model__path=str(model))
    record = reading.read_json(workdir / "prepare/stage.json")
    assert record["config"]["data"]["date"] == "2024-07-26"
    first = pq.read_table(workdir / "prepare/pool.parquet")["input_ids"][0].as_py()
    assert dated.decode(first).startswith("26 Jul<|user|>")
    run(made, workdir, model__path=str(model))
    with pytest.raises(errors.UserError, match=r"data.date was '2024-07-26', is now '2025-01-01'"):
        run(made, workdir, model__path=str(model), data__date="2025-01-01")
    (model / "chat_template.jinja").write_text(folders.CHAT)
    with pytest.raises(errors.UserError, match=r"model.path chat template was .*, is now "):
        run(made, workdir, model__path=str(model))
    dated.save_pretrained(model)
    run(made, workdir, model__path=str(model))
    artifacts.write_json(model / "special_tokens_map.json", {"bos_token": "<|user|>"})
    with pytest.raises(errors.UserError, match=r"model.path tokenizer was .*, is now "):
        run(made, workdir, model__path=str(model))


def test_a_dry_run_tries_the_chat_template(made, tmp_path):
    shutil.copytree(made / "decoder", tmp_path / "decoder")
    (tmp_path / "decoder/chat_template.jinja").write_text("{{ messages[0].content }}")
    cfg = config.resolve(make_config(made, model__path=str(tmp_path / "decoder")))
    with pytest.raises(errors.UserError, match=r"^model\.path has a chat template that leaves out"):
        preflight.dry_run(cfg, tmp_path / "run", ["prepare"])


@pytest.mark.parametrize("date", ["", "26 Jul 2024", "2024-02-30", "20240726"])
def test_a_date_is_a_day(date, made, tmp_path):
    with pytest.raises(errors.UserError, match=r"^data\.date must be a day as YYYY-MM-DD; got"):
        run(made, tmp_path / "run", data__date=date)


def test_a_prompt_that_opens_the_reasoning_is_a_warning(made, tmp_path, caplog):
    shutil.copytree(made / "decoder", tmp_path / "decoder")
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = folders.CHAT.replace("<|assistant|>{%", "<|assistant|><think>{%")
    tokenizer.save_pretrained(tmp_path / "decoder")
    for name in ("plain", "think"):
        caplog.clear()
        model = str(tmp_path / "decoder")
        run(made, tmp_path / name, model__path=model, data__template=name)
        assert ("closes it at once" in caplog.text) == (name == "plain")


def test_a_tokenizer_without_chat_template_is_a_warning(made, tmp_path, caplog):
    model = folders.decoder(tmp_path / "plain", chat=False)
    run(made, tmp_path / "run", model__path=str(model))
    assert "has no chat template" in caplog.text


def test_a_loss_that_is_not_a_number_names_the_example(made, tmp_path):
    import safetensors.numpy

    folders.decoder(tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    # Finite, as weights that are loaded are; its products with itself in the tied head are not.
    row = folders.tokenizer().convert_tokens_to_ids("w")
    tensors["model.embed_tokens.weight"][row] = 3e38
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(errors.UserError, match=r"target '.*' is not finite"):
        run(made, tmp_path / "run", "prepare,influence", model__path=str(tmp_path / "nan"))


def command(made, workdir, stages, *flags):
    pairs = {
        "model.path": made / "decoder",
        "model.max_tokens": 256,
        "data.pool": made / "pool.jsonl",
        "data.targets": made / "targets.jsonl",
        "data.tests": made / "tests.jsonl",
    }
    return [
        "run_diq",
        f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}", f"--stages={stages}",
        *(f"--config.{name}={value}" for name, value in pairs.items()), *flags,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_influence_continues_to_identical_bytes(made, tmp_path):
    pool = folders.write(tmp_path / "pool.jsonl", folders.pool_rows(200))
    flags = (f"--config.data.pool={pool}", "--config.influence.batch_tokens=64")
    killed = command(made, tmp_path / "killed", "prepare,influence", *flags)
    partial = tmp_path / "killed/influence/partial"
    process = scripts.start(*killed)
    while process.poll() is None and len(list(partial.glob("rows/part-*"))) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 0 < len(parts.Parts(partial / "rows").done) < 200
    scripts.script(*killed).check_returncode()
    whole = command(made, tmp_path / "whole", "prepare,influence", *flags)
    scripts.script(*whole).check_returncode()
    name = "influence/influence.parquet"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.model.pth=x"], "model.path"),
        (["--config.selection.retention_ratio=1.5"], "selection.retention_ratio must be in (0, 1]"),
        (["--config.influence.normalize=cosine"], "gradient norm"),
        (["--stages=prepair"], "Did you mean 'prepare'?"),
        (["--workdir=/proc/nowhere"], "/proc/nowhere"),
        (["stray"], "'stray' is not a flag"),
    ],
)
def test_the_command_line_answers_mistakes_with_a_sentence(flags, message, made, tmp_path):
    ended = scripts.script(*command(made, tmp_path / "run", "prepare"), *flags)
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_help_says_what_a_script_does_and_takes():
    script = [sys.executable, str(ROOT / "experiments/run_diq.py")]
    ended = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr
    for part in ("A finished stage is skipped", "--stages", "selection.retention_ratio"):
        assert part in ended.stdout
    bare = subprocess.run(script, capture_output=True, text=True)
    assert bare.returncode == 2
    assert bare.stderr == "error: --config and --workdir must be given; --help explains them.\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__targets": ""}, r"data\.targets must be named, since data\.pool is not"),
        (
            {"data__tests": "", "difficulty__source": " "},
            r"data\.tests and difficulty\.source must be named",
        ),
        ({"difficulty__source": "sample", "difficulty__encoder": "nowhere"}, "does not exist here"),
        ({"influence__parameters": "q_prj"}, r"influence\.parameters: 'q_prj' matches none"),
        ({"finetune__targets": "(q"}, r"finetune\.targets: '\(q' is not a valid regex"),
        ({"finetune__parameters": "xyz"}, r"finetune\.parameters: 'xyz' matches none"),
        ({"data__tests": "gone.jsonl"}, r"data\.tests: there is no file gone\.jsonl"),
    ],
)
def test_what_would_fail_later_fails_before_anything_runs(made, tmp_path, changes, says):
    with pytest.raises(errors.UserError, match=says):
        run(made, tmp_path / "run", "", **changes)
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_labels_must_have_the_perspectives_that_are_asked_for(made, tmp_path):
    rates = [{"question": f"q{i}", "p_correct": i / 20} for i in range(20)]
    source = folders.write(tmp_path / "rates.jsonl", rates)
    changes = {"difficulty__source": source, "difficulty__encoder": str(made / "encoder")}
    with pytest.raises(errors.UserError, match="difficulty_knowledge needs the difficulty persp"):
        run(made, tmp_path / "run", "", selection__method="difficulty_knowledge", **changes)


def test_a_pool_too_large_for_all_pairs_is_refused_once_it_is_prepared(made, tmp_path, monkeypatch):
    monkeypatch.setattr("diq_jax.selection.methods.MOST_ROWS", 23)
    changes = {"influence__engine": "factored", "selection__method": "k_center"}
    with pytest.raises(errors.UserError, match="at most 23 examples; this one has 24"):
        run(made, tmp_path, "", **changes)
    assert not (tmp_path / "difficulty").exists()


def test_the_sample_stands_in_only_beside_the_sample():
    c = config.default()
    c.model.path = "x"
    cfg = config.resolve(c)
    assert cfg.data.targets == cfg.data.tests == cfg.difficulty.source == "sample"
    c.data.pool = "mine.jsonl"
    cfg = config.resolve(c)
    assert cfg.data.targets == cfg.data.tests == cfg.difficulty.source == ""


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(made, tmp_path):
    cfg = config.resolve(make_config(made))
    names = ["prepare", "difficulty"]
    said = preflight.dry_run(cfg, tmp_path / "run", names)
    assert re.search(r"data\.pool +24 rows", said) and re.search(r"prepare +to do$", said, re.M)
    assert not (tmp_path / "run").exists()
    assert "influence hours" not in said
    for engine in ("factored", "exact"):
        timed = config.resolve(make_config(made, influence__engine=engine))
        told = preflight.dry_run(timed, tmp_path / "run", [*names, "influence"])
        hours = r"hours +[\d.e-]+: 3 batches of \d+ x \d+ timed, [\d,]+ tokens/s"
        assert re.search(hours, told), told
    many = config.resolve(make_config(made, parallel__distributed=True, parallel__model=64))
    told_many = preflight.dry_run(many, tmp_path / "run", [*names, "influence"])
    assert "hours" not in told_many and told_many.endswith("need and take: `diq plan`.")
    assert not (tmp_path / "run").exists()
    run(made, tmp_path / "run", "prepare")
    rows = pq.read_table(tmp_path / "run/prepare/pool.parquet")["input_ids"].to_pylist()
    tokens = sum(map(len, rows))
    assert f"about {tokens:,}: {tokens / 24:.1f} of the first 24 rows" in told
    said = preflight.dry_run(cfg, tmp_path / "run", names)
    assert re.search(r"prepare +done$", said, re.M) and re.search(r"difficulty +to do", said)
    other = config.resolve(make_config(made, data__seed=3))
    assert "refused without --overwrite: data.seed was 0, is now 3" in preflight.dry_run(
        other, tmp_path / "run", names
    )
