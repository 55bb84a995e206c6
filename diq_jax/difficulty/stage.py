"""The difficulty stage: a level in [1, 5] of each pool example, for each perspective.

Every distinct text is scored once, by a model that did not see it: a labelled text by its fold's
(whatever the id of the pool row that holds it), any other by a model of all labelled rows.

The temperatures of calibration.py are reported and not applied to these levels: a labelled row's
would come from predictions of models that saw its label. Those of a trained folder as
difficulty.source are applied, for they were fitted on other rows than it is asked to score.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from diq_jax import config, errors
from diq_jax.data import example
from diq_jax.difficulty import (
    agreement,
    calibration,
    classifier,
    folds,
    labels,
    model_scores,
    trained,
)
from diq_jax.models import checkpoint, encoder, hf, tokenizer
from diq_jax.run import artifacts, devices, parts, records, stages

FIELD = "difficulty.encoder"
POOL, LEVELS = "prepare/pool.parquet", "difficulty/difficulty.parquet"
PARTIAL = "difficulty/partial"  # what a killed run continues from; removed at the end


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Fingerprints what is read beside artifacts: encoder, label files, the model's weights."""
    settings = context.config.difficulty
    found = model_scores.fingerprints(context) if settings.model_scores else {}
    if labels.is_columns(settings.source):
        return found
    if trained.is_folder(settings.source):
        return found | {labels.FIELD: trained.fingerprint(settings.source)}
    return found | {
        FIELD: checkpoint.open_checkpoint(settings.encoder, FIELD).fingerprint,
        **tokenizer.fingerprints(settings.encoder, FIELD),
        labels.FIELD: labels.fingerprint(settings.source),
    }


def check(context: stages.Context, needed: Sequence[tuple[str, str]] = ()) -> None:
    """Raises UserError for labels or an encoder that cannot be read, or a perspective unlabelled.

    Args:
        needed: (what needs it, perspective) of what reads the levels.
    """
    settings = context.config.difficulty
    if labels.is_columns(settings.source):
        known = _known_columns(context)
    elif trained.is_folder(settings.source):
        found = trained.load(settings.source)
        known = trained.known(found.temperatures)
        _open(dataclasses.replace(settings, encoder=settings.source, max_tokens=1, layers=0))
    else:
        _, _, known = _labelled(settings)
        _open(settings)
    _check_perspective(settings, known)
    for what, perspective in needed:
        if not known[config.PERSPECTIVES.index(perspective)]:
            raise errors.UserError(
                f"{what} needs the difficulty perspective {perspective!r}, which {labels.FIELD} "
                "does not label."
            )


def _known_columns(context) -> np.ndarray:
    """Returns (3,) bool: the perspectives that the pool has, as far as is known by now."""
    settings = context.config.difficulty
    names = labels.column_names(settings.source, settings.perspective)
    if context.path(POOL).is_file() and not context.path(LEVELS).is_file():
        scores = _column_scores(context)
        return np.array([np.isfinite(scores[p]).any() for p in config.PERSPECTIVES])
    return np.array([p in names for p in config.PERSPECTIVES])


def _column_scores(context) -> dict[str, np.ndarray]:
    """Reads the pool part by part: of a large one the rows would not fit into memory."""
    settings, rows, ids = context.config.difficulty, [], []
    columns = labels.column_names(settings.source, settings.perspective)
    needed = columns[settings.perspective]
    for part in records.read_batches(context.workdir, POOL, ("example_id", "row")):
        ids += part["example_id"].to_pylist()
        came = map(json.loads, part["row"].to_pylist())
        # A row without the needed column is kept whole, for the message that names the nearest.
        rows += [
            {c: row[c] for c in columns.values() if c in row} if needed in row else row
            for row in came
        ]
    return labels.column_scores(rows, ids, settings.source, settings.perspective)


