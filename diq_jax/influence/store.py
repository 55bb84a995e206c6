"""The gradient store: projected gradients on disk, one row for each example, read by memory map.

    from diq_jax.influence import store
    gradients = store.open_store("runs/mine/influence/store")
    scores = gradients.scores(targets)                  # (rows, Q), streamed

A folder holds `train-00003-of-00064.npy` (examples by range, in the order of the pool),
`examples.parquet` (example_id, loss), `targets.npy` (the directions that the run scored against)
and `manifest.json`: shape, dtype, what made the rows (weights, data, parameters, projection), a
checksum for each file. While a run is at work there is one log, `rows.log`, instead: a record is
whole or is not counted, so that a killed run loses the batch it was in and nothing else.

bfloat16 is kept as its bits in uint16, since .npy knows no bfloat16; `rows` gives it back.
"""

import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diq_jax.data import gradient_store
from diq_jax.run import artifacts, processes, reading

HEADER = np.dtype([("index", "<u4"), ("checksum", "<u4"), ("loss", "<f4")])
# The reading half, under the names that users find here.
Store, open_store = gradient_store.Store, gradient_store.open_store
products, unit, DTYPES = gradient_store.products, gradient_store.unit, gradient_store.DTYPES


class Writer:
    """Appends rows in any order, by index; `finish` turns them into shards. Of several processes
    the first writes, and all can read what it had written when they last waited for it.

    Args:
        made_from: what must be the same for rows to belong together; kept in the manifest.
    """

    def __init__(
        self, folder: str | os.PathLike, dim: int, dtype: str, made_from: Mapping[str, Any]
    ):
        self.folder = pathlib.Path(folder)
        self.dim, self.dtype, self.made_from = dim, dtype, dict(made_from)
        self._record = np.dtype([("header", HEADER), ("row", gradient_store.stored(dtype), (dim,))])
        self._places: dict[int, int] = {}
        artifacts.make_folder(self.folder)
        self.log = self.folder / "rows.log"
        head = self.folder / "rows.json"
        if self.log.exists() and head.exists():
            gradient_store.refuse_other(reading.read_record(head, {}), self._head(), self.folder)
            self._recover()
        else:
            artifacts.write_json(head, self._head())
        self._file = None
        if processes.is_first():
            self._file = open(self.log, "ab")
            self._file.truncate(len(self._places) * self._record.itemsize)
            artifacts.sync(self.folder)

    def _head(self):
        return {"dim": self.dim, "dtype": self.dtype, "made_from": self.made_from}

    def _recover(self):
        """Counts the records that are whole, up to the first that is not."""
        count = self.log.stat().st_size // self._record.itemsize
        if count:
            for place, record in enumerate(np.memmap(self.log, self._record, "r", shape=count)):
                if _checksum(record) != record["header"]["checksum"]:
                    break
                self._places[int(record["header"]["index"])] = place

    @property
    def row_bytes(self) -> int:
        """On disk, of one example."""
        return self.dim * gradient_store.stored(self.dtype).itemsize

    @property
    def done(self) -> set[int]:
        """The indices that are on disk."""
        return set(self._places)

    def append(self, indices: Sequence[int], rows: np.ndarray, losses: np.ndarray) -> None:
        """Adds rows (b, dim) float32; those that are there already stay as they are."""
        new = [k for k, index in enumerate(indices) if index not in self._places]
        for k in new:
            self._places[indices[k]] = len(self._places)
        if self._file is None:
            return
        records = np.zeros(len(new), self._record)
        records["header"]["index"] = [indices[k] for k in new]
        records["header"]["loss"] = losses[new]
        records["row"] = _to_stored(rows[new], self.dtype)
        records["header"]["checksum"] = [_checksum(record) for record in records]
        self._file.write(records.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def losses(self) -> np.ndarray:
        """(rows,) float32 in order of index."""
        return self._read()["header"]["loss"][self._order()]

    def row_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, rows (n, dim) float32) in order of index."""
        records, order = self._read(), self._order()
        for start in range(0, len(order), gradient_store.READ_ROWS):
            part = records["row"][order[start : start + gradient_store.READ_ROWS]]
            yield start, gradient_store.from_stored(part, self.dtype)

    def finish(
        self, example_ids: Sequence[str], targets: np.ndarray, shard_rows: int, target_names
    ) -> None:
        """Writes shards, then the manifest, in the first process; the log stays until `discard`.

        Args:
            targets: (Q, dim) float32, the projected directions, one for each of `target_names`.
        """
        records, order = self._read(), self._order()
        if len(order) != len(example_ids):
            raise ValueError(f"{len(order)} rows for {len(example_ids)} examples.")
        if not processes.is_first():
            return
        count = -(-len(order) // shard_rows)
        checksums = {}
        for k in range(count):
            name = f"train-{k:05d}-of-{count:05d}.npy"
            rows = records["row"][order[k * shard_rows : (k + 1) * shard_rows]]
            checksums[name] = _save(self.folder / name, rows)
        checksums["targets.npy"] = _save(self.folder / "targets.npy", targets.astype(np.float32))
        table = {"example_id": list(example_ids), "loss": pa.array(self.losses())}
        artifacts.write_table(self.folder / "examples.parquet", table)
        checksums["examples.parquet"] = artifacts.sha256(self.folder / "examples.parquet")
        shape = {"rows": len(order), "shard_rows": shard_rows, "targets": list(target_names)}
        artifacts.write_json(
            self.folder / "manifest.json", self._head() | shape | {"sha256": checksums}
        )

    def discard(self) -> None:
        """Drops the log, once all that depends on it is written."""
        self.close()
        artifacts.remove(self.log)
        artifacts.remove(self.folder / "rows.json")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self):
        shape = len(self._places)
        return (
            np.memmap(self.log, self._record, "r", shape=shape)
            if shape
            else np.zeros(0, self._record)
        )

    def _order(self):
        return np.array([self._places[index] for index in sorted(self._places)], np.int64)


def fits(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Returns whether each row (n, dim) float32 can be kept in `dtype`, (n,) bool: none of its
    numbers overflows, and they do not all vanish.
    """
    kept = gradient_store.from_stored(_to_stored(rows, dtype), dtype)
    return np.isfinite(kept).all(axis=1) & (kept.any(axis=1) | ~rows.any(axis=1))


@np.errstate(over="ignore")  # the caller asks `fits`
def _to_stored(rows, dtype):
    return np.ascontiguousarray(rows.astype(DTYPES[dtype])).view(gradient_store.stored(dtype))


def _checksum(record) -> int:
    """Of index, loss and row: a record that a killed process left half written does not match."""
    header = np.array([record["header"]["index"]], "<u4").tobytes()
    header += np.array([record["header"]["loss"]], "<f4").tobytes()
    return zlib.crc32(np.ascontiguousarray(record["row"]).tobytes(), zlib.crc32(header))


def _save(path, array) -> str:
    with artifacts.atomic(path) as temporary:
        with open(temporary, "wb") as f:
            np.save(f, np.ascontiguousarray(array))
    return artifacts.sha256(path)
