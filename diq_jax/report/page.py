"""One run as one HTML file that needs nothing else: no network, no clock, the same bytes again."""

import dataclasses
import functools
import html
import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
import plotly.offline

from diq_jax import config
from diq_jax.report import classifier, figures, outcomes, tables

MOST_POINTS = 4000  # of the scatters; browsers drag with more SVG marks
TEXT_BUDGET = 2_000_000  # characters of examples to read by a click, over all points
PREFERENCES = {"loss": "loss (nats)", "margin": "margin (nats)", "accuracy": "pairs in order"}
EXTREMES = 5  # examples shown at each end
TEMPLATE = pathlib.Path(__file__).with_name("template.html")


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Holds what the stages left, read into memory.

    Attributes:
        examples: columns in the order of the pool: example_id, source, question, reasoning, answer
            (lists of str) and difficulty, influence, loss, tokens, quadrant, rank, selected
            (arrays), why (texts). Difficulty may be nan where the pool has none.
        rows: the rows as they came.
        thresholds: difficulty (None where there is none) and influence (None where quadrants cut at
            its residual).
        results, classifier, losses, preferences: evaluate/results.json, difficulty/metrics.json,
            finetune/losses.jsonl, dpo/losses.jsonl, empty where the stage has not run.
        repeats: the rows of selection/hygiene.parquet; None where nothing was compared.
        records: stage.json of each finished stage, in order.
    """

    config: config.Config
    examples: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    thresholds: Mapping[str, float | None]
    results: Mapping[str, Any]
    classifier: Mapping[str, Any]
    losses: Sequence[Mapping[str, Any]]
    preferences: Sequence[Mapping[str, Any]]
    repeats: Sequence[Mapping[str, Any]] | None
    records: Sequence[Mapping[str, Any]]

    @property
    def has_difficulty(self) -> bool:
        """Whether every example has a difficulty."""
        return bool(np.isfinite(self.examples["difficulty"]).all())

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """Influence as it is drawn: an outlier stands at the fence."""
        return np.clip(self.examples["influence"], *figures.fences(self.examples["influence"]))

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Indices of the examples in the scatters."""
        return figures.shown(self.examples["selected"], self.examples["rank"], MOST_POINTS)

    @functools.cached_property
    def _decimals(self):
        return tables.decimals_for(self.influence)

    def score(self, i: int) -> str:
        """The influence of example i, in as many decimals as all of them."""
        return tables.number(float(self.examples["influence"][i]), self._decimals)

    @property
    def quadrant_counts(self) -> dict[int, tuple[int, int]]:
        """{quadrant: (examples, selected ones)}."""
        quadrant, selected = self.examples["quadrant"], self.examples["selected"]
        return {
            q: (int(np.sum(quadrant == q)), int(np.sum(selected & (quadrant == q))))
            for q in figures.QUADRANTS
        }


def pictures(run: ReportData) -> dict[str, figures.Picture]:
    """Draws {name: picture}, without those that this run has no data for."""
    e, points = run.examples, run.drawn
    x, y, chosen = e["difficulty"][points], run.influence[points], e["selected"][points]
    rho = tables.correlation(e["influence"], e["tokens"])
    out = {"tokens": figures.render(figures.tokens, e["tokens"][points], y, chosen, rho)}
    panels = [(figures.INFLUENCE, run.influence, run.thresholds["influence"])]
    if run.has_difficulty:
        scatter = (x, y, chosen, run.quadrant_counts, run.thresholds)
        out["quadrants"] = figures.render(figures.quadrants, *scatter)
        panels.insert(0, (figures.DIFFICULTY, e["difficulty"], run.thresholds["difficulty"]))
    out["distributions"] = figures.render(figures.distributions, panels, e["selected"])
    shares = tables.group_shares(e["source"], e["selected"])
    if len(shares) > 1:
        names, pool, picked = zip(*shares, strict=True)
        percent = (100 * np.array(n) / max(1, sum(n)) for n in (pool, picked))
        out["sources"] = figures.render(figures.sources, names, *percent)
    if run.results:
        out["comparison"] = figures.render(figures.comparison, outcomes.panels(run.results))
    if run.losses:
        curves = (_curves(run.losses, name) for name in ("loss", "target_loss"))
        out["loss"] = figures.render(figures.loss, *curves)
    if run.preferences:
        steps = [entry["step"] for entry in run.preferences]
        curves = {
            label: [entry[name] for entry in run.preferences] for name, label in PREFERENCES.items()
        }
        out["preferences"] = figures.render(figures.preferences, steps, curves)
    perspectives = classifier.panels(run.classifier)
    if perspectives:
        out["classifier"] = figures.render(classifier.draw, perspectives)
    return dict(sorted(out.items()))


