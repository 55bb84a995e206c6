"""One reader for JSON and one for parquet: typed, within limits, mistakes say where.

Files of the user, of a hub, of a server and of our own earlier stages all pass through here.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax import errors

shorten = errors.shorten
MOST_DEPTH = 100  # lists and objects inside each other
MOST_DIGITS = 400  # of one number: no float has more, and Python takes quadratic time for them
BATCH_ROWS = 8192  # of a table that is read part by part
MOST_BYTES = 2**28  # of a JSON file that is read as a whole
_MANY_DIGITS = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
# What a damaged file makes pyarrow raise; OSError is a codec's complaint.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


class Base64(str):
    """Stands for bytes in a row: JSON writes it, and nothing reads it as a text."""


def parse_json(text: str, where: str, first_line: int | None = None, mend: bool = False) -> Any:
    """Parses one JSON value that can be written again as JSON in UTF-8.

    Args:
        where: the place for messages: a file, or a sentence's subject such as "the reply".
        first_line: the line of `where`, a file, at which the text begins: messages say FILE:LINE.
        mend: for what was paid for: half of a surrogate pair becomes U+FFFD, and a number that is
            not finite null.

    Raises:
        UserError: no JSON; nested deeper than MOST_DEPTH; a number that is not finite or of more
            than MOST_DIGITS digits; half of a surrogate pair in a text; a name twice in an object.
    """

    def wrong(problem: str, line: int = 1) -> errors.UserError:
        place = where if first_line is None else f"{where}:{first_line + line - 1}"
        return errors.UserError(f"{place} is not JSON that can be used: {problem}.")

    try:
        long = _MANY_DIGITS.search(text)
        hooks: dict[str, Any] = {"parse_int": _whole, "parse_float": _real} if long else {}
        value = json.loads(text, object_pairs_hook=_object, **hooks)
    except json.JSONDecodeError as e:
        raise wrong(f"{e.msg} at column {e.colno}", e.lineno) from None
    except RecursionError:
        raise wrong(f"it is nested deeper than {MOST_DEPTH} levels") from None
    except ValueError as e:
        raise wrong(str(e)) from None
    # Brackets in texts count too, so that this only says when a walk is needed.
    if text.count("[") + text.count("{") > MOST_DEPTH and _depth(value) > MOST_DEPTH:
        raise wrong(f"it is nested deeper than {MOST_DEPTH} levels")
    if mend:
        whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
        return json.loads(whole.decode("utf-16", "replace"), parse_constant=lambda _: None)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise wrong("a text holds half of a surrogate pair, which is no character") from None
    except ValueError:
        raise wrong("a number is NaN or infinite") from None
    return value


def read_json(path: str | os.PathLike, most_bytes: int = MOST_BYTES) -> Any:
    """Reads a JSON file in UTF-8.

    Raises:
        UserError: as `parse_json`; or the file is missing, unreadable, not UTF-8 or over
            `most_bytes`.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise errors.UserError(f"{path} has {size:,} bytes; expected at most {most_bytes:,}.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise errors.UserError(f"{path} is missing.") from None
    except UnicodeDecodeError as e:
        raise errors.UserError(f"{path} is not valid JSON: it is not UTF-8 ({e.reason}).") from None
    except OSError as e:
        raise errors.UserError(f"{path} cannot be read: {e.strerror}.") from None
    return parse_json(text, str(path), first_line=1)


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Reads one of our own JSON-lines files as a whole. Raises UserError as `read_json`."""
    path = pathlib.Path(path)
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise errors.UserError(f"{path} is missing.") from None
    except UnicodeDecodeError as e:
        raise errors.UserError(f"{path}: it is not UTF-8 ({e.reason}).") from None
    if rest:
        raise errors.UserError(f"{path} ends in the middle of line {len(lines) + 1}.")
    return [parse_json(line, str(path), n) for n, line in enumerate(lines, start=1)]


def read_record(
    path: str | os.PathLike,
    required: Mapping[str, type | tuple[type, ...]],
    optional: Mapping[str, type | tuple[type, ...]] | None = None,
) -> dict[str, Any]:
    """Reads a JSON object whose fields have known types; other fields pass.

    Raises:
        UserError: as `read_json` and `check_record`.
    """
    return check_record(read_json(path), str(path), required, optional)


def check_record(
    value: Any,
    where: str,
    required: Mapping[str, type | tuple[type, ...]],
    optional: Mapping[str, type | tuple[type, ...]] | None = None,
) -> dict[str, Any]:
    """Returns `value`, an object with every field of `required`, each field of its type.

    Types are JSON's: True is no int, an int is a float.

    Raises:
        UserError: naming `where` and the field.
    """
    if not isinstance(value, dict):
        raise errors.UserError(f"{where} must hold a JSON object; got {shorten(value)}.")
    for name in required:
        if name not in value:
            near = errors.nearest(name, [k for k in value if k not in required])
            raise errors.UserError(f"{where} has no field {name!r}.{near}")
    for name, kinds in {**required, **(optional or {})}.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if name in value and not _is_of(value[name], kinds):
            expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)
            got = shorten(value[name])
            raise errors.UserError(f"{where}: {name} must be {expected}; got {got}.")
    return value


@contextlib.contextmanager
def _parquet(path: str | os.PathLike) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; what is wrong with it, as it is read, is a UserError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise errors.UserError(f"{path} is missing: run the stage that makes it first.") from None
    except errors.UserError:
        raise
    except PARQUET_ERRORS as e:
        said = " ".join(str(e).split())[:200].rstrip(".")
        raise errors.UserError(f"{path} is not a readable parquet file: {said}.") from None


def read_table(
    path: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    most_rows: int | None = None,
    only: bool = False,
) -> pa.Table:
    """Reads a parquet file and checks its texts, and those of its columns that `columns` names.

    Args:
        columns: {name: kind}, a kind of columns.KINDS; each must be there. Other columns pass.
        most_rows: refuses a file with more.
        only: whether to read the columns of `columns` alone.

    Raises:
        UserError: the file is missing or damaged, a column is missing, of another type, or holds a
            value that its kind does not allow; the file, the column and the first such row are
            named.
    """
    with _parquet(path) as file:
        rows = file.metadata.num_rows
        if most_rows is not None and rows > most_rows:
            raise errors.UserError(f"{path} has {rows:,} rows; expected at most {most_rows:,}.")
        table = file.read(list(columns) if only and columns else None)
        table.validate(full=True)
    for name in columns or {}:
        if name not in table.column_names:
            near = errors.nearest(name, table.column_names)
            raise errors.UserError(
                f"{path} has no column {name!r}; it has {', '.join(table.column_names)}.{near}"
            )
    if rows:  # an empty column may have any type
        _check_columns(table, columns or {}, path)
    return table


def group_rows(path: str | os.PathLike) -> list[int]:
    """Counts the rows of each row group. Raises UserError as `read_table`."""
    with _parquet(path) as file:
        return [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]


def table_batches(
    path: str | os.PathLike, columns: Mapping[str, str], group: int | None = None
) -> Iterator[pa.Table]:
    """Reads the columns of `read_table`, of all row groups or one, a group or less at a time.

    Raises:
        UserError: as `read_table`, for a value once its part is read.
    """
    with _parquet(path) as file:
        lacks = [name for name in columns if name not in file.schema_arrow.names]
        if lacks:
            raise errors.UserError(f"{path} has no column {lacks[0]!r}.")
        groups = range(file.num_row_groups) if group is None else [group]
        for batch in file.iter_batches(BATCH_ROWS, groups, list(columns)):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            _check_columns(table, columns, path)
            yield table


def _check_columns(table: pa.Table, columns: Mapping[str, str], path: str | os.PathLike) -> None:
    from diq_jax.run import columns as columns_lib

    for name, kind in columns.items():
        columns_lib.check(table[name], kind, f"{path}: column {name!r}")


def parquet_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Reads a parquet file row by row.

    Raises:
        UserError: the file is missing or damaged, a text is not UTF-8, or two columns share a name.
    """
    with _parquet(path) as file:
        check_distinct(file.schema_arrow.names, f"{path}")
        for batch in file.iter_batches():
            batch.validate(full=True)
            yield from batch.to_pylist()


def check_distinct(names: Iterable[str], where: str) -> None:
    """Raises UserError where a name stands twice, since a row would keep one of the two."""
    names = list(names)
    for name in names:
        if names.count(name) > 1:
            raise errors.UserError(f"{where} names the column {name!r} twice; rename one.")


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false",
          dict: "an object", list: "a list", type(None): "null"}  # fmt: skip


def _is_of(value, kinds):
    kind = type(value)
    return kind in kinds or (kind is int and float in kinds)


def _object(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {shorten(twice)} twice")
    return made


def _whole(digits):
    _check_digits(digits)
    return int(digits)


def _real(digits):
    _check_digits(digits)
    return float(digits)


def _check_digits(digits):
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, over {MOST_DIGITS}")


def _depth(value) -> int:
    """Levels of lists and objects, without recursion."""
    deepest, left = 0, [(value, 1)]
    while left:
        node, level = left.pop()
        if isinstance(node, dict | list):
            deepest = max(deepest, level)
            children = node.values() if isinstance(node, dict) else node
            left += [(child, level + 1) for child in children]
    return deepest
