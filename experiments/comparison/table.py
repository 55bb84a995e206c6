"""The comparison's tables, aligned for the terminal and in Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from comparison import grid, statistics
from diq_jax.report import outcomes, tables


def caption(results: Mapping[str, Any]) -> str:
    """How the numbers are to be read."""
    s = results["settings"]
    removed = f" ({s['removed']} removed by hygiene)" if s["removed"] else ""
    return (
        f"{s['model']}, pool of {s['pool']:,}{removed}, {s['targets']:,} targets, {s['tests']:,} "
        f"test questions of {s['tasks']} tasks; seeds: {s['seeds']}. Means over questions and "
        "seeds with 95 % bootstrap intervals, both resampled (few seeds make them a little too "
        "narrow). - random: paired, same budget, seed and questions; each seed of random is "
        "another draw. p (Holm): its two-sided bootstrap p, corrected over the methods of the "
        "budget; bold is below 0.05. - base: paired with the model as it is. Win / tie / loss: "
        "over tasks x seeds, a win where the 95 % interval of the task's paired difference to "
        "random lies on the better side of 0 (below for losses, above for accuracies), a loss on "
        "the worse; not corrected for their number. Test and target loss count the token that "
        "ends an answer, as training does; subsets of short answers teach where to stop, so read "
        "the loss without it too. A budget of tokens is a share of the pool's tokens."
    )


LEVEL = 0.05  # a corrected p below it is marked
COST = "Cost"
COST_CAPTION = (
    "Cost of one training and of the selection before it: FLOPs by formula, without padding "
    "(comparison/cost.py); seconds as measured, programs compiled. Not counted: prepare, "
    "which all need, evaluation, and the stage selection itself."
)


def plain(results: Mapping[str, Any]) -> str:
    parts = [textwrap.fill(caption(results), 100)]
    parts += [f"{title}\n{t.plain()}" for title, t in _tables(results)]
    parts.append(textwrap.fill(COST_CAPTION, 100))
    return "\n\n".join(parts)


def markdown(results: Mapping[str, Any]) -> str:
    parts = ["# Selection methods compared", caption(results)]
    for title, t in _tables(results):
        lines = [list(t.headers), ["---", *["---:"] * (len(t.headers) - 1)]]
        lines += [[_cell(c) for c in row] for row in t.rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        if title == COST:
            parts.append(COST_CAPTION)
    return "\n\n".join(parts) + "\n"


def prediction(rows: Sequence[tuple[str, float]]) -> str:
    """The FLOPs of a comparison that has not run."""
    total = sum(flops for _, flops in rows)
    lines = [*rows, ("in all", total)]
    shown = [[tables.Cell(name), tables.Cell(f"{flops:.2e}")] for name, flops in lines]
    note = "Without padding, and without the encoder of difficulty, where there is one."
    return f"{tables.Table(['Predicted', 'FLOPs'], shown).plain()}\n{note}"


def _tables(results) -> list[tuple[str, tables.Table]]:
    measured = [m for m in statistics.METRICS if m in results["rows"][0]["metrics"]]
    out = [(outcomes.title(m), _metric(results, m)) for m in measured]
    return [*out, (COST, _cost(results))]


def _metric(results, metric) -> tables.Table:
    """A row for each method and budget: the mean, and the differences to random and to base."""
    _, _, factor, decimals = outcomes.METRICS[metric]

    def measure(value, sign=False, strong=False):
        mean, low, high = (
            tables.number(factor * value[name], decimals, sign) for name in ("mean", "low", "high")
        )
        return tables.Cell(mean, f"{low} to {high}", strong)

    rows = []
    for row in results["rows"]:
        value = row["metrics"][metric]
        versus = value["versus"]
        gap = p = won = to_base = tables.Cell("")
        if value["versus_base"] is not None:
            to_base = measure(value["versus_base"], sign=True)
        if versus is not None:
            gap = measure(versus, sign=True, strong=versus["p_holm"] < LEVEL)
            p = tables.Cell(f"{versus['p_holm']:.3g}")
            won = tables.Cell(f"{versus['wins']} / {versus['ties']} / {versus['losses']}")
        rows.append([*_names(row), measure(value), gap, p, won, to_base])
    headers = [
        "Method", "Budget", "Rows", "Mean (95 %)", "- random (95 %)", "p (Holm)",
        "Win / tie / loss", "- base (95 %)",
    ]  # fmt: skip
    return tables.Table(headers, rows)


def _names(row) -> list[tables.Cell]:
    if not row["budget"]:
        return [tables.Cell(row["method"]), tables.Cell(""), tables.Cell("")]
    of = "" if row["unit"] == "rows" else f" of {row['unit']}"
    budget = tables.Cell(f"{100 * row['budget']:g} %{of}")
    return [tables.Cell(row["method"]), budget, tables.Cell(f"{row['rows']:,}")]


def _cost(results) -> tables.Table:
    full = next((r["cost"]["flops"] for r in results["rows"] if r["method"] == grid.FULL), None)
    rows = []
    for row in results["rows"]:
        if "cost" not in row:
            continue
        cost = row["cost"]
        share = [] if full is None else [f"{100 * cost['flops'] / full:.1f} %"]
        texts = [
            f"{row['steps']:,.0f}", f"{row['answer_tokens'] / row['rows']:.0f}",
            f"{row['first_loss']:.3f}", f"{row['last_loss']:.3f}", f"{cost['training_flops']:.2e}",
            f"{cost['flops']:.2e}", *share, f"{cost['training_seconds']:,.0f}",
            f"{cost['seconds']:,.0f}",
        ]  # fmt: skip
        rows.append([*_names(row), *map(tables.Cell, texts)])
    headers = [
        "Method", "Budget", "Rows", "Steps", "Answer tokens/row", "First loss", "Last loss",
        "Training FLOPs", "FLOPs incl. selection", *(["Of full"] if full is not None else []),
        "Training s", "Seconds incl. selection",
    ]  # fmt: skip
    return tables.Table(headers, rows)


def _cell(cell: tables.Cell) -> str:
    text = f"{cell.text} ({cell.interval})" if cell.interval else cell.text
    return f"**{text}**" if cell.strong else text
