"""What the stages of a run left, read into memory for its report."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config
from diq_jax.report import detail, figures, opinions, studies, tables, texts
from diq_jax.run import reading, records, stages

STAGES = ("prepare", "difficulty", "influence", "selection", "finetune", "dpo", "evaluate")
MOST_POINTS = 4000  # of the pictures
THRESHOLDS = ("difficulty", "influence")
TEXTS = ("question", "reasoning", "answer")
POOL = "prepare/pool.parquet"
OWN_COLUMNS = ("id", "source", *TEXTS, "input_ids", "labels")


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Holds what the stages left, read into memory.

    Attributes:
        examples: columns in the order of the pool: example_id, source, why (lists of str);
            question, reasoning, answer (texts on the disk); difficulty, influence, loss, tokens,
            quadrant, rank, selected (arrays). Difficulty may be nan where the pool has none.
        rows: the rows as they came, on the disk.
        thresholds: difficulty (None where there is none) and influence (None where quadrants cut at
            its residual).
        results, classifier, losses, preferences: evaluate/results.json, difficulty/metrics.json,
            finetune/losses.jsonl, dpo/losses.jsonl, empty where the stage has not run.
        repeats: the rows of selection/hygiene.parquet; None where nothing was compared.
        records: stage.json of each finished stage, in order.
        study: methods compared by training in this folder; None where none were.
    """

    config: config.Config
    examples: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    thresholds: Mapping[str, float | None]
    results: Mapping[str, Any]
    classifier: Mapping[str, Any]
    losses: Sequence[Mapping[str, Any]]
    preferences: Sequence[Mapping[str, Any]]
    repeats: Sequence[Mapping[str, Any]] | None
    records: Sequence[Mapping[str, Any]]
    detail: detail.Detail
    opinions: opinions.Opinions
    study: studies.Study | None

    @property
    def has_difficulty(self) -> bool:
        """Tells whether every example has a difficulty."""
        return bool(np.isfinite(self.examples["difficulty"]).all())

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Returns the columns of the rows as they came that sort them into groups."""
        return tables.group_columns(self.rows, OWN_COLUMNS)

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """Returns the influence as it is drawn: an outlier stands at the fence."""
        return np.clip(self.examples["influence"], *figures.fences(self.examples["influence"]))

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Returns the indices of the examples in the scatters."""
        return figures.shown(self.examples["selected"], self.examples["rank"], MOST_POINTS)

    @property
    def quadrant_counts(self) -> dict[int, tuple[int, int]]:
        """Returns {quadrant: (examples, selected ones)}."""
        quadrant, selected = self.examples["quadrant"], self.examples["selected"]
        return {
            q: (int(np.sum(quadrant == q)), int(np.sum(selected & (quadrant == q))))
            for q in figures.QUADRANTS
        }


def load(context: stages.Context) -> ReportData:
    """Reads the artifacts.

    Raises:
        UserError: one of prepare, influence and selection is missing.
    """
    columns, rows = read_examples(context.workdir)
    made = (records.read(context.path(name)) for name in STAGES)
    return ReportData(
        config=context.config,
        examples=columns,
        rows=rows,
        thresholds=reading.read_record(
            context.path("selection/thresholds.json"),
            dict.fromkeys(THRESHOLDS, (float, type(None))),
        ),
        results=optional(context, "evaluate/results.json"),
        classifier=optional(context, "difficulty/metrics.json"),
        losses=_lines(context, "finetune/losses.jsonl"),
        preferences=_lines(context, "dpo/losses.jsonl"),
        repeats=context.table(detail.PAIRS).to_pylist()
        if context.path(detail.PAIRS).exists()
        else None,
        records=[record for record in made if record and record["status"] == records.DONE],
        detail=detail.load(context, columns["example_id"]),
        opinions=opinions.load(context),
        study=study(context),
    )


def read_examples(
    workdir: pathlib.Path,
) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
    """Reads the columns of ReportData.examples, and the rows as they came.

    Raises:
        UserError: one of prepare, influence and selection is missing.
    """
    scores = records.read_table(workdir, "selection/selection.parquet")
    influence = records.read_table(workdir, "influence/influence.parquet")
    names = ("example_id", "source")
    pool = records.read_table(workdir, POOL, names)
    columns: dict[str, Any] = {name: pool[name].to_pylist() for name in names}
    columns |= {name: texts.Column(workdir, POOL, name) for name in TEXTS}
    columns |= {name: influence[name].to_numpy() for name in ("loss", "tokens")}
    for name in ("difficulty", "influence", "quadrant", "rank", "selected"):
        columns[name] = scores[name].to_numpy()
    reasons = "why" in scores.column_names  # selections of earlier versions give none
    columns["why"] = scores["why"].to_pylist() if reasons else [""] * len(scores)
    return columns, texts.Column(workdir, POOL, "row", json.loads)


def study(context: stages.Context) -> studies.Study | None:
    """Reads the study in the run's folder, None where there is none."""
    return next(map(studies.read, studies.files(context.workdir)), None)


def optional(context: stages.Context, name: str) -> dict[str, Any]:
    """Reads an artifact in JSON, empty where there is none."""
    path = context.path(name)
    return reading.read_record(path, {}) if path.exists() else {}


def _lines(context, name):
    path = context.path(name)
    return reading.read_jsonl(path) if path.exists() else []
