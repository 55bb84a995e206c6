"""A workdir at a URL is as one here, whichever machines work on it one after the other."""

import os
import pathlib
import shutil
import signal
import socket
import time

import buckets
import crashing
import forks
import fsspec
import pytest
import scripts

from diq_jax import errors
from diq_jax.commands import cli
from diq_jax.evaluate import predictions
from diq_jax.run import artifacts, mirror, reading

FILE = pathlib.Path(buckets.__file__)
OTHER = '{"run": "a", "host": "h", "process": 1, "beat": 0}'


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder of an empty store; what looks at it is fast."""
    monkeypatch.setenv("DIQ_BUCKETS", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    monkeypatch.setattr(mirror, "SETTLED", 0.01)
    buckets.register()
    (tmp_path / "store").mkdir()
    return tmp_path / "store/b/run"


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_and_removed_here_is_there_at_once(store):
    with mirror.opened("bucket://b/run/") as copy:
        artifacts.write_json(copy / "prepare/stage.json", {})
        artifacts.write_text(copy / "prepare/partial/a", "1")
        assert files(store) == {".writer", "prepare/stage.json", "prepare/partial/a"}
        artifacts.write_text(copy / "prepare/partial/a", "22")
        assert (store / "prepare/partial/a").read_text() == "22"
        (copy / "prepare/others").write_text("of a library")
        artifacts.sync_tree(copy / "prepare")
        artifacts.remove(copy / "prepare/partial")
        assert files(store) == {".writer", "prepare/stage.json", "prepare/others"}
        artifacts.write_text(copy.parent / "elsewhere", "")
        (copy / "run.log").write_text("a line")
    assert files(store) == files(copy) == {"prepare/stage.json", "prepare/others", "run.log"}


def test_the_url_is_the_truth(store, monkeypatch):
    with mirror.opened("bucket://b/run") as copy:
        for name in ("stage.json", "kept", "changed", "gone"):
            artifacts.write_text(copy / f"prepare/{name}", name)
    before = {name: (copy / f"prepare/{name}").stat().st_ino for name in ("kept", "changed")}
    (store / "prepare/changed").write_text("other")
    (store / "prepare/gone").unlink()
    (copy / "prepare/more").write_text("of a run that was killed before it was sent")
    with mirror.opened("bucket://b/run", writes=False) as copy:
        assert (copy / "prepare/changed").read_text() == "other"
        assert (
            files(copy)
            == files(store)
            == {f"prepare/{n}" for n in ("stage.json", "kept", "changed")}
        )
        assert (copy / "prepare/kept").stat().st_ino == before["kept"]  # not fetched again
        artifacts.write_text(copy / "prepare/kept", "not sent")
    assert (store / "prepare/kept").read_text() == "kept"
    with mirror.opened("bucket://b/run", writes=False) as copy:
        assert (copy / "prepare/kept").read_text() == "kept"


def test_two_runs_at_one_url(store, tmp_path, monkeypatch):
    with mirror.opened("bucket://b/run"):
        with pytest.raises(errors.UserError, match="Another run is at work in bucket://b/run"):
            with mirror.opened("bucket://b/run"):
                pass
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
        monkeypatch.setattr(mirror, "DEAD", 5.0)
        (store / ".writer").write_text(OTHER)
        with monkeypatch.context() as patch:
            beaten = lambda _: (store / ".writer").write_text(OTHER.replace("0", "1"))  # noqa: E731
            patch.setattr(mirror.time, "sleep", beaten)
            with pytest.raises(errors.UserError, match=r"at work in .*/run \(process 1 of h\)"):
                with mirror.opened("bucket://b/run"):
                    pass


def test_a_dead_run_is_taken_over(store, monkeypatch, capfd):
    monkeypatch.setattr(mirror, "DEAD", 0.1)
    store.mkdir(parents=True)
    (store / ".writer").write_text(OTHER)
    with mirror.opened("bucket://b/run"):
        said = capfd.readouterr().err
        assert "is held by process 1 of h: waiting 0.1 s" in said and "is taken over" in said
    assert files(store) == set()


@pytest.mark.parametrize("text", ["[]", '{"run": "x"}'])
def test_a_damaged_sign_of_another_run_is_refused(text, store):
    store.mkdir(parents=True)
    (store / ".writer").write_text(text)
    with pytest.raises(errors.UserError, match=r"bucket://b/run/\.writer is damaged: remove it"):
        with mirror.opened("bucket://b/run"):
            pass


def test_a_run_that_was_taken_over_writes_no_more(store, monkeypatch):
    monkeypatch.setattr(mirror, "BEAT", 0.05)
    with pytest.raises(errors.UserError, match="Another run has taken over bucket://b/run"):
        with mirror.opened("bucket://b/run") as copy:
            (store / ".writer").write_text(OTHER)
            time.sleep(0.5)
            artifacts.write_text(copy / "prepare/a", "")
    assert files(store) == {".writer"} and (store / ".writer").read_text() == OTHER


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos/a.png", r"bucket://b/run holds 1 files, such as 'photos/a.png', but no run"),
        ("prepare/stage.json", None),
        ("run.log", None),
    ],
)
def test_a_place_of_something_else_is_refused(name, message, store):
    (store / name).parent.mkdir(parents=True)
    (store / name).write_text("{}")
    if message:
        with pytest.raises(errors.UserError, match=message):
            with mirror.opened("bucket://b/run"):
                pass
        assert files(store) == {name}
    else:
        with mirror.opened("bucket://b/run") as copy:
            assert files(copy) == {name}


def test_a_failed_transfer_is_one_sentence(store, monkeypatch):
    def fails(*args):
        raise OSError("503 slow down")

    with pytest.raises(errors.UserError, match=r"--workdir: bucket://b/run cannot be .*503 slow"):
        with mirror.opened("bucket://b/run") as copy:
            with monkeypatch.context() as patch:
                patch.setattr(buckets.ObjectStore, "put_file", fails)
                artifacts.write_text(copy / "prepare/a", "")
    assert files(store) == set()
    with pytest.raises(errors.UserError, match="Protocol not known"):
        with mirror.opened("nosuch://b/run"):
            pass


def test_names_that_lead_out_of_the_copy_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/b/run/prepare/stage.json", b"{}")
    found = memory.find("/b/run", detail=True)
    bad = {"/b/run/../../x": next(iter(found.values()))}
    monkeypatch.setattr(type(memory), "find", lambda *args, **kwargs: found | bad)
    with pytest.raises(errors.UserError, match=r"holds '../../x', no name of a file"):
        with mirror.opened("memory://b/run"):
            pass
    assert not (tmp_path / "x").exists()


STAGES = "--stages=prepare,difficulty,influence,selection,finetune"
SETTINGS = (
    STAGES, "--config.difficulty.source=columns",
    "--config.influence.engine=projected", "--config.influence.parameters=lora",
    "--config.influence.projection.dim=32", "--config.influence.batch_tokens=96",
    "--config.selection.retention_ratio=0.5", "--config.finetune.baselines=",
    "--config.finetune.checkpoint_every_steps=1", "--config.finetune.epochs=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return scripts.make(tmp_path_factory.mktemp("mirror"))


def flags(made, workdir):
    return [*scripts.data_flags(made, workdir), *SETTINGS]


def start(made, machine, *more, workdir="bucket://b/run", **env):
    """`diq run` at a URL, on a machine with a cache of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(machine)} | env
    return forks.Running([FILE, "run", *flags(made, workdir), *more], env)


