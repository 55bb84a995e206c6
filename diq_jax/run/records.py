"""What a stage recorded of itself in stage.json, and its files held against that.

Nobody uses an artifact unverified: a stage verifies what it declares to read, and what it finds
done (stages.py); a study reads another run's tables with `table` and other files after `verify`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from diq_jax import config, errors
from diq_jax.run import artifacts, progress, reading

NAME, SEAL = "stage.json", "sha256"
# The folder of a stage is being emptied, its stage is at work, or its outputs are whole.
CLEARING, RUNNING, DONE = STATUSES = ("clearing", "running", "done")
LEVELS_UP = 3  # from a file to the folder of its stage: finetune/baselines/NAME/FILE
REQUIRED = {"stage": str, "status": str, "config": dict, "inputs": dict}
FINISHED = {"outputs": dict, "rows": int, "seconds": float}
COUNTS = {"tokens": int, "resumed_tokens": int, "tokens_per_second": float}

IDS, TOKENS = {"example_id": "text"}, {"input_ids": "wholes", "labels": "wholes"}
# The columns that the tables of a run have, and what they hold (columns.KINDS).
COLUMNS: dict[str, dict[str, str]] = {
    "prepare/pool.parquet": IDS
    | dict.fromkeys(("source", "question", "reasoning", "answer", "row"), "text")
    | TOKENS,
    "prepare/targets.parquet": IDS
    | {"task": "text", "question": "text", "choices": "texts"}
    | TOKENS,
    "prepare/tests.parquet": IDS
    | {"task": "text", "question": "text", "options": "texts"}
    | {"prompt_ids": "wholes", "option_ids": "nested", "answer": "whole"}
    | {"end_ids": "wholes", "choices": "texts"},
    # A perspective that nobody labelled is NaN.
    "difficulty/difficulty.parquet": IDS | dict.fromkeys(config.PERSPECTIVES, "number"),
    "difficulty/model_scores.parquet": IDS
    | dict.fromkeys(("loss", "similarity", "task_similarity"), "finite")
    | {"perplexity": "number", "ifd": "number"}
    | dict.fromkeys(("answer_tokens", "reasoning_tokens"), "whole"),
    "influence/influence.parquet": IDS
    | {"influence": "finite", "loss": "finite", "tokens": "whole"},
    "influence/tuned.parquet": IDS,
    "selection/selection.parquet": IDS
    | {"difficulty": "number", "influence": "finite", "quadrant": "whole", "rank": "whole"}
    | {"selected": "flag"},
    "selection/baselines.parquet": IDS,
    "selection/hygiene.parquet": IDS
    | dict.fromkeys(("other", "other_in", "kind"), "text")
    | {"similarity": "number"},
}
OPTIONAL: dict[str, dict[str, str]] = {  # columns that only some settings, or later versions, write
    "prepare/pool.parquet": {"letter": "text", "context": "text"},
    "influence/influence.parquet": {"influence_by_target": "finites", "alignment": "finite"},
    "influence/tuned.parquet": {"color": "finite", "temp": "finite", "temp_cluster": "whole"},
}


def read(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Reads the record of a stage's folder; None where there is none.

    Raises:
        UserError: a stage.json that this version of diq_jax does not write.
    """
    path = pathlib.Path(folder) / NAME
    if not os.path.lexists(path):
        return None
    try:
        record = reading.read_record(path, REQUIRED, FINISHED | COUNTS)
        errors.check_choice(f"{path}: status", record["status"], STATUSES)
        if record["status"] == DONE:
            reading.check_record(record, str(path), FINISHED)
        reading.check_record(record, str(path), {}, {"versions": dict})
        for field in ("inputs", "outputs", "versions"):
            texts = record.get(field, {})
            reading.check_record(texts, f"{path}: {field}", dict.fromkeys(texts, str))
    except errors.UserError as e:
        raise errors.UserError(
            f"{e} It is damaged, or not of this version of diq_jax: move {path.parent} away and "
            "make the stage again, or name another --workdir."
        ) from None
    return record


def finished(workdir: pathlib.Path, stage: str, field: str = "--workdir") -> dict[str, Any]:
    """Reads the record of a finished stage of another run.

    Raises:
        UserError: naming `field`, a flag: the stage has not finished there.
    """
    record = read(workdir / stage)
    if record is None or record["status"] != DONE:
        raise errors.UserError(
            f"{field}: {workdir} holds no finished {stage} stage: run first "
            f"diq run --stages={stage}."
        )
    return record


def config_of(record: Mapping[str, Any], path: pathlib.Path) -> config.Config:
    """Returns the config that a record was made with. UserError where it is not this version's."""
    try:
        return config.from_dict(record["config"])
    except errors.UserError as e:
        raise errors.UserError(f"{path / NAME} holds a config of another version: {e}") from None


