"""Exact tests on paired outcomes, and their correction for several tests."""

import math
from collections.abc import Mapping


def sign_test(wins: int, losses: int) -> float:
    """Computes the two-sided p-value of `wins` against `losses` where both are equally likely.

    McNemar's exact test is this, of the questions that only one of two models gets right. Without
    any win or loss p is 1.
    """
    count, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusts by Holm's steps: the chance of any false alarm stays below the level read at."""
    ordered = sorted(p_values, key=p_values.__getitem__)
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
