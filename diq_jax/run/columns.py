"""What the columns of parquet files may hold, and where they hold it not."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diq_jax import errors


def check(column: pa.ChunkedArray, kind: str, where: str) -> None:
    """Raises UserError where a column, not empty, does not hold values of a kind of `KINDS`."""
    expected, fits, allowed = KINDS[kind]
    if not fits(column.type):
        raise errors.UserError(f"{where} must hold {expected}; its type is {column.type}.")
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise errors.UserError(f"{where} must hold {expected}; row {row} is null.")
    if allowed is None:
        return
    ok = allowed(column)
    if not ok.all():
        row = int(np.argmin(ok))
        raise errors.UserError(
            f"{where} must hold {expected}; row {row} is {errors.shorten(column[row].as_py())}."
        )


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
            values, rows = (
                chunk.flatten(),
                pc.call_function("list_parent_indices", [chunk]).to_numpy(),
            )
        if pa.types.is_floating(values.type):
            wrong = pc.call_function("is_inf" if nan else "is_finite", [values])
            wrong = wrong if nan else pc.call_function("invert", [wrong])
            wrong = pc.fill_null(wrong, False).to_numpy(zero_copy_only=False)
            ok[start + rows[wrong]] = False
        start += len(chunk)
    return ok


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
    """Returns whether each list of a column has values that are allowed and not null, alone."""
    ok, start = np.ones(len(column), bool), 0
    for chunk in column.chunks:
        inner = chunk.flatten()
        bad = ~allowed(inner) | inner.is_null().to_numpy(False)
        if bad.any():  # the parents take eight bytes a value
            parents = pc.call_function("list_parent_indices", [chunk]).to_numpy()
            ok[start + np.unique(parents[bad])] = False
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
