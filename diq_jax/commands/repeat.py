"""Repeats a selection from its record and artifacts alone: `diq run --from`."""

import itertools
import pathlib
import sys
from typing import Any

from diq_jax import errors, pipeline
from diq_jax.run import artifacts, reading, records, stages

MANIFEST = "influence/store/manifest.json"


def selection(run: pathlib.Path, workdir: pathlib.Path, named: str, verify: bool) -> None:
    """Selects again in `workdir` what `run` selected, and prints whether all files are the same.

    Args:
        run: a run whose selection has finished.
        workdir: a new folder, into which the artifacts that the selection read are linked.
        named: the value of --stages.

    Raises:
        UserError: there is no finished selection, or an artifact has changed since.
        SystemExit: with code 1, a file is different.
    """
    if named and pipeline.parse_stages(named) != ["selection"]:
        raise errors.UserError(f"--from repeats a selection: --stages must be it; got {named!r}.")
    record = records.finished(run, "selection", "--from")
    cfg = records.config_of(record, run / "selection")
    link_inputs(record, run, workdir)
    with pipeline.at_work(cfg, workdir, verify) as context:
        stages.execute(pipeline.STAGES["selection"], context, overwrite=False)
    again = records.finished(workdir, "selection")
    for part in ("inputs", "versions"):
        for name, value in again[part].items():
            if record[part].get(name) != value:
                print(f"note: {name} was {record[part].get(name)}, is now {value}")
    names = sorted(record["outputs"].keys() | again["outputs"].keys())
    found = (first_difference(run / "selection" / n, workdir / "selection" / n) for n in names)
    if difference := next(filter(None, found), ""):
        print(f"different: {difference}")
        sys.exit(1)
    print(f"identical: {', '.join(names)}")


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
            raise errors.UserError(f"--from: {run / name}, which the selection read, is missing.")
        if artifacts.sha256(run / name) != record["inputs"][name]:
            raise errors.UserError(f"--from: {run / name} has changed since the selection read it.")
    shards = (run / MANIFEST).parent.rglob("*") if MANIFEST in names else ()
    made = {run / name.split("/")[0] / records.NAME for name in names}
    for file in [*(run / name for name in names), *shards, *made]:
        link = workdir / file.relative_to(run)
        if file.is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def first_difference(left: pathlib.Path, right: pathlib.Path) -> str:
    """Says where two files differ; "" where they are the same bytes."""
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
