"""Reading a gradient store: projected gradients, one row for each example, by memory map.

influence/store.py writes it and says what its folder holds; the reading half is here because
selection reads it too.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from diq_jax import errors
from diq_jax.run import artifacts, reading

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
READ_ROWS = 4096  # rows of one block of a product
MANIFEST = {
    "dim": int, "dtype": str, "made_from": dict, "rows": int, "shard_rows": int, "targets": list,
    "sha256": dict,
}  # fmt: skip
COLUMNS = {"example_id": "text", "loss": "finite"}
FILES = ("examples.parquet", "targets.npy")  # beside the shards


class GradientStore:
    """Reads a finished store by memory map.

    A file is held against its checksum in the manifest before it is first used, unless `verified`
    is False: every read may raise UserError.
    """

    def __init__(
        self, folder: str | os.PathLike, manifest: Mapping[str, Any], verified: bool = True
    ) -> None:
        self.folder, self.manifest = pathlib.Path(folder), dict(manifest)
        self.dim, self.dtype = manifest["dim"], manifest["dtype"]
        self._checked = set() if verified else {*manifest["sha256"]}
        table = reading.read_table(self._verified("examples.parquet"), COLUMNS)
        self.example_ids: list[str] = table["example_id"].to_pylist()
        self.losses = table["loss"].to_numpy()
        self.shards = sorted(name for name in manifest["sha256"] if name.startswith("train-"))
        self.targets = np.load(self._verified("targets.npy"))

    def __len__(self) -> int:
        return len(self.example_ids)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, rows (n, dim) float32), at most READ_ROWS at a time."""
        first = 0
        for name in self.shards:
            shard = self._shard(name)
            for start in range(0, len(shard), READ_ROWS):
                part = self._read(shard[start : start + READ_ROWS], first)
                yield first, part
                first += len(part)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows [start, stop) as float32, and no others."""
        size, parts = self.manifest["shard_rows"], []
        for k in range(start // size, -(-min(stop, len(self)) // size)):
            shard = self._shard(self.shards[k])
            parts.append(shard[max(start - k * size, 0) : max(stop - k * size, 0)])
        if not parts:
            return np.zeros((0, self.dim), np.float32)
        return self._read(np.concatenate(parts), start)

    def _read(self, stored: np.ndarray, first: int) -> np.ndarray:
        """Converts rows on disk to float32; `first` is the number of the first, for messages."""
        rows = from_stored(stored, self.dtype)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            example_id = self.example_ids[first + int(np.argmin(finite))]
            raise errors.UserError(
                f"{self.folder} holds a gradient of example {example_id!r} that is not finite (its "
                f"dtype is {self.dtype}): make the store again with --overwrite."
            )
        return rows

    def scores(self, targets: np.ndarray, normalize: str = "dot") -> np.ndarray:
        """Computes inner products, or cosines, of rows with `targets` (Q, dim): (rows, Q)."""
        targets = np.asarray(targets, np.float32)
        if targets.ndim != 2 or targets.shape[1] != self.dim:
            raise errors.UserError(
                f"{self.folder} holds rows of {self.dim} numbers; the targets have shape "
                f"{targets.shape}."
            )
        cosine = normalize == "cosine"
        return products(self.blocks(), len(self), unit(targets) if cosine else targets, cosine)

    def verify(self) -> None:
        """Reads every byte that was not verified yet.

        Raises:
            UserError: a file is missing or differs from its checksum; it is named.
        """
        for name in self.manifest["sha256"]:
            self._verified(name)

    def _shard(self, name: str) -> np.ndarray:
        """Returns a shard's rows as they lie on disk."""
        shard = np.load(self._verified(name), mmap_mode="r")
        if shard.ndim != 2 or shard.shape[1] != self.dim or shard.dtype != stored(self.dtype):
            raise errors.UserError(
                f"{self.folder / name} must hold rows of {self.dim} {stored(self.dtype)}; got "
                f"{shard.dtype} of shape {shard.shape}."
            )
        return shard

    def _verified(self, name: str) -> pathlib.Path:
        """Returns the path of a file of the store, once its checksum is that of the manifest."""
        path = self.folder / name
        if not path.is_file():
            raise errors.UserError(f"{path} is missing; the store's manifest names it.")
        if name not in self._checked and artifacts.sha256(path) != self.manifest["sha256"][name]:
            raise errors.UserError(
                f"{path} is damaged: its checksum is not the one in manifest.json; make the "
                "store again with --stages=influence --overwrite."
            )
        self._checked.add(name)
        return path


