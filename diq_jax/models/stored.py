"""Tensors as they lie in a file: what each reader of weights (safetensors, GGUF, torch) hands out,
and an array over a mapped file.
"""

import dataclasses
import mmap
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np

# What weights may be stored as. Anything else is quantised, or no weight.
PLAIN = ("float64", "float32", "float16", "bfloat16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes one tensor of a file.

    Attributes:
        shape: (out, in), as Hugging Face stores it.
        dtype: the numpy dtype that `read` gives; for a type that numpy lacks, the format's name.
        read: gives a fresh array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


def map_file(file: pathlib.Path) -> mmap.mmap | bytes:
    """Maps a file for reading; an empty one, which cannot be mapped, is b"". Raises OSError."""
    with open(file, "rb") as f:
        if f.seek(0, 2) == 0:
            return b""
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def all_finite(array: np.ndarray) -> bool:
    """Tells whether an array has neither NaN nor infinity; a bfloat16 array by its bits, which is
    faster.
    """
    if array.dtype == BFLOAT16:
        exponent = np.uint16(0x7F80)
        return not ((array.view(np.uint16) & exponent) == exponent).any()
    return bool(np.isfinite(array).all())
