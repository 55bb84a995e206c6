"""Rows from files and the hub, checked one by one: every mistake is named with its file and line.

A source is a path, a glob, `hub:NAME[:CONFIG[:SPLIT]]` (split `train` unless given) or `sample`;
several are separated by commas. Targets and tests may also be `benchmark:NAME[:FILE]`
(benchmarks.py). The extension gives the format: .jsonl, .jsonl.gz, .json (a list),
.parquet, .csv; text is UTF-8. Lines are counted from 1, as editors do; rows of .json, .parquet and
the hub from 0, as `dataset[17]` does.
"""

import csv
import glob
import gzip
import hashlib
import importlib.resources
import io
import itertools
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax.common import artifacts, errors
from diq_jax.data import benchmarks
from diq_jax.data import example as example_lib

Rows = Iterator[tuple[dict, str]]  # a row and where it stands

# Column names of public pools; "a+b" joins two columns by a blank line.
MAPPINGS = {
    # FreedomIntelligence/medical-o1-reasoning-SFT: as in data/demo_data.json of its repository.
    "huatuo": {"question": "Question", "reasoning": "Complex_CoT", "answer": "Response"},
    # UCSC-VLAA/m23k-tokenized: the names that its authors' tokenising script reads.
    "m23k": {"question": "prompt", "reasoning": "reasoning", "answer": "distilled_answer_string"},
    # UCSC-VLAA/MedReason: the names that several public loaders read. The options are a text of
    # their own, and without them "which of the following" asks nothing.
    "medreason": {"question": "question+options", "reasoning": "reasoning", "answer": "answer"},
    # hongzhouyu/FineMed-SFT: uncertain, from one public loader. It has no column of reasoning.
    "finemed": {"question": "instruction", "answer": "response"},
}
CONTRACT = {name: name for name in ("id", "question", "reasoning", "answer")}
# A file of such a name says nothing about its task: the folder does.
SPLIT_NAMES = {"target", "targets", "test", "tests", "train", "dev", "val", "validation"}


def read_rows(spec: str, field: str, sample: str = "") -> list[tuple[dict, str]]:
    """Reads every row of `spec` with where it stands: "file:line", or "NAME row 17".

    Args:
        sample: the shipped file that the word `sample` stands for: pool, targets or tests.

    Raises:
        UserError: naming `field`, the config field that `spec` comes from, the file and the line.
    """
    return [row for source in _resolve(spec, field, sample) for row in _rows(source, field)]


def fingerprint(spec: str, field: str, sample: str = "") -> str:
    """A hash of the files that `spec` names; of a hub data set or a benchmark, its name.

    Args:
        sample: the shipped file that the word `sample` stands for: pool, targets or tests.
    """
    digest = hashlib.sha256()
    for source in _resolve(spec, field, sample):
        head, file = _split(source)
        is_hub = file.startswith("hub:")
        digest.update((head + (file if is_hub else artifacts.sha256(file))).encode())
    return digest.hexdigest()


def load_pool(
    spec: str, columns: str, limit: int, field: str = "data.pool"
) -> list[example_lib.Example]:
    """Loads the examples to choose from: the first `limit`, or all for 0.

    Args:
        columns: "" (id, question, reasoning, answer), a name of `MAPPINGS`, or
            "question=Q,reasoning=R,answer=A[,id=ID]". A row without an id is named after its
            position in the pool, counted from 0: "row-000017". Pre-tokenised rows need no mapping.
    """
    sources = _resolve(spec, field, sample="pool")
    rows = itertools.chain.from_iterable(_rows(source, field) for source in sources)
    rows = list(itertools.islice(rows, limit or None))
    mapping = _mapping(columns)
    _check_columns(mapping, rows)
    examples = [
        _from_pool_row(row, f"{field}: {where}", position, "", mapping)
        for position, (row, where) in enumerate(rows)
    ]
    check_ids(examples, [where for _, where in rows], spec, field)
    return examples


def load_targets(
    spec: str,
    per_task: int,
    seed: int,
    columns: str,
    field: str = "data.targets",
    sample: str = "targets",
) -> list[example_lib.Example]:
    """Loads the target examples: multiple choice, or like the pool's, pre-tokenised ones included.

    Draws `per_task` examples of every task (0: all; fewer where a task has fewer), in the order of
    the file. The draw depends on the seed, the task's name and its ids, not on the order of rows or
    on other tasks, and a larger draw contains a smaller one. A row without a task belongs to the
    task that its file is named after, or its folder where the file is called target, test or the
    like. `columns` is the pool's mapping: it applies to the rows that have its columns. `sample`:
    targets, or tests for those of the shipped sample and of benchmarks.
    """
    mapping = _mapping(columns)

    def parse(row: dict, where: str, position: int, task: str) -> example_lib.Example:
        if isinstance(row.get("options"), dict | list):
            return _from_choices(row, where, position, task)
        fits = set(mapping["question"].split("+")) <= row.keys()
        return _from_pool_row(row, where, position, task, mapping if fits else CONTRACT)

    return _load_tasks(spec, per_task, seed, field, sample, parse)


