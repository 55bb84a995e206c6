"""The table of selection methods: what each sorts by, and what it says of a row.

A method maps the pool's scores to a total order, so that budgets nest. To add one, add a row to
METHODS: its checks, its cost, its column in baselines.parquet and its sentences follow from that.
LESS is no method of its own: it is `influence` with influence.direction=less and normalize=cosine.
"""

import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config, errors
from diq_jax.selection import quadrants

Scores = Mapping[str, Any]  # {name: (n,) array}: see `ranks`
PERSPECTIVE = "the perspective"  # stands for the one that difficulty.perspective names
# What has to be computed over a pool before its scores are there; others are there always.
PARTS = {
    "difficulty": (PERSPECTIVE, *config.PERSPECTIVES),
    "influence": ("influence",),
    "model_scores": ("loss", "ifd", "similarity", "reasoning_tokens"),
    "store": ("k_center", "k_center_distance", "facility_location", "facility_location_gain"),
}


@dataclasses.dataclass(frozen=True)
class OrderSettings:
    """What an order depends on beside the scores.

    Attributes:
        perspective, percentile: the difficulty that DIQ uses, and its threshold.
        seed: of `random`.
        quadrants: in the order in which they fill the budget.
        residual: whether the influence is what its regression on length leaves of it.
    """

    perspective: str = "overall"
    percentile: float = 50.0
    seed: int = 0
    quadrants: tuple[int, ...] = (1, 2, 3, 4)
    residual: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to order a pool.

    Attributes:
        reads: names of the scores that it needs.
        keys: (scores, settings) -> arrays (n,) to sort by, ascending, the first one first; what
            still ties goes by example id (UTF-8).
        why: what it saw in a row, as a format of the row's scores, of `place` ("place 4 of 3,151"),
            of `measure` (the name of the influence) and of what `sees` gives.
        sees: (scores, settings) -> {name: n values} for `why`; these scores also hold `rank`.
    """

    reads: tuple[str, ...]
    keys: Callable[[Scores, OrderSettings], tuple]
    why: str
    sees: Callable[[Scores, OrderSettings], Scores] = lambda scores, settings: {}


def _highest(score, why, **more) -> Method:
    return Method((score,), lambda scores, _: (-scores[score],), why, **more)


def _lowest(score, why, **more) -> Method:
    return Method((score,), lambda scores, _: (scores[score],), why, **more)


def _diq(first: int | None = None) -> Method:
    """Returns DIQ, or DIQ with one quadrant before the others, to compare quadrants."""

    def keys(scores, settings):
        order = sorted(settings.quadrants, key=lambda q: q != first)  # stable
        places = jnp.argsort(jnp.array(order))
        quadrant, _ = quadrants.of(scores, settings)
        return places[quadrant - 1], -scores["influence"], -scores[settings.perspective]

    return Method((PERSPECTIVE, "influence"), keys, "{seen}", _see_quadrant)


def _see_quadrant(scores, settings):
    quadrant, (tau_d, m_dot) = quadrants.of(scores, settings)
    quadrant, place, size = np.asarray(quadrant), np.zeros(len(quadrant), int), np.zeros(5, int)
    for i in np.argsort(scores["rank"]):
        size[quadrant[i]] += 1
        place[i] = size[quadrant[i]]
    seen = [
        f"Q{q}: difficulty {_against(d, float(tau_d))}, {measure} {_against(v, float(m_dot))}; "
        f"place {k:,} of {size[q]:,} in Q{q}"
        for q, d, v, k, measure in zip(
            quadrant, scores[settings.perspective], scores["influence"], place, scores["measure"],
            strict=True,
        )
    ]  # fmt: skip
    return {"seen": seen}


def _random(scores, settings):
    # The draw runs over the order of ids, so that the order of the file does not matter.
    places = jax.random.permutation(jax.random.key(settings.seed), scores["id_order"].shape[0])
    return (places[scores["id_order"]],)


def _ifd(scores, settings):
    """Sorts the highest below 1 first: above, the prompt does not help the answer, and arXiv
    2308.12032 takes it for misaligned. Then those from 1 up, nearest first; then those without any.
    """
    ifd = scores["ifd"]
    none = jnp.isnan(ifd)
    below = ifd < 1
    group = jnp.where(below, 0, jnp.where(none, 2, 1))
    return group, jnp.where(none, 0.0, jnp.where(below, -ifd, ifd))


def _see_ifd(scores, settings):
    none = "no ifd (too short an answer)"
    return {"seen": [none if np.isnan(x) else f"ifd {_against(x, 1.0)}" for x in scores["ifd"]]}


def _from_median(scores, settings):
    """Sorts by how far the log of each perplexity, which is its mean loss, lies from the median."""
    return (jnp.abs(scores["loss"] - jnp.median(scores["loss"])),)


def _see_median(scores, settings):
    away = np.asarray(_from_median(scores, settings)[0])
    return {"away": away, "median": [np.median(scores["loss"])] * len(away)}


def _see_distance(scores, settings):
    first, then = "nearest to the mean gradient", "at cosine distance {:.3g} from all before it"
    return {"seen": [first if np.isnan(x) else then.format(x) for x in scores["k_center_distance"]]}


METHODS: dict[str, Method] = {
    "diq": _diq(),
    "random": Method((), _random, "random {place}"),
    "influence": _highest("influence", "{measure} {influence:.3g}, {place}"),
    "difficulty_knowledge": _highest("knowledge", "knowledge difficulty {knowledge:.3g}, {place}"),
    "difficulty_reasoning": _highest("reasoning", "reasoning difficulty {reasoning:.3g}, {place}"),
    "difficulty_overall": _highest("overall", "difficulty {overall:.3g}, {place}"),
    **{f"quadrant_{q}": _diq(q) for q in (1, 2, 3, 4)},
    "short_answers": _lowest("answer_tokens", "{answer_tokens:,} answer tokens, {place}"),
    "long_answers": _highest("answer_tokens", "{answer_tokens:,} answer tokens, {place}"),
    "similarity": _highest("similarity", "mean cosine with the targets {similarity:.3g}, {place}"),
    "perplexity": _highest(
        "loss", "perplexity {perplexity:.3g}, {place}",
        sees=lambda scores, _: {"perplexity": np.exp(scores["loss"].astype(np.float64))},
    ),
    "middle_perplexity": Method(
        ("loss",), _from_median,
        "log perplexity {loss:.3g}, {away:.3g} from the median {median:.3g}, {place}", _see_median,
    ),
    "ifd": Method(("ifd",), _ifd, "{seen}, {place}", _see_ifd),
    "long_reasoning": _highest(
        "reasoning_tokens", "{reasoning_tokens:,} reasoning tokens, {place}"
    ),
    "k_center": _lowest("k_center", "{seen}, {place}", sees=_see_distance),
    "facility_location": _lowest(
        "facility_location", "adds {facility_location_gain:.3g} to the coverage, {place}"
    ),
}  # fmt: skip


def parts(method: str) -> tuple[str, ...]:
    """Returns what has to be computed over the pool for a method, names in PARTS."""
    reads = set(METHODS[method].reads)
    return tuple(part for part, scores in PARTS.items() if reads & set(scores))


def asked(cfg: config.Config) -> Iterator[tuple[str, str]]:
    """Yields (field, method) of every selection method that a config asks for."""
    yield "selection.method", cfg.selection.method
    yield from (("finetune.baselines", method) for method in cfg.finetune.baseline_methods)


def perspectives(cfg: config.Config) -> list[tuple[str, str]]:
    """Lists (what needs it, perspective) of each method that reads a certain perspective."""
    return [
        (f"{field}={method}", score)
        for field, method in asked(cfg)
        for score in METHODS[method].reads
        if score in config.PERSPECTIVES
    ]


def check(cfg: config.Config) -> None:
    """Raises UserError where a config asks for a method that does not exist, or whose input would
    be missing: before hours of work, not after.
    """
    for field, method in asked(cfg):
        check_method(cfg, field, method)


def check_method(cfg: config.Config, field: str, method: str) -> None:
    """Raises UserError where `field` names no method, or one whose input would be missing."""
    errors.check_choice(field, method, METHODS)
    found = parts(method)
    if "model_scores" in found and not cfg.difficulty.model_scores:
        raise errors.UserError(f"{field}={method} needs difficulty.model_scores=True.")
    if "store" in found and (cfg.influence.engine == "exact" or cfg.influence.warmup.epochs):
        raise errors.UserError(
            f"{field}={method} needs the base model's gradient store: set influence.engine to "
            "projected or factored, and influence.warmup.epochs to 0."
        )


def missing(method: str, scores: Scores, settings: OrderSettings) -> str:
    """Returns a score that a method needs and the pool lacks, or ""."""
    reads = METHODS[method].reads
    needed = (settings.perspective if name == PERSPECTIVE else name for name in reads)
    return next((name for name in needed if name not in scores), "")


def ranks(method: str, scores: Scores, settings: OrderSettings) -> jax.Array:
    """Ranks the pool's examples under a method.

    Args:
        scores: (n,) each: influence, answer_tokens, id_order (int32, the position of each example
            in the order of ids), and what there is of the difficulty perspectives, of loss, ifd,
            similarity, reasoning_tokens (difficulty/model_scores.parquet), and of the diverse
            orders (selection/diversity.py).

    Returns:
        (n,) int32, a permutation of 1..n.
    """
    keys = METHODS[method].keys(scores, settings)
    return quadrants.ranks_of(jnp.lexsort((scores["id_order"], *reversed(keys))))


def why(method: str, scores: Scores, settings: OrderSettings, ranks: np.ndarray) -> list[str]:
    """Says of each row what a method saw in it, such as "influence 0.021, place 4 of 3,151".

    Args:
        ranks: (n,) by the method.
    """
    count = len(ranks)
    columns = {name: np.asarray(values) for name, values in scores.items()} | {
        "rank": ranks,
        "place": [f"place {rank:,} of {count:,}" for rank in ranks],
        "measure": ["influence residual" if settings.residual else "influence"] * count,
    }
    columns |= METHODS[method].sees(columns, settings)
    text = METHODS[method].why
    names = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    rows = zip(*(columns[name] for name in names), strict=True)
    return [text.format_map(dict(zip(names, row, strict=True))) for row in rows]


def _against(value, threshold) -> str:
    """Writes "value >= threshold" or "value < threshold", with as many digits as show it."""
    high = bool(value >= threshold)
    for digits in range(3, 10):
        left, right = (f"{x:.{digits}g}" for x in (value, threshold))
        if (float(left) >= float(right)) == high:
            break
    return f"{left} {'>=' if high else '<'} {right}"


def id_order(ids: Sequence[str]) -> np.ndarray:
    """Returns (n,) int32 from 0, the place of each id in UTF-8 order: the same everywhere."""
    order = np.argsort(np.array([i.encode() for i in ids], object), kind="stable")
    return np.asarray(quadrants.ranks_of(jnp.asarray(order)) - 1)