def verify(path: str | os.PathLike, checksum: str = "") -> bool:
    """Holds a file against the record of the stage that made it, in a folder above.

    Args:
        checksum: of the file, where it is known.

    Returns:
        Whether there is such a record: a file of the user's own has none.

    Raises:
        UserError: the file is missing, its stage has not finished, or it differs from the record.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.UserError(f"{path} is missing: run the stage that makes it first.")
    for folder in path.absolute().parents[:LEVELS_UP]:
        if (record := read(folder)) is not None:
            break
    else:
        return False
    if record["status"] != DONE:
        stage = record["stage"]
        raise errors.UserError(
            f"{path} is of the stage {stage!r}, which has not finished: run with --stages={stage}."
        )
    _compare(path, folder, record, checksum or artifacts.sha256(path))
    return True


def _compare(path, folder, record, checksum) -> None:
    name = path.absolute().relative_to(folder.absolute()).as_posix()
    if name not in record["outputs"]:
        problem = f"is not among the files that {folder / NAME} says it has written"
    elif checksum != record["outputs"][name]:
        problem = f"was damaged or changed: its checksum is not the one in {folder / NAME}"
    else:
        return
    raise errors.UserError(
        f"{path} {problem}. Redo the stage with --stages={record['stage']} --overwrite, or use the "
        "file as it is with --verify=off."
    )


def verify_outputs(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Holds every output that is there against its record; a bar shows where that takes long."""
    found = [folder / name for name in record["outputs"] if (folder / name).is_file()]
    for path, checksum in checksums(f"verify {folder.name}", found):
        _compare(path, folder, record, checksum)


def checksums(title: str, paths: Sequence[pathlib.Path]) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields (path, sha256) with a bar that shows where it takes more than a few seconds."""
    with progress.byte_bar(title, sum(path.stat().st_size for path in paths)) as bar:
        for path in paths:
            yield path, artifacts.sha256(path)
            bar.update(path.stat().st_size)


def seal(result: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the checksum of its values to a result of a study, for `unseal`."""
    return {**result, SEAL: _checksum(result)}


def unseal(path: pathlib.Path, verified: bool = True) -> dict[str, Any]:
    """Reads a result that `seal` closed. Those of earlier versions have no checksum.

    Raises:
        UserError: it is not JSON, or not what was written.
    """
    result = reading.read_record(path, {}, {SEAL: str})
    expected = result.pop(SEAL, None)
    if verified and expected is not None and _checksum(result) != expected:
        raise errors.UserError(
            f"{path} was damaged or changed: its values do not have the checksum that it names. "
            "Delete it, to compute it again, or use it as it is with --verify=off."
        )
    return result


def _checksum(result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def table(workdir: pathlib.Path, name: str, verified: bool = True) -> pa.Table:
    """Reads a table of a run, such as influence/influence.parquet, with the columns it must have.

    Args:
        verified: whether to hold it against its record.

    Raises:
        UserError: it is missing, damaged or unfinished, or a column is not as it must be.
    """
    if verified:
        verify(workdir / name)
    return read_table(workdir, name)


def read_table(workdir: pathlib.Path, name: str, columns: Sequence[str] = ()) -> pa.Table:
    """Reads a run's table, or some columns. Raises UserError as `table`, but for its record."""
    known = COLUMNS[name] | OPTIONAL.get(name, {})
    kinds = {column: known[column] for column in columns or COLUMNS[name]}
    with _redone(workdir, name):
        return reading.read_table(workdir / name, kinds, only=bool(columns))


def group_rows(workdir: pathlib.Path, name: str) -> list[int]:
    """Counts the rows of each row group of a table. Raises UserError as `read_table`."""
    with _redone(workdir, name):
        return reading.group_rows(workdir / name)


def read_batches(
    workdir: pathlib.Path, name: str, columns: Sequence[str], group: int | None = None
) -> Iterator[pa.Table]:
    """Reads some columns of a run's table, or of one row group, by parts. See `read_table`."""
    known = COLUMNS[name] | OPTIONAL.get(name, {})
    with _redone(workdir, name):
        yield from reading.table_batches(workdir / name, {c: known[c] for c in columns}, group)


@contextlib.contextmanager
def _redone(workdir: pathlib.Path, name: str) -> Iterator[None]:
    """Says of a table that cannot be read how to make it again."""
    try:
        yield
    except errors.UserError as e:
        if not (workdir / name).exists():
            raise
        stage = name.split("/")[0]
        raise errors.UserError(f"{e} Redo the stage with --stages={stage} --overwrite.") from None