def open_store(
    folder: str | os.PathLike, made_from: Mapping[str, Any] | None = None, verified: bool = True
) -> GradientStore:
    """Opens a finished store.

    Args:
        made_from: what its rows must have been made from, where the caller depends on it.
        verified: whether files are held against their checksums.

    Raises:
        UserError: no finished store, or one of another model, seed or projection (named).
    """
    folder = pathlib.Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise errors.UserError(f"{folder} is not a finished gradient store: it has no {path.name}.")
    manifest = reading.read_record(path, MANIFEST)
    _check_manifest(manifest, path)
    if made_from is not None:
        refuse_other({"made_from": manifest["made_from"]}, {"made_from": dict(made_from)}, folder)
    return GradientStore(folder, manifest, verified)


def _check_manifest(manifest, path) -> None:
    """Raises UserError where a store cannot be as its manifest says."""
    errors.check_choice(f"{path}: dtype", manifest["dtype"], DTYPES)
    for name in ("dim", "shard_rows"):
        errors.check(f"{path}: {name}", manifest[name] >= 1, "at least 1", manifest[name])
    files = manifest["sha256"]
    reading.check_record(files, f"{path}: sha256", dict.fromkeys({*files, *FILES}, str))
    for name in files:
        ok = name == os.path.basename(name)
        errors.check(f"{path}: sha256", ok, "names of files beside it", name)
    shards = sum(name.startswith("train-") for name in files)
    expected = -(-manifest["rows"] // manifest["shard_rows"])
    errors.check(f"{path}: sha256", shards == expected, f"{expected} shards", shards)


def products(
    blocks: Iterable[tuple[int, np.ndarray]], count: int, targets: np.ndarray, unit_rows: bool
) -> np.ndarray:
    """Computes <row, target>, (count, Q), for blocks of rows, scaled to length 1 where asked."""
    out = np.zeros((count, len(targets)), np.float32)
    for first, rows in blocks:
        out[first : first + len(rows)] = (unit(rows) if unit_rows else rows) @ targets.T
    return out


def unit(rows: np.ndarray) -> np.ndarray:
    """Scales rows (n, dim) to length 1; a row of zeros stays."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def stored(dtype: str) -> np.dtype:
    """Returns the dtype on disk: .npy has no bfloat16, which is kept as its bits."""
    return np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(DTYPES[dtype])


@np.errstate(over="ignore")  # the caller asks `fits`
def to_stored(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Converts rows (n, dim) float32 to the form on disk."""
    return np.ascontiguousarray(rows.astype(DTYPES[dtype])).view(stored(dtype))


def fits(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Returns which rows (n, dim) float32 `dtype` can keep, (n,) bool: finite, and not all 0."""
    kept = from_stored(to_stored(rows, dtype), dtype)
    finite = np.isfinite(kept).all(axis=1)
    return np.logical_and(finite, kept.any(axis=1) | ~rows.any(axis=1))


def from_stored(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Converts rows from the form on disk to float32."""
    return np.ascontiguousarray(rows).view(DTYPES[dtype]).astype(np.float32)


def refuse_other(
    found: Mapping[str, Any], expected: Mapping[str, Any], folder: pathlib.Path
) -> None:
    """Raises UserError naming what differs between two records of how rows were made."""

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
