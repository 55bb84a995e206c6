"""Rows of one file, folder or hub data set, each with its place, and with JSON's types only.

The extension gives the format (`READERS`); text is UTF-8. Lines are counted from 1, as editors do;
rows of the other formats from 0, as `dataset[17]` does. A folder is what `save_to_disk` of the
datasets library wrote, or its files are read in order (`in_folder`).
"""

import base64
import collections
import csv
import glob
import gzip
import io
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
from absl import logging

from diq_jax import errors
from diq_jax.run import reading

PlacedRows = Iterator[tuple[dict[str, Any], str]]  # a row and where it stands
HUB, BENCHMARK = "hub:", "benchmark:"
SAVED = ("state.json", "dataset_dict.json")  # what a folder of save_to_disk holds one of
# What the name of a split's file begins with, such as train-00000-of-00003.parquet.
SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")
MOST_JSON_BYTES = 2**32  # of a .json, which is read as a whole
DAMAGED = (EOFError, OSError, ValueError, zlib.error, csv.Error, pa.ArrowException)


def read(source: str) -> PlacedRows:
    """Reads the rows of a path or of `hub:NAME[:CONFIG[:SPLIT]]`.

    Raises:
        UserError: the source cannot be read, or holds something else than rows.
    """
    if source.startswith(HUB):
        reader: Callable[[str], PlacedRows] = _read_hub
    elif is_saved(source):
        reader = _read_saved
    else:
        ending = next((ending for ending in READERS if source.endswith(ending)), None)
        if ending is None:
            raise errors.UserError(f"{source} must end in {', '.join(READERS)}.")
        reader = READERS[ending]
    said: set[str] = set()
    try:
        for row, where in reader(source):
            if not isinstance(row, dict):
                raise errors.UserError(f"{where} must be an object, got {reading.shorten(row)}.")
            yield _as_json(row, where, said), where
    except errors.UserError:
        raise
    except DAMAGED as e:
        problem = " ".join(str(e).split())[:200].rstrip(".")
        raise errors.UserError(f"{source} cannot be read: {problem}.") from None


