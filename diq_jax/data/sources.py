"""Rows from files and the hub, checked one by one: every mistake is named with its file and line.

A source is a path, a glob, `hub:NAME[:CONFIG[:SPLIT]]` (split `train` unless given) or `sample`;
several are separated by commas. Targets and tests may also be `benchmark:NAME[:FILE]`
(benchmarks.py). The extension gives the format: .jsonl, .jsonl.gz, .json (a list),
.parquet, .csv; text is UTF-8. Lines are counted from 1, as editors do; rows of .json, .parquet and
the hub from 0, as `dataset[17]` does.
"""

import base64
import csv
import dataclasses
import glob
import gzip
import hashlib
import importlib.resources
import io
import itertools
import json
import math
import os
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging

from diq_jax import errors
from diq_jax.data import benchmarks
from diq_jax.data import example as example_lib
from diq_jax.run import artifacts, reading

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
CONTRACT = example_lib.CONTRACT
MOST_JSON_BYTES = 2**32  # of a .json, which is read as a whole
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
        try:
            digest.update((head + (file if is_hub else artifacts.sha256(file))).encode())
        except OSError as e:
            raise errors.UserError(f"{field}: {file} cannot be read: {e.strerror}.") from None
    return digest.hexdigest()


def check(spec: str, field: str, sample: str = "") -> None:
    """Raises UserError where `spec` names nothing, or a file that is not there."""
    _resolve(spec, field, sample)


