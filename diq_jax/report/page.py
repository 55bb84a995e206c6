"""One run as one HTML file that needs nothing else: no network, no clock, the same bytes again."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

from diq_jax import config
from diq_jax.report import classifier, detail, explorer, figures, outcomes, style, tables
from diq_jax.run import artifacts

MOST_POINTS = 4000  # of the pictures
PREFERENCES = {"loss": "loss (nats)", "margin": "margin (nats)", "accuracy": "pairs in order"}
OWN_COLUMNS = ("id", "source", "question", "reasoning", "answer", "input_ids", "labels")
EXTREMES = 5  # examples shown at each end


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
    detail: detail.Detail

    @property
    def has_difficulty(self) -> bool:
        """Tells whether every example has a difficulty."""
        return bool(np.isfinite(self.examples["difficulty"]).all())

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """Returns the influence as it is drawn: an outlier stands at the fence."""
        return np.clip(self.examples["influence"], *figures.fences(self.examples["influence"]))

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Returns the indices of the examples in the scatters."""
        return figures.shown(self.examples["selected"], self.examples["rank"], MOST_POINTS)

    @functools.cached_property
    def _decimals(self):
        return tables.decimals_for(self.influence)

    def score(self, i: int) -> str:
        """Writes the influence of example i, in as many decimals as all of them."""
        return tables.number(float(self.examples["influence"][i]), self._decimals)

    @property
    def quadrant_counts(self) -> dict[int, tuple[int, int]]:
        """Returns {quadrant: (examples, selected ones)}."""
        quadrant, selected = self.examples["quadrant"], self.examples["selected"]
        return {
            q: (int(np.sum(quadrant == q)), int(np.sum(selected & (quadrant == q))))
            for q in figures.QUADRANTS
        }


def pictures(run: ReportData) -> dict[str, style.Picture]:
    """Draws {name: picture}, without those that this run has no data for."""
    e, points = run.examples, run.drawn
    x, y, chosen = e["difficulty"][points], run.influence[points], e["selected"][points]
    rho = tables.correlation(e["influence"], e["tokens"])
    out = {"tokens": style.render(figures.tokens, e["tokens"][points], y, chosen, rho)}
    panels = [(figures.INFLUENCE, run.influence, run.thresholds["influence"])]
    if run.has_difficulty:
        scatter = (x, y, chosen, run.quadrant_counts, run.thresholds)
        out["quadrants"] = style.render(figures.quadrants, *scatter)
        panels.insert(0, (figures.DIFFICULTY, e["difficulty"], run.thresholds["difficulty"]))
    out["distributions"] = style.render(figures.distributions, panels, e["selected"])
    shares = tables.group_shares(e["source"], e["selected"])
    if len(shares) > 1:
        names, pool, picked = zip(*shares, strict=True)
        percent = (100 * np.array(n) / max(1, sum(n)) for n in (pool, picked))
        out["sources"] = style.render(figures.sources, names, *percent)
    if run.results:
        out["comparison"] = style.render(figures.comparison, outcomes.panels(run.results))
    if run.losses:
        curves = (_curves(run.losses, name) for name in ("loss", "target_loss"))
        out["loss"] = style.render(figures.loss, *curves)
    if run.preferences:
        steps = [entry["step"] for entry in run.preferences]
        curves = {
            label: [entry[name] for entry in run.preferences] for name, label in PREFERENCES.items()
        }
        out["preferences"] = style.render(figures.preferences, steps, curves)
    perspectives = classifier.panels(run.classifier)
    if perspectives:
        out["classifier"] = style.render(classifier.draw, perspectives)
    return dict(sorted(out.items()))


def render(run: ReportData, drawn: Mapping[str, style.Picture], explored: explorer.Explorer) -> str:
    """Writes the page. Everything from the data is escaped: HTML by jinja, JSON by the explorer."""
    e = run.examples
    cfg, selected = run.config, e["selected"]
    by_column = tables.group_columns(run.rows, OWN_COLUMNS)
    chosen = {e["example_id"][i] for i in np.flatnonzero(selected)}
    return fill(
        "report.html",
        drawn,
        explored,
        config=cfg,
        examples=len(selected),
        selected=int(selected.sum()),
        headline=outcomes.headline(run.results),
        cuts=None not in run.thresholds.values(),
        outliers=int(np.sum(run.influence != e["influence"])),
        comparisons=_comparisons(run.results) if run.results else [],
        averages=outcomes.averages(run.results) if run.results else None,
        tests=run.results.get("tests"),
        tasks=[
            (f"{task} ({n} questions)", outcomes.levels(run.results, task, metrics))
            for task, n in (outcomes.task_names(run.results) if run.results else {}).items()
            for metrics in (outcomes.WRITTEN, outcomes.CHOSEN)
        ],
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


def fill(
    template: str, drawn: Mapping[str, style.Picture], explored: explorer.Explorer, **values: Any
) -> str:
    """Fills a template of this folder that extends base.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    svg = {name: markupsafe.Markup(picture.svg) for name, picture in drawn.items()}
    return environment.get_template(template).render(svg=svg, explorer=explored, **values)


def write(
    folder: pathlib.Path,
    text: str,
    drawn: Mapping[str, style.Picture],
    explored: explorer.Explorer,
) -> None:
    """Writes report.html, its pictures as *.png and *.svg, and for a large pool rows/*.gz."""
    files = {f"rows/{name}.gz": blob for name, blob in explored.files.items()}
    for name, picture in drawn.items():
        files |= {f"{name}.png": picture.png, f"{name}.svg": picture.standalone.encode()}
    for name, blob in (files | {"report.html": text.encode()}).items():
        with artifacts.atomic(folder / name) as temporary:
            temporary.write_bytes(blob)


def _comparisons(results):
    """Lists (levels, paired differences or None, caption) of the two sets of metrics."""
    captions = {
        "Losses: lower is better.": outcomes.WRITTEN,
        "The right option's share among the options: choice loss is minus its log (by the whole "
        "options, and by the letters alone), Brier score and margin are by the whole options. "
        "Lower is better but for the margin.": outcomes.CHOSEN,
    }
    for caption, metrics in captions.items():
        if (levels := outcomes.levels(results, metrics=metrics)) is not None:
            yield levels, outcomes.differences(results, metrics), caption


def _groups(title, values, selected):
    return tables.groups(title, tables.group_shares(values, selected))


def _quadrant_table(run):
    shares = [
        (f"Q{q} {figures.QUADRANTS[q]}", *counts) for q, counts in run.quadrant_counts.items()
    ]
    return tables.groups("Quadrant", shares)


def explore(run: ReportData) -> explorer.Explorer:
    """Packs all rows for the explorer."""
    e, cfg = run.examples, run.config
    return explorer.make(
        e,
        run.rows,
        tables.group_columns(run.rows, OWN_COLUMNS),
        run.detail,
        {
            "method": cfg.selection.method,
            "quadrant_order": cfg.selection.quadrants,
            "thresholds": {name: run.thresholds[name] for name in ("difficulty", "influence")},
        },
    )


def _curves(losses, name):
    """Returns {arm: (steps, values)} of the steps that have the value."""
    curves: dict[str, tuple[list, list]] = {}
    for entry in losses:
        if name in entry:
            steps, values = curves.setdefault(entry["arm"], ([], []))
            steps.append(entry["step"])
            values.append(entry[name])
    return curves


def _extremes(run):
    """Finds the examples at both ends of influence; ties by example_id; none at both ends."""
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