def render(run: ReportData, drawn: Mapping[str, figures.Picture]) -> str:
    """Writes the page. Everything from the data is escaped: HTML by jinja, JSON by `_json`."""
    e = run.examples
    cfg, selected = run.config, e["selected"]
    own_columns = ("id", "source", "question", "reasoning", "answer", "input_ids", "labels")
    by_column = tables.group_columns(run.rows, own_columns)
    chosen = {e["example_id"][i] for i in np.flatnonzero(selected)}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=cfg,
        examples=len(selected),
        selected=int(selected.sum()),
        headline=outcomes.headline(run.results),
        svg={name: markupsafe.Markup(picture.svg) for name, picture in drawn.items()},
        explorer=_json(_explorer(run)) if run.has_difficulty else None,
        plotly=markupsafe.Markup(plotly.offline.get_plotlyjs()) if run.has_difficulty else None,
        shown=len(run.drawn),
        outliers=int(np.sum(run.influence != e["influence"])),
        levels=outcomes.levels(run.results) if run.results else None,
        differences=outcomes.differences(run.results) if run.results else None,
        averages=outcomes.averages(run.results) if run.results else None,
        tests=run.results.get("tests"),
        tasks={
            f"{task} ({n} questions)": outcomes.levels(run.results, task)
            for task, n in (outcomes.task_names(run.results) if run.results else {}).items()
        },
        by_source=_groups("Source", e["source"], selected),
        by_quadrant=_quadrant_table(run) if run.has_difficulty else None,
        by_column={name: _groups(name, values, selected) for name, values in by_column.items()},
        rho_tokens=tables.correlation(e["influence"], e["tokens"]),
        rho_loss=tables.correlation(e["influence"], e["loss"]),
        repeats=None if run.repeats is None else tables.repeats(run.repeats, chosen),
        lengths=tables.length_means(e["tokens"], selected),
        extremes=_extremes(run),
        trained=bool(run.losses),
        classifier=tables.difficulty(run.classifier),
        classifier_rows=run.classifier.get("rows"),
        classifier_folds=run.classifier.get("folds"),
        cost=tables.cost(run.records),
        versions=tables.versions(run.records),
        settings=tables.settings(cfg),
    )


def _groups(title, values, selected):
    return tables.groups(title, tables.group_shares(values, selected))


def _quadrant_table(run):
    shares = [
        (f"Q{q} {figures.QUADRANTS[q]}", *counts) for q, counts in run.quadrant_counts.items()
    ]
    return tables.groups("Quadrant", shares)


