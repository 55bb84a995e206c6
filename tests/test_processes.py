"""Two processes that work as one give what one process gives."""

import os
import pathlib
import shutil
import signal
import socket
import time

import crashing
import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import scripts

from diq_jax.influence import store
from diq_jax.run import reading

SCORE = ("--stages=prepare,influence", "--config.influence.batch_tokens=96")
STORE = (
    "--config.influence.engine=projected", "--config.influence.parameters=lora",
    "--config.influence.projection.dim=32", "--config.influence.store.shard_rows=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    return scripts.make(tmp_path_factory.mktemp("processes"))


def start(made, workdir, *flags, processes=1, devices=1, stages=SCORE, script="run_diq"):
    """The processes of one run, with as many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    if processes > 1:
        flags = (*flags, "--config.parallel.distributed=True")
    flags = (*scripts.data_flags(made, workdir), *stages, *flags)
    count = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}", "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
    }  # fmt: skip
    return [
        scripts.start(script, *flags, env=env | {"JAX_PROCESS_ID": str(index)})
        for index in range(processes)
    ]


def finish(running) -> list[str]:
    """What each printed."""
    ended = [process.communicate() for process in running]
    assert not any(process.returncode for process in running), [err[-2000:] for _, err in ended]
    return [out for out, _ in ended]


def scores(workdir, column="influence"):
    table = pq.read_table(workdir / "influence/influence.parquet")
    return np.array(table[column].to_pylist(), np.float32)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_two_processes_score_as_one_and_the_first_writes(made, tmp_path):
    flags = ("--config.influence.targets=task",)
    first, second = finish(start(made, tmp_path / "two", *flags, processes=2, devices=2))
    finish(start(made, tmp_path / "one", *flags))
    assert "24 rows" in first and "rows" not in second
    for column in ("influence", "influence_by_target", "loss"):
        assert_close(scores(tmp_path / "two", column), scores(tmp_path / "one", column))
    files = [
        sorted(str(p.relative_to(tmp_path / run)) for p in (tmp_path / run).rglob("*"))
        for run in ("one", "two")
    ]
    assert files[0] == files[1]


def begin_store(made, tmp_path):
    """Two processes that have begun a store: (flags, processes, where its parts are)."""
    pool = folders.write(tmp_path / "pool.jsonl", folders.pool_rows(200))
    flags = (*STORE, f"--config.data.pool={pool}")
    running = start(made, tmp_path / "two", *flags, processes=2)
    partial = tmp_path / "two/influence/partial/rows"
    while not list(partial.glob("part-*")):
        assert running[0].poll() is None, running[0].communicate()[1][-2000:]
        time.sleep(0.01)
    return flags, running, partial


@pytest.mark.slow
def test_one_process_finishes_the_store_of_two_that_were_killed(made, tmp_path):
    flags, running, partial = begin_store(made, tmp_path)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert partial.exists(), "they ended before they could be killed"
    finish(start(made, tmp_path / "two", *flags))
    finish(start(made, tmp_path / "one", *flags))
    assert_close(scores(tmp_path / "two"), scores(tmp_path / "one"))
    stores = [store.open_store(tmp_path / run / "influence/store") for run in ("two", "one")]
    assert_close(*(np.concatenate([rows for _, rows in s.blocks()]) for s in stores))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [(0,), (1,), (0, 1)])
def test_sigterm_to_any_stops_all_and_the_run_continues(stopped, made, tmp_path):
    flags, running, partial = begin_store(made, tmp_path)
    for index in stopped:
        running[index].send_signal(signal.SIGTERM)
    for process in running:
        said = process.communicate(timeout=10)[1]
        assert process.returncode == 143, said[-2000:]
        assert said.count("Stopped by SIGTERM: the same command continues from here.") == 1
        assert "error" not in said and "Traceback" not in said
    assert partial.exists(), "they ended before they could be stopped"
    finish(start(made, tmp_path / "two", *flags))
    finish(start(made, tmp_path / "one", *flags))
    assert_close(scores(tmp_path / "two"), scores(tmp_path / "one"))


# What each stage leaves on its way, and the process that is killed then.
UNDER_WAY = {
    "difficulty/partial/*/part-*": 1,
    "finetune/state/selected/*/checksums.json": 0,
    "dpo/state/*/checksums.json": 1,
    "evaluate/partial/base/answer/part-*": 0,
}


@pytest.fixture(scope="module")
def stages(made) -> tuple[str, ...]:
    """All stages, each with what devices do in it."""
    folders.encoder(made / "encoder")
    folders.write(made / "pairs.jsonl", folders.preference_rows(8))
    settings = {
        "difficulty.source": made / "pool.jsonl", "difficulty.encoder": made / "encoder",
        "difficulty.folds": 2, "difficulty.epochs": 1, "difficulty.model_scores": True,
        "influence.batch_tokens": 512, "selection.retention_ratio": 0.5, "finetune.baselines": "",
        "finetune.eval_every_steps": 2, "finetune.checkpoint_every_steps": 1,
        "finetune.dpo.data": made / "pairs.jsonl", "finetune.dpo.batch_size": 4,
        "evaluate.protocol": "generate", "evaluate.max_new_tokens": 4,
    }  # fmt: skip
    names = "prepare,difficulty,influence,selection,finetune,dpo,evaluate"
    return (f"--stages={names}", *(f"--config.{name}={x}" for name, x in settings.items()))


@pytest.fixture(scope="module")
def two(made, stages, tmp_path_factory) -> pathlib.Path:
    """What two processes make that nobody kills."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    finish(start(made, workdir, processes=2, stages=stages))
    return workdir


@pytest.mark.slow
def test_every_stage_of_two_and_of_four_processes_is_that_of_one(made, stages, two, tmp_path):
    finish(start(made, tmp_path / "one", stages=stages))
    finish(start(made, tmp_path / "four", processes=4, stages=stages))
    for several in (two, tmp_path / "four"):
        assert_same_run(several, tmp_path / "one")


def assert_same_run(several, one):
    """Scores, losses and weights to float error, and the same answers."""
    for file in ("difficulty/difficulty.parquet", "difficulty/model_scores.parquet",
                 "influence/influence.parquet", "dpo/reference.parquet"):  # fmt: skip
        found, expected = (pq.read_table(run / file) for run in (several, one))
        for name in expected.column_names[1:]:
            assert_close(*(t[name].to_numpy().astype(np.float64) for t in (found, expected)))
    for name in ("finetune/adapter", "finetune/best_adapter", "dpo/adapter"):
        found, expected = (
            safetensors.numpy.load_file(run / name / "adapter_model.safetensors")
            for run in (several, one)
        )
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-5)
    texts = [
        [(row["model"], row["example_id"], row["answers"]) for row in rows]
        for rows in (reading.read_jsonl(run / "evaluate/predictions.jsonl")
                     for run in (several, one))
    ]  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_killed_processes_continue_to_the_same_bytes(made, stages, two, tmp_path):
    workdir = tmp_path / "run"
    for pattern, victim in UNDER_WAY.items():
        running = start(made, workdir, processes=2, stages=stages)
        while not list(workdir.glob(pattern)):
            assert running[0].poll() is None, running[0].communicate()[1][-2000:]
            time.sleep(0.005)
        running[victim].send_signal(signal.SIGKILL)
        for process in running:
            assert process.wait(timeout=60)  # the other ends too
    finish(start(made, workdir, processes=2, stages=stages))
    found, expected = crashing.contents(workdir), crashing.contents(two)
    assert found.keys() - expected.keys() == {n for n in found if n.startswith("error-")}
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_is_saved_where_sigterm_comes(processes, made, stages, two, tmp_path):
    shutil.copytree(two, tmp_path / "run", ignore=shutil.ignore_patterns("finetune", "dpo"))
    flags = (*stages[1:], "--stages=finetune", "--config.finetune.checkpoint_every_steps=10000",
             "--config.finetune.eval_every_steps=20", "--config.finetune.epochs=100")  # fmt: skip
    running = start(made, tmp_path / "run", processes=processes, stages=flags)
    while not (tmp_path / "run/finetune/best_adapter/adapter_config.json").exists():
        assert running[0].poll() is None, running[0].communicate()[1][-2000:]
        time.sleep(0.01)
    running[-1].send_signal(signal.SIGTERM)
    for process in running:
        assert process.wait(timeout=30) == 143
    [kept] = (tmp_path / "run/finetune/state/selected").glob("*/checksums.json")
    assert 20 <= int(kept.parent.name) < 300
    finish(start(made, tmp_path / "run", processes=processes, stages=flags))
    record = reading.read_json(tmp_path / "run/finetune/stage.json")
    assert 0 < record["resumed_tokens"] < record["tokens"]


