"""The selection stage: difficulty and influence -> a total order, the subset, other methods'."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax import config, errors, stats
from diq_jax.data import gradient_store
from diq_jax.run import artifacts, records, stages
from diq_jax.selection import by_hand, diversity, handoff, hygiene_stage, methods
from diq_jax.selection import select as selecting

POOL = "prepare/pool.parquet"
INFLUENCE, TUNED = "influence/influence.parquet", "influence/tuned.parquet"
MODEL_SCORES, STORE = "difficulty/model_scores.parquet", "influence/store"


def run(context: stages.Context) -> dict[str, Any]:
    """Writes selection.parquet, baselines.parquet, thresholds.json, handoff.py's files, hygiene.

    baselines.parquet holds each method's own ranks, without selection.source_cap; a method whose
    input is not there is left out. With selection.length_residual every method that reads the
    influence reads its residual; the column `influence` of selection.parquet stays as it came.

    Raises:
        UserError: the method's input is missing, or selection.source_cap or hygiene leaves fewer
            examples than the budget.
    """
    cfg = context.config
    pool = context.table(POOL, "example_id", "source")
    ids = pool["example_id"].to_pylist()
    scores, levels = read_scores(context, ids)
    if cfg.selection.method.startswith(methods.FILE):
        scores["listed"] = by_hand.listed(cfg.selection.method.removeprefix(methods.FILE), ids)
    removed, cleaned = hygiene_stage.run(context)
    found = selecting.select(
        scores, levels, perspective=cfg.difficulty.perspective,
        percentile=cfg.difficulty.percentile, sources=pool["source"].to_pylist(), removed=removed,
        decided=by_hand.decisions(cfg.selection.edits, ids) if cfg.selection.edits else None,
        **dataclasses.asdict(cfg.selection),
    )  # fmt: skip
    influence = pa.array(scores["influence"])
    own = {
        "quadrant": pa.array(found.quadrants), "rank": pa.array(found.ranks),
        "selected": pa.array(found.selected), "why": pa.array(found.why),
    }  # fmt: skip
    _write(context, found, pool, levels[cfg.difficulty.perspective], influence, own)
    _hand_off(context, found, levels, scores, own)
    quadrants = {f"Q{q}": found.quadrants == q for q in (1, 2, 3, 4)}
    return {
        "rows": len(ids),
        "selected": found.keep,
        "quadrants": {name: int(inside.sum()) for name, inside in quadrants.items()},
        "selected_quadrants": {
            name: int((inside & found.selected).sum()) for name, inside in quadrants.items()
        },
        **cleaned,
    }


def read_scores(
    context: stages.Context, ids: Sequence[str], diverse: bool = True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what select.select takes: a pool's scores, and each perspective's levels.

    Args:
        diverse: whether to compute the diverse orders, which compare all pairs of gradients.

    Raises:
        UserError: they are of other examples than `ids`.
    """
    difficulty = context.table("difficulty/difficulty.parquet")
    influence = context.table(INFLUENCE, "example_id", "influence", "tokens")
    _check_rows(ids, difficulty, influence)
    scores = {name: influence[name].to_numpy() for name in ("influence", "tokens")}
    scores |= {"example_ids": list(ids)} | _by_target(context)
    scores |= _diversity(context, ids) if diverse else {}
    scores |= _more(context, ids, MODEL_SCORES, ("loss", "ifd", "similarity", "reasoning_tokens"))
    if context.path(TUNED).exists():
        names = [n for n in records.OPTIONAL[TUNED] if n in _names(context.path(TUNED))]
        scores |= _more(context, ids, TUNED, names)
    return scores, {p: difficulty[p].to_numpy() for p in config.PERSPECTIVES}