def _json(value) -> markupsafe.Markup:
    """JSON that may stand inside a script element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def _explorer(run):
    """Makes the scatter for plotly.js, without what is the page's own (colors, sizes), and the text
    of each example drawn, as far as the budget goes.
    """
    e, points = run.examples, run.drawn
    selected = e["selected"][points]
    traces = [_trace(run, "not selected", ~selected), _trace(run, "selected", selected)]
    room = max(200, TEXT_BUDGET // (3 * len(points)))
    names = ("example_id", "source", "question", "reasoning", "answer")
    texts = [[_cut(e[name][i], room, " … (cut)") for name in names] for i in points]
    return {"figure": {"data": traces, "layout": _layout(run)}, "texts": texts}


def _trace(run, name, group):
    e, points, places = run.examples, run.drawn, np.flatnonzero(group)
    columns = [e[name] for name in ("example_id", "question", "source", "rank", "tokens")]
    hovered = [
        # The last one says where the text is.
        [*(_hover_text(column[points[k]]) for column in columns), run.score(points[k]), int(k)]
        for k in places
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": _digits(e["difficulty"][points[places]]),
        "y": _digits(run.influence[points[places]]),
        "customdata": hovered,
        "hovertemplate": "<b>%{customdata[0]}</b> · %{customdata[2]}<br>%{customdata[1]}<br>"
        "difficulty %{x:.2f} · influence %{customdata[5]} · rank %{customdata[3]} · "
        "%{customdata[4]} answer tokens<extra></extra>",
    }


def _layout(run):
    tau_d, m_dot = run.thresholds["difficulty"], run.thresholds["influence"]
    lines = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": tau_d, "x1": tau_d}]
    if m_dot is not None:
        lines.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": m_dot, "y1": m_dot})
    drawn = run.examples["difficulty"][run.drawn], run.influence[run.drawn]
    axes = [
        {"title": {"text": title}, "range": figures.limits(values)}
        for title, values in zip(figures.axis_titles(run.thresholds), drawn, strict=True)
    ]
    corners = [
        {
            "text": f"<b>{figures.quadrant_label(quadrant, run.quadrant_counts)}</b>",
            "xref": "paper",
            "yref": "paper",
            "x": x,
            "y": y,
            "xanchor": "right" if x else "left",
            "yanchor": "top" if y else "bottom",
            "showarrow": False,
        }
        for quadrant, (x, y) in figures.CORNERS.items()
    ]
    return {"xaxis": axes[0], "yaxis": axes[1], "shapes": lines, "annotations": corners}


def _hover_text(cell):
    """The start of a text for a plotly hover label, which reads a little HTML: escaped, and broken
    into lines.
    """
    lines = textwrap.wrap(_cut(str(cell), 120, "…"), 64)
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _cut(text, room, mark):
    return text if len(text) <= room else text[:room] + mark


def _digits(values):
    return [float(f"{value:.6g}") for value in values]


def _curves(losses, name):
    """{arm: (steps, values)} of the steps that have the value."""
    curves: dict[str, tuple[list, list]] = {}
    for entry in losses:
        if name in entry:
            steps, values = curves.setdefault(entry["arm"], ([], []))
            steps.append(entry["step"])
            values.append(entry[name])
    return curves


def _extremes(run):
    """The examples at both ends of influence; ties by example_id; none at both ends."""
    e = run.examples
    ids = e["example_id"]
    order = sorted(range(len(ids)), key=lambda i: (-e["influence"][i], ids[i]))
    ends = {
        "Most influential": order[:EXTREMES],
        "Least influential": order[EXTREMES:][-EXTREMES:][::-1],
    }
    return {title: [_card(run, i) for i in indices] for title, indices in ends.items()}


def _card(run, i):
    e = run.examples
    unit = "nats/token" if run.config.influence.loss_reduction == "mean" else "nats"
    numbers = {
        "influence": run.score(i),
        "difficulty": tables.number(float(e["difficulty"][i]), 2),
        "loss": f"{tables.number(float(e['loss'][i]), 3)} {unit}",
        "answer": f"{tables.number(int(e['tokens'][i]), 0)} tokens",
        "quadrant": f"Q{e['quadrant'][i]}" if run.has_difficulty else "",
        "rank": tables.number(int(e["rank"][i]), 0),
        "why": e["why"][i],
        "source": e["source"][i],
    }
    texts = {name.title(): e[name][i] for name in ("question", "reasoning", "answer")}
    return {
        "id": e["example_id"][i],
        "selected": bool(e["selected"][i]),
        "numbers": {name: value for name, value in numbers.items() if value},
        "texts": {name: text for name, text in texts.items() if text},
        "note": str(run.rows[i].get("note") or ""),
    }
