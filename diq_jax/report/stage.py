"""The report stage: what the stages left on disk -> one page and its pictures."""

import json
import pathlib
from typing import Any

from diq_jax.report import detail, outcomes, page
from diq_jax.run import reading, records, stages

STAGES = ("prepare", "difficulty", "influence", "selection", "finetune", "dpo", "evaluate")
PICTURES = (
    "classifier", "comparison", "distributions", "loss", "preferences", "quadrants", "sources",
    "tokens",
)  # fmt: skip
THRESHOLDS = ("difficulty", "influence")
TEXTS = ("example_id", "source", "question", "reasoning", "answer")


def run(context: stages.Context) -> dict[str, Any]:
    """Writes report/report.html and report/*.png, *.svg; for a large pool also report/rows/*.gz.

    Needs prepare, influence and selection. What the other stages would have shown is left out, and
    the page says so. The same artifacts give the same bytes.
    """
    found = load(context)
    drawn, explored = page.pictures(found), page.explore(found)
    page.write(context.path("report"), page.render(found, drawn, explored), drawn, explored)
    return {"rows": len(found.rows), "figures": [f"{name}.png" for name in drawn]}


def summary(context: stages.Context) -> str:
    """Writes the comparison as aligned text, and where to look, for the end of a run."""
    results = _optional(context, "evaluate/results.json")
    parts = [outcomes.headline(results)]
    if results:
        shown = [
            of(results, metrics=metrics)
            for metrics in (outcomes.WRITTEN, outcomes.CHOSEN)
            for of in (outcomes.levels, outcomes.differences)
        ]
        shown.append(outcomes.averages(results))
        parts += [table.plain() for table in shown if table is not None]
    paths = {
        "report": "report/report.html",
        "subset": "selection/selected.jsonl",
        "adapter": "finetune/adapter",
        "model": "finetune/model",
        "dpo": "dpo/adapter",
    }
    there = {
        name: context.path(path) for name, path in paths.items() if context.path(path).exists()
    }
    parts.append("\n".join(f"{name:<8}{path}" for name, path in there.items()))
    return "\n\n".join(part for part in parts if part).replace("−", "-")


def load(context: stages.Context) -> page.ReportData:
    """Reads the artifacts.

    Raises:
        UserError: one of prepare, influence and selection is missing.
    """
    columns, rows = read_examples(context.workdir)
    made = (records.read(context.path(name)) for name in STAGES)
    return page.ReportData(
        config=context.config,
        examples=columns,
        rows=rows,
        thresholds=reading.read_record(
            context.path("selection/thresholds.json"),
            dict.fromkeys(THRESHOLDS, (float, type(None))),
        ),
        results=_optional(context, "evaluate/results.json"),
        classifier=_optional(context, "difficulty/metrics.json"),
        losses=_lines(context, "finetune/losses.jsonl"),
        preferences=_lines(context, "dpo/losses.jsonl"),
        repeats=context.table(detail.PAIRS).to_pylist()
        if context.path(detail.PAIRS).exists()
        else None,
        records=[record for record in made if record and record["status"] == records.DONE],
        detail=detail.load(context, columns["example_id"]),
    )


def read_examples(workdir: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads the columns of page.ReportData.examples, and the rows as they came.

    Raises:
        UserError: one of prepare, influence and selection is missing.
    """
    scores = records.read_table(workdir, "selection/selection.parquet")
    influence = records.read_table(workdir, "influence/influence.parquet")
    # Token ids are most of a large pool's bytes, and not read.
    pool = records.read_table(workdir, "prepare/pool.parquet", (*TEXTS, "row"))
    columns = {name: pool[name].to_pylist() for name in TEXTS}
    columns |= {name: influence[name].to_numpy() for name in ("loss", "tokens")}
    for name in ("difficulty", "influence", "quadrant", "rank", "selected"):
        columns[name] = scores[name].to_numpy()
    reasons = "why" in scores.column_names  # selections of earlier versions give none
    columns["why"] = scores["why"].to_pylist() if reasons else [""] * len(scores)
    return columns, [json.loads(row) for row in pool["row"].to_pylist()]


def _optional(context, name):
    path = context.path(name)
    return reading.read_record(path, {}) if path.exists() else {}


def _lines(context, name):
    path = context.path(name)
    return reading.read_jsonl(path) if path.exists() else []
