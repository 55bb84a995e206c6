"""One run as one HTML file that needs nothing else: no network, no clock, the same bytes again."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np

from diq_jax.report import explorer, figures, inputs, opinions, outcomes, studies, style, tables
from diq_jax.run import artifacts


def render(
    run: inputs.ReportData, drawn: Mapping[str, style.Picture], explored: explorer.Explorer
) -> str:
    """Writes the page. Everything from the data is escaped: HTML by jinja, JSON by the explorer."""
    e = run.examples
    cfg, selected = run.config, e["selected"]
    chosen = {e["example_id"][i] for i in np.flatnonzero(selected)}
    return fill(
        "report.html",
        drawn,
        explored,
        config=cfg,
        examples=len(selected),
        selected=int(selected.sum()),
        headline=outcomes.headline(run.results, studies.claim(run.study, cfg, len(selected))),
        cuts=None not in (run.thresholds["difficulty"], run.thresholds["influence"]),
        outliers=int(np.sum(run.influence != e["influence"])),
        comparisons=_comparisons(run.results) if run.results else [],
        averages=outcomes.averages(run.results) if run.results else None,
        study=run.study,
        studied=studies.tabled(run.study) if run.study else [],
        tests=run.results.get("tests"),
        tasks=[
            (f"{task} ({n} questions)", outcomes.levels(run.results, task, metrics))
            for task, n in (outcomes.task_names(run.results) if run.results else {}).items()
            for metrics in (outcomes.WRITTEN, outcomes.CHOSEN)
        ],
        by_source=_groups("Source", e["source"], selected),
        by_quadrant=_quadrant_table(run) if run.has_difficulty else None,
        by_column={name: _groups(name, values, selected) for name, values in run.groups.items()},
        rho_tokens=tables.correlation(e["influence"], e["tokens"]),
        rho_loss=tables.correlation(e["influence"], e["loss"]),
        repeats=None if run.repeats is None else tables.repeats(run.repeats, chosen),
        lengths=tables.length_means(e["tokens"], selected),
        trained=bool(run.losses),
        classifier=tables.difficulty(run.classifier),
        disagreements={
            name: values["apart"]
            for name, values in run.classifier.get("perspectives", {}).items()
            if values.get("apart")
        },
        classifier_rows=run.classifier.get("rows"),
        classifier_folds=run.classifier.get("folds"),
        opinions=run.opinions,
        judged=opinions.judged(run.opinions.judge) if run.opinions.judge else [],
        confusion=opinions.confusion(run.opinions.verdicts),
        apart=opinions.apart(run.opinions),
        annotated=opinions.annotated(run.opinions.annotator) if run.opinions.annotator else None,
        cost=tables.cost(run.records),
        versions=tables.versions(run.records),
        settings=tables.settings(cfg),
    )


def fill(
    template: str,
    drawn: Mapping[str, style.Picture],
    explored: explorer.Explorer | None,
    **values: Any,
) -> str:
    """Fills a template of this folder that extends base.html, without an explorer for None."""
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
    explored: explorer.Explorer | None,
) -> None:
    """Writes report.html, its pictures (style.SUFFIXES), and for a large pool rows/*.gz."""
    beside = ((f"rows/{name}.gz", blob) for name, blob in (explored.files if explored else ()))
    shown = (
        (f"{name}.{suffix}", blob)
        for name, picture in drawn.items()
        for suffix, blob in picture.files.items()
    )
    for name, blob in itertools.chain(beside, shown, [("report.html", text.encode())]):
        with artifacts.atomic(folder / name) as temporary:
            temporary.write_bytes(blob)


def write_studies(folder: pathlib.Path, found: Sequence[studies.Study]) -> None:
    """Writes report.html of methods compared by training, and a picture of each study."""
    names = [f"study-{i}" for i in range(1, len(found) + 1)]
    pictures = {name: studies.picture(study) for name, study in zip(names, found, strict=True)}
    drawn = {name: made for name, made in pictures.items() if made is not None}
    shown = [(name, s, studies.tabled(s)) for name, s in zip(names, found, strict=True)]
    write(folder, fill("studies.html", drawn, None, studies=shown), drawn, None)


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


def explore(run: inputs.ReportData) -> explorer.Explorer:
    """Packs all rows for the explorer."""
    e, cfg = run.examples, run.config
    return explorer.make(
        e,
        run.rows,
        run.groups,
        run.detail,
        {
            "method": cfg.selection.method,
            "quadrant_order": cfg.selection.quadrants,
            "thresholds": {name: run.thresholds[name] for name in ("difficulty", "influence")},
        },
    )
