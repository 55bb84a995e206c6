"""A stage's folder: what is its own, what is whole, and what it must not touch."""

import json
import os

import pytest
import tiny

from diq_jax import config, errors
from diq_jax.run import artifacts, parts, records, stages


def make_context(workdir, verify=True):
    values = config.default()
    values.model.path, values.data.pool = "x", "sample"
    return stages.Context(config.resolve(values), workdir, tiny.placement(), verify)


class Fault(Exception):
    pass


def first(context):
    artifacts.write_text(context.path("first/out/a.txt"), "a" * 100)
    artifacts.write_text(context.path("first/b.txt"), "b")
    return {"rows": 1}


def second(context):
    mine = parts.Parts(context.path("second/partial"))
    mine.add([0], {"read": [context.path("first/out/a.txt").read_text()]})
    artifacts.write_text(context.path("second/c.txt"), "c")
    artifacts.remove(context.path("second/partial"))
    return {"rows": 1}


def make(name, run, reads=(), writes=("*.txt", "partial/*")):
    return stages.Stage(name, lambda _: reads, writes, lambda _: {}, run)


TIMES = {"seconds": 0, "peak_memory_mib": {}}
FIRST = make("first", first, writes=("out/*.txt", "b.txt"))
SECOND = make("second", second, ("first/out/a.txt",))


def execute(stage, workdir, overwrite=False, **changes):
    return stages.execute(stage, make_context(workdir, **changes), overwrite)


@pytest.fixture(autouse=True)
def decided(monkeypatch):
    """The seed decides what these stages make."""
    monkeypatch.setattr(config, "decided_by", lambda stage: {"data.seed"})


@pytest.fixture
def done(tmp_path):
    assert execute(FIRST, tmp_path) and execute(SECOND, tmp_path)
    return tmp_path


