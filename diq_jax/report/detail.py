"""What a run may hold beyond scores; the explorer shows it, or says how to get it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config
from diq_jax.data import encoded, example, gradient_store
from diq_jax.report import tables
from diq_jax.run import reading, stages

MODEL_SCORES = "difficulty/model_scores.parquet"
PAIRS = "selection/hygiene.parquet"
MOST_NEAR = 5_000  # rows; more would cost minutes
NEIGHBOURS = 6


@dataclasses.dataclass(frozen=True)
class Detail:
    """Holds the columns of the explorer that not every run has.

    Attributes:
        numbers: {name: (n,)}.
        methods: {selection method: ranks (n,)}.
        by_target: (n, Q) influence on each target or task, or None.
        targets: Q names.
        heat, pieces: for each row its answer tokens' shares of the influence, and their texts.
        near: for each row [(row, cosine of the gradients)], nearest first.
        repeats: {example_id: [(other, where, kind, similarity)]}.
        edits: decisions made by hand, {example_id, decision, reason}.
        absent: sentences.
    """

    numbers: Mapping[str, np.ndarray]
    methods: Mapping[str, np.ndarray]
    by_target: np.ndarray | None
    targets: Sequence[str]
    heat: Sequence[np.ndarray] | None
    pieces: Sequence[Sequence[str]] | None
    near: Sequence[Sequence[tuple[int, float]]] | None
    repeats: Mapping[str, Sequence[tuple[str, str, str, float]]]
    edits: Sequence[Mapping[str, Any]]
    absent: Sequence[str]


def load(context: stages.Context, ids: Sequence[str]) -> Detail:
    """Reads what the run has.

    Raises:
        UserError: an artifact holds other rows than the pool.
    """
    numbers = dict(_columns(context, "difficulty/difficulty.parquet", config.PERSPECTIVES))
    numbers.pop(context.config.difficulty.perspective, None)  # shown as the difficulty
    numbers |= _columns(context, MODEL_SCORES)
    by_target, targets, heat, pieces = _influence(context)
    near = _near(context, ids)
    absent = {
        "heat by token (influence.per_token=True)": heat is None,
        "influence on each target (influence.targets=example)": by_target is None,
        "nearest rows by gradient (influence.engine=projected or factored, a pool of at most "
        f"{MOST_NEAR:,} rows)": near is None,
    }
    return Detail(
        numbers=numbers,
        methods=_columns(context, "selection/baselines.parquet"),
        by_target=by_target,
        targets=targets,
        heat=heat,
        pieces=pieces,
        near=near,
        repeats=_repeats(context),
        edits=_edits(context),
        absent=[sentence for sentence, lacking in absent.items() if lacking],
    )


def _columns(context, path, names=None):
    """Returns {name: (n,)} of the columns of numbers of a table that may not be there."""
    if not context.path(path).exists():
        return {}
    table = context.table(path)
    names = names or [name for name in table.column_names if name != "example_id"]
    return {name: table[name].to_numpy() for name in names if name in table.column_names}


def _influence(context):
    table = context.table("influence/influence.parquet")
    by_target, targets, heat, pieces = None, [], None, None
    if "influence_by_target" in table.column_names:
        by_target = np.array(table["influence_by_target"].to_pylist(), np.float32)
        targets = _target_names(context)
    if "token_influence" in table.column_names:
        heat, pieces = table["token_influence"].to_pylist(), _pieces(context)
    return by_target, targets, heat, pieces


def _target_names(context):
    table = context.table("prepare/targets.parquet", "example_id", "task", "question")
    if context.config.influence.targets == "task":
        return sorted(set(table["task"].to_pylist()))
    columns = (table[name].to_pylist() for name in ("example_id", "task", "question"))
    return [f"{i} ({task}): {tables.cut(q, 160)}" for i, task, q in zip(*columns, strict=True)]


def _pieces(context) -> list[list[str]]:
    """Returns the text of each scored token; one inside a character has the empty text."""
    import tokenizers.decoders

    from diq_jax.models import tokenizer

    loaded = tokenizer.load_tokenizer(context.config.model.path, "model.path").backend_tokenizer
    rows = encoded.from_table(context.table("prepare/pool.parquet", *encoded.COLUMNS))
    found = []
    for row in rows:
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        texts = [stream.step(loaded, int(token)) or "" for token in row.input_ids]
        scored = np.flatnonzero(row.labels[1:] != example.IGNORED) + 1
        found.append([texts[t] for t in scored])
    return found


def _near(context, ids):
    folder = context.path("influence/store")
    if not (folder / gradient_store.FILES[0]).exists() or not 1 < len(ids) <= MOST_NEAR:
        return None
    store = gradient_store.open_store(folder, verified=context.verify)
    if store.example_ids != list(ids):
        return None
    unit, found = gradient_store.unit(store.rows(0, len(ids))), []
    for first in range(0, len(ids), 512):
        cosines = unit[first : first + 512] @ unit.T
        cosines[np.arange(len(cosines)), first + np.arange(len(cosines))] = -2  # itself
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(ids) - 1)]
        found += [
            [(int(j), float(row[j])) for j in best]
            for row, best in zip(cosines, nearest, strict=True)
        ]
    return found


def _repeats(context):
    found: dict[str, list[tuple[str, str, str, float]]] = {}
    if context.path(PAIRS).exists():
        for pair in context.table(PAIRS).to_pylist():
            told = pair["other_in"], pair["kind"], pair["similarity"]
            found.setdefault(pair["example_id"], []).append((pair["other"], *told))
            if pair["other_in"] == "pool":
                found.setdefault(pair["other"], []).append((pair["example_id"], *told))
    return found


def _edits(context):
    path = context.config.selection.edits
    return reading.read_jsonl(path) if path else []