def run(context: stages.Context) -> dict[str, Any]:
    """Writes difficulty.parquet, metrics.json and, where asked for, model_scores.parquet.

    A killed run continues after the last finished batch and gives identical bytes where training is
    deterministic, as on a CPU; a trained model waits on disk until its texts are scored.

    Returns:
        rows and tokens, resumed_tokens among them, the cross-validation's metrics, and the part of
        tokens and seconds that model_scores took.
    """
    settings = context.config.difficulty
    by_columns = labels.is_columns(settings.source)
    pool = context.table(POOL, "example_id", *(() if by_columns else ("question", "row")))
    measured: dict[str, Any] = {"rows": 0, "folds": 0, "perspectives": {}}
    counts: dict[str, Any] = {"tokens": 0}
    if by_columns:
        scores = _column_scores(context)
    elif trained.is_folder(settings.source):
        scores, counts = _apply(context, pool)
    else:
        scores, measured, counts = _classify(context, pool)
    artifacts.write_table(
        context.path(LEVELS),
        {"example_id": pool["example_id"]} | {p: pa.array(scores[p]) for p in config.PERSPECTIVES},
        unknown=config.PERSPECTIVES,  # those that nobody labelled
    )
    artifacts.write_json(context.path("difficulty/metrics.json"), measured)
    if settings.model_scores:
        started, found = time.time(), model_scores.run(context)
        counts |= {name: counts.get(name, 0) + tokens for name, tokens in found.items()}
        counts["model_scores"] = {"seconds": round(time.time() - started, 3), **found}
    parts.drop(context.path(PARTIAL))
    return {"rows": len(pool), **counts, "metrics": measured}


def train(context: stages.Context) -> dict[str, Any]:
    """Runs `diq train-classifier`: cross-validates, trains on all labelled rows, writes its folder.

    Returns:
        rows, tokens and resumed_tokens, and the cross-validation's metrics.
    """
    partial, out = context.path("classifier/partial"), context.path("classifier")
    settings = context.config.difficulty
    if labels.is_columns(settings.source) or trained.is_folder(settings.source):
        raise errors.UserError(f"{labels.FIELD} must be labelled rows; got {settings.source!r}.")
    questions, levels, _ = _labelled(settings)
    pretrained, hf_config = _load(settings, context.placement)
    task = _task(pretrained, questions, levels, [])
    pooled = folds.pool(task, pretrained)
    probabilities, counts = folds.score(task, pretrained, partial, pooled)
    measured = _measure(task, probabilities, questions, settings)
    rows = len(questions)
    everything, state = np.ones(rows, bool), partial / f"{folds.STATE}-{settings.folds}"
    model, new = folds.fit(settings.folds, everything, task, pretrained, pooled, state)
    tokens = settings.epochs * sum(len(task.texts[text]) for text in task.labelled)
    resumed = {"resumed_tokens": counts["resumed_tokens"] + tokens - new}
    counts = {**counts, "tokens": counts["tokens"] + tokens, **resumed}
    temperatures = {
        p: found["calibration"]["temperature"] for p, found in measured["perspectives"].items()
    }
    tok = tokenizer.load_tokenizer(settings.encoder, FIELD)
    trained.save(out, model, hf_config, tok, settings.max_tokens, temperatures)
    artifacts.write_json(out / "metrics.json", measured)
    artifacts.remove(partial)
    return {"rows": rows, **counts, "metrics": measured}


def _labelled(settings) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads (questions, levels (n, 3), (3,) bool: the perspectives that have labels)."""
    questions, levels = labels.labelled_rows(settings.source)
    known = np.asarray(np.isfinite(levels).any(axis=0))
    _check_perspective(settings, known)
    return questions, levels, known


def _check_perspective(settings, known):
    if not known[config.PERSPECTIVES.index(settings.perspective)]:
        raise errors.UserError(
            f"difficulty.perspective={settings.perspective}, but {labels.FIELD} labels only "
            f"{', '.join(np.array(config.PERSPECTIVES)[known])}."
        )


def _classify(context, pool) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Returns (scores of the pool rows, metrics, token counts)."""
    settings = context.config.difficulty
    questions, levels, known = _labelled(settings)
    pretrained, _ = _load(settings, context.placement)
    task = _task(pretrained, questions, levels, _pool_questions(context, pool))
    probabilities, counts = folds.score(task, pretrained, context.path(PARTIAL))
    measured = _measure(task, probabilities, questions, settings)
    return _scores(probabilities[task.pool], known), measured, counts


