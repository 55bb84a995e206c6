"""The explorer: all rows of a run for explorer/*.js, as compressed blobs inside or beside the page.

The page unpacks the columns at once and the texts of a chunk of rows when one of them is read.
"""

import base64
import dataclasses
import gzip
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np

from diq_jax.report import detail, figures, tables

CHUNK_CHARACTERS = 2**20  # of texts: larger chunks are searched sooner, smaller ones read sooner
HEAT = 6  # characters of a chunk for each of a text with the heat of its tokens
INLINE_BYTES = 48 * 2**20  # of the page; more rows than that lie beside it, for a server
START = 110  # characters of a question in the table
MOST_LABELS = 2**16 - 1  # of a group
TARGETS = 10  # that a row helps most and hurts most
FOLDER = pathlib.Path(__file__).with_name("explorer")
SCRIPTS = ("data", "choice", "scatter", "table", "reader", "picture", "methods", "main")
TEXTS = ("question", "reasoning", "answer")
TITLES = {
    "difficulty": figures.DIFFICULTY,
    "influence": figures.INFLUENCE,
    "tokens": "answer tokens",
    "loss": "loss at the base model (nats)",
}
HIDDEN = ("rank", "quadrant", "selected", "id_order")


@dataclasses.dataclass(frozen=True)
class Explorer:
    """Holds what the template needs of the explorer.

    Attributes:
        blobs: {name: base64 of gzip} for the page.
        served: whether the page would be too large, and the rows lie beside it.
        files: (name, gzip) of the rows beside it, packed as they are taken, once.
        methods: how many methods can be compared.
        absent: what the run lacks, and how to get it.
    """

    index: markupsafe.Markup
    script: markupsafe.Markup
    style: markupsafe.Markup
    blobs: Mapping[str, str]
    served: bool
    files: Iterator[tuple[str, bytes]]
    methods: int
    absent: Sequence[str]


def make(
    examples: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    details: detail.Detail,
    facts: Mapping[str, Any],
    titles: Mapping[str, str] = TITLES,
) -> Explorer:
    """Packs a run. The same arguments give the same bytes.

    Args:
        examples: the columns of inputs.ReportData.examples.
        rows: the rows as they came.
        groups: {name: a text for each row} to color and to filter by.
        facts: method, thresholds and quadrant_order; perhaps view, the first x, y and color, and
            shades of labels.
        titles: of columns of numbers.
    """
    n = len(rows)
    numbers = _numbers(examples, details)
    codes, labels = _codes({"source": examples["source"], **groups})
    columns = b"".join(
        [np.asarray(v, "<f4").tobytes() for v in numbers.values()]
        + [np.asarray(v, "<u2").tobytes() for v in codes.values()]
    )
    starts = [tables.cut(text, START) for text in examples["question"]]
    head = {"columns": columns, "names": _json([list(examples["example_id"]), starts])}
    blobs = {k: _gzip(v) for k, v in head.items()}
    characters = sum(len(text) for name in TEXTS for text in examples[name])
    spans = _spans(n, characters * (1 if details.heat is None else HEAT))
    served, texts, rest = _inside(_packed(examples, rows, details, spans))
    blobs |= {} if served else texts
    index = {
        "rows": n,
        "chunk_rows": spans[0][1],
        "chunks": len(spans),
        "characters": characters,
        "served": served,
        "numbers": [_described(name, titles) for name in numbers],
        "groups": [{"name": name, "labels": found} for name, found in labels.items()],
        "fences": {k: _fence(v) for k, v in numbers.items() if k.startswith("influence")},
        "keep": int(np.sum(examples["selected"])),
        "methods": list(details.methods),
        "targets": list(details.targets),
        "quadrants": figures.QUADRANTS,
        "edits": list(details.edits),
        "run": hashlib.sha256(head["names"]).hexdigest()[:16],
        **facts,
    }  # fmt: skip
    return Explorer(
        index=_safe(index),
        script=_source(*(f"{name}.js" for name in SCRIPTS)),
        style=_source("style.css"),
        blobs={name: base64.b64encode(blob).decode() for name, blob in blobs.items()},
        served=served,
        files=itertools.chain(texts.items(), rest) if served else rest,
        methods=len(details.methods),
        absent=details.absent,
    )


