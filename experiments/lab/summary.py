"""What the lab's trainings say: a row for each arm and budget, as CSV and Markdown.

Differences are to `random` at the same budget, paired by seed and question, with intervals over
both (comparison/statistics.py). p-values are of the same resamplings, corrected by Holm over the
arms of a budget.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comparison import statistics
from diq_jax.evaluate import intervals, significance
from diq_jax.report import studies
from lab import arms, trainings

PANELS = {
    "choice_loss_letters": "choice loss, letters (nats)",
    "test_loss_without_end": "test loss without end of turn (nats/token)",
    "held_out_loss": "loss on held-out reasoning (nats/token)",
}
MORE = {"choice_loss": "choice loss, whole options (nats)", "test_loss": "test loss (nats/token)"}
Values = Mapping[str, np.ndarray]


def rows(
    found: Mapping[tuple[str, float], Values],
    base: Values,
    about: Mapping[tuple[str, float], Mapping[str, float]],
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Compares every arm with random and with the base model.

    Args:
        found: {(arm, budget): {metric: (S, Q)}}.
        base: {metric: (1, Q)}.
        about: {(arm, budget): columns that are written beside}.
    """
    out = [{"arm": arms.BASE, "budget": 0.0, "metrics": {m: _mean(base[m]) for m in base}}]
    for (arm, budget), values in found.items():
        row = {"arm": arm, "budget": budget, **about[arm, budget], "metrics": {}}
        for metric in trainings.METRICS:
            cell = _mean(values[metric])
            cell["versus_base"] = _difference(values[metric] - base[metric], samples, seed)
            random = found.get((arms.RANDOM, budget))
            if arm not in (arms.RANDOM, arms.FULL) and random is not None:
                seeds = min(len(values[metric]), len(random[metric]))
                gap = values[metric][:seeds] - random[metric][:seeds]
                cell["versus_random"] = _difference(gap, samples, seed)
            row["metrics"][metric] = cell
        out.append(row)
    _correct(out)
    return out


def _mean(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "sd_of_seeds": float(values.mean(axis=1).std())}


def _difference(gap: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    """Returns the mean of paired differences (S, Q), its 95 % interval and a two-sided p."""
    drawn = statistics.estimates(gap, samples, seed)
    beyond = min(np.mean(drawn[1:] <= 0), np.mean(drawn[1:] >= 0))
    return intervals.summary(drawn) | {"p": float(min(1.0, 2 * max(beyond, 1 / samples)))}


def _correct(found: Sequence[Mapping[str, Any]]) -> None:
    """Adds p_holm to each difference to random: over the arms of a budget, for each metric."""
    for metric in trainings.METRICS:
        for budget in {row["budget"] for row in found}:
            cells = {
                row["arm"]: row["metrics"][metric]["versus_random"]
                for row in found
                if row["budget"] == budget and "versus_random" in row["metrics"][metric]
            }
            adjusted = significance.holm({arm: cell["p"] for arm, cell in cells.items()})
            for arm, cell in cells.items():
                cell["p_holm"] = adjusted[arm]


def lines(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lists the values of each arm, budget and metric, for CSV."""
    made = []
    for row in found:
        about = {k: row.get(k) for k in ("arm", "budget", "rows", "answer_tokens", "seeds")}
        for metric, cell in row["metrics"].items():
            line = about | {"metric": metric} | {k: cell[k] for k in ("mean", "sd_of_seeds")}
            for other in ("random", "base"):
                versus = cell.get(f"versus_{other}", {})
                line |= {f"{other}_{name}": value for name, value in versus.items()}
            made.append(line)
    return made


def as_markdown(found: Sequence[Mapping[str, Any]], title: str) -> str:
    """Writes a table for each budget, best choice loss first; * where Holm's p is below 0.05."""
    lines = [title, ""]
    for budget in sorted({row["budget"] for row in found}):
        mine = [row for row in found if row["budget"] == budget]
        mine.sort(key=lambda row: row["metrics"]["choice_loss_letters"]["mean"])
        lines += [f"**{100 * budget:g} %**" if budget else "**base**", ""]
        heads = ["arm", "rows", "answer tokens", *PANELS.values(), *MORE.values(), "accuracy (%)"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in mine:
            cells = [_cell(row["metrics"][m]) for m in (*PANELS, *MORE)]
            about = [f"{row.get(name, 0):,.0f}" for name in ("rows", "answer_tokens")]
            accuracy = f"{100 * row['metrics']['accuracy_norm']['mean']:.1f}"
            lines.append(f"| {' | '.join([row['arm'], *about, *cells, accuracy])} |")
        lines.append("")
    return "\n".join(lines)


def _cell(cell: Mapping[str, Any]) -> str:
    versus = cell.get("versus_random")
    return f"{cell['mean']:.4f}" if versus is None else difference(versus, 4)


def difference(cell: Mapping[str, float], digits: int) -> str:
    """Writes a difference with its interval; * where Holm's p is below studies.SURE."""
    mean, low, high = (f"{cell[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}){'*' if cell.get('p_holm', 1) < studies.SURE else ''}"