def is_saved(path: str) -> bool:
    """Returns whether `path` is a folder that save_to_disk of the datasets library wrote."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED)


def find(part: str, field: str) -> list[str]:
    """Lists what a path, a glob (sorted), a folder or a hub name stands for, as `read` takes it.

    Raises:
        UserError: naming `field`: nothing is there, or no file; or as `in_folder`.
    """
    path = os.path.expanduser(part)
    if part.startswith(HUB) or os.path.isfile(path) or is_saved(path):
        return [path]
    if os.path.isdir(path):
        return in_folder(path, field)
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        if found := [match for match in matches if is_file(match, field)]:
            return found
        raise errors.UserError(f"{field}: no file matches {part}.")
    if os.path.lexists(path):
        is_file(path, field)
        raise errors.UserError(f"{field}: {part} is neither a file nor a folder.")
    folder, name = os.path.split(path)
    known = os.path.isdir(folder or ".") and os.access(folder or ".", os.R_OK)
    names = os.listdir(folder or ".") if known else []
    raise errors.UserError(f"{field}: there is no file {part}.{errors.nearest(name, names)}")


def check_once(places: Iterable[str], field: str) -> None:
    """Raises UserError where a file or name stands twice: its rows would count twice."""
    whole = (os.path.realpath(place) if os.path.exists(place) else place for place in places)
    [(place, count)] = collections.Counter(whole).most_common(1)
    if count > 1:
        raise errors.UserError(f"{field} names {place} {count} times; name it once.")


def in_folder(path: str, field: str) -> list[str]:
    """Lists the files of a folder that `read` knows, sorted; of those below it none.

    Raises:
        UserError: there is none, one is a link to nothing, or they are of several formats, which
            would be copies of one, or of several splits.
    """
    found: dict[str, list[str]] = {}
    try:
        names = sorted(os.listdir(path))
    except OSError as e:
        raise errors.UserError(f"{field}: {path} cannot be read: {e.strerror}.") from None
    for name in names:
        ending = next((ending for ending in READERS if name.endswith(ending)), "")
        if ending and not name.startswith(".") and is_file(os.path.join(path, name), field):
            found.setdefault(ending, []).append(os.path.join(path, name))
    held = " and ".join(found)
    if len(found) == 1:
        [files] = found.values()
        splits = {match[0] for file in files if (match := SPLIT.match(os.path.basename(file)))}
        if len(splits) < 2:
            return files
        held = f"the splits {' and '.join(sorted(splits))}"
    held = held or f"no file that ends in {', '.join(READERS)}"
    raise errors.UserError(
        f"{field}: {path} is a folder with {held}; name its files, such as {path}/*.jsonl."
    )


def is_file(path: str, field: str) -> bool:
    """Returns whether `path` is a file. Raises UserError for a link to nothing."""
    if os.path.islink(path) and not os.path.exists(path):
        raise errors.UserError(f"{field}: {path} is a link to what is not there.")
    return os.path.isfile(path)


def _as_json(row: dict, where: str, said: set[str]) -> dict:
    """Gives a row JSON's types only, as it is written again later.

    NaN and infinities become null, times and numbers of other types text, bytes Base64; each column
    of which that happens is named once, and added to `said`.
    """
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError:
        raise errors.UserError(f"{where}: a text holds half of a surrogate pair.") from None
    except (TypeError, ValueError):
        made = {str(name): _plain_value(value) for name, value in row.items()}
    for name, value in row.items():
        if name not in said and made[str(name)] != value:
            said.add(name)
            kept = reading.shorten(json.dumps(made[str(name)]))
            logging.warning(
                "%s: column %s holds %s, which is no JSON: here, and wherever it is written, it is "
                "%s.", where, name, reading.shorten(value), kept,
            )  # fmt: skip
    return made


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return reading.Base64(base64.b64encode(value).decode())
    return value if isinstance(value, str | int | None) else str(value)


def _open(path: str) -> Any:
    if path.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _read_jsonl(path: str) -> PlacedRows:
    with _open(path) as f:
        lines = iter(lambda: f.readline(reading.MOST_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > reading.MOST_BYTES:
                raise errors.UserError(f"{path}:{number} is over {reading.MOST_BYTES:,} bytes.")
            if text := _decode(line, path, number).strip():
                yield reading.parse_json(text, path, number), f"{path}:{number}"


def _read_json(path: str) -> PlacedRows:
    if os.path.getsize(path) > MOST_JSON_BYTES:
        raise errors.UserError(
            f"{path} is over {MOST_JSON_BYTES:,} bytes: write one object a line, as .jsonl."
        )
    text = _decode(pathlib.Path(path).read_bytes(), path)
    if not text.lstrip().startswith("["):
        raise errors.UserError(f"{path} must hold a list of objects (one a line: name it .jsonl).")
    return _numbered(reading.parse_json(text, path, 1), path)


def _read_cells(path: str) -> PlacedRows:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    delimiter = "\t" if path.endswith(".tsv") else ","
    with open(path, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True, delimiter=delimiter)
        try:
            reading.check_distinct(reader.fieldnames or [], f"{path}:1")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise errors.UserError(
                        f"{where} must have {len(reader.fieldnames or [])} cells, as line 1 has."
                    )
                yield row, where
        except UnicodeDecodeError:  # which says the place in a piece of the file
            _decode(pathlib.Path(path).read_bytes(), path)
            raise
        except csv.Error as e:
            raise errors.UserError(
                f"{path}:{reader.reader.line_num} has a quote that is left open, or text behind a "
                f'closing one ({" ".join(str(e).split())}); expected "..." around a whole cell.'
            ) from None


def _read_arrow(path: str) -> PlacedRows:
    """Reads Arrow's stream format, which the datasets library writes, or its file format."""
    with pa.memory_map(path) as data:
        is_file = data.read(6) == b"ARROW1"
        data.seek(0)
        with pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data) as reader:
            reading.check_distinct(reader.schema.names, path)
            table = reader.read_all()
        table.validate(full=True)
        batches = (batch.to_pylist() for batch in table.to_batches(max_chunksize=1024))
        yield from _numbered((row for rows in batches for row in rows), path)


def _read_saved(path: str) -> PlacedRows:
    import datasets  # a second to import

    try:
        found = datasets.load_from_disk(path)
    except (LookupError, TypeError, AttributeError) as e:  # of a state.json, or a table of no rows
        raise errors.UserError(
            f"{path} is not a folder of rows as save_to_disk writes it ({type(e).__name__}: {e})."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise errors.UserError(
                f"{path} has the splits {', '.join(map(str, found))}; name the folder of one of "
                "them."
            )
        found = found["train"]
    return _numbered(found, path)


def _read_hub(source: str) -> PlacedRows:
    name, config, split = ([*source.removeprefix(HUB).split(":", 2), "", ""])[:3]
    if not name:
        raise errors.UserError(f"{source} must be hub:NAME, or hub:NAME:CONFIG:SPLIT.")
    import datasets  # a second to import, and only the hub needs it
    from datasets import exceptions

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, exceptions.DatasetsError) as e:
        raise errors.UserError(f"{source} cannot be loaded from the hub: {e}.") from None
    return _numbered(rows, name)


def _numbered(rows: Iterable[Any], name: str) -> PlacedRows:
    return ((row, f"{name} row {i}") for i, row in enumerate(rows))


def _decode(data: bytes, path: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise errors.UserError(f"{path}:{line} is not UTF-8: {e.reason}.") from None


READERS: dict[str, Callable[[str], PlacedRows]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda path: _numbered(reading.parquet_rows(path), path),
    ".csv": _read_cells,
    ".tsv": _read_cells,
    ".arrow": _read_arrow,
}