# Where SIGTERM leaves the state of a training without checkpoints, which takes 200 steps.
STATES = {
    "influence/warmup/state-1": (
        "--config.influence.direction=adam", "--config.influence.warmup.epochs=1",
        "--config.influence.warmup.batch_size=1", "--config.influence.warmup.fraction=1",
    ),
    "difficulty/partial/state-0": ("--config.difficulty.epochs=100",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_sigterm_costs_a_training_no_step(state, made, stages, tmp_path):
    name = state.partition("/")[0]
    pool = folders.write(tmp_path / "pool.jsonl", folders.pool_rows(200))
    flags = (*stages[1:], *STATES[state], f"--stages=prepare,{name}", f"--config.data.pool={pool}")
    finish(start(made, tmp_path / "whole", processes=1, stages=flags))
    [running] = start(made, tmp_path / "run", processes=1, stages=flags)
    while not (tmp_path / "run" / state).exists():
        assert running.poll() is None, running.communicate()[1][-2000:]
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 143
    [kept] = (tmp_path / "run" / state).glob("*/checksums.json")
    assert int(kept.parent.name) > 0
    finish(start(made, tmp_path / "run", processes=1, stages=flags))
    assert crashing.contents(tmp_path / "run") == crashing.contents(tmp_path / "whole")


@pytest.mark.slow
def test_processes_train_parameters_that_lie_in_parts(made, stages, two, tmp_path):
    flags = (*stages[1:], "--stages=finetune", "--config.finetune.parameters=all",
             "--config.finetune.dpo.data=", "--config.finetune.learning_rate=1e-3",
             "--config.parallel.fsdp=on")  # fmt: skip
    for name, processes in (("one", 1), ("several", 2)):
        shutil.copytree(two, tmp_path / name, ignore=shutil.ignore_patterns("finetune", "dpo"))
        finish(start(made, tmp_path / name, processes=processes, stages=flags))
    found, expected = (
        safetensors.numpy.load_file(tmp_path / name / "finetune/model/model.safetensors")
        for name in ("several", "one")
    )
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-5)


@pytest.mark.parametrize(
    "script, message",
    [
        ("run_diq", "set JAX_COORDINATOR_ADDRESS"),
        ("compare_selection", "set JAX_COORDINATOR_ADDRESS"),
        ("ablate_projection", "is for `diq run`"),
    ],
)
def test_a_run_without_others_is_one_sentence(script, message, made, tmp_path):
    flags = ("--config.parallel.distributed=True",)
    ended = scripts.on_data(script, made, tmp_path / "run", *flags)
    assert ended.returncode == 2 and message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_warm_up_of_two_processes_is_that_of_one(made, tmp_path):
    flags = ("--config.influence.direction=adam", "--config.influence.warmup.epochs=2",
             "--config.influence.warmup.fraction=0.5")  # fmt: skip
    finish(start(made, tmp_path / "two", *flags, processes=2))
    finish(start(made, tmp_path / "one", *flags, devices=2))
    assert_close(scores(tmp_path / "two"), scores(tmp_path / "one"))


COMPARE = (
    "--methods=influence,short_answers", "--budgets=0.25,1", "--seeds=2", "--directions=adam",
    "--config.influence.warmup.epochs=1", "--config.influence.warmup.fraction=0.5",
    "--config.evaluate.bootstrap_samples=100", "--config.difficulty.source=columns",
)  # fmt: skip


@pytest.mark.slow
def test_a_comparison_of_two_processes_is_that_of_one(made, tmp_path):
    """Two processes are killed once a cell is kept, and go on; then both are as one."""
    how = {"script": "compare_selection", "stages": COMPARE}
    running = start(made, tmp_path / "two", processes=2, **how)
    cells = tmp_path / "two/compare/cells"
    while len(list(cells.glob("*.json"))) < 2:
        assert running[0].poll() is None, running[0].communicate()[1][-2000:]
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    first, second = finish(start(made, tmp_path / "two", processes=2, **how))
    finish(start(made, tmp_path / "one", devices=2, **how))
    assert "Wrote" in first and "Wrote" not in second
    found, expected = (
        reading.read_json(tmp_path / run / "compare/results.json")["rows"] for run in ("two", "one")
    )
    assert len(expected) == 6  # base, full, and at 25 % random and three methods
    for row, other in zip(found, expected, strict=True):
        assert (row["method"], row["budget"]) == (other["method"], other["budget"])
        for metric in row["metrics"]:
            means = (r["metrics"][metric]["mean"] for r in (row, other))
            np.testing.assert_allclose(*means, rtol=1e-4, atol=1e-5, err_msg=row["method"])
