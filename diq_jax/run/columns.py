"""What the columns of parquet files may hold: kinds of values, and checks that name the first row
with another.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diq_jax import errors


def shorten(value: Any, most: int = 60) -> str:
    """Shows a value in a message, in one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check(column: pa.ChunkedArray, kind: str, where: str) -> None:
    """Raises UserError, which begins with `where`, unless the values are of a kind in KINDS."""
    expected, fits, allowed = KINDS[kind]
    if not fits(column.type):
        raise errors.UserError(f"{where} must hold {expected}; its type is {column.type}.")
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise errors.UserError(f"{where} must hold {expected}; row {row} is null.")
    if allowed is None:
        return
    ok = allowed(column)
    if not ok.all():
        row = int(np.argmin(ok))
        raise errors.UserError(
            f"{where} must hold {expected}; row {row} is {shorten(column[row].as_py())}."
        )


def _finite_numbers(column):
    return np.isfinite(column.to_numpy().astype(np.float64))


def _lists_are(inner: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def fits(kind):
        # Of empty lists alone nothing says what they are of.
        return pa.types.is_list(kind) and (
            inner(kind.value_type) or pa.types.is_null(kind.value_type)
        )

    return fits


def _finite_lists(column):
    """Tells whether each list has neither nulls nor numbers that are not finite."""
    return _lists_of(column, lambda x: np.isfinite(x.to_numpy(False).astype(np.float64)))


def _finite_nested(column):
    """Tells whether each list of lists has no nulls on any level."""
    return _lists_of(column, lambda lists: _finite_lists(pa.chunked_array([lists])))


def _lists_of(column, allowed: Callable[[pa.Array], np.ndarray]) -> np.ndarray:
    """Makes a check of whether each list of a column has only values that are allowed and
    not null.
    """
    ok, start = np.ones(len(column), bool), 0
    for chunk in column.chunks:
        inner = chunk.flatten()
        bad = ~allowed(inner) | inner.is_null().to_numpy(False)
        if bad.any():  # the parents take eight bytes a value
            ok[start + np.unique(pc.list_parent_indices(chunk).to_numpy()[bad])] = False
        start += len(chunk)
    return ok


def _is_text(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


# Kind of a column: what messages call it, which types fit, and a test of its values where there is
# one. No kind allows null.
KINDS: dict[str, tuple[str, Callable, Callable | None]] = {
    "text": ("texts", _is_text, None),
    "whole": ("whole numbers", pa.types.is_integer, None),
    "flag": ("true or false", pa.types.is_boolean, None),
    "number": ("numbers", pa.types.is_floating, None),  # NaN allowed: "unknown"
    "finite": ("finite numbers", pa.types.is_floating, _finite_numbers),
    "texts": ("lists of texts", _lists_are(_is_text), None),
    "wholes": ("lists of whole numbers", _lists_are(pa.types.is_integer), _finite_lists),
    "nested": (
        "lists of lists of whole numbers", _lists_are(_lists_are(pa.types.is_integer)),
        _finite_nested,
    ),
    "finites": ("lists of finite numbers", _lists_are(pa.types.is_floating), _finite_lists),
}  # fmt: skip


def finite_rows(column: pa.ChunkedArray, nan: bool = False) -> np.ndarray:
    """Returns, for each row of a column of numbers or of lists of them, whether all are finite.

    Null passes, and so does what is no real number.

    Args:
        nan: whether NaN passes too.
    """
    ok = np.ones(len(column), bool)
    start = 0
    for chunk in column.chunks:
        values, rows = chunk, np.arange(len(chunk))
        if pa.types.is_list(chunk.type):
            values, rows = chunk.flatten(), pc.list_parent_indices(chunk).to_numpy()
        if pa.types.is_floating(values.type):
            wrong = pc.is_inf(values) if nan else pc.invert(pc.is_finite(values))
            wrong = pc.fill_null(wrong, False).to_numpy(zero_copy_only=False)
            ok[start + rows[wrong]] = False
        start += len(chunk)
    return ok
