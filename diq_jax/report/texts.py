"""The texts of a pool, read from the disk a row group at a time: they need not fit into memory."""

import bisect
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diq_jax.run import records


class Column(Sequence[Any]):
    """Reads one column of a run's table like a list, of which it holds a row group at a time.

    Rows are read in order, as the explorer does, at the speed of the disk; each step elsewhere
    costs a row group.

    Args:
        of: makes an item of the stored text.
    """

    def __init__(
        self, workdir: pathlib.Path, table: str, name: str, of: Callable[[str], Any] = str
    ) -> None:
        self._workdir, self._table, self._name, self._of = workdir, table, name, of
        counts = records.group_rows(workdir, table)
        self._ends = list(itertools.accumulate(counts))
        self._held: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: Any) -> Any:
        i = range(len(self))[i]
        group = bisect.bisect_right(self._ends, i)
        if group != self._held[0]:
            self._held = group, list(self._read(group))
        return self._held[1][i - self._ends[group]]

    def __iter__(self) -> Iterator[Any]:
        for group in range(len(self._ends)):
            yield from self._read(group)

    def _read(self, group: int) -> Iterator[Any]:
        for part in records.read_batches(self._workdir, self._table, (self._name,), group):
            yield from map(self._of, part[self._name].to_pylist())
