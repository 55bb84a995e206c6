"""What is compared: methods x budgets x seeds, and the examples that each of them trains on."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diq_jax import config, errors
from diq_jax.influence import kinds
from diq_jax.run import records, stages
from diq_jax.selection import hygiene, methods, select, stage

FULL, RANDOM = "full", "random"
UNITS = ("rows", "tokens")


@dataclasses.dataclass(frozen=True)
class Request:
    """The grid.

    Attributes:
        methods: selection methods, `random` first; the others are compared with it.
        budgets: shares of the pool, ascending; 1 is the whole pool, which no method changes.
        seeds: trainings of each method and budget.
        rankings: further methods, {name: (another finished workdir, a method of its)}; "" is the
            method that it selected by.
        units: what a budget is a share of: rows, tokens, or both.
        directions: influence.direction of further runs, whose orders stand as METHOD@DIRECTION.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: int
    rankings: Mapping[str, tuple[pathlib.Path, str]] = dataclasses.field(default_factory=dict)
    units: tuple[str, ...] = ("rows",)
    directions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.methods, *self.rankings)


@dataclasses.dataclass(frozen=True)
class GridCell:
    """One training: the examples, as sorted indices into the pool, and the seed, from 0."""

    method: str
    budget: float
    seed: int
    indices: tuple[int, ...]
    unit: str = "rows"

    @property
    def name(self) -> str:
        of = "" if self.unit == "rows" else f" of {self.unit}"
        return f"{self.method} {100 * self.budget:g} %{of} seed {self.seed}"


def parse(
    names: Sequence[str],
    budgets: Sequence[str],
    seeds: int,
    rankings: Sequence[str],
    units: Sequence[str] = UNITS[:1],
    directions: Sequence[str] = (),
) -> Request:
    """The grid that the flags ask for; `random` is always in it.

    Args:
        rankings: NAME=WORKDIR, or NAME=WORKDIR:METHOD.

    Raises:
        UserError: an unknown method, a budget out of range, a ranking without a workdir.
    """
    for name in names:
        errors.check_choice("--methods", name, methods.METHODS)
    shares = sorted({_share(text) for text in budgets})
    if not shares:
        raise errors.UserError("--budgets must name at least one share of the pool.")
    errors.check("--seeds", seeds >= 1, "at least 1", seeds)
    chosen = tuple(dict.fromkeys((RANDOM, *names)))
    others: dict[str, tuple[pathlib.Path, str]] = {}
    for text in rankings:
        name, _, where = text.partition("=")
        folder, colon, method = where.rpartition(":")
        if not name or not where:
            raise errors.UserError(f"--rankings must be NAME=WORKDIR[:METHOD]; got {text!r}.")
        if name in (*chosen, *others, FULL, "base"):
            raise errors.UserError(f"--rankings: {name!r} is the name of another row; rename it.")
        others[name] = (pathlib.Path(folder), method) if colon else (pathlib.Path(where), "")
    for unit in units:
        errors.check_choice("--units", unit, UNITS)
    for direction in directions:
        errors.check_choice("--directions", direction, kinds.DIRECTIONS)
    named = tuple(dict.fromkeys(units)) or UNITS[:1]
    return Request(chosen, tuple(shares), seeds, others, named, tuple(dict.fromkeys(directions)))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    errors.check("--budgets", 0 < value <= 1, "shares of the pool in (0, 1]", text)
    return value


def check(cfg: config.Config, request: Request) -> None:
    """Raises UserError where the stages could not give a method its input, or orders not nest."""
    for method in request.methods:
        methods.check_method(cfg, "--methods", method)
    if cfg.selection.source_cap < 1:
        raise errors.UserError(
            "selection.source_cap belongs to one budget, and the budgets compared are to nest: "
            "leave it at 1."
        )
    if not cfg.finetune.trains_adapter:
        raise errors.UserError(
            f"finetune.parameters={cfg.finetune.parameters}: cells train adapters; set it to lora."
        )
    for name, (workdir, method) in request.rankings.items():
        _check_ranking(name, workdir, method)


def _check_ranking(name, workdir, method):
    record = records.finished(workdir, "selection", f"--rankings={name}")
    if method:
        errors.check_choice(f"--rankings={name}: the method", method, methods.METHODS)
    elif records.config_of(record, workdir / "selection").selection.source_cap < 1:
        raise errors.UserError(
            f"--rankings={name}: {workdir} was selected with selection.source_cap, for one budget; "
            "name a method, as NAME=WORKDIR:METHOD."
        )


def ranking_method(workdir: pathlib.Path, method: str) -> str:
    """The selection method whose order a ranking takes."""
    record = records.finished(workdir, "selection", "--rankings")
    return method or records.config_of(record, workdir / "selection").selection.method


