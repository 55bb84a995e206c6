"""Orders in which targets, or clusters of rows, take turns."""

import numpy as np


def take_turns(
    by_target: np.ndarray, id_order: np.ndarray, blocks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Orders rows by turns: each target takes its best remaining row, one after another, until all
    rows are taken (greedy round-robin, arXiv 2602.14696).

    Needs memory for one order of the pool for each target, and at most n Q steps.

    Args:
        by_target: (n, Q), the influence of each row on each target, larger is better.
        id_order: (n,), which breaks ties.
        blocks: (n,) of numbers: all rows of a lower one come before those of a higher one, and in
            each the first target begins. None is one block.

    Returns:
        (places (n,) int32 from 0, the target (n,) int32 that took each row).
    """
    count, targets = by_target.shape
    places, takers = np.zeros(count, np.int32), np.zeros(count, np.int32)
    blocks = np.zeros(count, np.int32) if blocks is None else blocks
    taken, place = np.zeros(count, bool), 0
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        orders = [
            iter(rows[np.lexsort((id_order[rows], -by_target[rows, q]))].tolist())
            for q in range(targets)
        ]
        for turn in range(len(rows)):
            target = turn % targets
            row = next(i for i in orders[target] if not taken[i])
            taken[row] = True
            places[row], takers[row] = place, target
            place += 1
    return places, takers


def cluster_turns(score: np.ndarray, clusters: np.ndarray, id_order: np.ndarray) -> np.ndarray:
    """Counts for each row (n,) how many of its cluster have a higher score: sorted by this and then
    by score, clusters take turns.
    """
    order = np.lexsort((id_order, -score, clusters))
    first = np.concatenate([[True], np.diff(clusters[order]) != 0])
    starts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    out = np.empty(len(order), np.int32)
    out[order] = np.arange(len(order)) - starts
    return out


def percentiles(values: np.ndarray) -> np.ndarray:
    """Turns values into places in (0, 100), equal ones into the middle of their places."""
    ordered = np.sort(values)
    ends = [np.searchsorted(ordered, values, side) for side in ("left", "right")]
    return 50.0 * (ends[0] + ends[1]) / len(values)
