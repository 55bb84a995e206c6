"""What the cells say: means with two-level intervals, and paired differences to the reference.

Dims: S seeds, Q questions (or targets), B bootstrap samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax.evaluate import intervals, significance

METRICS = (*intervals.METRICS, "target_loss")


def draws(seeds: int, questions: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws weights of seeds (1 + B, S) and questions (1 + B, Q), with replacement after 1/n.

    With one seed they are intervals.estimates' draws.
    """
    rng = {name: np.random.Generator(np.random.PCG64(s)) for name, s in
           (("questions", seed), ("seeds", [seed, 1]))}  # fmt: skip
    out = []
    for name, n in (("seeds", seeds), ("questions", questions)):
        rows = [np.ones(n)]
        rows += [np.bincount(rng[name].integers(0, n, n), minlength=n) for _ in range(samples)]
        out.append(np.stack(rows) / n)
    return out[0], out[1]


def estimates(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """The mean of values (S, Q), then its value in each resampling of both axes: (1 + B,).

    All values of one shape are resampled alike, so that a difference is paired.
    """
    seeds, questions = values.shape
    by_seed, by_question = draws(seeds, questions, samples, seed)
    return np.sum((by_seed @ values) * by_question, axis=1)


def p_value(drawn: np.ndarray) -> float:
    """Computes a two-sided bootstrap p of (1 + B,) `estimates`, at least 2 / (1 + B)."""
    below, above = np.sum(drawn[1:] <= 0), np.sum(drawn[1:] >= 0)
    return float(min(1.0, 2 * (1 + min(below, above)) / len(drawn)))


def correct(rows: Sequence[dict[str, Any]]) -> None:
    """Adds p_holm to each difference: Holm's correction over a budget's methods, by metric."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        for metric, value in row["metrics"].items():
            if value["versus"] is not None:
                key = row["budget"], row["unit"], metric
                groups.setdefault(key, {})[row["method"]] = value["versus"]
    for group in groups.values():
        adjusted = significance.holm({name: versus["p"] for name, versus in group.items()})
        for name, versus in group.items():
            versus["p_holm"] = adjusted[name]


def outcomes(
    differences: np.ndarray, tasks: Sequence[str], lower: bool, samples: int, seed: int
) -> dict[str, int]:
    """Counts wins, ties and losses over tasks x seeds, by 95 % intervals that leave 0 out.

    A task of one question has no interval and counts as a tie.
    """
    labels, better = np.asarray(tasks), -1 if lower else 1
    counts = {"wins": 0, "ties": 0, "losses": 0}
    for task in sorted(set(tasks)):
        mine = better * differences[:, labels == task]
        drawn = intervals.estimates(mine.T, samples, seed)
        low, high = np.percentile(drawn[1:], [2.5, 97.5], axis=0)
        if mine.shape[1] < 2:
            low, high = np.zeros((2, len(mine)))
        counts["wins"] += int(np.sum(low > 0))
        counts["losses"] += int(np.sum(high < 0))
        counts["ties"] += int(np.sum((low <= 0) & (high >= 0)))
    return counts


def compare(
    found: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray] | None,
    tasks: Mapping[str, Sequence[str]],
    samples: int,
    seed: int,
    base: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns {metric: {mean, low, high, by_seed, versus, versus_base}}, the last two or None.

    versus: {mean, low, high, p, wins, ties, losses}; versus_base: {mean, low, high}.

    Args:
        found: {metric: (S, Q)}; reference the same of what it is compared with.
        base: {metric: (1, Q)} of the base model, which no seed moves.
        tasks: {metric: the task of each question}.
    """
    out = {}
    for metric, values in found.items():
        drawn = estimates(values, samples, seed)
        out[metric] = intervals.summary(drawn) | {"by_seed": values.mean(axis=1).tolist()}
        out[metric]["versus"] = None
        if reference is not None:
            gap = values - reference[metric]
            lower = metric not in intervals.HIGHER_IS_BETTER
            drawn = estimates(gap, samples, seed)
            won = outcomes(gap, tasks[metric], lower, samples, seed)
            out[metric]["versus"] = intervals.summary(drawn) | {"p": p_value(drawn)} | won
        out[metric]["versus_base"] = None
        if base is not None:
            drawn = estimates(values - base[metric], samples, seed)
            out[metric]["versus_base"] = intervals.summary(drawn)
    return out
