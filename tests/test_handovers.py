"""What stages hand to each other through the disk: declared, recorded, and as it was written."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import folders
import pyarrow.parquet as pq
import pytest
import scripts
import tiny

from diq_jax import config, errors, fields, pipeline
from diq_jax.run import artifacts, devices, records, stages

SETTINGS = {
    "model.max_tokens": 256,
    "difficulty.source": "columns",
    "influence.engine": "projected",
    "influence.parameters": "lora",
    "influence.projection.dim": 32,
    "influence.store.shard_rows": 10,
    "selection.retention_ratio": 0.25,
    "finetune.epochs": 1,
    "evaluate.bootstrap_samples": 100,
}

TRAINING = ("influence", "finetune", "dpo", "evaluate")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    base = scripts.make(tmp_path_factory.mktemp("made"))
    folders.write(base / "preferences.jsonl", folders.preference_rows(4))
    return base


def make_config(made) -> config.Config:
    values = config.default()
    paths = {
        "model.path": made / "decoder",
        "finetune.dpo.data": made / "preferences.jsonl",
        **{f"data.{name}": made / f"{name}.jsonl" for name in ("pool", "targets", "tests")},
    }
    for name, value in ({k: str(path) for k, path in paths.items()} | SETTINGS).items():
        *sections, field = name.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[field] = value
    return config.resolve(values)


@pytest.fixture(scope="module")
def looked_at() -> dict[str, set[str]]:
    """{stage: the config fields that it read}, once `finished` is made."""
    return {}


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory, looked_at) -> pathlib.Path:
    """A run of all stages, with a gradient store and preferences."""
    workdir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, looked_at)
        pipeline.run(make_config(made), workdir, list(pipeline.STAGES), overwrite=False)
    return workdir


def watch(patch, looked_at):
    """Notes in `looked_at` which fields each stage reads while it works."""
    names = {name for name, _, _ in fields.walk(config.Config)}
    reading = []

    def get(self, name):
        by = sys._getframe(1).f_globals["__name__"]
        copied = by == "dataclasses" or "config" in by or by == "diq_jax.fields"  # or checked
        if reading and not copied and f"{type(self).section}.{name}" in names:
            looked_at[reading[0]].add(f"{type(self).section}.{name}")
        return object.__getattribute__(self, name)

    def watched(stage):
        def run(context):
            looked_at[stage.name] = set()
            reading.append(stage.name)
            try:
                return stage.run(context)
            finally:
                reading.pop()

        return dataclasses.replace(stage, run=run)

    patch.setattr(fields.Section, "__getattribute__", get, raising=False)
    patch.setattr(pipeline, "STAGES", {n: watched(s) for n, s in pipeline.STAGES.items()})


def test_a_stage_reads_only_fields_that_it_declares_or_that_are_harmless(finished, looked_at):
    harmless = {
        name
        for name, owner, found in fields.walk(config.Config)
        if found.metadata["declared"].decides == () or owner is config.Parallel
    }
    # These are held by checksums of what they name.
    named = {"model.path", "data.pool", "data.targets", "data.tests", "influence.lora.path"}
    found = {
        name: looked_at[name] - config.decided_by(name) - harmless - named
        for name in pipeline.STAGES
    }
    # What would end a later stage is looked at early, and changes nothing here.
    ahead = {"evaluate.protocol", "finetune.dpo.data", "finetune.dpo.limit"}
    expected = {"prepare": ahead, "difficulty": {"difficulty.perspective"}}
    # dpo trains by a copy of finetune with its own values; the report shows the whole config.
    dpo = {f"finetune.{f.name}" for f in dataclasses.fields(config.finetune_config.Dpo)}
    found["dpo"] -= dpo | {f"finetune.{name}" for name in ("dropout", "packing", "max_steps")}
    del found["report"]
    assert found == {name: expected.get(name, set()) for name in found}


def execute(made, workdir, name, overwrite=False, verify=True) -> bool:
    context = stages.Context(make_config(made), workdir, tiny.placement(), verify)
    with devices.matmul_precision("float32"):
        return stages.execute(pipeline.STAGES[name], context, overwrite)


def record_of(workdir, name):
    return json.loads((workdir / name / "stage.json").read_text())


def test_every_file_of_a_stage_is_a_declared_and_recorded_output(finished):
    for name in pipeline.STAGES:
        files = {
            str(p.relative_to(finished / name))
            for p in (finished / name).rglob("*")
            if p.is_file() and p.name != records.NAME
        }
        assert files == set(record_of(finished, name)["outputs"]), name


class Flipped:
    """One bit of a file turned, for a while."""

    def __init__(self, path: pathlib.Path):
        self.path, self.content = path, path.read_bytes()

    def __enter__(self):
        damaged = bytearray(self.content)
        damaged[len(damaged) // 2] ^= 1
        self.path.write_bytes(damaged)

    def __exit__(self, *_):
        self.path.write_bytes(self.content)


def test_a_flipped_bit_in_any_file_is_refused(made, finished):
    """By the stage that wrote it, which is not done, and by each that reads it."""
    refused = 0
    for name in pipeline.STAGES:
        own = [f"{name}/{file}" for file in record_of(finished, name)["outputs"]]
        read = [file for file in record_of(finished, name)["inputs"] if "/" in file]
        for file in (*own, *read):
            with (
                Flipped(finished / file),
                pytest.raises(errors.UserError, match="damaged or changed") as caught,
            ):
                execute(made, finished, name)
            stage = file.split("/")[0]
            assert file in str(caught.value) and f"--stages={stage} --overwrite" in str(
                caught.value
            )
            refused += 1
        assert not execute(made, finished, name)
    assert refused > 60


def test_a_damaged_store_is_refused_where_its_rows_are_read(made, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for file in ("train-00001-of-00003.npy", "targets.npy", "examples.parquet"):
        with (
            Flipped(workdir / "influence/store" / file),
            pytest.raises(errors.UserError, match=f"store/{file} is damaged.*--stages=influence"),
        ):
            execute(made, workdir, "selection", overwrite=True)
    assert execute(made, workdir, "selection", overwrite=True)


def test_without_verification_a_changed_file_is_used_and_the_record_says_so(
    made, finished, tmp_path
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    scores = workdir / "influence/influence.parquet"
    pq.write_table(pq.read_table(scores), scores, compression="none")  # the same rows
    with pytest.raises(errors.UserError, match="damaged or changed"):
        execute(made, workdir, "selection", overwrite=True)
    assert execute(made, workdir, "selection", overwrite=True, verify=False)
    assert "influence/influence.parquet" in record_of(workdir, "selection")["unverified_inputs"]
    selections = [r / "selection/selection.parquet" for r in (workdir, finished)]
    assert selections[0].read_bytes() == selections[1].read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "difficulty",
        "selection",
        "report",
        *(pytest.param(n, marks=pytest.mark.slow) for n in TRAINING),
    ],
)
def test_a_stage_needs_what_it_declares_and_nothing_else(name, made, finished, tmp_path):
    record = record_of(finished, name)
    read = [file for file in record["inputs"] if "/" in file]
    if "influence/store/manifest.json" in read:  # which vouches for the files beside it
        read += [f"influence/{f}" for f in record_of(finished, "influence")["outputs"] if "/" in f]
    # The report shows what the stages say of themselves; evaluate looks whether finetune ran.
    read += [f"{stage}/stage.json" for stage in pipeline.STAGES if stage != name]
    for file in dict.fromkeys(read):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / file, path)
    assert execute(made, tmp_path, name)
    again = record_of(tmp_path, name)
    assert again["inputs"] == record["inputs"] and "unverified_inputs" not in again
    assert again["outputs"].keys() == record["outputs"].keys()
    same = [f for f, checksum in again["outputs"].items() if checksum == record["outputs"][f]]
    # TensorBoard's file names and the seconds in the report are of the day.
    assert {*again["outputs"]} - {*same} <= {"report.html"}


def test_what_the_user_put_into_the_folders_stays(made, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    kept = [f"{name}/notes.txt" for name in pipeline.STAGES]
    kept += ["finetune/adapter/README.md", "influence/store/plot.png", "report/mine/report.html"]
    for file in kept:
        artifacts.write_text(workdir / file, "mine")
    for name in ("prepare", "selection"):
        assert execute(made, workdir, name, overwrite=True)
    assert all((workdir / file).read_text() == "mine" for file in kept)
    assert not execute(made, workdir, "influence") and not execute(made, workdir, "evaluate")


def test_the_lock_is_never_somebody_elses_file(made, tmp_path):
    workdir, theirs = tmp_path / "run", tmp_path / "theirs"
    workdir.mkdir()
    theirs.write_text("precious")
    (workdir / ".lock").symlink_to(theirs)
    with pytest.raises(errors.UserError, match=r"\.lock is a symbolic link"):
        pipeline.run(make_config(made), workdir, ["prepare"], False)
    assert theirs.read_text() == "precious" and os.listdir(workdir) == [".lock"]
    (workdir / ".lock").unlink()
    (workdir / ".lock").write_text("of another program")
    with pipeline.locked(workdir):
        with pytest.raises(errors.UserError, match="Another run is at work"):
            pipeline.run(make_config(made), workdir, ["prepare"], False)
    assert (workdir / ".lock").read_text() == "of another program"


def test_a_lock_that_is_no_file_is_one_sentence(made, tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(errors.UserError, match=r"cannot be written: Is a directory"):
        pipeline.run(make_config(made), tmp_path, ["prepare"], False)