def load_tests(
    spec: str, per_task: int, seed: int, field: str = "data.tests"
) -> list[example_lib.Example]:
    """Loads multiple-choice rows (id, task, question, options, answer_idx), drawn as targets."""
    return _load_tasks(spec, per_task, seed, field, "tests", _from_choices)


def _load_tasks(
    spec: str, per_task: int, seed: int, field: str, sample: str, parse: Callable
) -> list[example_lib.Example]:
    examples, places = [], []
    for source in _resolve(spec, field, sample):
        for row, where in _rows(source, field):
            task = row.get("task") or _task_name(source)
            if not isinstance(task, str):
                raise errors.UserError(f"{field}: {where}: task must be a text, got {task!r}.")
            examples.append(parse(row, f"{field}: {where}", len(examples), task))
            places.append(where)
    check_ids(examples, places, spec, field)
    ids: dict[str, list[str]] = {}
    for example in examples:
        ids.setdefault(example.task, []).append(example.example_id)
    drawn = {id_ for task in ids for id_ in _draw(sorted(ids[task]), task, per_task, seed)}
    return [example for example in examples if example.example_id in drawn]


def _draw(ids: list[str], task: str, count: int, seed: int) -> list[str]:
    if count == 0:
        return ids
    digest = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
    order = np.random.Generator(np.random.PCG64([seed, digest])).permutation(len(ids))
    return [ids[i] for i in order[:count]]


def _task_name(source: str) -> str:
    if source.startswith("hub:"):
        return source.split(":")[1].rpartition("/")[2]
    path = pathlib.Path(source).resolve()
    stem = path.name.partition(".")[0]
    return path.parent.name if stem in SPLIT_NAMES else stem


def check_ids(
    examples: list[example_lib.Example], places: list[str], spec: str, field: str
) -> None:
    if not examples:
        raise errors.UserError(f"{field} holds no rows: {spec}.")
    first: dict[str, str] = {}
    for example, where in zip(examples, places, strict=True):
        if example.example_id in first:
            raise errors.UserError(
                f"{field}: id {example.example_id!r} stands at {first[example.example_id]} and "
                f"again at {where}; ids must be unique."
            )
        first[example.example_id] = where


def _mapping(columns: str) -> dict[str, str]:
    if not columns or columns in MAPPINGS:
        return MAPPINGS.get(columns, CONTRACT)
    pairs = [[text.strip() for text in part.partition("=")] for part in columns.split(",")]
    mapping = {name: column for name, _, column in pairs}
    if "=" not in columns or not all(mapping.values()):
        raise errors.UserError(
            f"data.columns must be empty, one of {', '.join(MAPPINGS)}, or like "
            f"question=Q,reasoning=R,answer=A; got {columns!r}.{errors.nearest(columns, MAPPINGS)}"
        )
    for name in mapping:
        errors.check_choice("data.columns: the name before =", name, CONTRACT)
    for name in ("question", "answer"):
        if name not in mapping:
            raise errors.UserError(f"data.columns must map {name} too; got {columns!r}.")
    return mapping


def _check_columns(mapping: dict[str, str], rows: list[tuple[dict, str]]) -> None:
    """A mapped column that no row has is a typo; the contract is checked row by row."""
    known = {column for row, _ in rows for column in row}
    if mapping is CONTRACT or not known or "input_ids" in known:
        return
    for column in "+".join(mapping.values()).split("+"):
        if column not in known:
            raise errors.UserError(
                f"data.columns names the column {column!r}, but the rows from {rows[0][1]} on have "
                f"{', '.join(sorted(known))}.{errors.nearest(column, known)}"
            )


def _from_pool_row(
    row: dict, where: str, position: int, task: str, mapping: dict[str, str]
) -> example_lib.Example:
    example_id = example_lib.row_id(row, where, position, mapping.get("id", "id"))
    if row.get("input_ids") is not None:
        return example_lib.from_tokens(row, where, example_id, task)
    return example_lib.from_text(row, where, example_id, task, mapping)


def _from_choices(row: dict, where: str, position: int, task: str) -> example_lib.Example:
    return example_lib.from_choices(row, where, example_lib.row_id(row, where, position), task)


