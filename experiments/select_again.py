"""Reruns a selection from its stage.json alone and compares the files byte by byte.

    python experiments/select_again.py --stage=runs/mine/selection/stage.json --workdir=runs/again

The config is the record's; the inputs are the artifacts beside it, which must still be those that
it names. They are linked into --workdir, where the stage runs again. Exit code 0: every file is
identical; 1: the first difference is printed.
"""

import itertools
import pathlib
import sys
from typing import Any

from absl import flags

from diq_jax import errors, pipeline
from diq_jax.commands import cli
from diq_jax.run import artifacts, reading, records, stages

STAGE = flags.DEFINE_string("stage", None, "The selection/stage.json of a finished run.")
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "A new folder to select in.")

MANIFEST = "influence/store/manifest.json"


def read_record(file: pathlib.Path) -> dict[str, Any]:
    """Raises UserError where the file is missing or not of a finished selection."""
    if not file.is_file():
        raise errors.UserError(f"--stage: there is no file {file}.")
    record = records.read(file.parent)
    if file.name != records.NAME or record["stage"] != "selection":
        raise errors.UserError(f"--stage: {file} is not the stage.json of a selection.")
    if record["status"] != "done":
        raise errors.UserError(f"--stage: the selection of {file} has not finished.")
    return record


def link_inputs(record: dict[str, Any], run: pathlib.Path, workdir: pathlib.Path) -> None:
    """Links the artifacts that the record names, and the gradient store's shards, into `workdir`.

    Raises:
        UserError: an artifact is missing or has changed since, or `workdir` is not empty.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise errors.UserError(f"--workdir: {workdir} is not empty.")
    names = [name for name in record["inputs"] if name in records.COLUMNS or name == MANIFEST]
    for name in names:
        if not (run / name).is_file():
            raise errors.UserError(f"--stage: {run / name}, which the selection read, is missing.")
        if artifacts.sha256(run / name) != record["inputs"][name]:
            raise errors.UserError(
                f"--stage: {run / name} has changed since the selection read it."
            )
    shards = (run / MANIFEST).parent.rglob("*") if MANIFEST in names else ()
    made = {run / name.split("/")[0] / records.NAME for name in names}
    for file in [*(run / name for name in names), *shards, *made]:
        link = workdir / file.relative_to(run)
        if file.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def first_difference(left: pathlib.Path, right: pathlib.Path) -> str:
    """Where two files differ, in words; "" where they are the same bytes."""
    if not right.exists() or not left.exists():
        return f"{(left if right.exists() else right).name} is missing"
    if left.read_bytes() == right.read_bytes():
        return ""
    if left.suffix == ".parquet":
        rows = [reading.read_table(file).to_pylist() for file in (left, right)]
    else:
        rows = [file.read_text(encoding="utf-8").splitlines() for file in (left, right)]
    for number, (a, b) in enumerate(itertools.zip_longest(*rows)):
        if repr(a) != repr(b):  # nan equals itself
            return f"{left.name} differs in row {number}: was {a}, is now {b}"
    return f"{left.name} has the same rows in other bytes (another version of pyarrow?)"


def main() -> None:
    file, workdir = pathlib.Path(STAGE.value), cli.folder(WORKDIR)
    record, run = read_record(file), file.parent.parent
    cfg = records.config_of(record, file.parent)
    link_inputs(record, run, workdir)
    with pipeline.at_work(cfg, workdir, cli.verify(VERIFY)) as context:
        stages.execute(pipeline.STAGES["selection"], context, overwrite=False)
    again = records.finished(workdir, "selection")
    changed = {
        name: (record[part].get(name), value)
        for part in ("inputs", "versions")
        for name, value in again[part].items()
        if record[part].get(name) != value
    }
    for name, (old, new) in changed.items():
        print(f"note: {name} was {old}, is now {new}")
    names = sorted(record["outputs"].keys() | again["outputs"].keys())
    found = (first_difference(run / "selection" / n, workdir / "selection" / n) for n in names)
    difference = next(filter(None, found), "")
    if difference:
        print(f"different: {difference}")
        sys.exit(1)
    print(f"identical: {', '.join(names)}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["stage", "workdir"])
    cli.run(main)
