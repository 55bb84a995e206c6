"""The lab's arms: every order of the pool that is compared, by the stages of the pipeline.

A method of selection/methods.py is an arm under its own name where its input is there, on the mean
direction. `diq` and `influence` are arms of the other directions too, such as "diq, adam", and of
the length residual.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from diq_jax import config, pipeline, prepare
from diq_jax.selection import methods, select, stage

RANDOM, FULL, BASE = "random", "full", "base"
TARGETS = "the targets"  # trained on themselves, drawn anew for each seed: nothing is selected
MEAN = "mean"  # the folder of the mean direction, which has all scores
BY_INFLUENCE = ("diq", "influence")  # the methods that are arms of every direction
DIRECTIONS: dict[str, dict[str, Any]] = {
    "adam": {"direction": "adam", "warmup": {"epochs": 1, "fraction": 0.25, "learning_rate": 1e-3}},
    "gauss_newton": {"direction": "gauss_newton"},
}


def orders(
    cfg: config.Config, workdir: pathlib.Path, budgets: Sequence[float], overwrite: bool
) -> dict[str, dict[float, np.ndarray]]:
    """Runs the stages that score, for each direction, skipping what is done.

    Args:
        overwrite: whether scores that other settings made are made again, not refused.

    Returns:
        {arm: {budget: ranks (n,) from 1}}, without `random`, in the order of the prepared pool.
        (An order that does not nest depends on the budget.)
    """
    folder = workdir / MEAN
    mean = changed(cfg, {"influence": {"engine": "projected", "direction": "mean"}})
    pipeline.run(mean, folder, ("prepare", "difficulty", "influence"), overwrite)
    with pipeline.at_work(mean, folder) as context:
        ids = context.table(prepare.POOL, "example_id")["example_id"].to_pylist()
        scores, levels = stage.read_scores(context, ids)
    found = by_methods(cfg, scores, levels, budgets)
    # The same order under another name.
    found.pop(f"diq_{cfg.difficulty.perspective}", None)
    found |= by_methods(cfg, scores, levels, budgets, BY_INFLUENCE, "residual")
    for name, changes in DIRECTIONS.items():
        other = changed(cfg, {"influence": {"engine": "exact", "targets": "mean", **changes}})
        pipeline.run(other, workdir / name, ("prepare", "influence"), overwrite)
        with pipeline.at_work(other, workdir / name) as context:
            table = context.table("influence/influence.parquet")
        if table["example_id"].to_pylist() != ids:
            raise ValueError(f"{workdir / name} and {folder} hold different pools.")
        along = scores | {"influence": table["influence"].to_numpy()}
        found |= by_methods(cfg, along, levels, budgets, BY_INFLUENCE, name)
    return found


def changed(section: Any, changes: dict[str, Any]) -> Any:
    """Returns a section of the config with fields changed, those of its own sections too."""
    values = {
        name: changed(getattr(section, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(section, **values)


def by_methods(
    cfg: config.Config,
    scores: dict[str, Any],
    levels: dict[str, np.ndarray],
    budgets: Sequence[float],
    names: Sequence[str] = (),
    suffix: str = "",
) -> dict[str, dict[float, np.ndarray]]:
    """Orders a pool by every method with its input there, `random` aside, or by `names`."""
    found: dict[str, dict[float, np.ndarray]] = {}
    for budget in budgets:
        made = select.select(
            scores,
            levels,
            perspective=cfg.difficulty.perspective,
            percentile=cfg.difficulty.percentile,
            method="influence",
            retention_ratio=budget,
            length_residual=suffix == "residual",
        )
        for name, ranks in made.orders.items():
            if name != RANDOM and (not names or name in names):
                found.setdefault(f"{name}, {suffix}" if suffix else name, {})[budget] = ranks
    return found


def random_ranks(ids: list[str], seed: int) -> np.ndarray:
    """Returns the ranks of `random` with selection.seed = seed, (n,) from 1."""
    scores = {"id_order": methods.id_order(ids)}
    return np.asarray(methods.ranks(RANDOM, scores, methods.OrderSettings(seed=seed)))


def drawn_targets(candidates: int, targets: int, count: int, seed: int) -> tuple[int, ...]:
    """Draws `count` targets, or all, as ascending indices past those of the candidates."""
    order = np.random.default_rng(seed).permutation(targets)[:count]
    return tuple(sorted((candidates + order).tolist()))


def chosen(ranks: np.ndarray, budget: float) -> tuple[int, ...]:
    """Returns the rows of a budget, as ascending indices into the pool."""
    keep = select.budget(budget, len(ranks))
    return tuple(np.flatnonzero(ranks <= keep).tolist())
