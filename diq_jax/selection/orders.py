"""How selection methods order a pool, and what they say of a row (methods.METHODS is the table)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax.selection import quadrants

Scores = Mapping[str, Any]  # {name: (n,) array, of by_target (n, Q)}: see methods.ranks
PERSPECTIVE = "the perspective"  # stands for the one that difficulty.perspective names


@dataclasses.dataclass(frozen=True)
class OrderSettings:
    """Holds what an order depends on beside the scores.

    Attributes:
        perspective, percentile: the difficulty that DIQ uses, and its threshold.
        seed: of `random`.
        quadrants: in the order in which they fill the budget.
        residual: whether the influence is what its regression on length leaves of it.
        ratio: the share of the pool to keep, which moves the band of `adaptive`.
        band: its center at 1 % of the pool, its rise for ten times as much, and its width, in
            percentiles of the difficulty.
        groups: the names of the targets of by_target.
    """

    perspective: str = "overall"
    percentile: float = 50.0
    seed: int = 0
    quadrants: tuple[int, ...] = (1, 2, 3, 4)
    residual: bool = False
    ratio: float = 0.01
    band: tuple[float, float, float] = (50.0, 25.0, 50.0)
    groups: tuple[str, ...] = ()

    @property
    def edges(self) -> tuple[float, float]:
        """Returns the band of `adaptive`, lowest and highest percentile."""
        center, rise, width = self.band
        center = min(100.0, max(0.0, center + rise * math.log10(100 * self.ratio)))
        return center - width / 2, center + width / 2


@dataclasses.dataclass(frozen=True)
class Method:
    """Describes one way to order a pool.

    Attributes:
        reads: names of the scores that it needs.
        keys: (scores, settings) -> arrays (n,) to sort by, ascending, the first one first; what
            still ties goes by example id (UTF-8).
        why: what it saw in a row, as a format of the row's scores, of `place` ("place 4 of 3,151"),
            of `measure` (the name of the influence) and of what `sees` gives.
        sees: (scores, settings) -> {name: n values} for `why`; these scores also hold `rank`.
        nests: whether the order is the same for every budget, so that a budget's rows lie inside a
            larger one's.
    """

    reads: tuple[str, ...]
    keys: Callable[[Scores, OrderSettings], tuple]
    why: str
    sees: Callable[[Scores, OrderSettings], Scores] = lambda scores, settings: {}
    nests: bool = True


def highest(score: str, why: str, **more: Any) -> Method:
    """Returns the method that sorts by a score, the highest first."""
    return Method((score,), lambda scores, _: (-scores[score],), why, **more)


def lowest(score: str, why: str, **more: Any) -> Method:
    """Returns the method that sorts by a score, the lowest first."""
    return Method((score,), lambda scores, _: (scores[score],), why, **more)


def diq(first: int | None = None, perspective: str = PERSPECTIVE) -> Method:
    """Returns DIQ, or DIQ with one quadrant first, or DIQ by a certain perspective."""

    def of(settings):
        if perspective == PERSPECTIVE:
            return settings
        return dataclasses.replace(settings, perspective=perspective)

    def keys(scores, settings):
        settings = of(settings)
        quadrant, _ = quadrants.of(scores, settings)
        places = _filled(quadrant, settings, first)
        return places, -scores["influence"], -scores[settings.perspective]

    def sees(scores, settings):
        return see_quadrant(scores, of(settings))

    return Method((perspective, "influence"), keys, "{seen}", sees)


def _filled(quadrant, settings, first=None):
    """Says of each row when its quadrant is filled, from 0."""
    order = sorted(settings.quadrants, key=lambda q: q != first)  # stable
    return jnp.argsort(jnp.array(order))[quadrant - 1]


def _turns(scores, settings, inside: bool):
    """Returns the places and the takers of turns, in all of the pool or quadrant by quadrant."""
    blocks = _filled(quadrants.of(scores, settings)[0], settings) if inside else None
    by_target, id_order = np.asarray(scores["by_target"]), np.asarray(scores["id_order"])
    return take_turns(by_target, id_order, None if blocks is None else np.asarray(blocks))


def round_robin(inside: bool) -> Method:
    """Returns the greedy round-robin of the targets, or that inside of DIQ's quadrants."""

    def keys(scores, settings):
        return (jnp.asarray(_turns(scores, settings, inside)[0]),)

    def sees(scores, settings):
        _, takers = _turns(scores, settings, inside)
        names = settings.groups or [str(q + 1) for q in range(scores["by_target"].shape[1])]
        values = scores["by_target"][np.arange(len(takers)), takers]
        seen = [
            f"taken by target {names[q]!r}, {measure} on it {value:.3g}"
            for q, value, measure in zip(takers, values, scores["measure"], strict=True)
        ]
        if inside:
            marks = np.asarray(quadrants.of(scores, settings)[0])
            seen = [f"Q{q}: {text}" for q, text in zip(marks, seen, strict=True)]
        return {"seen": seen}

    reads = ((PERSPECTIVE, "influence") if inside else ()) + ("by_target",)
    return Method(reads, keys, "{seen}, {place}", sees)


def _band(scores: Scores, settings: OrderSettings) -> tuple:
    """Returns the percentiles of the difficulty, and quadrants with `in the band` as difficult."""
    places = percentiles(np.asarray(scores[settings.perspective]))
    low, high = settings.edges
    outside = jnp.asarray(np.abs(places - (low + high) / 2) > (high - low) / 2)
    influence = scores["influence"]
    return places, quadrants.quadrants(~outside, influence, True, jnp.median(influence))