def orders(context: stages.Context, request: Request) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns methods' ranks from 1, {name: (seeds, n) int32}, and what hygiene removed, (n,) bool.

    {(name, budget): ..} where budgets do not nest; removed rows rank last, and no budget holds
    them.

    `random` is drawn anew for each seed, from selection.seed on; the other orders have none.

    Raises:
        UserError: a method's input is missing, or another workdir ranks another pool.
    """
    table = context.table("selection/baselines.parquet")
    ids = table["example_id"].to_pylist()
    removed = _removed(context, ids)
    found = {}
    for method in request.methods:
        if method == RANDOM:
            seeds = context.config.selection.seed + np.arange(request.seeds)
            found[method] = np.stack([random_ranks(ids, int(seed), removed) for seed in seeds])
        elif method in table.column_names and not methods.METHODS[method].nests:
            for budget in request.budgets:
                ranks = select.demote(_ranks_at(context, ids, method, budget), removed)
                found[method, budget] = np.stack([ranks] * request.seeds)
        elif method in table.column_names:
            found[method] = np.stack([table[method].to_numpy()] * request.seeds)
        else:
            raise errors.UserError(
                f"--methods={method}: selection/baselines.parquet lacks it, as its input (a "
                "difficulty perspective, difficulty.model_scores, a gradient store) was not there; "
                f"it has {', '.join(table.column_names[1:])}."
            )
    for name, (workdir, method) in request.rankings.items():
        ranks = select.demote(_other_ranks(context, name, workdir, method), removed)
        found[name] = np.stack([ranks] * request.seeds)
    return found, removed


def random_ranks(ids: Sequence[str], seed: int, removed: np.ndarray) -> np.ndarray:
    """(n,) as the selection stage draws them with selection.seed."""
    scores = {"id_order": jnp.asarray(methods.id_order(ids))}
    settings = methods.OrderSettings(seed=seed)  # the draw depends on the seed alone
    return select.demote(np.asarray(methods.ranks(RANDOM, scores, settings)), removed)


def _ranks_at(context, ids, method, budget) -> np.ndarray:
    """(n,) ranks of a method for one budget."""
    cfg = context.config
    scores, levels = stage.read_scores(context, ids, diverse=False)
    wanted = dataclasses.replace(cfg.selection, method=method, retention_ratio=budget)
    found = select.select(
        scores, levels, perspective=cfg.difficulty.perspective,
        percentile=cfg.difficulty.percentile, **dataclasses.asdict(wanted),
    )  # fmt: skip
    return found.orders[method]


def _removed(context, ids):
    if context.config.selection.hygiene != "remove":
        return np.zeros(len(ids), bool)
    rows = context.table("selection/hygiene.parquet").to_pylist()
    out = hygiene.dropped([hygiene.Repeat(**row) for row in rows])
    return np.array([id_ in out for id_ in ids])


def _other_ranks(context, name, workdir, method) -> np.ndarray:
    """(n,) ranks of another workdir, in the order of this one's pool."""
    rows = [
        dict(zip(*(table[c].to_pylist() for c in ("example_id", "row")), strict=True))
        for table in (
            records.table(folder, "prepare/pool.parquet", context.verify)
            for folder in (context.workdir, workdir)
        )
    ]
    if rows[0] != rows[1]:
        same = sum(rows[1].get(i) == row for i, row in rows[0].items())
        raise errors.UserError(
            f"--rankings={name}: {workdir} ranks another pool: {len(rows[1])} rows, {same} of "
            f"them among the {len(rows[0])} of this one."
        )
    file, column = ("baselines", method) if method else ("selection", "rank")
    table = records.table(workdir, f"selection/{file}.parquet", context.verify)
    if column not in table.column_names:
        raise errors.UserError(f"--rankings={name}: {workdir} has no ranks of {method}.")
    ranks = dict(zip(table["example_id"].to_pylist(), table[column].to_pylist(), strict=True))
    return np.array([ranks[i] for i in rows[0]], np.int32)


def cells(
    request: Request,
    ranks: Mapping[Any, np.ndarray],
    removed: np.ndarray,
    tokens: np.ndarray | None = None,
) -> list[GridCell]:
    """All trainings, the cheapest budgets first; the whole pool once, as `full`.

    Args:
        tokens: (n,) of each row, for budgets of tokens: as many of a method's first rows as have
            together at most the share of all tokens, at least one.
    """
    most = len(removed) - int(removed.sum())
    out = []
    for budget in request.budgets:
        keep = min(select.budget(budget, len(removed)), most)
        if budget == 1:
            everyone = tuple(np.flatnonzero(~removed).tolist())
            out += [GridCell(FULL, budget, seed, everyone) for seed in range(request.seeds)]
            continue
        for name in request.names:
            own = ranks[name] if name in ranks else ranks[name, budget]
            for unit in request.units:
                for seed in range(request.seeds):
                    count = keep
                    if unit == "tokens" and tokens is not None:
                        order = np.argsort(own[seed])[:most]
                        limit = budget * tokens[~removed].sum()
                        count = max(1, int(np.sum(np.cumsum(tokens[order]) <= limit)))
                    chosen = np.flatnonzero(own[seed] <= count)
                    out.append(GridCell(name, budget, seed, tuple(chosen.tolist()), unit))
    return out
