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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa

from diq_jax.common import artifacts, errors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HEADER = np.dtype([("index", "<u4"), ("checksum", "<u4"), ("loss", "<f4")])
READ_ROWS = 4096  # rows of one block of a product


class Writer:
    """Appends rows in any order, by index; `finish` turns them into shards.

    Args:
        made_from: what must be the same for rows to belong together; kept in the manifest.
    """

    def __init__(
        self, folder: str | os.PathLike, dim: int, dtype: str, made_from: Mapping[str, Any]
    ):
        self.folder = pathlib.Path(folder)
        self.dim, self.dtype, self.made_from = dim, dtype, dict(made_from)
        self._record = np.dtype([("header", HEADER), ("row", _stored(dtype), (dim,))])
        self._places: dict[int, int] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "rows.log"
        head = self.folder / "rows.json"
        if self.log.exists() and head.exists():
            _refuse_other(artifacts.read_json(head), self._head(), self.folder)
            self._recover()
        else:
            artifacts.write_json(head, self._head())
        self._file = open(self.log, "ab")
        self._file.truncate(len(self._places) * self._record.itemsize)

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
        return self.dim * _stored(self.dtype).itemsize

    @property
    def done(self) -> set[int]:
        """The indices that are on disk."""
        return set(self._places)

    def append(self, indices: Sequence[int], rows: np.ndarray, losses: np.ndarray) -> None:
        """Adds rows (b, dim) float32; those that are there already stay as they are."""
        new = [k for k, index in enumerate(indices) if index not in self._places]
        records = np.zeros(len(new), self._record)
        records["header"]["index"] = [indices[k] for k in new]
        records["header"]["loss"] = losses[new]
        records["row"] = _to_stored(rows[new], self.dtype)
        records["header"]["checksum"] = [_checksum(record) for record in records]
        self._file.write(records.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        for k in new:
            self._places[indices[k]] = len(self._places)

    def losses(self) -> np.ndarray:
        """(rows,) float32 in order of index."""
        return self._read()["header"]["loss"][self._order()]

    def row_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, rows (n, dim) float32) in order of index."""
        records, order = self._read(), self._order()
        for start in range(0, len(order), READ_ROWS):
            part = records["row"][order[start : start + READ_ROWS]]
            yield start, _from_stored(part, self.dtype)

    def finish(
        self, example_ids: Sequence[str], targets: np.ndarray, shard_rows: int, target_names
    ) -> None:
        """Writes shards, then the manifest; the log stays until `discard`.

        Args:
            targets: (Q, dim) float32, the projected directions, one for each of `target_names`.
        """
        records, order = self._read(), self._order()
        if len(order) != len(example_ids):
            raise ValueError(f"{len(order)} rows for {len(example_ids)} examples.")
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
        self.log.unlink()
        (self.folder / "rows.json").unlink()

    def close(self) -> None:
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


class Store:
    """A finished store, read by memory map."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]):
        self.folder, self.manifest = pathlib.Path(folder), dict(manifest)
        self.dim, self.dtype = manifest["dim"], manifest["dtype"]
        table = artifacts.read_table(self.folder / "examples.parquet")
        self.example_ids: list[str] = table["example_id"].to_pylist()
        self.losses = table["loss"].to_numpy()
        self.shards = sorted(name for name in manifest["sha256"] if name.startswith("train-"))
        self.targets = np.load(self.folder / "targets.npy")

    def __len__(self) -> int:
        return len(self.example_ids)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows (n, dim) float32), at most READ_ROWS at a time."""
        first = 0
        for name in self.shards:
            shard = np.load(self.folder / name, mmap_mode="r")
            for start in range(0, len(shard), READ_ROWS):
                part = _from_stored(shard[start : start + READ_ROWS], self.dtype)
                yield first, part
                first += len(part)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32; only what is asked for is read."""
        size, parts = self.manifest["shard_rows"], []
        for k in range(start // size, -(-min(stop, len(self)) // size)):
            shard = np.load(self.folder / self.shards[k], mmap_mode="r")
            parts.append(shard[max(start - k * size, 0) : max(stop - k * size, 0)])
        if not parts:
            return np.zeros((0, self.dim), np.float32)
        return _from_stored(np.concatenate(parts), self.dtype)

    def scores(self, targets: np.ndarray, normalize: str = "dot") -> np.ndarray:
        """Inner products, or cosines, of all rows with `targets` (Q, dim): (rows, Q) float32."""
        targets = np.asarray(targets, np.float32)
        if targets.ndim != 2 or targets.shape[1] != self.dim:
            raise errors.UserError(
                f"{self.folder} holds rows of {self.dim} numbers; the targets have shape "
                f"{targets.shape}."
            )
        cosine = normalize == "cosine"
        return products(self.blocks(), len(self), unit(targets) if cosine else targets, cosine)

    def verify(self) -> None:
        """Reads every byte.

        Raises:
            UserError: a file is missing or differs from its checksum; it is named.
        """
        for name, expected in self.manifest["sha256"].items():
            path = self.folder / name
            if not path.is_file():
                raise errors.UserError(f"{path} is missing; the store's manifest names it.")
            if artifacts.sha256(path) != expected:
                raise errors.UserError(
                    f"{path} is damaged: its checksum is not the one in manifest.json; make the "
                    "store again with --overwrite."
                )


def open_store(folder: str | os.PathLike, made_from: Mapping[str, Any] | None = None) -> Store:
    """Opens a finished store.

    Args:
        made_from: what its rows must have been made from, where the caller depends on it.

    Raises:
        UserError: no finished store, or one of another model, seed or projection (named).
    """
    folder = pathlib.Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        unfinished = "its run has not finished" if (folder / "rows.log").exists() else "no manifest"
        raise errors.UserError(f"{folder} is not a finished gradient store ({unfinished}).")
    manifest = artifacts.read_json(path)
    if made_from is not None:
        _refuse_other({"made_from": manifest["made_from"]}, {"made_from": dict(made_from)}, folder)
    return Store(folder, manifest)


def products(
    blocks: Iterable[tuple[int, np.ndarray]], count: int, targets: np.ndarray, unit_rows: bool
) -> np.ndarray:
    """<row, target>, (count, Q), for rows that come in blocks, taken to length 1 where asked."""
    out = np.zeros((count, len(targets)), np.float32)
    for first, rows in blocks:
        out[first : first + len(rows)] = (unit(rows) if unit_rows else rows) @ targets.T
    return out


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, dim) taken to length 1; a row of zeros stays."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _stored(dtype):
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(DTYPES[dtype])


def _to_stored(rows, dtype):
    return np.ascontiguousarray(rows.astype(DTYPES[dtype])).view(_stored(dtype))


def _from_stored(rows, dtype):
    return np.ascontiguousarray(rows).view(DTYPES[dtype]).astype(np.float32)


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


def _refuse_other(found, expected, folder):
    """UserError naming what differs between two records of how rows were made."""

    def flat(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}".removeprefix("made_from."), value

    old, new = dict(flat(found)), dict(flat(expected))
    wrong = [
        f"{name} was {old.get(name)!r}, is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if wrong:
        raise errors.UserError(
            f"The gradient store {folder} was made from something else: {'; '.join(wrong)}."
        )
