"""The selection stage: difficulty and influence -> a total order, the subset, and what else one
might take.
"""

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from diq_jax.common import artifacts, config, errors, metrics, stages
from diq_jax.selection import hygiene, hygiene_stage, methods, quadrants


def run(context: stages.Context) -> dict[str, Any]:
    """Writes selection.parquet, baselines.parquet, thresholds.json, selected.jsonl and, unless
    selection.hygiene is off, hygiene.parquet.

    Raises:
        UserError: the method or the perspective needs a difficulty that the pool does not have, or
            hygiene leaves fewer rows than the budget.
    """
    cfg = context.config
    pool = artifacts.read_table(context.path("prepare/pool.parquet"))
    difficulty = artifacts.read_table(context.path("difficulty/difficulty.parquet"))
    influence = artifacts.read_table(context.path("influence/influence.parquet"))
    ids = pool["example_id"].to_pylist()
    _check_rows(ids, difficulty, influence)

    scores = {p: jnp.asarray(difficulty[p].to_numpy()) for p in config.PERSPECTIVES}
    scores["influence"] = jnp.asarray(influence["influence"].to_numpy())
    # UTF-8 order: the same on every platform and locale.
    order = np.argsort(np.array([i.encode() for i in ids], object), kind="stable")
    scores["id_order"] = quadrants.ranks_of(jnp.asarray(order)) - 1
    known = [p for p in config.PERSPECTIVES if bool(jnp.isfinite(scores[p]).all())]
    _check_known(cfg, known)

    rank = functools.partial(
        methods.ranks,
        scores=scores,
        perspective=cfg.difficulty.perspective,
        percentile=cfg.difficulty.percentile,
        seed=cfg.selection.seed,
    )
    skipped = {f"difficulty_{p}" for p in config.PERSPECTIVES if p not in known}
    last, cleaned = hygiene_stage.run(context, pool)
    ranks = {
        m: hygiene.demote(np.asarray(rank(m)), last) for m in config.METHODS if m not in skipped
    }
    chosen = ranks[cfg.selection.method]
    keep = methods.budget(cfg.selection.retention_ratio, len(ids))
    hardness = scores[cfg.difficulty.perspective]
    tau_d, m_dot = quadrants.thresholds(hardness, scores["influence"], cfg.difficulty.percentile)
    quadrant = np.asarray(quadrants.quadrants(hardness, scores["influence"], tau_d, m_dot))
    selected = chosen <= keep

    artifacts.write_table(
        context.path("selection/selection.parquet"),
        {
            "example_id": pool["example_id"],
            "difficulty": pa.array(np.asarray(hardness)),
            "influence": influence["influence"],
            "quadrant": pa.array(quadrant),
            "rank": pa.array(chosen),
            "selected": pa.array(selected),
        },
    )
    artifacts.write_table(
        context.path("selection/baselines.parquet"),
        {"example_id": pool["example_id"]} | {m: pa.array(r) for m, r in ranks.items()},
    )
    artifacts.write_json(
        context.path("selection/thresholds.json"),
        {
            "difficulty": metrics.finite(tau_d),
            "influence": metrics.finite(m_dot),
            "selected": keep,
        },
    )
    rows = pool["row"].to_pylist()
    picked = [json.loads(rows[i]) for i in np.argsort(chosen)[:keep]]
    artifacts.write_jsonl(context.path("selection/selected.jsonl"), picked)
    counts = {f"Q{q}": int(np.sum(quadrant == q)) for q in (1, 2, 3, 4)}
    taken = {f"Q{q}": int(np.sum(selected & (quadrant == q))) for q in (1, 2, 3, 4)}
    return {
        "rows": len(ids),
        "selected": keep,
        "quadrants": counts,
        "selected_quadrants": taken,
        **cleaned,
    }


def _check_rows(ids, *tables):
    for table in tables:
        if table["example_id"].to_pylist() != ids:
            raise errors.UserError(
                "Difficulty, influence and pool hold different examples: redo the older stage."
            )


def _check_known(cfg, known):
    needed = {"diq": cfg.difficulty.perspective}.get(
        cfg.selection.method, cfg.selection.method.removeprefix("difficulty_")
    )
    if needed in config.PERSPECTIVES and needed not in known:
        raise errors.UserError(
            f"selection.method={cfg.selection.method} needs the difficulty perspective {needed!r}, "
            f"which the pool lacks; it has {', '.join(known) or 'none'}."
        )
