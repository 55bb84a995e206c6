"""What a GGUF file says before its weights: metadata and a list of tensors, within bounds.

Every length is held against the bytes that are left before anything of that length is made, so that
a damaged or hostile file is refused at once. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import pathlib
from typing import Any

import gguf
import numpy as np

from diq_jax import errors
from diq_jax.models import stored
from diq_jax.run import reading

VERSIONS = (2, 3)
MOST_ENTRIES = 2**16  # metadata keys, and tensors; a model of 80 layers has 724 tensors
MOST_TEXTS = 2**20  # texts in lists; the largest tokenizers have 800,000 tokens and merges
MOST_NUMBERS = 2**22  # numbers in lists
MOST_DIMENSIONS = 4
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
TEXT, LIST = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
NUMBERS = {
    gguf.GGUFValueType[name]: np.dtype(dtype)
    for name, dtype in (
        ("UINT8", "u1"), ("INT8", "i1"), ("UINT16", "<u2"), ("INT16", "<i2"), ("UINT32", "<u4"),
        ("INT32", "<i4"), ("UINT64", "<u8"), ("INT64", "<i8"), ("FLOAT32", "<f4"),
        ("FLOAT64", "<f8"), ("BOOL", "?"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Listed:
    """Describes a tensor by the header: its shape (out, in), type, place and size."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Holds what a GGUF file says before its tensors, and the file."""

    metadata: dict[str, Any]
    tensors: dict[str, Listed]
    data: mmap.mmap | bytes


def read_header(path: pathlib.Path) -> Header:
    """Reads all metadata and the list of tensors; the data stays mapped.

    Raises:
        UserError: the file is damaged, of another version or byte order, or beyond the limits.
    """
    try:
        data = stored.map_file(path)
    except OSError as e:
        raise errors.UserError(f"{path} cannot be read: {e.strerror}.") from None
    try:
        return _parse(_Cursor(data))
    except ValueError as e:
        raise errors.UserError(
            f"{path} is not a whole GGUF file of version 2 or 3: it ends after"
            f" {len(data)} bytes and cannot be read to the end of what its header lists ({e})."
        ) from None


class _Cursor:
    """Reads the file from a place on, and never beyond its end."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 0
        self.texts_left, self.numbers_left = MOST_TEXTS, MOST_NUMBERS

    def take(self, count: int) -> bytes:
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise ValueError(f"{count:,} bytes are listed at byte {start:,}")
        self.at = end
        return self.data[start:end]

    def whole(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.whole(8)).decode()

    def count(self, most: int, what: str) -> int:
        count = self.whole(8)
        if count > most:
            raise ValueError(f"{count:,} {what} are listed; expected at most {most:,}")
        return count

    def value(self) -> Any:
        kind = gguf.GGUFValueType(self.whole(4))
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            return self.values()
        return self.numbers(kind, 1)[0]

    def values(self) -> list[Any]:
        kind = gguf.GGUFValueType(self.whole(4))
        if kind == LIST:
            raise ValueError("it holds lists of lists, which no supported model has")
        if kind == TEXT:
            count = self.count(self.texts_left, "texts")
            self.texts_left -= count
            return [self.text() for _ in range(count)]
        count = self.count(self.numbers_left, "numbers")
        self.numbers_left -= count
        return self.numbers(kind, count)

    def numbers(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
        dtype = NUMBERS[kind]
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _parse(cursor: _Cursor) -> Header:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.whole(4)
    if version & 0xFFFF == 0:
        raise ValueError("it has the byte order of another kind of machine")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}")
    tensor_count = cursor.count(MOST_ENTRIES, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(MOST_ENTRIES, "metadata keys")):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the metadata key {reading.shorten(key)} is there twice")
        metadata[key] = cursor.value()
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment not in [2**i for i in range(21)]:
        raise ValueError(f"{ALIGNMENT_KEY} is {reading.shorten(alignment)}, no power of two")
    listed = [_listed(cursor) for _ in range(tensor_count)]
    base = math.ceil(cursor.at / alignment) * alignment
    tensors: dict[str, Listed] = {}
    end = base
    for tensor in sorted(listed, key=lambda t: t.start):
        shown, start = reading.shorten(tensor.name), base + tensor.start
        if tensor.name in tensors:
            raise ValueError(f"the tensor {shown} is there twice")
        if start % alignment or start < end:
            raise ValueError(f"the tensor {shown} is misaligned or overlaps another")
        end = start + tensor.size
        if end > len(cursor.data):
            raise ValueError(f"the tensor {shown} ends at byte {end:,}")
        tensors[tensor.name] = dataclasses.replace(tensor, start=start)
    return Header(metadata, tensors, cursor.data)


def _listed(cursor: _Cursor) -> Listed:
    """Reads a tensor whose start counts from where the data begins."""
    name, dimensions = cursor.text(), cursor.whole(4)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"the tensor {reading.shorten(name)} has {dimensions:,} dimensions")
    shape = tuple(cursor.whole(8) for _ in range(dimensions))[::-1]
    kind = gguf.GGMLQuantizationType(cursor.whole(4))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"the rows of the tensor {reading.shorten(name)} are no whole blocks")
    return Listed(name, shape, kind, cursor.whole(8), math.prod(shape) // block * size)
