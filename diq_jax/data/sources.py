"""Rows from files and the hub, checked one by one: every mistake is named with its file and line.

A source is a path, a glob, a folder of save_to_disk, `hub:NAME[:CONFIG[:SPLIT]]` (split `train`
unless given) or `sample`; several are separated by commas. Targets and tests may also be
`benchmark:NAME[:FILE]` (benchmarks.py). files.py has the formats.
"""

import dataclasses
import glob
import hashlib
import importlib.resources
import itertools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from diq_jax import errors
from diq_jax.data import benchmarks, files
from diq_jax.data import example as example_lib
from diq_jax.run import artifacts, reading

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
# A file of such a name says nothing about its task: the folder does.
SPLIT_NAMES = {"target", "targets", "test", "tests", "train", "dev", "val", "validation"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of a spec: a path or `hub:` name, and the benchmark that publishes such rows."""

    place: str
    benchmark: str = ""
    role: str = ""  # of a benchmark's rows: targets or tests


def read_rows(spec: str, field: str, sample: str = "") -> list[tuple[dict, str]]:
    """Reads every row of `spec` with where it stands: "file:line", or "NAME row 17".

    Args:
        sample: the shipped file that the word `sample` stands for: pool, targets or tests.

    Raises:
        UserError: naming `field`, the config field that `spec` comes from, the file and the line.
    """
    return [row for source in _resolve(spec, field, sample) for row in _rows(source, field)]


def fingerprint(spec: str, field: str, sample: str = "") -> str:
    """Hashes the files that `spec` names, and the names of its hub data sets and benchmarks.

    Args:
        sample: the shipped file that the word `sample` stands for: pool, targets or tests.
    """
    digest = hashlib.sha256()
    for source in _resolve(spec, field, sample):
        if source.benchmark:
            digest.update(f"{benchmarks.PREFIX}{source.role}:{source.benchmark}:".encode())
        if source.place.startswith(files.HUB):
            digest.update(source.place.encode())
            continue
        place = pathlib.Path(source.place)
        inside = sorted(filter(pathlib.Path.is_file, place.rglob("*")))
        for file in inside or [place]:
            try:
                digest.update(artifacts.sha256(file).encode())
            except OSError as e:
                raise errors.UserError(f"{field}: {file} cannot be read: {e.strerror}.") from None
    return digest.hexdigest()


def check(spec: str, field: str, sample: str = "") -> None:
    """Raises UserError where `spec` names nothing, or a file that is not there."""
    _resolve(spec, field, sample)


def load_examples(
    spec: str, columns: str = "", limit: int = 0, field: str = "data.pool"
) -> list[example_lib.Example]:
    """Loads the examples of a pool: the first `limit`, or all for 0.

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


def _task_name(source: Source) -> str:
    if source.place.startswith(files.HUB):
        return source.place.split(":")[1].rpartition("/")[2]
    path = pathlib.Path(source.place).resolve()
    stem = path.name.partition(".")[0]
    return path.parent.name if stem in SPLIT_NAMES else stem


def check_ids(
    examples: list[example_lib.Example], places: list[str], spec: str, field: str
) -> None:
    """Raises UserError where there is no example, or two have one id."""
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
    """Refuses a mapped column that no row has: a typo. The contract is checked row by row."""
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
    """Makes an example of a row of choices with one right letter, which tests ask for."""
    example_id = example_lib.row_id(row, where, position)
    example = example_lib.from_choices(row, where, example_id, task)
    if not example.answer_idx:
        letters = ", ".join(example.options)
        raise errors.UserError(f"{where}: answer_idx must be one of {letters}; got None.")
    return dataclasses.replace(example, answer=example.options[example.answer_idx])


def _resolve(spec: str, field: str, sample: str = "") -> list[Source]:
    """Returns the sources of `spec` in order, a glob's sorted.

    Args:
        sample: the shipped file that the word `sample` stands for.
    """
    sources: list[Source] = []
    for part in filter(None, map(str.strip, spec.split(","))):
        path = os.path.expanduser(part)
        if part == "sample" and sample:
            shipped = importlib.resources.files("diq_jax.data") / "sample" / f"{sample}.jsonl"
            sources.append(Source(str(shipped)))
        elif part.startswith(benchmarks.PREFIX):
            sources += _benchmark(part, field, sample)
        elif part.startswith(files.HUB) or os.path.isfile(path) or files.is_saved(path):
            sources.append(Source(path))
        elif os.path.isdir(path):
            raise errors.UserError(f"{field}: {part} is a folder; name files: {part}/*.jsonl.")
        elif glob.has_magic(path):
            found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
            if not found:
                raise errors.UserError(f"{field}: no file matches {part}.")
            sources += map(Source, found)
        else:
            folder, name = os.path.split(path)
            names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            near = errors.nearest(name, names)
            raise errors.UserError(f"{field}: there is no file {part}.{near}")
    if not sources:
        raise errors.UserError(f"{field} must name a file, glob, hub:NAME or sample; got {spec!r}.")
    return sources


def _benchmark(spec: str, field: str, sample: str) -> list[Source]:
    role = "targets" if sample == "targets" else "tests"
    found = []
    for name, file in benchmarks.expand(spec, field):
        known = getattr(benchmarks.BENCHMARKS[name], role)
        inner = [source.place for source in _resolve(file, field)] if file else [known]
        found += [Source(place, name, role) for place in inner]
    return found


def _rows(source: Source, field: str) -> files.PlacedRows:
    try:
        rows = files.read(source.place)
        if source.benchmark:
            is_target, is_hub = source.role == "targets", source.place.startswith(files.HUB)
            rows = benchmarks.convert_all(source.benchmark, rows, is_target, is_hub)
        yield from rows
    except errors.UserError as e:
        raise errors.UserError(f"{field}: {e}") from None
