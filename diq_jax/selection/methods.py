"""Selection methods by name. Each maps the pool's scores to a total order, so that budgets nest.

A method is a function (scores, settings) -> keys: arrays (n,) to sort by, ascending, the first one
first; what still ties goes by example id (UTF-8). LESS is no method of its own: it is `influence`
with influence.direction=less and normalize=cosine.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config
from diq_jax.selection import quadrants


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an order depends on beside the scores.

    Attributes:
        perspective, percentile: the difficulty that DIQ uses, and its threshold.
        seed: of `random`.
        quadrants: in the order in which they fill the budget.
    """

    perspective: str
    percentile: float
    seed: int = 0
    quadrants: tuple[int, ...] = (1, 2, 3, 4)


def _diq(scores, settings, first=None):
    difficulty, influence = scores[settings.perspective], scores["influence"]
    order = sorted(settings.quadrants, key=lambda q: q != first)  # stable
    places = jnp.argsort(jnp.array(order))
    return places[quadrant(scores, settings) - 1], -influence, -difficulty


def _random(scores, settings):
    # The draw runs over the order of ids, so that the order of the file does not matter.
    places = jax.random.permutation(jax.random.key(settings.seed), scores["id_order"].shape[0])
    return (places[scores["id_order"]],)


def _ifd(scores, settings):
    """The highest below 1 first: above, the prompt does not help the answer, and arXiv 2308.12032
    takes it for misaligned. Then those from 1 up, nearest first; then those without any.
    """
    ifd = scores["ifd"]
    none = jnp.isnan(ifd)
    below = ifd < 1
    group = jnp.where(below, 0, jnp.where(none, 2, 1))
    return group, jnp.where(none, 0.0, jnp.where(below, -ifd, ifd))


def _ascending(column, scores, settings):
    return (scores[column],)


def _descending(column, scores, settings):
    return (-scores[column],)


def from_median(scores):
    """How far the log of each perplexity, which is its mean loss, lies from the median: (n,)."""
    return jnp.abs(scores["loss"] - jnp.median(scores["loss"]))


METHODS = {
    "diq": _diq,
    "random": _random,
    "influence": functools.partial(_descending, "influence"),
    **{f"difficulty_{p}": functools.partial(_descending, p) for p in config.PERSPECTIVES},
    # That quadrant first, the others in their order: to compare quadrants with one another.
    **{f"quadrant_{q}": functools.partial(_diq, first=q) for q in (1, 2, 3, 4)},
    "short_answers": functools.partial(_ascending, "answer_tokens"),
    "long_answers": functools.partial(_descending, "answer_tokens"),
    "similarity": functools.partial(_descending, "similarity"),
    "perplexity": functools.partial(_descending, "loss"),
    "middle_perplexity": lambda scores, settings: (from_median(scores),),
    "ifd": _ifd,
    "long_reasoning": functools.partial(_descending, "reasoning_tokens"),
    "k_center": functools.partial(_ascending, "k_center"),
    "facility_location": functools.partial(_ascending, "facility_location"),
}
# The score that a method sorts by, where it is not named as the method is; DIQ's and the quadrants'
# is the perspective.
NEEDS = {
    "random": "id_order",
    **{f"difficulty_{p}": p for p in config.PERSPECTIVES},
    "short_answers": "answer_tokens",
    "long_answers": "answer_tokens",
    "perplexity": "loss",
    "middle_perplexity": "loss",
    "long_reasoning": "reasoning_tokens",
}


def ranks(method: str, scores: Mapping[str, jax.Array], settings: Settings):
    """Ranks from 1 of the pool's examples under a method.

    Args:
        scores: (n,) each: influence, answer_tokens, id_order (int32, the position of each example
            in the order of ids), and what there is of the difficulty perspectives, of loss, ifd,
            similarity, reasoning_tokens (difficulty/model_scores.parquet), and of k_center and
            facility_location (selection/diversity.py).

    Returns:
        (n,) int32, a permutation of 1..n.
    """
    keys = METHODS[method](scores, settings)
    return quadrants.ranks_of(jnp.lexsort((scores["id_order"], *reversed(keys))))


def missing(method: str, scores: Mapping[str, jax.Array], settings: Settings) -> str:
    """The score that a method needs and the pool lacks, or ""."""
    needed = settings.perspective if is_by_quadrant(method) else NEEDS.get(method, method)
    return "" if needed in scores else needed


def id_order(ids: Sequence[str]) -> np.ndarray:
    """(n,) int32 from 0, the place of each id in UTF-8 order: the same on every platform."""
    order = np.argsort(np.array([i.encode() for i in ids], object), kind="stable")
    return np.asarray(quadrants.ranks_of(jnp.asarray(order)) - 1)


def is_by_quadrant(method: str) -> bool:
    return method == "diq" or method.startswith("quadrant_")


def quadrant(scores, settings: Settings):
    """(n,) int8 in 1..4."""
    difficulty, influence = scores[settings.perspective], scores["influence"]
    thresholds = quadrants.thresholds(difficulty, influence, settings.percentile)
    return quadrants.quadrants(difficulty, influence, *thresholds)


def budget(retention_ratio: float, pool: int) -> int:
    """How many examples to keep: the nearest whole number, at least 1."""
    return max(1, int(retention_ratio * pool + 0.5))


def source_limit(source_cap: float, keep: int) -> int:
    """How many examples of one source a budget may hold, at least 1."""
    return max(1, math.floor(source_cap * keep + 1e-9))  # 0.29 * 100 is a little below 29


def capped(ranks: np.ndarray, sources: Sequence[str], keep: int, limit: int):
    """A total order whose first `keep` hold at most `limit` examples of a source.

    Examples are taken by rank; one whose source is full is passed over; all that are not taken
    follow by rank. The fill depends on the budget: orders of two budgets need not nest.

    Returns:
        (ranks (n,) int32, passed over (n,) bool). Fewer than `keep` are taken where the limit
        leaves no more; the caller refuses that.
    """
    taken: dict[str, int] = {}
    places, passed = [], np.zeros(len(ranks), bool)
    for i in np.argsort(ranks):
        if len(places) == keep:
            break
        count = taken.get(sources[i], 0)
        if count == limit:
            passed[i] = True
        else:
            taken[sources[i]] = count + 1
            places.append(i)
    rest = np.ones(len(ranks), bool)
    rest[places] = False
    order = np.lexsort((ranks, rest))
    out = np.empty(len(ranks), np.int32)
    out[order] = np.arange(1, len(ranks) + 1)
    return out, passed


def length_residual(influence: np.ndarray, answer_tokens: np.ndarray, id_order: np.ndarray):
    """What least squares on (1, log answer tokens) leave of the influence, (n,) float32.

    Sums run in the order of ids, so that the order of the file changes no bit.
    """
    order = np.argsort(id_order)
    y, x = influence.astype(np.float64), np.log(answer_tokens.astype(np.float64))
    y, x = y - y[order].mean(), x - x[order].mean()
    spread = np.sum(x[order] ** 2)
    slope = np.sum((x * y)[order]) / spread if spread > 0 else 0.0
    return (y - slope * x).astype(np.float32)
