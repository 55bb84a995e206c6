"""The report stage: what the stages left on disk -> one page and its pictures."""

from typing import Any

from diq_jax.report import inputs, opinions, outcomes, page, pictures, studies, style
from diq_jax.run import stages

FILES = tuple(f"{name}.{suffix}" for name in pictures.PICTURES for suffix in style.SUFFIXES)


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Returns {name: hash} of what the report reads that no stage has made."""
    return opinions.fingerprints(context) | studies.fingerprints(context.workdir)


def run(context: stages.Context) -> dict[str, Any]:
    """Writes report/report.html and its pictures, *.png, *.svg, *.csv; of a large pool rows/*.gz.

    Needs prepare, influence and selection. What the other stages would have shown is left out, and
    the page says so. The same artifacts give the same bytes.
    """
    found = inputs.load(context)
    drawn, explored = pictures.draw(found), page.explore(found)
    page.write(context.path("report"), page.render(found, drawn, explored), drawn, explored)
    return {"rows": len(found.rows), "figures": [f"{name}.png" for name in drawn]}


def summary(context: stages.Context) -> str:
    """Writes the comparison as aligned text, and where to look, for the end of a run."""
    results = inputs.optional(context, "evaluate/results.json")
    pool = len(context.table(inputs.POOL, "example_id"))
    claim = studies.claim(inputs.study(context), context.config, pool)
    parts = [outcomes.headline(results, claim)]
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
