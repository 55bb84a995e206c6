"""Files that are either whole or not there, also after a power cut: atomic writes, parquet tables.

What a function here has written when it returns stays: a file's bytes are synced before it gets its
name, and its folder afterwards, for a name is lost with a folder that was not synced.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax import errors
from diq_jax.run import processes, reading

_watchers: list[Callable[[pathlib.Path], None]] = []


@contextlib.contextmanager
def watched(watcher: Callable[[pathlib.Path], None]) -> Iterator[None]:
    """Has `watcher` told of every file and folder that is written, or removed, once it is."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _tell(path: str | os.PathLike) -> None:
    for watcher in _watchers:
        watcher(pathlib.Path(path))


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path, renamed to `path` at the end; only the first process writes."""
    path = pathlib.Path(path)
    if not processes.is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch) / path.name
        return
    make_folder(path.parent)
    _drop_stale(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    fcntl.flock(handle, fcntl.LOCK_EX)  # as long as its writer lives
    temporary = pathlib.Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        sync(temporary)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _drop_stale(path) -> None:
    """Removes the temporary files of writers of `path` that were killed."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if temporary_of(stale.name) == path.name:
            # Of a living writer, or gone by now: not ours to remove.
            with contextlib.suppress(OSError), open(stale, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.unlink()


def temporary_of(name: str) -> str:
    """Returns the name of the file that `atomic` was writing under this temporary name, or ""."""
    found = re.fullmatch(r"\.(.+)\.\w{8}\.tmp", name)
    return found[1] if found else ""


def replace(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Renames a synced file inside its folder, and syncs the folder."""
    os.replace(source, path)
    sync(pathlib.Path(path).parent)
    _tell(path)


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder, with those above it that are missing, and syncs each one's parent."""
    path = pathlib.Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync(path: str | os.PathLike) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | os.PathLike) -> None:
    """Syncs all files and folders below, which other libraries wrote, and the folder itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)
    _tell(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text as UTF-8, by `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Raises UserError, naming the place, where a number is not finite or a text no Unicode."""
    write_text(path, _dumps(path, value, indent=1) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a line for each row, one by one. Raises UserError as `write_json`."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        for i, row in enumerate(rows, start=1):
            f.write(_dumps(f"{path}:{i}", row) + "\n")


def _dumps(path, value, indent=None):
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:
        name, leaf = next(_unfit(value, ""), ("a value", value))
        raise errors.UserError(
            f"{path} is not written: {name} would be {reading.shorten(leaf)}, which is neither a "
            "finite number nor a text."
        ) from None
    return text


def _unfit(value, name) -> Iterator[tuple[str, Any]]:
    """Yields the values inside that are no JSON in UTF-8, as (dotted name, value)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unfit(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _unfit(inner, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, str) and value != value.encode(errors="replace").decode():
        yield name, value


def write_table(
    path: str | os.PathLike, columns: Mapping[str, Any] | pa.Table, unknown: Collection[str] = ()
) -> None:
    """Writes a parquet file; the bytes depend on the values and the pyarrow version only.

    Args:
        unknown: the columns where NaN stands for an unknown number.

    Raises:
        UserError: another number is not finite; the column and the row are named.
    """
    table = pa.table(dict(columns)) if isinstance(columns, Mapping) else columns
    write_tables(path, [table], unknown)


def write_tables(
    path: str | os.PathLike, tables: Iterable[pa.Table], unknown: Collection[str] = ()
) -> None:
    """Writes tables of one schema, at least one, as row groups: for what memory does not hold.

    Raises:
        UserError: as `write_table`.
    """
    tables = iter(tables)
    first = next(tables)
    with atomic(path) as temporary, pq.ParquetWriter(temporary, first.schema) as writer:
        for table in itertools.chain([first], tables):
            _check_finite(path, table, unknown)
            writer.write_table(table)


def _check_finite(path, table, unknown) -> None:
    from diq_jax.run import columns as columns_lib

    for name in table.column_names:
        finite = columns_lib.finite_rows(table[name], nan=name in unknown)
        if not finite.all():
            row = int(np.argmin(finite))
            ids = table["example_id"] if "example_id" in table.column_names else range(len(finite))
            raise errors.UserError(
                f"{path} is not written: {name} of {str(ids[row])!r} would be "
                f"{reading.shorten(table[name][row].as_py())}, which is not finite."
            )


def remove(path: str | os.PathLike) -> None:
    """Deletes a file, a link, or a folder with all in it, if there; only the first process does."""
    path = pathlib.Path(path)
    if not processes.is_first() or not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    sync(path.parent)
    _tell(path)


def sha256(path: str | os.PathLike) -> str:
    """Returns the checksum of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_once(path: str | os.PathLike) -> str:
    """Hashes a large file once for all stages of a run, and again if its size or time changes."""
    found = os.stat(path)
    return _hashed(os.fspath(path), found.st_size, found.st_mtime_ns)


@functools.cache
def _hashed(path, size, changed):
    return sha256(path)
