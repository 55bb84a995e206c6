"""The selection stage: difficulty and influence -> a total order, the subset, and what else one
might take.
"""

import collections
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax import config, errors, stats
from diq_jax.data import gradient_store
from diq_jax.run import artifacts, stages
from diq_jax.selection import diversity, hygiene, hygiene_stage, methods, quadrants, reasons

POOL = "prepare/pool.parquet"
MODEL_SCORES, STORE = "difficulty/model_scores.parquet", "influence/store"


def run(context: stages.Context) -> dict[str, Any]:
    """Writes selection.parquet, baselines.parquet, thresholds.json, selected.jsonl and, unless
    selection.hygiene is off, hygiene.parquet.

    baselines.parquet holds each method's own ranks, without selection.source_cap; a method whose
    input is not there is left out. With selection.length_residual every method that reads the
    influence reads its residual; the column `influence` of selection.parquet stays as it came.

    Raises:
        UserError: the method's input is missing, or selection.source_cap or hygiene leaves fewer
            examples than the budget.
    """
    cfg = context.config
    pool = context.table(POOL, "example_id", "source", "row")
    difficulty = context.table("difficulty/difficulty.parquet")
    influence = context.table("influence/influence.parquet", "example_id", "influence", "tokens")
    ids = pool["example_id"].to_pylist()
    _check_rows(ids, difficulty, influence)

    scores = _scores(cfg, ids, difficulty, influence)
    scores |= _model_scores(context, ids) | _diversity(context, ids, scores["id_order"])
    settings = methods.Settings(
        cfg.difficulty.perspective,
        cfg.difficulty.percentile,
        cfg.selection.seed,
        cfg.selection.quadrants,
    )
    _check_input(cfg, scores, settings)
    removed, cleaned = hygiene_stage.run(context)
    last = np.array([bool(reason) for reason in removed])
    ranks = {
        m: hygiene.demote(np.asarray(methods.ranks(m, scores, settings)), last)
        for m in config.METHODS
        if not methods.missing(m, scores, settings)
    }
    keep = methods.budget(cfg.selection.retention_ratio, len(ids))
    sources = pool["source"].to_pylist()
    limit = methods.source_limit(cfg.selection.source_cap, keep)
    chosen, passed = _capped(cfg, ranks[cfg.selection.method], sources, last, keep, limit)
    selected = chosen <= keep
    hardness = difficulty[cfg.difficulty.perspective].to_numpy()
    tau_d, m_dot = quadrants.thresholds(hardness, scores["influence"], cfg.difficulty.percentile)
    quadrant = np.asarray(quadrants.quadrants(hardness, scores["influence"], tau_d, m_dot))
    outcome = reasons.Outcome(
        ranks[cfg.selection.method], selected, keep, passed, limit, sources, removed,
        cfg.selection.length_residual,
    )  # fmt: skip

    artifacts.write_table(
        context.path("selection/selection.parquet"),
        {
            "example_id": pool["example_id"],
            "difficulty": pa.array(hardness),
            "influence": influence["influence"],
            "quadrant": pa.array(quadrant),
            "rank": pa.array(chosen),
            "selected": pa.array(selected),
            "why": pa.array(reasons.why(cfg.selection.method, scores, settings, outcome)),
        },
        unknown=("difficulty",),  # of a perspective that nobody labelled
    )
    artifacts.write_table(
        context.path("selection/baselines.parquet"),
        {"example_id": pool["example_id"]} | {m: pa.array(r) for m, r in ranks.items()},
    )
    artifacts.write_json(
        context.path("selection/thresholds.json"),
        {
            "difficulty": stats.finite(tau_d),
            "influence": None if cfg.selection.length_residual else stats.finite(m_dot),
            "influence_residual": stats.finite(m_dot) if cfg.selection.length_residual else None,
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


def check(context: stages.Context) -> None:
    """Raises UserError where the prepared pool is too large for a method that is asked for."""
    path = context.path("prepare/pool.parquet")
    asked = [(field, m) for field, m in context.config.methods() if m in config.DIVERSE]
    if not asked or not path.is_file():
        return
    (field, method), rows = asked[0], pq.ParquetFile(path).metadata.num_rows
    if rows > diversity.MOST_ROWS:
        raise errors.UserError(
            f"{field}={method} compares all pairs of a pool of at most {diversity.MOST_ROWS:,} "
            f"examples; this one has {rows:,}."
        )


def _check_rows(ids, *tables):
    for table in tables:
        if table["example_id"].to_pylist() != ids:
            raise errors.UserError(
                "Difficulty, influence and pool hold different examples: redo the older stage."
            )


def _scores(cfg, ids, difficulty, influence):
    """What every pool has; a perspective that it lacks is left out."""
    id_order = methods.id_order(ids)
    values = influence["influence"].to_numpy()
    tokens = influence["tokens"].to_numpy()
    if cfg.selection.length_residual:
        values = methods.length_residual(values, tokens, id_order)
    scores = {"id_order": id_order, "influence": values, "answer_tokens": tokens}
    levels = {p: difficulty[p].to_numpy() for p in config.PERSPECTIVES}
    scores |= {p: level for p, level in levels.items() if np.isfinite(level).all()}
    return {name: jnp.asarray(value) for name, value in scores.items()}


def _model_scores(context, ids):
    if not context.path(MODEL_SCORES).exists():
        return {}
    names = ("loss", "ifd", "similarity", "reasoning_tokens")
    table = context.table(MODEL_SCORES, "example_id", *names)
    _check_rows(ids, table)
    return {name: jnp.asarray(table[name].to_numpy()) for name in names}


def _diversity(context, ids, id_order):
    """Places in the two diverse orders, and what each row added, where there is a store of few
    enough rows.
    """
    folder = context.path(STORE)
    if not (folder / "manifest.json").exists() or len(ids) > diversity.MOST_ROWS:
        return {}
    store = gradient_store.open_store(folder, verified=context.verify)
    if store.example_ids != ids:
        raise errors.UserError(f"{folder} and the pool hold different examples: redo influence.")
    by_id = np.argsort(np.asarray(id_order))
    cosines = diversity.cosines(gradient_store.unit(store.rows(0, len(ids))[by_id]))
    found = {}
    for name, gain in (("k_center", "distance"), ("facility_location", "gain")):
        order, gains = getattr(diversity, name)(cosines)
        places = np.empty(len(ids), np.int32)
        places[order] = np.arange(len(ids))
        found |= {name: places[id_order], f"{name}_{gain}": gains[id_order]}
    return {name: jnp.asarray(values) for name, values in found.items()}


def _capped(cfg, ranks, sources, last, keep, limit):
    """(ranks, passed over) under selection.source_cap; rows of `last` (n,) bool are never taken."""
    if cfg.selection.source_cap == 1:
        return ranks, np.zeros(len(ranks), bool)
    counts = collections.Counter(s for s, out in zip(sources, last, strict=True) if not out)
    room = sum(min(limit, count) for count in counts.values())
    if room < keep:
        raise errors.UserError(
            f"selection.source_cap={cfg.selection.source_cap} leaves room for {room} of the budget "
            f"of {keep} examples, at most {limit} from each of {len(set(sources))} sources: raise "
            "it."
        )
    return methods.capped(ranks, sources, keep, limit)


def _check_input(cfg, scores, settings):
    method = cfg.selection.method
    lacking = methods.missing(method, scores, settings)
    known = ", ".join(p for p in config.PERSPECTIVES if p in scores)
    if lacking in config.PERSPECTIVES:
        raise errors.UserError(
            f"selection.method={method} needs the difficulty perspective {lacking!r}, which the "
            f"pool lacks; it has {known or 'none'}."
        )
    if lacking in config.DIVERSE:
        raise errors.UserError(
            f"selection.method={method} needs {STORE}, the gradients of the base model "
            "(influence.engine=projected or factored, no warm-up), and a pool of at most "
            f"{diversity.MOST_ROWS:,} examples."
        )
    if lacking:
        raise errors.UserError(
            f"selection.method={method} needs {MODEL_SCORES}: set difficulty.model_scores=True and "
            "redo the stage difficulty."
        )