def load_pool(
    spec: str, columns: str, limit: int, field: str = "data.pool"
) -> list[example_lib.Example]:
    """Loads the examples to choose from: the first `limit`, or all for 0.

    Args:
        columns: "" (id, question, reasoning, answer), a name of `MAPPINGS`, or
            "question=Q,reasoning=R,answer=A[,id=ID]". A row without an id is named after its
            position in the pool, counted from 0: "row-000017". Pre-tokenised rows need no mapping;
            rows of choices have `options` and `answer_idx` under these names, and then need no
            answer (example.from_choices).
    """
    sources = _resolve(spec, field, sample="pool")
    rows = itertools.chain.from_iterable(_rows(source, field) for source in sources)
    rows = list(itertools.islice(rows, limit or None))
    mapping = _mapping(columns)
    _check_columns(mapping, rows)
    examples = [
        _from_row(row, f"{field}: {where}", position, "", mapping)
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
    """Loads the target examples, rows like the pool's: choices, texts, or pre-tokenised ones.

    Draws `per_task` examples of every task (0: all; fewer where a task has fewer), in the order of
    the file. The draw depends on the seed, the task's name and its ids, not on the order of rows or
    on other tasks, and a larger draw contains a smaller one. A row without a task belongs to the
    task that its file is named after, or its folder where the file is called target, test or the
    like. `columns` is the pool's mapping: it applies to the rows that have its columns. `sample`:
    targets, or tests for those of the shipped sample and of benchmarks.
    """
    mapping = _mapping(columns)

    def parse(row: dict, where: str, position: int, task: str) -> example_lib.Example:
        fits = set(mapping["question"].split("+")) <= row.keys()
        return _from_row(row, where, position, task, mapping if fits else CONTRACT)

    return _load_tasks(spec, per_task, seed, field, sample, parse)


def load_tests(
    spec: str, per_task: int, seed: int, field: str = "data.tests"
) -> list[example_lib.Example]:
    """Loads multiple-choice rows (id, task, question, options, answer_idx), drawn as targets."""
    return _load_tasks(spec, per_task, seed, field, "tests", _from_test)


def _load_tasks(
    spec: str, per_task: int, seed: int, field: str, sample: str, parse: Callable
) -> list[example_lib.Example]:
    examples, places = [], []
    for source in _resolve(spec, field, sample):
        for row, where in _rows(source, field):
            task = row.get("task") or _task_name(source)
            if not isinstance(task, str):
                raise errors.UserError(
                    f"{field}: {where}: task must be a text, got {reading.shorten(task)}."
                )
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


def _from_row(
    row: dict, where: str, position: int, task: str, mapping: dict[str, str]
) -> example_lib.Example:
    example_id = example_lib.row_id(row, where, position, mapping.get("id", "id"))
    return example_lib.from_row(row, where, example_id, task, mapping)


def _from_test(row: dict, where: str, position: int, task: str) -> example_lib.Example:
    """A row of choices with one right letter, which is what tests ask for."""
    example_id = example_lib.row_id(row, where, position)
    example = example_lib.from_choices(row, where, example_id, task)
    if not example.answer_idx:
        letters = ", ".join(example.options)
        raise errors.UserError(f"{where}: answer_idx must be one of {letters}; got None.")
    return dataclasses.replace(example, answer=example.options[example.answer_idx])


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
    rows = ((row, f"{field}: {where}") for row, where in _plain_rows(file, field))
    made = benchmarks.convert_all(name, rows, role == "targets", file.startswith("hub:"))
    yield from ((row, where.removeprefix(f"{field}: ")) for row, where in made)


def _plain_rows(source: str, field: str) -> Rows:
    is_hub = source.startswith("hub:")
    read = _read_hub if is_hub else next((READERS[e] for e in READERS if source.endswith(e)), None)
    if read is None:
        raise errors.UserError(f"{field}: {source} must end in {', '.join(READERS)}.")
    said: set[str] = set()
    try:
        for row, where in read(source):
            if not isinstance(row, dict):
                raise errors.UserError(f"{where} must be an object, got {reading.shorten(row)}.")
            yield _as_json(row, where, said), where
    except errors.UserError as e:
        raise errors.UserError(f"{field}: {e}") from None
    except (EOFError, OSError, zlib.error, csv.Error) as e:
        raise errors.UserError(f"{field}: {source} cannot be read: {e}.") from None


def _as_json(row: dict, where: str, said: set[str]) -> dict:
    """The row with JSON's types only, as it is written again later. NaN and infinities become null,
    times and numbers of other types text, bytes Base64; each column of which that happens is said
    once, and added to `said`.
    """
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError:
        raise errors.UserError(f"{where}: a text holds half of a surrogate pair.") from None
    except (TypeError, ValueError):
        made = {str(name): _plain_value(value) for name, value in row.items()}
    for name, value in row.items():
        if name not in said and made[str(name)] != value:
            said.add(name)
            kept = reading.shorten(json.dumps(made[str(name)]))
            logging.warning(
                "%s: column %s holds %s, which is no JSON: here, and wherever it is written, it is "
                "%s.", where, name, reading.shorten(value), kept,
            )  # fmt: skip
    return made


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if isinstance(value, str | int | None) else str(value)


def _read_jsonl(path: str) -> Rows:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as f:
        lines = iter(lambda: f.readline(reading.MOST_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > reading.MOST_BYTES:
                raise errors.UserError(f"{path}:{number} is over {reading.MOST_BYTES:,} bytes.")
            if text := _decode(line, path, number).strip():
                yield reading.parse_json(text, path, number), f"{path}:{number}"


def _read_json(path: str) -> Rows:
    if os.path.getsize(path) > MOST_JSON_BYTES:
        raise errors.UserError(
            f"{path} is over {MOST_JSON_BYTES:,} bytes: write one object a line, as .jsonl."
        )
    rows = reading.parse_json(_decode(pathlib.Path(path).read_bytes(), path), path, 1)
    if not isinstance(rows, list):
        raise errors.UserError(f"{path} must hold a list of objects (one a line: name it .jsonl).")
    return ((row, f"{path} row {i}") for i, row in enumerate(rows))


def _read_csv(path: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    text = _decode(pathlib.Path(path).read_bytes(), path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    reading.check_distinct(reader.fieldnames or [], f"{path}:1")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or None in row.values():
            raise errors.UserError(
                f"{where} must have {len(reader.fieldnames)} cells, as line 1 has."
            )
        yield row, where


def _read_parquet(path: str) -> Rows:
    return ((row, f"{path} row {i}") for i, row in enumerate(reading.parquet_rows(path)))


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


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
