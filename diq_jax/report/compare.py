"""Two runs over one pool: what both select, what one alone does, how their configs differ."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config, errors
from diq_jax.report import detail, explorer, figures, inputs, page, style, tables
from diq_jax.run import records

READS = ("prepare/pool.parquet", "influence/influence.parquet", "selection/selection.parquet")
MOST_ROWS = 20  # listed of what one run alone selects
START = 110  # characters of their questions
BUDGETS = 200  # points of the curve


@dataclasses.dataclass(frozen=True)
class Side:
    """Holds one of the two runs.

    Attributes:
        examples: the columns of inputs.ReportData.examples, the second run's in the order of the
            first.
        rows: the rows as they came, in that order.
    """

    name: str
    config: config.Config
    examples: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def load(first: str, second: str, field: str, verified: bool = True) -> tuple[Side, Side]:
    """Reads two runs.

    Args:
        field: the flag or command that names them, for messages.

    Raises:
        UserError: a run has not finished prepare, influence or selection; an artifact is damaged;
            both are one run, or their pools differ.
    """
    folders = pathlib.Path(first), pathlib.Path(second)
    if folders[0].resolve() == folders[1].resolve():
        raise errors.UserError(f"{field} names {first!r} twice; name two runs.")
    names = [folder.resolve().name for folder in folders]
    if names[0] == names[1]:
        names = [os.fspath(folder) for folder in folders]
    a, b = (
        _read(folder, name, field, verified) for folder, name in zip(folders, names, strict=True)
    )
    place = {name: i for i, name in enumerate(b.examples["example_id"])}
    same = [
        place[name]
        for name, row in zip(a.examples["example_id"], a.rows, strict=True)
        if name in place and b.rows[place[name]] == row
    ]
    if not len(same) == len(a.rows) == len(b.rows):
        raise errors.UserError(
            f"{field}: the pools differ: {first} has {len(a.rows):,} rows, {second} "
            f"{len(b.rows):,}, and {len(same):,} are the same; name two runs over one data.pool."
        )
    columns = {
        name: values[same] if isinstance(values, np.ndarray) else [values[i] for i in same]
        for name, values in b.examples.items()
    }
    return a, dataclasses.replace(b, examples=columns, rows=[b.rows[i] for i in same])


def _read(folder, name, field, verified):
    record = {}
    for path in READS:
        record = records.finished(folder, path.split("/")[0], field)
        if verified:
            records.verify(folder / path)
    examples, rows = inputs.read_examples(folder)
    return Side(name, records.config_of(record, folder / "selection"), examples, rows)


def write(folder: pathlib.Path, sides: tuple[Side, Side]) -> None:
    """Writes report.html and its pictures. The same runs give the same bytes."""
    a, b = sides
    drawn, explored = pictures(a, b), explore(a, b)
    e = a.examples
    differs = [
        [field, ours, theirs]
        for (field, ours, _), (_, theirs, _) in zip(
            tables.settings(a.config), tables.settings(b.config), strict=True
        )
        if ours != theirs
    ]
    text = page.fill(
        "compare.html",
        drawn,
        explored,
        names=[a.name, b.name],
        pool=a.config.data.pool,
        headline=headline(a, b),
        cuts=False,
        outliers=0,
        taken=_taken(a, b),
        agreement=tables.Table.of_texts(
            ["Spearman correlation of", "rows", "rho"],
            [
                [name, f"{len(a.rows):,}", tables.correlation(e[name], b.examples[name])]
                for name in ("rank", "influence", "difficulty", "loss")
                if np.isfinite([e[name], b.examples[name]]).all()
            ],
        ),
        only={name: _only(a, b, i) for i, name in enumerate((a.name, b.name))},
        differs=tables.Table.of_texts(["Field", a.name, b.name], differs),
    )
    page.write(folder, text, drawn, explored)


def picked(a: Side, b: Side) -> np.ndarray:
    """Tells who selects each row, (n,): 0 neither, 1 only the first, 2 only the second, 3 both."""
    return a.examples["selected"] + 2 * b.examples["selected"]


def labels(a: Side, b: Side) -> list[str]:
    """Writes what the numbers of `picked` mean."""
    return ["neither", f"only {a.name}", f"only {b.name}", "both"]


def shared(a: Side, b: Side) -> np.ndarray:
    """Counts the rows that the first k places of both orders share, (n,), for k = 1, 2, ..., n."""
    later = np.sort(np.maximum(a.examples["rank"], b.examples["rank"]))
    return np.searchsorted(later, np.arange(1, len(later) + 1), "right")


def headline(a: Side, b: Side) -> str:
    """Says how many rows both select, and how many chance would give."""
    _, one, other, both = np.bincount(picked(a, b), minlength=4)
    chance = (one + both) * (other + both) / len(a.rows)
    return (
        f"{a.name} selects {one + both:,} of {len(a.rows):,} rows, {b.name} {other + both:,}; "
        f"{both:,} are the same ({chance:,.1f} expected by chance, overlap "
        f"{both / max(1, one + other + both):.0%} of all that either selects)."
    )


def pictures(a: Side, b: Side) -> dict[str, style.Picture]:
    """Draws the overlap by budget, and rank against rank."""
    n, who, said = len(a.rows), picked(a, b), labels(a, b)
    k = np.unique(np.geomspace(1, n, BUDGETS).astype(int))
    curve = {"budget_percent": 100 * k / n, "in_both_percent": 100 * shared(a, b)[k - 1] / k}
    kept = {side.name: 100 * side.examples["selected"].mean() for side in (a, b)}
    points = figures.shown(who > 0, np.minimum(*_ranks(a, b)), inputs.MOST_POINTS)
    places = dict(zip((a.name, b.name), (rank[points] for rank in _ranks(a, b)), strict=True))
    return {
        "overlap": style.render(curve, figures.overlap, *curve.values(), kept),
        "ranks": style.render(
            {**places, "selected by": np.array(said)[who[points]]},
            figures.rank_rank, places, who[points], said,
        ),
    }  # fmt: skip


def _ranks(a, b):
    return a.examples["rank"], b.examples["rank"]


def explore(a: Side, b: Side) -> explorer.Explorer:
    """Packs all rows for the explorer, with both runs as its methods."""
    e, said = dict(a.examples), labels(a, b)
    e["why"] = [
        f"{a.name}: {one} · {b.name}: {other}"
        for one, other in zip(e["why"], b.examples["why"], strict=True)
    ]
    numbers, titles = {}, dict(explorer.TITLES)
    for name in ("influence", "difficulty", "loss"):
        if not np.array_equal(e[name], b.examples[name], equal_nan=True):
            titles[name] = f"{explorer.TITLES[name]}, {a.name}"
            numbers[f"{name}, {b.name}"] = b.examples[name]
            titles[f"{name}, {b.name}"] = f"{explorer.TITLES[name]}, {b.name}"
    by = [f"rank by {side.name}" for side in (a, b)]
    found = detail.Detail(
        numbers=numbers,
        methods={side.name: side.examples["rank"] for side in (a, b)},
        by_target=None, targets=[], heat=None, pieces=None, near=None, repeats={}, edits=[],
        absent=[],
    )  # fmt: skip
    facts = {
        "method": a.name,
        "quadrant_order": a.config.selection.quadrants,
        "thresholds": {"difficulty": None, "influence": None},
        "shades": dict(zip(said, figures.PICKED, strict=True)),
        "view": {"x": by[0], "y": by[1], "color": "selected by"},
    }
    groups = {"selected by": [said[code] for code in picked(a, b)]}
    return explorer.make(e, a.rows, groups, found, facts, titles)


def _taken(a, b):
    """Tables what kind of row both select, one alone, or neither."""
    rows, who = [], picked(a, b)
    for code, name in sorted(enumerate(labels(a, b)), reverse=True):
        of = who == code
        cells = [(f"median {n}", _median(a.examples[n][of])) for n in ("tokens", "difficulty")]
        cells += [
            (f"median influence, {side.name}", _median(side.examples["influence"][of]))
            for side in (a, b)
        ]
        rows.append({"Selected by": name, "rows": f"{of.sum():,}", **dict(cells)})
    return tables.Table.of_texts(list(rows[0]), [list(row.values()) for row in rows])


def _median(values):
    found = values[np.isfinite(values)]
    return f"{np.median(found):,.4g}".replace("-", "−") if len(found) else "–"


def _only(a, b, which):
    """Tables the first rows by rank that one side alone selects, with both scores and ranks."""
    own, found = (a, b)[which], np.flatnonzero(picked(a, b) == which + 1)
    best = found[np.argsort(own.examples["rank"][found], kind="stable")][:MOST_ROWS]
    columns = ("rank", "influence", "difficulty")
    rows = []
    for i in best:
        question = tables.cut(a.examples["question"][i], START)
        numbers = (_median(s.examples[name][[i]]) for name in columns for s in (a, b))
        rows.append([f"{a.examples['example_id'][i]} · {question}", *numbers])
    headers = ["Row", *(f"{name}, {s.name}" for name in columns for s in (a, b))]
    return len(found), tables.Table.of_texts(headers, rows)
