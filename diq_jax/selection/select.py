"""Selection in memory: scores of a pool -> a total order, the subset, and why."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from diq_jax import config, errors, fields, selection_config
from diq_jax.selection import methods, quadrants

if TYPE_CHECKING:
    from diq_jax.selection import by_hand


@dataclasses.dataclass(frozen=True)
class Selected:
    """Holds a selection, in the order of the pool.

    Attributes:
        ranks: (n,) int32 from 1; the first `keep` are selected.
        selected: (n,) bool.
        why: n sentences.
        quadrants: (n,) int8 in 1..4, by `thresholds`: tau_d and m_dot, nan where the pool lacks the
            perspective. m_dot is of the residual with length_residual.
        orders: {method: ranks (n,)} of every method whose scores are there, without source_cap.
    """

    ranks: np.ndarray
    selected: np.ndarray
    why: list[str]
    quadrants: np.ndarray
    thresholds: tuple[float, float]
    orders: dict[str, np.ndarray]

    @property
    def keep(self) -> int:
        """Returns the size of the subset."""
        return int(self.selected.sum())


def select(
    scores: Any,
    difficulty: Any = None,
    *,
    perspective: str = "overall",
    percentile: float = 50.0,
    sources: Sequence[str] | None = None,
    removed: Sequence[str] | None = None,
    decided: Mapping[str, "by_hand.Decision"] | None = None,
    **settings: Any,
) -> Selected:
    """Orders a pool by a selection method and takes the first of it. Writes nothing.

    Args:
        scores: what influence.score returns, or {name: n values} with example_ids, influence,
            tokens (of the answer), and what there is for other methods (methods.ranks), such as
            by_target (n, Q) with `groups`, the Q names.
        difficulty: {perspective: (n,) levels in [1, 5]}, or the levels of `perspective` alone; nan
            where unknown.
        perspective, percentile: as difficulty.perspective and difficulty.percentile.
        sources: of each row, for source_cap.
        removed: why hygiene ranks a row last, "" where it does not.
        decided: what people decided of examples, {example_id: decision}.
        settings: fields of selection_config.Selection, such as method and retention_ratio.

    Raises:
        UserError: a field out of range, a score that the method needs is missing, or source_cap
            leaves fewer examples than the budget.
    """
    scores = _columns_of(scores)
    groups = tuple(scores.pop("groups", ()))
    method, cfg, order = _settings(settings, perspective, percentile, groups)
    difficulty = _levels(difficulty, perspective)
    ids = list(scores["example_ids"])
    _check_columns(ids, {**scores, **difficulty})
    given = _given(scores, difficulty, order)
    _check_scores(method, given, order)
    removed = list(removed or [""] * len(ids))
    last = np.array([bool(reason) for reason in removed])
    orders = {
        name: demote(np.asarray(methods.ranks(name, given, order)), last)
        for name in methods.METHODS
        if not methods.missing(name, given, order)
    }
    own, keep = orders[method], budget(cfg.retention_ratio, len(ids))
    _check_listed(given, method, keep)
    endings = [f"; {why}" if why else f"; beyond the budget of {keep:,}" for why in removed]
    placed = _edited(own, ids, decided, keep)
    ranks = _capped(cfg.source_cap, placed, sources or [""] * len(ids), last, keep, endings)
    selected, said = ranks <= keep, methods.why(method, given, order, own)
    levels = {perspective: jnp.full(len(ids), jnp.nan), **given}
    quadrant, (tau_d, m_dot) = quadrants.of(levels, order)
    return Selected(
        ranks=ranks,
        selected=selected,
        why=_sentences(ids, said, endings, selected, decided or {}),
        quadrants=np.asarray(quadrant),
        thresholds=(float(tau_d), float(m_dot)),
        orders=orders,
    )


def _columns_of(scores) -> dict[str, Any]:
    if isinstance(scores, Mapping):
        return dict(scores)
    names = ("example_ids", "influence", "tokens")
    names += ("by_target", "groups", "alignment") if len(scores.groups) > 1 else ()
    return {name: getattr(scores, name) for name in names}


def _levels(difficulty, perspective) -> Mapping[str, Any]:
    if isinstance(difficulty, Mapping):
        return difficulty
    return {} if difficulty is None else {perspective: difficulty}


def _settings(
    settings, perspective, percentile, groups
) -> tuple[str, selection_config.Selection, methods.OrderSettings]:
    cfg = fields.build(selection_config.Selection, settings, "selection.")
    split = {"perspective": perspective, "percentile": percentile}
    split = fields.build(config.Difficulty, split, "difficulty.")
    method = methods.name(cfg.method)
    errors.check_choice("selection.method", method, methods.METHODS)
    order = methods.OrderSettings(
        perspective, split.percentile, cfg.seed, cfg.quadrants, cfg.length_residual,
        cfg.retention_ratio, cfg.band, groups,
    )  # fmt: skip
    return method, cfg, order


def _sentences(ids, said, endings, selected, decided):
    """Joins what the method saw in each row and why it is not taken, or what a person decided."""
    rows = zip(ids, said, endings, selected, strict=True)
    return [
        sentence + (decided[i].said if i in decided else "" if taken else ending)
        for i, sentence, ending, taken in rows
    ]


def _check_columns(ids, columns):
    """Raises UserError where a row has no value or no number: it would turn the median."""
    for name, values in columns.items():
        if len(values) != len(ids):
            raise errors.UserError(f"{name} has {len(values)} values for {len(ids)} examples.")
    for name in ("influence", "by_target", "alignment", "color", "temp"):
        if name not in columns:
            continue
        finite = np.isfinite(np.asarray(columns[name], np.float64)).reshape(len(ids), -1).all(1)
        if not finite.all():
            row, what = int(np.argmin(finite)), name.replace("by_target", "influence on a target")
            raise errors.UserError(f"The {what} of example {ids[row]!r} is not finite.")


def _check_listed(given, method, keep):
    """Raises UserError where a file lists fewer examples than the budget: no method ranks more."""
    if method == "file" and (count := int(jnp.isfinite(given["listed"]).sum())) < keep:
        n = len(given["listed"])
        raise errors.UserError(
            f"selection.method=file lists {count:,} examples, fewer than the budget of {keep:,}: "
            f"set selection.retention_ratio={count / n:.6g} ({count:,} of {n:,}), or less."
        )


def _edited(ranks, ids, decided, keep):
    """Returns the ranks as people's decisions change them (selection.edits)."""
    if not decided:
        return ranks
    from diq_jax.selection import by_hand

    return by_hand.apply(ranks, ids, decided, keep)