def finish(running, code=0):
    out, err = running.communicate()
    assert running.returncode == code, err[-2000:]
    return out, err


# What stands at the URL when a machine is lost.
UNDER_WAY = ("influence/partial/rows/part-*", "finetune/state/selected/*/checksums.json")


@pytest.mark.slow
def test_lost_machines_leave_what_another_one_continues_to_the_same_bytes(made, store, tmp_path):
    assert scripts.script("run", *flags(made, tmp_path / "whole")).returncode == 0
    for number, pattern in enumerate(UNDER_WAY):
        running = start(made, tmp_path / f"machine-{number}")
        while not list(store.glob(pattern)):
            assert running.poll() is None, running.communicate()[1][-2000:]
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
        shutil.rmtree(tmp_path / f"machine-{number}")
    out, err = finish(start(made, tmp_path / "last"))
    assert "prepare     done before" in out and "is taken over" in err
    expected = crashing.contents(tmp_path / "whole")
    expected.pop(".lock")
    assert crashing.contents(store) == expected
    out, _ = finish(start(made, tmp_path / "reader"))
    assert out.count("done before") == 5
    file = store / "influence/influence.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    _, err = finish(start(made, tmp_path / "reader"), code=2)
    assert "influence.parquet" in err and "is not" in err


# Two hosts, the parameters and their training in parts on both.
PARTS = ("--config.parallel.distributed=True", "--config.parallel.fsdp=on",
         "--config.finetune.parameters=all")  # fmt: skip


