"""Tensors as they lie in a file: what each reader of weights (safetensors here) hands out.

They keep to what the safetensors library checks of a header.
"""

import collections
import dataclasses
import json
import mmap
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

from diq_jax import errors
from diq_jax.run import reading

Part = tuple[slice, ...]  # of an array's axes; () is the whole
# What weights may be stored as. Anything else is quantised, or no weight.
PLAIN = ("float64", "float32", "float16", "bfloat16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MOST_HEADER = 10**8  # bytes, the library's limit
# The format's name of each type that the library gives as a numpy array.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes one tensor of a file.

    Attributes:
        shape: (out, in), as Hugging Face stores it.
        dtype: the numpy dtype that `read` gives; for a type that numpy lacks, the format's name.
        read: gives a fresh array of the whole tensor, or of a part.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray] = dataclasses.field(repr=False)


def map_file(file: pathlib.Path) -> mmap.mmap | bytes:
    """Maps a file for reading; an empty one, which cannot be mapped, is b"". Raises OSError."""
    with open(file, "rb") as f:
        if f.seek(0, 2) == 0:
            return b""
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def all_finite(array: np.ndarray) -> bool:
    """Tells whether an array has neither NaN nor infinity; bfloat16 by its bits, faster."""
    if array.dtype == BFLOAT16:
        exponent = np.uint16(0x7F80)
        return not ((array.view(np.uint16) & exponent) == exponent).any()
    return bool(np.isfinite(array).all())


def open_safetensors(file: pathlib.Path) -> dict[str, Tensor]:
    """Opens a file without reading its weights.

    Raises:
        UserError: the file is damaged, or its header names a tensor twice.
    """
    try:
        handle = safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as e:
        raise errors.UserError(
            f"{file} is not a whole safetensors file: {_length_mismatch(file) or str(e)[:200]}."
        ) from None
    except OSError as e:
        raise errors.UserError(f"{file} cannot be read: {e}.") from None
    names = collections.Counter(_header_names(file))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise errors.UserError(f"{file} names {reading.shorten(twice[0])} twice.")

    def tensor(name):
        lazy = handle.get_slice(name)
        dtype = str(lazy.get_dtype())

        def read(part: Part = ()):
            return lazy[part] if part else handle.get_tensor(name)

        return Tensor(tuple(lazy.get_shape()), DTYPES.get(dtype, dtype), read)

    return {name: tensor(name) for name in handle.keys()}


def _header_names(file: pathlib.Path) -> list[str]:
    """Reads the names in a header that the library has checked; one may be there twice."""
    with open(file, "rb") as f:
        header = f.read(int.from_bytes(f.read(8), "little"))
    return [name for name, _ in json.loads(header, object_pairs_hook=list)]


def _length_mismatch(file: pathlib.Path) -> str | None:
    """Says what a too short or too long file is, from its header: 8 bytes of length, then JSON."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        promised = 8 + int.from_bytes(f.read(8), "little")
        if 8 <= promised <= min(size, MOST_HEADER):
            try:
                header = json.loads(f.read(promised - 8))
                ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
                promised += max(ends, default=0)
            except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
                return None
    return (
        f"it ends after {size} bytes, its header promises {promised}" if size != promised else None
    )