def _capped(source_cap, ranks, sources, last, keep, endings):
    """Returns ranks under source_cap, and says in `endings` which rows are passed over."""
    if source_cap == 1:
        return ranks
    limit = source_limit(source_cap, keep)
    _check_room(source_cap, sources, last, keep, limit)
    ranks, passed = capped(ranks, sources, keep, limit)
    for i in np.flatnonzero(passed & ~last):
        source = sources[i] or "(none)"
        endings[i] = f"; passed over, as source {source!r} has its {limit:,} already"
    return ranks


def _given(scores, difficulty, order) -> dict[str, Any]:
    """Returns the scores by methods' names, without perspectives that have unknown levels."""
    id_order = methods.id_order(scores["example_ids"])
    found = {name: values for name, values in scores.items() if name != "example_ids"}
    found |= {"id_order": id_order, "answer_tokens": np.asarray(found.pop("tokens"))}
    if order.residual:
        tokens = found["answer_tokens"]
        found["influence"] = length_residual(np.asarray(found["influence"]), tokens, id_order)
        if "by_target" in found:
            columns = np.asarray(found["by_target"]).T
            left = [length_residual(column, tokens, id_order) for column in columns]
            found["by_target"] = np.stack(left, axis=1)
    found |= {p: values for p, values in difficulty.items() if np.isfinite(values).all()}
    return {name: jnp.asarray(values) for name, values in found.items()}


def _check_scores(method, scores, settings):
    lacking = methods.missing(method, scores, settings)
    if not lacking:
        return
    if lacking in methods.PARTS["difficulty"]:
        known = ", ".join(p for p in config.PERSPECTIVES if p in scores)
        raise errors.UserError(
            f"selection.method={method} needs the difficulty perspective {lacking!r}, which the "
            f"pool lacks; it has {known or 'none'}."
        )
    part = next(part for part, names in methods.PARTS.items() if lacking in names)
    raise errors.UserError(f"selection.method={method} needs {methods.HOW[part]}.")


def budget(retention_ratio: float, pool: int) -> int:
    """Returns how many examples to keep: the nearest whole number, at least 1."""
    return max(1, int(retention_ratio * pool + 0.5))


def source_limit(source_cap: float, keep: int) -> int:
    """Returns how many examples of one source a budget may hold, at least 1."""
    return max(1, math.floor(source_cap * keep + 1e-9))  # 0.29 * 100 is a little below 29


def capped(
    ranks: np.ndarray, sources: Sequence[str], keep: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds a total order whose first `keep` hold at most `limit` examples of a source.

    Examples are taken by rank; one whose source is full is passed over; all that are not taken
    follow by rank. The fill depends on the budget: orders of two budgets need not nest.

    Returns:
        (ranks (n,) int32, passed over (n,) bool). Fewer than `keep` are taken where the limit
        leaves no more; the caller refuses that.
    """
    taken: dict[str, int] = collections.Counter()
    places, passed = [], np.zeros(len(ranks), bool)
    for i in map(int, np.argsort(ranks)):
        if len(places) == keep:
            break
        if taken[sources[i]] == limit:
            passed[i] = True
        else:
            taken[sources[i]] += 1
            places.append(i)
    rest = np.ones(len(ranks), bool)
    rest[places] = False
    return demote(ranks, rest), passed


def _check_room(source_cap, sources, last, keep, limit):
    counts = collections.Counter(s for s, out in zip(sources, last, strict=True) if not out)
    room = sum(min(limit, count) for count in counts.values())
    if room < keep:
        raise errors.UserError(
            f"selection.source_cap={source_cap} leaves room for {room} of the budget of {keep} "
            f"examples, at most {limit} from each of {len(set(sources))} sources: raise it."
        )


def demote(ranks: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Puts the rows of `last` (n,) bool after all others, their order kept: ranks from 1."""
    out = np.empty_like(ranks)
    out[np.lexsort((ranks, last))] = np.arange(1, len(ranks) + 1)
    return out


def length_residual(
    influence: np.ndarray, answer_tokens: np.ndarray, id_order: np.ndarray
) -> np.ndarray:
    """Returns what least squares on (1, log answer tokens) leave of the influence, (n,) float32.

    Sums run in the order of ids, so that the order of the file changes no bit.
    """
    order = np.argsort(id_order)
    y, x = influence.astype(np.float64), np.log(answer_tokens.astype(np.float64))
    y, x = y - y[order].mean(), x - x[order].mean()
    spread = np.sum(x[order] ** 2)
    slope = np.sum((x * y)[order]) / spread if spread > 0 else 0.0
    return (y - slope * x).astype(np.float32)