def _packed(examples, rows, details, spans) -> Iterator[tuple[str, bytes]]:
    """Yields (name, gzip) of what the reader shows of each chunk of rows."""
    for k, span in enumerate(spans):
        yield str(k), _gzip(_json([_record(examples, rows, details, i) for i in range(*span)]))


def _inside(chunks):
    """Takes chunks while the page has room: (whether some are left, {name: gzip}, the rest)."""
    taken, size = {}, 0
    for name, chunk in chunks:
        taken[name], size = chunk, size + len(chunk)
        if size * 4 / 3 > INLINE_BYTES:
            return True, taken, chunks
    return False, taken, chunks


def _source(*names: str) -> markupsafe.Markup:
    """Joins files of FOLDER."""
    return markupsafe.Markup("\n".join((FOLDER / n).read_text(encoding="utf-8") for n in names))


def _spans(n, characters):
    each = max(1, CHUNK_CHARACTERS * n // max(characters, CHUNK_CHARACTERS))
    return [(first, min(first + each, n)) for first in range(0, n, each)]


def _described(name: str, titles: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the page knows of a column of numbers."""
    hidden = name in HIDDEN or name.startswith("rank by ")
    return {"name": name, "title": titles.get(name, name), "fact": not hidden, "hidden": hidden}


def _numbers(examples, details) -> dict[str, np.ndarray]:
    """Returns the columns of numbers, (n,) each; a column without a number is left out."""
    ids = examples["example_id"]
    id_order = np.empty(len(ids))
    id_order[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    shown = ("difficulty", "influence", "tokens", "loss", "rank", "quadrant", "selected")
    found = {name: examples[name] for name in shown} | {"id_order": id_order} | details.numbers
    found |= {f"rank by {method}": ranks for method, ranks in details.methods.items()}
    found = {name: np.asarray(values, np.float32) for name, values in found.items()}
    return {name: v for name, v in found.items() if np.isfinite(v).any()}


def _codes(groups):
    """Returns {name: codes (n,)} and {name: labels}, of groups that tell rows apart."""
    codes, labels = {}, {}
    for name, values in groups.items():
        found = sorted(set(values))
        if 2 <= len(found) <= MOST_LABELS:
            place = {label: k for k, label in enumerate(found)}
            codes[name] = [place[v] for v in values]
            labels[name] = [v if len(v) <= 80 else tables.cut(v, 80) for v in found]
    return codes, labels


def _record(examples, rows, details, i) -> dict[str, Any]:
    """Returns what the reader shows of row i."""
    row = {name: examples[name][i] for name in (*TEXTS, "why")}
    known = {"id", "source", *row}
    row["own"] = {
        name: value
        for name, value in rows[i].items()
        if name not in known and value not in (None, "") and value not in row.values()
    }
    if details.heat is not None:
        row["pieces"] = details.pieces[i]
        row["heat"] = [float(f"{value:.3g}") for value in details.heat[i]]
    if details.by_target is not None:
        values = details.by_target[i]
        order = np.argsort(-values, kind="stable")
        row["helps"] = [[int(t), _digits(values[t])] for t in order[:TARGETS] if values[t] > 0]
        worst = order[::-1][:TARGETS]
        row["hurts"] = [[int(t), _digits(values[t])] for t in worst if values[t] < 0]
    if details.near is not None:
        row["near"] = [[int(j), _digits(cosine)] for j, cosine in details.near[i]]
    if repeats := details.repeats.get(examples["example_id"][i]):
        row["repeats"] = repeats
    return row


def _fence(influence):
    low, high = figures.fences(influence)
    pad = 0.08 * (high - low) or 0.5
    return [low - pad, high + pad]


def _digits(value):
    return float(f"{value:.4g}")


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def _json(value) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # half a surrogate pair cannot be written


def _safe(value) -> markupsafe.Markup:
    """Writes JSON that may stand inside a script element, whatever text it holds."""
    return markupsafe.Markup(tables.script_json(value))