def _write(context, found, pool, difficulty, influence, own):
    artifacts.write_table(
        context.path("selection/selection.parquet"),
        {
            "example_id": pool["example_id"],
            "difficulty": pa.array(difficulty),
            "influence": influence,
            **own,
        },
        unknown=("difficulty",),  # of a perspective that nobody labelled
    )
    artifacts.write_table(
        context.path("selection/baselines.parquet"),
        {"example_id": pool["example_id"]} | {m: pa.array(r) for m, r in found.orders.items()},
    )
    tau_d, m_dot = map(stats.finite, found.thresholds)
    residual = context.config.selection.length_residual
    artifacts.write_json(
        context.path("selection/thresholds.json"),
        {
            "difficulty": tau_d,
            "influence": None if residual else m_dot,
            "influence_residual": m_dot if residual else None,
            "selected": found.keep,
        },
    )


def _hand_off(context, found, levels, scores, own):
    """Joins what is known of each row, for handoff.py."""
    columns = {f"difficulty_{p}": pa.array(levels[p]) for p in levels}
    columns["loss"] = context.table(INFLUENCE, "loss")["loss"]
    names = ("influence", "alignment", "tokens", "ifd", "similarity", "reasoning_tokens")
    names += (*records.OPTIONAL[TUNED],)
    columns |= {name: pa.array(scores[name]) for name in names if name in scores}
    columns |= {"repeats": handoff.repeats(context, scores["example_ids"]), **own}
    handoff.write(context, np.argsort(found.ranks)[: found.keep], columns)


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Hashes what selection reads from outside the run."""
    found = {field: artifacts.sha256(path) for field, path in _by_hand(context).items()}
    return {**hygiene_stage.fingerprints(context), **found}


def check(context: stages.Context) -> None:
    """Raises UserError for a missing file, or a pool that is too large for a method."""
    _by_hand(context)
    path = context.path(POOL)
    asked = [found for found in methods.asked(context.config) if "store" in methods.parts(found[1])]
    if not asked or not path.is_file():
        return
    (field, method), rows = asked[0], pq.ParquetFile(path).metadata.num_rows
    if rows > methods.MOST_ROWS:
        raise errors.UserError(
            f"{field}={method} compares all pairs of a pool of at most {methods.MOST_ROWS:,} "
            f"examples; this one has {rows:,}."
        )


def _by_hand(context):
    """Finds the files by which people decide, {field: path}."""
    settings = context.config.selection
    named = {"selection.edits": settings.edits}
    if settings.method.startswith(methods.FILE):
        named["selection.method"] = settings.method.removeprefix(methods.FILE)
    return {field: by_hand.existing(path, field) for field, path in named.items() if path}


def _check_rows(ids, *tables):
    for table in tables:
        if table["example_id"].to_pylist() != ids:
            raise errors.UserError(
                "Difficulty, influence and pool hold different examples: redo the older stage."
            )


def _more(context, ids, file, names):
    if not context.path(file).exists():
        return {}
    table = context.table(file, "example_id", *names)
    _check_rows(ids, table)
    return {name: table[name].to_numpy() for name in names}


def _by_target(context):
    """Reads the influence on each of several targets, their names, and the alignment with them."""
    name, there = "influence_by_target", _names(context.path(INFLUENCE))
    if name not in there:
        return {}
    lists = context.table(INFLUENCE, name)[name].combine_chunks()
    groups = (records.read(context.path("influence")) or {}).get("target_groups", [])
    found = {"by_target": np.stack(lists.to_numpy(False)), "groups": groups}
    if "alignment" in there:
        found["alignment"] = context.table(INFLUENCE, "alignment")["alignment"].to_numpy()
    return found


def _names(path):
    return pq.read_schema(path).names if path.exists() else []


def _diversity(context, ids):
    """Orders by gradients alone, where there is a store of few enough rows."""
    folder = context.path(STORE)
    if not (folder / "manifest.json").exists() or len(ids) > methods.MOST_ROWS:
        return {}
    store = gradient_store.open_store(folder, verified=context.verify)
    if store.example_ids != ids:
        raise errors.UserError(f"{folder} and the pool hold different examples: redo influence.")
    rows = gradient_store.unit(store.rows(0, len(ids)))
    return diversity.orders(rows, methods.id_order(ids))
