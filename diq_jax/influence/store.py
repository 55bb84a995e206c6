"""The gradient store: projected gradients on disk, one row for each example, read by memory map.

    from diq_jax.influence import store
    gradients = store.open_store("runs/mine/influence/store")
    scores = gradients.scores(targets)                  # (rows, Q), streamed

A folder holds `train-00003-of-00064.npy` (examples by range, in the order of the pool),
`examples.parquet` (example_id, loss), `targets.npy` (the directions that the run scored against)
and `manifest.json`: shape, dtype, what made the rows (weights, data, parameters, projection), a
checksum for each file. bfloat16 is kept as its bits in uint16, since .npy knows no bfloat16; `rows`
gives it back.
"""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diq_jax.data import gradient_store
from diq_jax.run import artifacts, parts, processes

OPEN_SHARDS = 256  # are written in one pass over the parts
# The reading half, under the names that users find here.
open_store = gradient_store.open_store
products, unit, DTYPES = gradient_store.products, gradient_store.unit, gradient_store.DTYPES


class Writer:
    """Turns finished rows, which come in any order, into a store.

    Args:
        rows: where they are kept until the store is finished.
        count: how many there are in all.
    """

    def __init__(
        self, folder: pathlib.Path, rows: parts.Parts, count: int, dtype: str, shard_rows: int
    ) -> None:
        self.folder, self.rows, self.count = folder, rows, count
        self.dtype, self.shard_rows = dtype, shard_rows
        self.losses = np.zeros(count, np.float32)
        shards = -(-count // shard_rows)
        self.names = [f"train-{k:05d}-of-{shards:05d}.npy" for k in range(shards)]

    @property
    def done(self) -> set[int]:
        """Returns the positions of the rows that are on disk."""
        return self.rows.done

    def add(self, rows: Sequence[int], columns: Mapping[str, Any]) -> None:
        """Keeps the columns gradient (B, dim), as `dtype` lies on disk, and loss (B,)."""
        self.rows.add(rows, columns)

    def columns(self) -> dict[str, Any]:
        """Writes the shards, once all rows are there.

        Returns:
            loss (rows,), and gradient, of which slices (n, dim) are read as they lie on disk.
        """
        if len(self.done) != self.count:
            raise ValueError(f"{len(self.done)} rows for {self.count} examples.")
        if processes.is_first():
            for first in range(0, len(self.names), OPEN_SHARDS):
                self._write_shards(range(len(self.names))[first : first + OPEN_SHARDS])
        else:
            for rows, columns in self.rows.batches():
                self.losses[rows] = columns["loss"]
        processes.wait("shards")
        shards = [np.load(self.folder / name, mmap_mode="r") for name in self.names]
        return {"loss": self.losses, "gradient": _Slices(shards, self.shard_rows)}

    def _write_shards(self, which: Sequence[int]) -> None:
        """Spreads the rows of the parts over some shards."""
        opened: dict[int, np.memmap] = {}
        with contextlib.ExitStack() as stack:
            temporary = {
                k: stack.enter_context(artifacts.atomic(self.folder / self.names[k])) for k in which
            }
            for rows, columns in self.rows.batches():
                self.losses[rows] = columns["loss"]
                for k in np.unique(rows // self.shard_rows):
                    if k not in temporary:
                        continue
                    if k not in opened:
                        size = min(self.shard_rows, self.count - k * self.shard_rows)
                        kept = columns["gradient"]
                        opened[k] = np.lib.format.open_memmap(
                            temporary[k], "w+", kept.dtype, (int(size), kept.shape[1])
                        )
                    here = rows // self.shard_rows == k
                    opened[k][rows[here] % self.shard_rows] = columns["gradient"][here]
            for shard in opened.values():
                shard.flush()

    def finish(
        self,
        example_ids: Sequence[str],
        ends: np.ndarray,
        names: Sequence[str],
        made_from: Mapping[str, Any],
    ) -> None:
        """Writes what stands beside the shards, the manifest last, in the first process.

        Args:
            ends: (Q, dim) float32, the projected directions, one for each of `names`.
            made_from: what the rows depend on.
        """
        if not processes.is_first():
            return
        checksums = {name: artifacts.sha256(self.folder / name) for name in self.names}
        with artifacts.atomic(self.folder / "targets.npy") as temporary:
            with open(temporary, "wb") as f:
                np.save(f, np.ascontiguousarray(ends, np.float32))
        table = {"example_id": list(example_ids), "loss": pa.array(self.losses)}
        artifacts.write_table(self.folder / "examples.parquet", table)
        for name in ("targets.npy", "examples.parquet"):
            checksums[name] = artifacts.sha256(self.folder / name)
        artifacts.write_json(
            self.folder / "manifest.json",
            {
                "dim": ends.shape[1],
                "dtype": self.dtype,
                "made_from": dict(made_from),
                "rows": self.count,
                "shard_rows": self.shard_rows,
                "targets": list(names),
                "sha256": checksums,
            },
        )


class _Slices:
    """Reads slices of rows that lie in several shards."""

    def __init__(self, shards: Sequence[np.ndarray], shard_rows: int) -> None:
        self._shards, self._rows = shards, shard_rows

    def __getitem__(self, wanted: slice) -> np.ndarray:
        found = [
            shard[max(wanted.start - k * self._rows, 0) : max(wanted.stop - k * self._rows, 0)]
            for k, shard in enumerate(self._shards)
        ]
        return np.concatenate(found)