def _apply(context, pool) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Returns (scores of the pool rows by the folder of difficulty.source, token counts)."""
    settings = context.config.difficulty
    found = trained.load(settings.source)
    known = trained.known(found.temperatures)
    _check_perspective(settings, known)
    settings = dataclasses.replace(
        settings, encoder=settings.source, max_tokens=found.max_tokens, layers=0, epochs=0
    )
    pretrained, _ = _load(settings, context.placement)
    none = np.zeros((0, len(config.PERSPECTIVES)), np.float32)
    task = _task(pretrained, [], none, _pool_questions(context, pool))
    model = found.model | {"encoder": pretrained.params}
    probabilities, counts = folds.score(task, pretrained, context.path(PARTIAL), given=model)
    for i, perspective in enumerate(config.PERSPECTIVES):
        if perspective in found.temperatures:
            log_p = np.log(np.maximum(probabilities[:, i], 1e-30))
            probabilities[:, i] = np.exp(
                calibration.tempered(log_p, found.temperatures[perspective])
            )
    return _scores(probabilities[task.pool], known), counts


def _measure(task, probabilities, questions, settings):
    parts = task.folds[task.labelled]
    return agreement.measure(
        task.levels, probabilities[task.labelled], questions, parts, settings.seed
    )


def _scores(probabilities, known) -> dict[str, np.ndarray]:
    """Returns {perspective: (rows,) expected levels}, nan where the perspective has no labels."""
    expected = classifier.expected_level(probabilities)
    expected[:, ~known] = np.nan
    return {p: expected[:, i] for i, p in enumerate(config.PERSPECTIVES)}


def _open(settings) -> tuple[checkpoint.Checkpoint, encoder.EncoderConfig]:
    """Opens the encoder, without its weights, and checks it against its config and the settings."""
    opened = checkpoint.open_checkpoint(settings.encoder, FIELD)
    cfg = encoder.encoder_config(opened.config, FIELD)
    hf.check_encoder(opened, cfg, FIELD)
    for name, most in (("max_tokens", cfg.max_positions), ("layers", cfg.num_layers)):
        value = getattr(settings, name)
        expected = f"at most {most}, as {settings.encoder} has it"
        errors.check(f"difficulty.{name}", value <= most, expected, value)
    return opened, cfg


def _load(settings, placement) -> tuple[folds.Pretrained, dict[str, Any]]:
    """Loads (the encoder, its config.json)."""
    opened, cfg = _open(settings)
    params = hf.load_encoder(opened, cfg, np.float32, FIELD)
    layers = settings.layers or cfg.num_layers
    params = params | {"layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
    cfg = dataclasses.replace(cfg, num_layers=layers)
    # One jit serves both strategies: the mesh is there under pmap too.
    placement = devices.Placement(placement.mesh)
    return folds.Pretrained(placement.replicate(params), cfg, settings, placement), opened.config


def _task(
    pretrained, questions: Sequence[str], levels, pool: Sequence[str]
) -> folds.CrossValidation:
    """Treats texts that the encoder cannot tell apart as one, and takes the words of the first."""
    settings = pretrained.settings
    encode = tokenizer.load_tokenizer(settings.encoder, FIELD)
    asked = [*questions, *pool]
    ids = encode(asked, truncation=True, max_length=settings.max_tokens)["input_ids"]
    texts: dict[tuple[int, ...], int] = {}
    rows = np.array([texts.setdefault(tuple(row), len(texts)) for row in ids])
    largest = max(max(text) for text in texts)
    if largest >= pretrained.cfg.vocab_size:
        raise errors.UserError(
            f"{FIELD}: the tokenizer of {settings.encoder} gives token {largest}, its encoder has "
            f"{pretrained.cfg.vocab_size}."
        )
    _, first = np.unique(rows, return_index=True)
    labelled, in_pool = np.split(rows, [len(questions)])
    parts = np.full(len(texts), settings.folds)
    if questions:
        parts = labels.assign_folds(labelled, len(texts), settings.folds, settings.seed)
    return folds.CrossValidation(
        list(texts), [asked[i] for i in first], labelled, levels, in_pool, parts
    )


def _pool_questions(context, pool) -> list[str]:
    """Returns the questions; for a pre-tokenised row, which has none, its decoded prompt."""
    questions = pool["question"].to_pylist()
    missing = [i for i, question in enumerate(questions) if not question.strip()]
    if missing:
        decode = tokenizer.load_tokenizer(context.config.model.path, "model.path").decode
        rows = context.table(POOL, "input_ids", "labels").take(missing).to_pylist()
        for i, row in zip(missing, rows, strict=True):
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            prompt = [token for token, label in pairs if label == example.IGNORED]
            questions[i] = decode(prompt, skip_special_tokens=True)
    return questions
