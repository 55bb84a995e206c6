"""The report stage: what the stages left on disk -> one page and its pictures."""

import json
from typing import Any

import pyarrow.parquet as pq

from diq_jax.common import artifacts, stages
from diq_jax.report import page, tables

STAGES = ("prepare", "difficulty", "influence", "selection", "finetune", "dpo", "evaluate")
TEXTS = ("example_id", "source", "question", "reasoning", "answer")


def run(context: stages.Context) -> dict[str, Any]:
    """Writes report/report.html and report/*.png.

    Needs prepare, influence and selection. What the other stages would have shown is left out, and
    the page says so. The same artifacts give the same bytes.
    """
    found = load(context)
    drawn = page.pictures(found)
    for name, picture in drawn.items():
        with artifacts.atomic(context.path(f"report/{name}.png")) as temporary:
            temporary.write_bytes(picture.png)
    artifacts.write_text(context.path("report/report.html"), page.render(found, drawn))
    return {"rows": len(found.rows), "figures": [f"{name}.png" for name in drawn]}


def summary(context: stages.Context) -> str:
    """The comparison as aligned text, and where to look, for the end of a run."""
    results = _optional(context, "evaluate/results.json")
    parts = [tables.headline(results)]
    if results:
        shown = tables.levels(results), tables.differences(results), tables.averages(results)
        parts += [table.plain() for table in shown if table is not None and table.rows]
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


def load(context: stages.Context) -> page.Run:
    """Reads the artifacts.

    Raises:
        UserError: one of prepare, influence and selection is missing.
    """
    scores = artifacts.read_table(context.path("selection/selection.parquet"))
    influence = artifacts.read_table(context.path("influence/influence.parquet"))
    # Token ids are most of a large pool's bytes, and not read.
    pool = pq.read_table(context.path("prepare/pool.parquet"), columns=[*TEXTS, "row"])
    columns = {name: pool[name].to_pylist() for name in TEXTS}
    columns |= {name: influence[name].to_numpy() for name in ("loss", "tokens")}
    for name in ("difficulty", "influence", "quadrant", "rank", "selected"):
        columns[name] = scores[name].to_numpy()
    reasons = "why" in scores.column_names  # selections of earlier versions give none
    columns["why"] = scores["why"].to_pylist() if reasons else [""] * len(scores)
    pairs = context.path("selection/hygiene.parquet")
    records = (_optional(context, f"{name}/stage.json") for name in STAGES)
    return page.Run(
        config=context.config,
        examples=columns,
        rows=[json.loads(row) for row in pool["row"].to_pylist()],
        thresholds=artifacts.read_json(context.path("selection/thresholds.json")),
        results=_optional(context, "evaluate/results.json"),
        classifier=_optional(context, "difficulty/metrics.json"),
        losses=_lines(context, "finetune/losses.jsonl"),
        preferences=_lines(context, "dpo/losses.jsonl"),
        repeats=artifacts.read_table(pairs).to_pylist() if pairs.exists() else None,
        records=[record for record in records if record.get("status") == "done"],
    )


def _optional(context, name):
    path = context.path(name)
    return artifacts.read_json(path) if path.exists() else {}


def _lines(context, name):
    path = context.path(name)
    return artifacts.read_jsonl(path) if path.exists() else []
