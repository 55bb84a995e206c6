"""Selection methods by name. Each maps the pool's scores to a total order, so that budgets nest."""

import functools

import jax
import jax.numpy as jnp

from diq_jax.common import config
from diq_jax.selection import quadrants


def _diq(scores, perspective, percentile, seed):
    difficulty, influence = scores[perspective], scores["influence"]
    tau_d, m_dot = quadrants.thresholds(difficulty, influence, percentile)
    quadrant = quadrants.quadrants(difficulty, influence, tau_d, m_dot)
    return quadrants.diq_ranks(quadrant, difficulty, influence, scores["id_order"])


def _random(scores, perspective, percentile, seed):
    # The draw runs over the order of ids, so that the order of the file does not matter.
    places = jax.random.permutation(jax.random.key(seed), scores["id_order"].shape[0])
    return (places[scores["id_order"]] + 1).astype(jnp.int32)


def _descending(column, scores, perspective, percentile, seed):
    return quadrants.ranks_of(jnp.lexsort((scores["id_order"], -scores[column])))


METHODS = {
    "diq": _diq,
    "random": _random,
    "influence": functools.partial(_descending, "influence"),
} | {f"difficulty_{p}": functools.partial(_descending, p) for p in config.PERSPECTIVES}


def ranks(method: str, scores, perspective: str, percentile: float, seed: int):
    """Ranks from 1 of the pool's examples under a method.

    Args:
        scores: influence and the three difficulty perspectives, (n,) float32 each, and id_order,
            (n,) int32, the position of each example in the order of ids.
        perspective, percentile: the difficulty that DIQ uses, and its threshold.
        seed: of `random`.

    Returns:
        (n,) int32, a permutation of 1..n.
    """
    return METHODS[method](scores, perspective, percentile, seed)


def budget(retention_ratio: float, pool: int) -> int:
    """How many examples to keep: the nearest whole number, at least 1."""
    return max(1, int(retention_ratio * pool + 0.5))
