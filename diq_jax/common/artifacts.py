"""Files that are either whole or not there: atomic writes, parquet tables, and a journal to resume
from.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax.common import errors, processes


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, renamed to `path` when the block ends well. What any
    process but the first writes there is dropped.
    """
    path = pathlib.Path(path)
    if not processes.is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """NaN and infinities are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """NaN and infinities are refused: they are not JSON."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def read_json(path: str | os.PathLike) -> Any:
    """Raises UserError where the file is not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise errors.UserError(f"{path} is not valid JSON: {e}.") from None


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_table(path: str | os.PathLike, columns: Mapping[str, Any] | pa.Table) -> None:
    """Writes a parquet file; the bytes depend on the values and the pyarrow version only."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: str | os.PathLike) -> pa.Table:
    """Raises UserError, naming the file, where it is missing or no parquet file."""
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise errors.UserError(f"{path} is missing: run the stage that makes it first.") from None
    except pa.ArrowInvalid as e:
        raise errors.UserError(f"{path} is not a readable parquet file: {e}.") from None


def remove(path: str | os.PathLike) -> None:
    """Deletes a file, or a folder with all in it, if it is there; only the first process does."""
    path = pathlib.Path(path)
    if processes.is_first():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Journal:
    """An append-only JSON-lines file of finished work. A half line left by a killed process is
    dropped.

    Floats are written by repr, so that a float32 read back is bit-identical. All processes read it
    and keep the entries, the first writes them.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.entries: list[dict] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                self.entries.append(entry)
                whole += len(line)
        self._file = None
        if processes.is_first():
            self._file = open(self.path, "ab")
            self._file.truncate(whole)

    def append(self, entry: Mapping[str, Any]) -> None:
        self.extend([entry])

    def extend(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Adds entries that belong together, with one write to the disk."""
        if self._file is not None:
            lines = [json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries]
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.entries.extend(map(dict, entries))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