def _resolve(spec: str, field: str, sample: str = "") -> list[str]:
    """Paths, `hub:` names and benchmarks in order, a glob's sorted.

    A benchmark is "benchmark:ROLE:NAME:" before the path or `hub:` name of its rows, where ROLE is
    targets or tests.

    Args:
        sample: the shipped file that `sample` stands for.
    """
    sources: list[str] = []
    for part in filter(None, map(str.strip, spec.split(","))):
        path = os.path.expanduser(part)
        if part == "sample" and sample:
            shipped = importlib.resources.files("diq_jax.data") / "sample" / f"{sample}.jsonl"
            sources.append(str(shipped))
        elif part.startswith("hub:"):
            sources.append(part)
        elif part.startswith(benchmarks.PREFIX):
            sources += _benchmark(part, field, sample)
        elif os.path.isfile(path):
            sources.append(path)
        elif os.path.isdir(path):
            raise errors.UserError(f"{field}: {part} is a folder; name files: {part}/*.jsonl.")
        elif glob.has_magic(path):
            found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
            if not found:
                raise errors.UserError(f"{field}: no file matches {part}.")
            sources += found
        else:
            folder, name = os.path.split(path)
            names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            near = errors.nearest(name, names)
            raise errors.UserError(f"{field}: there is no file {part}.{near}")
    if not sources:
        raise errors.UserError(f"{field} must name a file, glob, hub:NAME or sample; got {spec!r}.")
    return sources


def _benchmark(spec: str, field: str, sample: str) -> list[str]:
    role = "targets" if sample == "targets" else "tests"
    found = []
    for name, file in benchmarks.expand(spec, field):
        known = getattr(benchmarks.BENCHMARKS[name], role)
        inner = _resolve(file, field) if file else [known]
        found += [f"{benchmarks.PREFIX}{role}:{name}:{source}" for source in inner]
    return found


def _split(source: str) -> tuple[str, str]:
    """("benchmark:ROLE:NAME:" or "", the path or `hub:` name) of an entry of `_resolve`."""
    if not source.startswith(benchmarks.PREFIX):
        return "", source
    head = source.split(":", 3)
    return ":".join([*head[:3], ""]), head[3]


def _rows(source: str, field: str) -> Rows:
    head, file = _split(source)
    if not head:
        yield from _plain_rows(source, field)
        return
    _, role, name, _ = head.split(":")
    for index, (row, where) in enumerate(_plain_rows(file, field)):
        made = benchmarks.convert(name, row, f"{field}: {where}", index, role == "targets")
        if made is not None:
            yield made, where


def _plain_rows(source: str, field: str) -> Rows:
    is_hub = source.startswith("hub:")
    read = _read_hub if is_hub else next((READERS[e] for e in READERS if source.endswith(e)), None)
    if read is None:
        raise errors.UserError(f"{field}: {source} must end in {', '.join(READERS)}.")
    try:
        for row, where in read(source):
            if not isinstance(row, dict):
                raise errors.UserError(f"{where} must be an object, got {str(row)[:60]!r}.")
            yield row, where
    except errors.UserError as e:
        raise errors.UserError(f"{field}: {e}") from None
    except (EOFError, OSError, zlib.error, csv.Error, pa.ArrowException) as e:
        raise errors.UserError(f"{field}: {source} cannot be read: {e}.") from None


def _read_jsonl(path: str) -> Rows:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if text := _decode(line, path, number).strip():
                yield _parse_json(text, path, number), f"{path}:{number}"


def _read_json(path: str) -> Rows:
    rows = _parse_json(_decode(pathlib.Path(path).read_bytes(), path), path)
    if not isinstance(rows, list):
        raise errors.UserError(f"{path} must hold a list of objects (one a line: name it .jsonl).")
    return ((row, f"{path} row {i}") for i, row in enumerate(rows))


def _read_csv(path: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    text = _decode(pathlib.Path(path).read_bytes(), path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise errors.UserError(
                f"{where} must have {len(reader.fieldnames)} cells, as line 1 has."
            )
        yield row, where


def _read_parquet(path: str) -> Rows:
    with pq.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches())
        for i, row in enumerate(itertools.chain.from_iterable(batches)):
            yield row, f"{path} row {i}"


def _read_hub(source: str) -> Rows:
    name, config, split = ([*source.removeprefix("hub:").split(":", 2), "", ""])[:3]
    if not name:
        raise errors.UserError(f"{source} must be hub:NAME, or hub:NAME:CONFIG:SPLIT.")
    import datasets  # a second to import, and only the hub needs it

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise errors.UserError(f"{source} cannot be loaded from the hub: {e}.") from None
    return ((row, f"{name} row {i}") for i, row in enumerate(rows))


def _decode(data: bytes, path: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise errors.UserError(f"{path}:{line} is not UTF-8: {e.reason}.") from None


def _parse_json(text: str, path: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        place = f"{path}:{first_line + e.lineno - 1}"
        raise errors.UserError(f"{place} is not JSON: {e.msg} at column {e.colno}.") from None


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