def start_hosts(made, machines, workdir):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        start(made, machine, *PARTS, workdir=workdir, **env, JAX_PROCESS_ID=str(index))
        for index, machine in enumerate(machines)
    ]


@pytest.mark.slow
def test_hosts_that_see_no_file_of_each_other_are_as_those_that_do(made, store, tmp_path):
    machines = tmp_path / "a", tmp_path / "b"
    for running in start_hosts(made, machines, tmp_path / "whole"):
        finish(running)
    hosts = start_hosts(made, machines, "bucket://b/run")
    while not list(store.glob(UNDER_WAY[1])):
        assert hosts[0].poll() is None, hosts[0].communicate()[1][-2000:]
        time.sleep(0.005)
    hosts[0].send_signal(signal.SIGKILL)
    for running in hosts:
        assert running.wait(timeout=60)  # the other ends too
    shutil.rmtree(machines[0])
    for running in start_hosts(made, machines, "bucket://b/run"):
        finish(running)
    record = reading.read_json(store / "finetune/stage.json")
    assert 0 < record["resumed_tokens"] < record["tokens"]
    expected, found = crashing.contents(tmp_path / "whole"), crashing.contents(store)
    expected.pop(".lock")
    assert {n: x for n, x in found.items() if not n.startswith("error-")} == expected


def test_a_dry_run_writes_nothing_there(made, store, tmp_path):
    out, _ = finish(start(made, tmp_path / "here", "--dry_run"))
    assert "to do" in out and not store.exists()


def test_a_command_reads_a_run_at_a_url_as_one_here(store, capsys):
    row = {"example_id": "q", "model": "selected", "task": "t", "answer": 0, "predicted": 0}
    with mirror.opened("bucket://b/run") as copy:
        artifacts.write_json(copy / "evaluate/stage.json", {})
        artifacts.write_jsonl(copy / "evaluate/predictions.jsonl", [row])
    shutil.rmtree(copy)
    try:
        [(name, found)] = predictions.read_all(
            [cli.run_folder("bucket://b/run:selected", "--answers")], "--answers", verified=False
        ).items()
        assert (name, found["q"]["task"]) == ("selected", "t")
        assert files(store) == {"evaluate/stage.json", "evaluate/predictions.jsonl"}  # no sign
        assert cli.run_folder("runs/here:selected", "--answers") == "runs/here:selected"
        for url, message in (("bucket://b/none", "holds no run"), (" ", "must name a run's")):
            with pytest.raises(errors.UserError, match=f"--answers.* {message}"):
                cli.run_folder(url, "--answers")
        (store.parent / "other").mkdir()
        (store.parent / "other/x").write_text("of somebody")
        with pytest.raises(errors.UserError, match=r"--selection: .* holds 1 files, such as 'x'"):
            cli.run_folder("bucket://b/other", "--selection")
        # Others may read beside it, as long as the URL stays as it was read, and nobody may write.
        with mirror.opened("bucket://b/run", writes=False) as beside:
            assert files(beside) == files(store)
        with pytest.raises(errors.UserError, match="or a command on this machine reads it"):
            mirror.opened("bucket://b/run").__enter__()
        (store / "evaluate/more").write_text("")
        with pytest.raises(errors.UserError, match="has changed since another command"):
            mirror.opened("bucket://b/run", writes=False).__enter__()
    finally:
        cli._OPENED.close()
        cli._COPIES.clear()
    with mirror.opened("bucket://b/run") as copy:  # nobody reads it now
        assert "evaluate/more" in files(copy)
