"""Rows from files and the hub, checked one by one: every mistake is named with its file and line.

A source is a path, glob, URL, folder (files.py), `hub:NAME[:CONFIG[:SPLIT]]` (split `train`
unless given) or `sample`; several are separated by commas. Targets and tests may also be
`benchmark:NAME[:FILE]` (benchmarks.py). files.py has the formats.
"""

import dataclasses
import hashlib
import importlib.resources
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.data import example as example_lib
from diq_jax.data import files, layouts
from diq_jax.run import artifacts, progress, reading

HEAD_ROWS = 1000  # of a source, whose columns tell its layout
# A file of such a name says nothing about its task: the folder does.
SPLIT_NAMES = {"target", "targets", "test", "tests", "train", "dev", "val", "validation"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds one entry of a spec: a path or `hub:` name, and the benchmark of such rows."""

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
    """Hashes the files that `spec` names, and the names of its hub data sets and benchmarks."""
    digest = hashlib.sha256()
    for source in _resolve(spec, field, sample):
        if source.benchmark:
            digest.update(f"{files.BENCHMARK}{source.role}:{source.benchmark}:".encode())
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
    spec: str, columns: str = "", limit: int = 0, field: str = "data.pool", turns: str = "last"
) -> list[example_lib.Example]:
    """Loads the examples of a pool: the first `limit`, or all for 0.

    Args:
        columns: "" (each source's layout is recognised), a name of `layouts.LAYOUTS`, or
            "question=Q,reasoning=R,answer=A[,id=ID]", which a source without these columns does not
            follow. A row without an id is named after its position in the pool, counted from 0:
            "row-000017". Pre-tokenised rows need no mapping; rows of choices have `options` and
            `answer_idx` under these names, and then need no answer (example.from_choices).
        turns: of a conversation, whether the `last` answer is scored or `all`.
    """
    return list(stream_examples(spec, columns, limit, field, turns))


def stream_examples(
    spec: str, columns: str = "", limit: int = 0, field: str = "data.pool", turns: str = "last"
) -> Iterator[example_lib.Example]:
    """Yields the examples of `load_examples` one by one, so that a pool may be larger than memory.

    A file is read while it is iterated over: a mistake in its last row is raised after all others
    have been yielded.
    """
    asked = layouts.named(columns)

    def read() -> Iterator[tuple[example_lib.Example, str]]:
        position = 0
        for source in _resolve(spec, field, sample="pool"):
            if limit and position == limit:
                return
            for head, (row, where) in _heads(_rows(source, field), limit and limit - position):
                if head is not None:  # the first row of a source
                    layout = _layout(head, where, source, field, asked)
                place = _place(row, f"{field}: {where}", position, "", layout)
                position += 1
                yield _turned(layout.read(row, place), turns, place.where), where

    examples = (example for example, _ in unique(read, spec, field))
    first = list(itertools.islice(examples, HEAD_ROWS))
    layouts.check_questions(first, f"{field}: {spec}")
    yield from first
    yield from examples


def load_targets(
    spec: str,
    per_task: int,
    seed: int,
    columns: str,
    field: str = "data.targets",
    sample: str = "targets",
    turns: str = "last",
) -> list[example_lib.Example]:
    """Loads the target examples, rows like the pool's: choices, texts, chats, or tokens.

    Draws `per_task` examples of every task (0: all; fewer where a task has fewer), in the order of
    the file. The draw depends on the seed, the task's name and its ids, not on the order of rows or
    on other tasks, and a larger draw contains a smaller one. A row without a task belongs to the
    task that its file is named after, or its folder where the file is called target, test or the
    like. `columns` is the pool's mapping: it applies to the rows that have its columns. `sample`:
    targets, or tests for those of the shipped sample and of benchmarks.
    """
    return _load_tasks(
        spec, per_task, seed, field, sample, layouts.named(columns),
        lambda row, place, layout: _turned(layout.read(row, place), turns, place.where),
    )  # fmt: skip


def load_tests(
    spec: str,
    per_task: int,
    seed: int,
    field: str = "data.tests",
    texts: bool = False,
    columns: str = "",
) -> list[example_lib.Example]:
    """Loads multiple-choice rows (id, task, question, options, answer_idx), drawn as targets.

    Args:
        texts: whether rows without options are taken too, as questions whose answer is a text.
        columns: as of `load_targets`.
    """
    asked = layouts.named(columns)

    def parse(row: dict, place: layouts.Place, layout: layouts.RowLayout) -> example_lib.Example:
        if layout is asked or (texts and not example_lib.has_options(row)):
            example = layout.read(row, place)
            if texts and example.options is None:
                return example
        else:
            example = example_lib.from_choices(row, *place)
        return _with_right_option(example, place)

    return _load_tasks(spec, per_task, seed, field, "tests", asked, parse)


def _load_tasks(
    spec: str,
    per_task: int,
    seed: int,
    field: str,
    sample: str,
    asked: layouts.RowLayout | None,
    parse: Callable,
) -> list[example_lib.Example]:
    def read() -> Iterator[tuple[example_lib.Example, str]]:
        position = 0
        for source in _resolve(spec, field, sample):
            for head, (row, where) in _heads(_rows(source, field)):
                task = row.get("task") or _task_name(source)
                if not isinstance(task, str):
                    raise errors.UserError(
                        f"{field}: {where}: task must be a text, got {reading.shorten(task)}."
                    )
                if head is not None:
                    own = [row for row in head if not (asked and asked.fits(row))]
                    layout = _layout(own, where, source, field) if own else layouts.OURS
                chosen = asked if asked and asked.fits(row) else layout
                place = _place(row, f"{field}: {where}", position, task, chosen)
                position += 1
                yield parse(row, place, chosen), where

    examples = [example for example, _ in unique(read, spec, field)]
    layouts.check_questions(examples, f"{field}: {spec}")
    ids: dict[str, list[str]] = {}
    for example in examples:
        ids.setdefault(example.task, []).append(example.example_id)
    drawn = {id_ for task in ids for id_ in _draw(sorted(ids[task]), task, per_task, seed)}
    return [example for example in examples if example.example_id in drawn]


def _heads(
    rows: files.PlacedRows, limit: int = 0
) -> Iterator[tuple[list[dict] | None, tuple[dict, str]]]:
    """Yields each row; with the first comes the list of the first rows, with others None."""
    rows = itertools.islice(rows, limit or None)
    first = list(itertools.islice(rows, HEAD_ROWS))
    for i, row in enumerate(itertools.chain(first, rows)):
        yield None if i else [row for row, _ in first], row


def _layout(
    head: list[dict],
    where: str,
    source: Source,
    field: str,
    asked: layouts.RowLayout | None = None,
) -> layouts.RowLayout:
    """Returns the layout that is asked for, or else the one that a source's first rows show."""
    if asked is not None and layouts.concerns(asked, head, where):
        return asked
    flag = "--columns" if field.startswith("--") else "--config.data.columns"
    name, found = layouts.recognise(head, f"{field}: {where}", flag)
    if asked is not None or found is not layouts.OURS:
        told = f"rows of the layout {name} ({', '.join(found.needs)})"
        why = "" if asked is None else ", as it has no column of data.columns"
        progress.say(f"{field}: {source.place}: {told}{why}")
    return found


def _place(
    row: dict, where: str, position: int, task: str, layout: layouts.RowLayout
) -> layouts.Place:
    id_ = example_lib.row_id(row, where, position, layout.id_column)
    return layouts.Place(where, id_, task)


def _turned(example: example_lib.Example, turns: str, where: str) -> example_lib.Example:
    earlier = [m for m in example.context if m["role"] == "assistant"]
    if turns != "all" or not earlier:
        return example
    if not all(message["content"].strip() for message in earlier):
        raise errors.UserError(
            f"{where}: an earlier answer is empty after its reasoning; set data.turns=last, which "
            "scores the last one alone."
        )
    return dataclasses.replace(example, every_turn=True)


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


def unique(
    read: Callable[[], Iterator[tuple[Any, str]]],
    spec: str,
    field: str,
    id_of: Callable[[Any], str] = lambda example: example.example_id,
) -> Iterator[tuple[Any, str]]:
    """Yields what `read` yields, examples with their places, and keeps nothing but hashes of ids.

    Raises:
        UserError: there is nothing, or two have one id; then `read` is called again to say where.
    """
    seen: set[int] = set()
    for i, (example, where) in enumerate(read()):
        id_ = id_of(example)
        if hash(id_) in seen:
            for earlier, place in itertools.islice(read(), i):
                if id_of(earlier) == id_:
                    raise errors.UserError(
                        f"{field}: id {id_!r} stands at {place} and again at {where}; ids must be "
                        "unique."
                    )
        seen.add(hash(id_))
        yield example, where
    if not seen:
        raise errors.UserError(f"{field} holds no rows: {spec}.")


def _with_right_option(example: example_lib.Example, place: layouts.Place) -> example_lib.Example:
    """Returns a test with the right option as its answer; it must have one."""
    options = example.options or {}
    if not example.answer_idx:
        letters = ", ".join(options) or "those of its options"
        raise errors.UserError(f"{place.where}: answer_idx must be one of {letters}; got None.")
    return dataclasses.replace(example, answer=options[example.answer_idx])


def _resolve(spec: str, field: str, sample: str = "") -> list[Source]:
    """Returns the sources of `spec` in order, a glob's sorted."""
    sources: list[Source] = []
    for part in filter(None, map(str.strip, spec.split(","))):
        if part == "sample" and sample:
            shipped = importlib.resources.files("diq_jax.data") / "sample" / f"{sample}.jsonl"
            sources.append(Source(str(shipped)))
        elif part.startswith(files.BENCHMARK):
            sources += _benchmark(part, field, sample)
        elif errors.is_url(part):
            from diq_jax.run import remote

            sources += [Source(str(file)) for file in remote.fetch(part, field)]
        else:
            sources += map(Source, files.find(part, field))
    if not sources:
        raise errors.UserError(f"{field} must name a file, glob, hub:NAME or sample; got {spec!r}.")
    files.check_once((f"{source.place}{source.benchmark}" for source in sources), field)
    return sources


def _benchmark(spec: str, field: str, sample: str) -> list[Source]:
    from diq_jax.data import benchmarks

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
            from diq_jax.data import benchmarks

            is_target, is_hub = source.role == "targets", source.place.startswith(files.HUB)
            rows = benchmarks.convert_all(source.benchmark, rows, is_target, is_hub)
        yield from rows
    except errors.UserError as e:
        raise errors.UserError(f"{field}: {e}") from None
