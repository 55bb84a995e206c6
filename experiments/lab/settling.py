"""How rankings settle with more targets: the mathematics of measure_targets.py."""

from collections.abc import Sequence

import numpy as np

from diq_jax import stats

MEASURES = {"spearman": "Spearman of the rankings", "overlap": "share of the chosen rows in both"}


def draw(tasks: Sequence[str], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws targets without replacement, as evenly over tasks as their numbers allow: (size,)."""
    left = {task: list(rng.permutation(np.flatnonzero(np.array(tasks) == task)))
            for task in sorted(set(tasks))}  # fmt: skip
    found: list[int] = []
    while len(found) < size:
        # Of the last turn, which not all tasks fit, the tasks are drawn.
        for task in rng.permutation(sorted(t for t in left if left[t])):
            if len(found) < size:
                found.append(int(left[str(task)].pop()))
    return np.array(found)


def agreement(left: np.ndarray, right: np.ndarray, keep: int) -> tuple[float, float]:
    """Compares two scores (n,): Spearman, and the share of the `keep` best of one in the other."""
    best = [set(np.argsort(-x, kind="stable")[:keep].tolist()) for x in (left, right)]
    return stats.spearman(left, right), len(best[0] & best[1]) / keep


def study(
    by_target: np.ndarray, tasks: Sequence[str], sizes: Sequence[int], draws: int, keep: int,
    seed: int,
) -> list[dict]:  # fmt: skip
    """Compares sets of targets with all of them, and with others.

    Args:
        by_target: (n, Q), the influence of each row on each target.

    Returns:
        A row for each size and kind (all, apart): the mean of each of MEASURES over draws, and the
        ends of the middle 95 %.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    whole, rows = by_target.mean(axis=1), []
    for size in sizes:
        found: dict[str, list] = {"all": [], "apart": []}
        for _ in range(draws):
            drawn = draw(tasks, min(2 * size, len(tasks)), rng)
            own = by_target[:, drawn[:size]].mean(axis=1)
            found["all"].append(agreement(own, whole, keep))
            if 2 * size <= len(tasks):
                other = by_target[:, drawn[size:]].mean(axis=1)
                found["apart"].append(agreement(own, other, keep))
        for kind, values in found.items():
            if values:
                table = np.array(values)
                ends = np.percentile(table, [2.5, 97.5], axis=0)
                rows.append({"size": size, "kind": kind} | {
                    name: {"mean": float(m), "low": float(lo), "high": float(hi)}
                    for name, m, lo, hi in zip(MEASURES, table.mean(axis=0), *ends, strict=True)
                })  # fmt: skip
    return rows