def adaptive(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts as DIQ, with a band of difficulty that moves with the budget in the place of high."""
    _, quadrant = _band(scores, settings)
    return _filled(quadrant, settings), -scores["influence"], -scores[settings.perspective]


def see_band(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says whether the difficulty of a row lies in the band of the budget."""
    places, quadrant = _band(scores, settings)
    low, high = settings.edges
    ends = f"{max(low, 0):.0f} to {min(high, 100):.0f}"
    band = f"the band {ends} of a budget of {100 * settings.ratio:g} %"
    seen = [
        f"difficulty at percentile {p:.0f}, {'in' if q in (1, 3) else 'outside'} {band}, {measure} "
        f"{value:.3g}"
        for p, q, value, measure in zip(
            places, np.asarray(quadrant), scores["influence"], scores["measure"], strict=True
        )
    ]
    return {"seen": seen}


def difficulty_length(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts by the mean of two percentiles, of difficulty and of reasoning length."""
    return (-jnp.asarray(_joint(scores, settings)),)


def _joint(scores: Scores, settings: OrderSettings) -> np.ndarray:
    both = (np.asarray(scores[name]) for name in (settings.perspective, "reasoning_tokens"))
    return np.mean([percentiles(values) for values in both], axis=0)


def see_joint(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says the difficulty of a row, its reasoning tokens and the mean of their percentiles."""
    level, joint = scores[settings.perspective], _joint(scores, settings)
    return {
        "seen": [
            f"difficulty {d:.3g} and {n:,} reasoning tokens, mean percentile {p:.0f}"
            for d, n, p in zip(level, scores["reasoning_tokens"], joint, strict=True)
        ]
    }


def temp(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts so that clusters take turns, each with its highest loss."""
    columns = (np.asarray(scores[name]) for name in ("temp", "temp_cluster", "id_order"))
    return jnp.asarray(cluster_turns(*columns)), -scores["temp"]


def see_quadrant(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says on which side of both thresholds a row lies, and its place in its quadrant."""
    quadrant, (tau_d, m_dot) = quadrants.of(scores, settings)
    quadrant, place, size = np.asarray(quadrant), np.zeros(len(quadrant), int), np.zeros(5, int)
    for i in np.argsort(scores["rank"]):
        size[quadrant[i]] += 1
        place[i] = size[quadrant[i]]
    seen = [
        f"Q{q}: difficulty {against(d, float(tau_d))}, {measure} {against(v, float(m_dot))}; "
        f"place {k:,} of {size[q]:,} in Q{q}"
        for q, d, v, k, measure in zip(
            quadrant, scores[settings.perspective], scores["influence"], place, scores["measure"],
            strict=True,
        )
    ]  # fmt: skip
    return {"seen": seen}


def random(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts by a draw that depends on the seed."""
    # The draw runs over the order of ids, so that the order of the file does not matter.
    places = jax.random.permutation(jax.random.key(settings.seed), scores["id_order"].shape[0])
    return (places[scores["id_order"]],)


def ifd(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts the highest below 1 first (arXiv 2308.12032), the nearest above, the rest.

    Above 1 the prompt does not help the answer, which that paper takes for misaligned.
    """
    ifd = scores["ifd"]
    none = jnp.isnan(ifd)
    below = ifd < 1
    group = jnp.where(below, 0, jnp.where(none, 2, 1))
    return group, jnp.where(none, 0.0, jnp.where(below, -ifd, ifd))


def see_ifd(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says the IFD of a row, and whether it is below 1."""
    none = "no ifd (too short an answer)"
    return {"seen": [none if np.isnan(x) else f"ifd {against(x, 1.0)}" for x in scores["ifd"]]}


def from_median(scores: Scores, settings: OrderSettings) -> tuple:
    """Sorts by how far the log of each perplexity, which is its mean loss, lies from the median."""
    return (jnp.abs(scores["loss"] - jnp.median(scores["loss"])),)


def see_median(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says how far the log perplexity of a row lies from the median."""
    away = np.asarray(from_median(scores, settings)[0])
    return {"away": away, "median": [np.median(scores["loss"])] * len(away)}


def see_distance(scores: Scores, settings: OrderSettings) -> dict[str, Any]:
    """Says how far the gradient of a row was from those before it."""
    first, then = "nearest to the mean gradient", "at cosine distance {:.3g} from all before it"
    return {"seen": [first if np.isnan(x) else then.format(x) for x in scores["k_center_distance"]]}


def against(value: float, threshold: float) -> str:
    """Writes "value >= threshold" or "value < threshold", with as many digits as show it."""
    high = bool(value >= threshold)
    for digits in range(3, 10):
        left, right = (f"{x:.{digits}g}" for x in (value, threshold))
        if (float(left) >= float(right)) == high:
            break
    return f"{left} {'>=' if high else '<'} {right}"


def see_listed(scores: Scores, settings: OrderSettings) -> Scores:
    """Says where a row stands in the file of selection.method=file:PATH."""
    listed = (
        f"line {x:,.0f} of the file" if x < math.inf else "not listed" for x in scores["listed"]
    )
    return {"seen": list(listed)}


def take_turns(
    by_target: np.ndarray, id_order: np.ndarray, blocks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Orders rows by turns: each target takes its best remaining row (arXiv 2602.14696).

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
    """Counts rows of the cluster with higher scores (n,): sorted by it, clusters take turns."""
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
