"""Why each example stands where it stands: one short clause a row, true of that row."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from diq_jax.selection import methods, quadrants


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a method's order.

    Attributes:
        ranks: (n,) by the method, removed rows last, before any cap.
        selected: (n,) bool; keep: the budget.
        passed: (n,) bool, passed over because their source had its `limit`.
        sources: (n,) texts.
        removed: (n,) texts, why hygiene ranks a row last, or "".
        residual: whether the influence of the scores is a residual.
    """

    ranks: np.ndarray
    selected: np.ndarray
    keep: int
    passed: np.ndarray
    limit: int
    sources: list[str]
    removed: list[str]
    residual: bool


def why(method: str, scores: Mapping, settings: methods.Settings, outcome: Outcome) -> list[str]:
    """A clause for each row, such as "influence 0.021, place 4 of 3151; beyond the budget of 315".

    Args:
        scores, settings: as methods.ranks takes them.
    """
    columns = {name: np.asarray(values) for name, values in scores.items()}
    if methods.is_by_quadrant(method):
        clauses = _of_quadrants(columns, scores, settings, outcome)
    else:
        clauses = _of_places(method, columns, outcome)
    return [f"{clause}{_end(i, outcome)}" for i, clause in enumerate(clauses)]


def _of_quadrants(columns, scores, settings, outcome):
    difficulty, influence = columns[settings.perspective], columns["influence"]
    taus = quadrants.thresholds(
        scores[settings.perspective], scores["influence"], settings.percentile
    )
    tau_d, m_dot = (float(tau) for tau in taus)
    quadrant = np.asarray(methods.quadrant(scores, settings))
    name = "influence residual" if outcome.residual else "influence"
    place, size = np.zeros(len(quadrant), np.int64), np.zeros(5, np.int64)
    for i in np.argsort(outcome.ranks):
        size[quadrant[i]] += 1
        place[i] = size[quadrant[i]]
    return [
        f"Q{q}: difficulty {_against(d, tau_d)}, {name} {_against(v, m_dot)}; "
        f"place {k:,} of {size[q]:,} in Q{q}"
        for q, d, v, k in zip(quadrant, difficulty, influence, place, strict=True)
    ]


def _of_places(method, columns, outcome):
    count = len(outcome.ranks)
    if method == "random":
        return [f"random place {rank:,} of {count:,}" for rank in outcome.ranks]
    describe = _describer(method, columns, outcome.residual)
    return [f"{describe(i)}, place {rank:,} of {count:,}" for i, rank in enumerate(outcome.ranks)]


def _describer(method, columns, residual) -> Callable[[int], str]:
    """Row -> what the method saw in it."""
    if method == "influence":
        name = "influence residual" if residual else "influence"
        return lambda i: f"{name} {_shown(columns['influence'][i])}"
    if method.startswith("difficulty_"):
        perspective = method.removeprefix("difficulty_")
        name = "difficulty" if perspective == "overall" else f"{perspective} difficulty"
        return lambda i: f"{name} {_shown(columns[perspective][i])}"
    if method == "middle_perplexity":
        middle, away = float(np.median(columns["loss"])), np.asarray(methods.from_median(columns))
        return lambda i: (
            f"log perplexity {_shown(columns['loss'][i])}, {_shown(away[i])} from the median "
            f"{_shown(middle)}"
        )
    return {
        "short_answers": lambda i: f"{columns['answer_tokens'][i]:,} answer tokens",
        "long_answers": lambda i: f"{columns['answer_tokens'][i]:,} answer tokens",
        "long_reasoning": lambda i: f"{columns['reasoning_tokens'][i]:,} reasoning tokens",
        "similarity": lambda i: f"mean cosine with the targets {_shown(columns['similarity'][i])}",
        "perplexity": lambda i: f"perplexity {_shown(np.exp(np.float64(columns['loss'][i])))}",
        "ifd": lambda i: _of_ifd(columns["ifd"][i]),
        "k_center": lambda i: _of_distance(columns["k_center_distance"][i]),
        "facility_location": lambda i: (
            f"adds {_shown(columns['facility_location_gain'][i])} to the coverage"
        ),
    }[method]


def _of_ifd(value):
    return f"ifd {_against(value, 1.0)}" if np.isfinite(value) else "no ifd (too short an answer)"


def _of_distance(value):
    if np.isnan(value):
        return "nearest to the mean gradient"
    return f"at cosine distance {_shown(value)} from all before it"


def _end(i, outcome):
    if outcome.selected[i]:
        return ""
    if outcome.removed[i]:
        return f"; {outcome.removed[i]}"
    if outcome.passed[i]:
        source = outcome.sources[i] or "(none)"
        return f"; passed over, as source {source!r} has its {outcome.limit:,} already"
    return f"; beyond the budget of {outcome.keep:,}"


def _shown(value) -> str:
    return f"{value:.3g}"


def _against(value, threshold) -> str:
    """ "value >= threshold" or "value < threshold", with as many digits as show it."""
    high = bool(value >= threshold)
    for digits in range(3, 10):
        left, right = (f"{x:.{digits}g}" for x in (value, threshold))
        if (float(left) >= float(right)) == high:
            break
    return f"{left} {'>=' if high else '<'} {right}"