def contents(folder):
    """{file: its bytes}, without the seconds and the memory that a stage took."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        out[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == records.NAME:
            out[str(path.relative_to(folder))] = json.loads(path.read_text()) | TIMES
    return out


def test_the_record_names_exactly_what_was_written(done):
    record = records.read(done / "first")
    expected = {name: artifacts.sha256(done / "first" / name) for name in ("b.txt", "out/a.txt")}
    assert record["outputs"] == expected and record["status"] == "done"
    assert records.read(done / "second")["inputs"] == {"first/out/a.txt": expected["out/a.txt"]}
    assert not execute(FIRST, done) and not execute(SECOND, done)


def test_a_field_that_an_earlier_version_lacked_is_no_difference(done):
    record = json.loads((done / "first" / records.NAME).read_text())
    del record["config"]["data"]["seed"]
    (done / "first" / records.NAME).write_text(json.dumps(record))
    assert not execute(FIRST, done)
    record["config"]["data"]["seed"] = 1
    (done / "first" / records.NAME).write_text(json.dumps(record))
    with pytest.raises(errors.UserError, match=r"data\.seed was 1, is now 0"):
        execute(FIRST, done)


def test_a_damaged_output_is_not_done_before(done):
    (done / "first/b.txt").write_text("B")
    with pytest.raises(errors.UserError, match=r"b\.txt was damaged .*--stages=first --overwrite"):
        execute(FIRST, done)
    assert not execute(FIRST, done, verify=False)
    assert execute(FIRST, done, overwrite=True)
    assert (done / "first/b.txt").read_text() == "b"
    assert not execute(SECOND, done)  # the same input again


def test_a_damaged_input_never_becomes_a_recorded_one(done):
    before = contents(done / "second")
    (done / "first/out/a.txt").write_text("A" * 100)
    for overwrite in (False, True):
        with pytest.raises(errors.UserError, match=r"out/a\.txt was damaged .*--stages=first"):
            execute(SECOND, done, overwrite)
    assert contents(done / "second") == before
    assert execute(SECOND, done, overwrite=True, verify=False)
    assert records.read(done / "second")["unverified_inputs"] == ["first/out/a.txt"]


def test_an_input_of_an_unfinished_stage_is_refused(tmp_path):
    def dies(context):
        first(context)
        raise Fault

    with pytest.raises(Fault):
        execute(make("first", dies), tmp_path)
    with pytest.raises(errors.UserError, match="has not finished"):
        execute(SECOND, tmp_path)


def test_an_input_brought_by_hand_is_used_and_said(tmp_path, caplog):
    artifacts.write_text(tmp_path / "first/out/a.txt", "mine")
    assert execute(SECOND, tmp_path)
    assert "used as it is, unverified" in caplog.text
    assert records.read(tmp_path / "second")["unverified_inputs"] == ["first/out/a.txt"]


def test_a_missing_output_is_made_again(done):
    whole = contents(done / "first")
    (done / "first/out/a.txt").unlink()
    assert execute(FIRST, done)
    assert contents(done / "first") == whole


def test_overwrite_leaves_what_others_put_there(done):
    for name in ("first/notes.md", "first/out/plot.png", "first/mine/b.txt"):
        artifacts.write_text(done / name, "mine")
    assert not execute(FIRST, done)
    assert execute(FIRST, done, overwrite=True)
    for name in ("first/notes.md", "first/out/plot.png", "first/mine/b.txt"):
        assert (done / name).read_text() == "mine"
    assert set(records.read(done / "first")["outputs"]) == {"b.txt", "out/a.txt"}


def test_outputs_of_an_earlier_version_are_deleted_too(done):
    path = done / "first/stage.json"
    record = json.loads(path.read_text())
    artifacts.write_text(done / "first/old/name.bin", "old")
    record["outputs"]["old/name.bin"] = artifacts.sha256(done / "first/old/name.bin")
    artifacts.write_json(path, record)
    assert execute(FIRST, done, overwrite=True)
    assert not (done / "first/old").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_refused(tmp_path, overwrite):
    (tmp_path / "first/years").mkdir(parents=True)
    (tmp_path / "first/years/thesis.txt").write_text("work")
    with pytest.raises(errors.UserError, match=r"holds files, but no stage\.json"):
        execute(FIRST, tmp_path, overwrite)
    assert contents(tmp_path) == {"first/years/thesis.txt": b"work"}


@pytest.mark.parametrize("text", ["{", '{"name": "theirs"}', "[]", '{"stage": 1}'])
def test_a_stage_json_of_others_is_refused(tmp_path, text):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/stage.json").write_text(text)
    (tmp_path / "first/b.txt").write_text("theirs")
    for overwrite in (False, True):
        with pytest.raises(errors.UserError, match="another --workdir"):
            execute(FIRST, tmp_path, overwrite)
    assert (tmp_path / "first/b.txt").read_text() == "theirs"


def test_the_record_of_another_stage_is_refused(done):
    os.rename(done / "second", done / "third")
    with pytest.raises(errors.UserError, match="of the stage 'second', not of 'third'"):
        execute(make("third", second), done)


def test_symbolic_links_are_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/b.txt").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/first").symlink_to(tmp_path / "theirs")
    with pytest.raises(errors.UserError, match="first is a symbolic link"):
        execute(FIRST, tmp_path / "run", overwrite=True)
    (tmp_path / "run/first").unlink()
    execute(FIRST, tmp_path / "run")
    for name, target in (("out", "theirs"), ("b.txt", "theirs/b.txt")):
        path = tmp_path / "run/first" / name
        artifacts.remove(path)
        path.symlink_to(tmp_path / target)
        with pytest.raises(errors.UserError, match=f"{name} is a symbolic link"):
            execute(FIRST, tmp_path / "run", overwrite=True)
        path.unlink()
    assert contents(tmp_path / "theirs") == {"b.txt": b"theirs"}


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "first").write_text("theirs")
    with pytest.raises(errors.UserError, match="first is no folder"):
        execute(FIRST, tmp_path, overwrite=True)


@pytest.mark.parametrize("deleted", range(4))
def test_a_kill_while_the_folder_is_emptied_leaves_nothing_stale(done, deleted, monkeypatch):
    """What is left of the former result is never taken for a part of the new one."""
    for name in ("b.txt", "out/a.txt", "old.txt"):
        artifacts.write_text(done / "first" / name, "stale")
    path = done / "first/stage.json"
    record = json.loads(path.read_text())
    record["outputs"] = {n: artifacts.sha256(done / "first" / n) for n in ("b.txt", "old.txt")}
    artifacts.write_json(path, record)
    remove, left = artifacts.remove, deleted

    def dies(path):
        nonlocal left
        left -= 1
        if left < 0:
            raise Fault
        remove(path)

    monkeypatch.setattr(artifacts, "remove", dies)
    with pytest.raises(Fault):
        execute(FIRST, done, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(
        errors.UserError, match=r"has not finished|needs .*which stage 'first' makes"
    ):
        execute(SECOND, done)

    def sees_nothing(context):
        assert [p.name for p in context.path("first").iterdir()] == [records.NAME]
        return first(context)

    assert execute(make("first", sees_nothing, writes=FIRST.writes), done)
    assert set(records.read(done / "first")["outputs"]) == {"b.txt", "out/a.txt"}


def test_half_written_files_of_a_killed_run_go_and_those_of_others_stay(tmp_path):
    for name in (".b.txt.abcd1234.tmp", ".stage.json.abcd1234.tmp"):
        artifacts.write_text(tmp_path / "first" / name, "half")
    with pytest.raises(errors.UserError, match="holds files"):  # the first is not the record's
        execute(FIRST, tmp_path)
    (tmp_path / "first/.b.txt.abcd1234.tmp").unlink()
    assert execute(FIRST, tmp_path)
    artifacts.write_text(tmp_path / "first/.b.txt.abcd1234.tmp", "half")
    artifacts.write_text(tmp_path / "first/.mine.tmp", "mine")
    assert execute(FIRST, tmp_path, overwrite=True)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {"b.txt", "out", "stage.json", ".mine.tmp"}
