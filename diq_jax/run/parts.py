"""The one way to resume outside training: a finished batch is a file that is whole or not there.

Its name ends in a checksum of its bytes, so that what is damaged is computed again.
"""

import hashlib
import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from diq_jax.run import artifacts, processes

ROW = "row"  # the column of positions
_NAME = re.compile(r"part-(\d{8})-([0-9a-f]{16})\.arrow")


class Parts:
    """Keeps the finished rows of one piece of work, in a folder of its own.

    A row is a position in what the work goes through, whose order must not change between calls;
    how rows are batched may. All processes read the parts, the first one writes them.

    Attributes:
        done: the positions of the rows that are finished.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.done: set[int] = set()
        self._files: list[pathlib.Path] = []
        self._count = 0
        self._new = False  # parts that another process may not have written yet
        damaged = []
        for path in sorted(folder.glob("part-*.arrow")):
            if not (found := _NAME.fullmatch(path.name)):
                continue
            self._count = max(self._count, int(found[1]) + 1)
            data = path.read_bytes()
            if _checksum(data) == found[2]:
                self._keep(path, _read(data))
            else:
                logging.warning("%s is damaged: its rows are computed again.", path)
                damaged.append(path)
        processes.wait(f"parts {folder.name} are read")
        for path in damaged:
            artifacts.remove(path)

    def _keep(self, path, table):
        self._files.append(path)
        self.done.update(table[ROW].to_pylist())

    def add(self, rows: Sequence[int], columns: Mapping[str, Any]) -> None:
        """Writes a finished batch.

        Args:
            rows: (B,) the positions of its rows.
            columns: (B,) or (B, N) arrays, or B values of any kind that Arrow has.
        """
        table = pa.table({ROW: np.asarray(rows, np.int64), **_to_arrow(columns)})
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        name = f"part-{self._count:08d}-{_checksum(sink.getvalue())}.arrow"
        self._count += 1
        if processes.is_first():
            with artifacts.atomic(self.folder / name) as temporary:
                temporary.write_bytes(sink.getvalue())
        self._keep(self.folder / name, table)
        self._new = True

    def remaining(self, count: int) -> list[int]:
        """Returns the positions of `count` rows that are not finished."""
        return [row for row in range(count) if row not in self.done]

    def batches(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Reads every part as (rows (B,) int64, {column: values}); every process must ask."""
        if self._new:
            processes.wait(f"parts {self.folder.name} are written")
            self._new = False
        return self._read_all()

    def _read_all(self):
        for path in self._files:
            table = _read(path.read_bytes())
            columns = {name: _from_arrow(table[name]) for name in table.column_names}
            yield columns.pop(ROW), columns

    def columns(self) -> dict[str, Any]:
        """Reads all columns by row: (R, ..) arrays, or lists if not numbers; none: empty."""
        return joined(list(self.batches()))


class Memory:
    """Keeps the finished rows of a piece of work that no later call continues, as `Parts` does."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self._batches: list[tuple[np.ndarray, Mapping[str, Any]]] = []

    def add(self, rows: Sequence[int], columns: Mapping[str, Any]) -> None:
        """Keeps a finished batch; see `Parts.add`."""
        self.done.update(rows)
        self._batches.append((np.asarray(rows, np.int64), columns))

    def columns(self) -> dict[str, Any]:
        """Returns all columns, in the order of the rows; see `Parts.columns`."""
        return joined(self._batches)


def drop(folder: pathlib.Path) -> None:
    """Removes a folder of parts once every process has read them."""
    processes.wait(f"{folder.name} has been read")
    artifacts.remove(folder)


def joined(batches: Sequence[tuple[np.ndarray, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns the columns of (rows, columns) batches in the order of the rows."""
    if not batches:
        return {}
    order = np.argsort(np.concatenate([rows for rows, _ in batches]), kind="stable")
    columns = {}
    for name in batches[0][1]:
        pieces = [found[name] for _, found in batches]
        if isinstance(pieces[0], np.ndarray):
            columns[name] = np.concatenate(pieces)[order]
        else:
            values = [value for piece in pieces for value in piece]
            columns[name] = [values[i] for i in order]
    return columns


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read(data: bytes) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()


def _to_arrow(columns):
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns = {**columns, name: pa.FixedSizeListArray.from_arrays(flat, values.shape[1])}
    return columns


def _from_arrow(column: pa.ChunkedArray):
    column = column.combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()
