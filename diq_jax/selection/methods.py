"""The table of selection methods: what each sorts by, and what it says of a row.

A method maps the pool's scores to a total order, so that budgets nest unless it says that they do
not. To add one, add a row to METHODS: its checks, its cost, its column in baselines.parquet and its
sentences follow from that. What differs in the direction alone is no method of its own: LESS is
`influence` with influence.direction=less.
"""

import string
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config, errors
from diq_jax.selection import orders, quadrants
from diq_jax.selection.orders import PERSPECTIVE, OrderSettings, Scores

_highest, _lowest = orders.highest, orders.lowest
# What has to be computed over a pool before its scores are there; others are there always.
PARTS = {
    "difficulty": (PERSPECTIVE, *config.PERSPECTIVES),
    "influence": ("influence",),
    "model_scores": ("loss", "ifd", "similarity", "reasoning_tokens"),
    "store": ("k_center", "k_center_distance", "facility_location", "facility_location_gain"),
    "by_target": ("by_target", "alignment"),
    "color": ("color",),
    "temp": ("temp", "temp_cluster"),
    "file": ("listed",),
}
MOST_ROWS = 20_000  # of a pool whose gradients are compared in all pairs
# How a run gets them, where it may lack them.
HOW = {
    "store": "influence/store, the gradients of the base model (influence.engine=projected or "
    f"factored, no warm-up), and a pool of at most {MOST_ROWS:,} examples",
    "model_scores": "difficulty/model_scores.parquet: set difficulty.model_scores=True and redo "
    "the stage difficulty",
    "by_target": "an influence for each of several targets: set influence.targets=task or example "
    "and redo the stage influence",
    "color": "influence/tuned.parquet: set influence.tuned.color=True and redo the stage influence",
    "temp": "influence/tuned.parquet: set influence.tuned.temp=True and redo the stage influence",
    "file": "a list of examples: set selection.method=file:PATH",
}

FILE = "file:"  # of selection.method=file:PATH
METHODS: dict[str, orders.Method] = {
    "diq": orders.diq(),
    "random": orders.Method((), orders.random, "random {place}"),
    "influence": _highest("influence", "{measure} {influence:.3g}, {place}"),
    "difficulty_knowledge": _highest("knowledge", "knowledge difficulty {knowledge:.3g}, {place}"),
    "difficulty_reasoning": _highest("reasoning", "reasoning difficulty {reasoning:.3g}, {place}"),
    "difficulty_overall": _highest("overall", "difficulty {overall:.3g}, {place}"),
    **{f"diq_{p}": orders.diq(perspective=p) for p in config.PERSPECTIVES},
    **{f"quadrant_{q}": orders.diq(q) for q in (1, 2, 3, 4)},
    "round_robin": orders.round_robin(inside=False),
    "diq_round_robin": orders.round_robin(inside=True),
    "adaptive": orders.Method(
        (PERSPECTIVE, "influence"), orders.adaptive, "{seen}, {place}", orders.see_band, nests=False
    ),
    "difficulty_length": orders.Method(
        (PERSPECTIVE, "reasoning_tokens"), orders.difficulty_length, "{seen}, {place}",
        orders.see_joint,
    ),
    "gist": _highest("alignment", "aligned with the targets by {alignment:.3g}, {place}"),
    "color": _highest("color", "training on the targets lowers its loss by {color:.3g}, {place}"),
    "temp": orders.Method(
        ("temp", "temp_cluster"), orders.temp,
        "loss of its first tokens {temp:.3g}, in cluster {temp_cluster}, {place}",
    ),
    "short_answers": _lowest("answer_tokens", "{answer_tokens:,} answer tokens, {place}"),
    "long_answers": _highest("answer_tokens", "{answer_tokens:,} answer tokens, {place}"),
    "similarity": _highest("similarity", "mean cosine with the targets {similarity:.3g}, {place}"),
    "perplexity": _highest(
        "loss", "perplexity {perplexity:.3g}, {place}",
        sees=lambda scores, _: {"perplexity": np.exp(scores["loss"].astype(np.float64))},
    ),
    "middle_perplexity": orders.Method(
        ("loss",), orders.from_median,
        "log perplexity {loss:.3g}, {away:.3g} from the median {median:.3g}, {place}",
        orders.see_median,
    ),
    "ifd": orders.Method(("ifd",), orders.ifd, "{seen}, {place}", orders.see_ifd),
    "long_reasoning": _highest(
        "reasoning_tokens", "{reasoning_tokens:,} reasoning tokens, {place}"
    ),
    "k_center": _lowest("k_center", "{seen}, {place}", sees=orders.see_distance),
    "facility_location": _lowest(
        "facility_location", "adds {facility_location_gain:.3g} to the coverage, {place}"
    ),
    "file": orders.Method(
        ("listed", "influence"), lambda scores, _: (scores["listed"], -scores["influence"]),
        "{seen}", orders.see_listed,
    ),
}  # fmt: skip


def name(method: str) -> str:
    """Returns the name in METHODS of a value of selection.method: `file` of file:PATH."""
    return "file" if method.startswith(FILE) else method


def parts(method: str) -> tuple[str, ...]:
    """Returns what has to be computed over the pool for a method, names in PARTS."""
    reads = set(METHODS[method].reads)
    return tuple(part for part, scores in PARTS.items() if reads & set(scores))


def asked(cfg: config.Config) -> Iterator[tuple[str, str]]:
    """Yields (field, method) of every selection method that a config asks for."""
    yield "selection.method", name(cfg.selection.method)
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
    """Raises UserError for an unknown method or a missing input: before hours of work."""
    for field, method in asked(cfg):
        check_method(cfg, field, method)


def check_method(cfg: config.Config, field: str, method: str) -> None:
    """Raises UserError where `field` names no method, or one whose input would be missing."""
    errors.check_choice(field, method, METHODS)
    found = parts(method)
    there = {
        "model_scores": cfg.difficulty.model_scores,
        "by_target": cfg.influence.targets != "mean",
        "color": cfg.influence.tuned.color,
        "temp": cfg.influence.tuned.temp,
        "file": field == "selection.method" and cfg.selection.method != "file",
    }
    for part in found:
        if not there.get(part, True):
            setting = HOW[part].partition("set ")[2].partition(" and ")[0]
            raise errors.UserError(f"{field}={method} needs {setting}.")
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
            similarity, reasoning_tokens (difficulty/model_scores.parquet), of color, temp and
            temp_cluster (influence/tuned.parquet), of alignment, and of the diverse orders
            (selection/diversity.py); by_target (n, Q), the influence on each of several targets.

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


def id_order(ids: Sequence[str]) -> np.ndarray:
    """Returns (n,) int32 from 0, the place of each id in UTF-8 order: the same everywhere."""
    order = np.argsort(np.array([i.encode() for i in ids], object), kind="stable")
    return np.asarray(quadrants.ranks_of(jnp.asarray(order)) - 1)
