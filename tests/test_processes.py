"""Two processes that work as one give what one process gives."""

import os
import pathlib
import signal
import socket
import time

import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import scripts

from diq_jax.influence import store

SCORE = ("--stages=prepare,influence", "--config.influence.batch_tokens=96")
STORE = (
    "--config.influence.engine=projected", "--config.influence.parameters=lora",
    "--config.influence.projection.dim=32", "--config.influence.store.shard_rows=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    return scripts.make(tmp_path_factory.mktemp("processes"))


def start(made, workdir, *flags, processes=1, devices=1):
    """The processes of one run, with as many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    if processes > 1:
        flags = (*flags, "--config.parallel.distributed=True")
    flags = (*scripts.data_flags(made, workdir), *SCORE, *flags)
    count = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}", "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
    }  # fmt: skip
    return [
        scripts.start("run_diq", *flags, env=env | {"JAX_PROCESS_ID": str(index)})
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


@pytest.mark.parametrize(
    "script, message",
    [
        ("run_diq", "set JAX_COORDINATOR_ADDRESS"),
        ("compare_selection", "is for `diq run`"),
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
