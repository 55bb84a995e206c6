"""The difficulty stage: a level in [1, 5] of each pool example, for each perspective.

Every distinct text is scored once, by a model that did not see it: a labelled text by its fold's
(whatever the id of the pool row that holds it), any other by a model of all labelled rows.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import safetensors.numpy

from diq_jax.common import artifacts, config, devices, errors, metrics, progress, stages, trees
from diq_jax.data import example
from diq_jax.difficulty import classifier, labels, model_scores
from diq_jax.models import checkpoint, hf, tokenizer
from diq_jax.models import config as model_config

FIELD = "difficulty.encoder"
PARTIAL = "difficulty/partial"  # what a killed run continues from; removed at the end


@dataclasses.dataclass(frozen=True)
class Task:
    """The distinct texts of the labelled rows and of the pool, and who may score them.

    Attributes:
        texts: token ids of each.
        labelled: (n,) the text of each labelled row; levels (n, 3) are its labels, nan unknown.
        pool: (rows,) the text of each pool row.
        parts: (texts,) from labels.assign_parts.
    """

    texts: list[tuple[int, ...]]
    labelled: np.ndarray
    levels: np.ndarray
    pool: np.ndarray
    parts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The encoder before training, on its devices."""

    params: dict
    cfg: model_config.EncoderConfig
    settings: config.Difficulty
    placement: devices.Placement


def fingerprints(context: stages.Context) -> dict[str, str]:
    """What the stage reads beside artifacts: the encoder and the label files; for the model's
    scores, its weights.
    """
    settings = context.config.difficulty
    found = model_scores.fingerprints(context) if settings.model_scores else {}
    if labels.is_columns(settings.source):
        return found
    return found | {
        FIELD: checkpoint.open_checkpoint(settings.encoder, FIELD).fingerprint,
        labels.FIELD: labels.fingerprint(settings.source),
    }


def run(context: stages.Context) -> dict[str, Any]:
    """Writes difficulty/difficulty.parquet (example_id, knowledge, reasoning, overall),
    metrics.json and, with difficulty.model_scores, model_scores.parquet.

    A killed run continues after the last finished batch and gives identical bytes where training is
    deterministic, as on a CPU; a trained model waits on disk until its texts are scored.

    Returns:
        rows and tokens, resumed_tokens among them, the cross-validation's metrics, and the part of
        tokens and seconds that model_scores took.
    """
    settings = context.config.difficulty
    pool = artifacts.read_table(context.path("prepare/pool.parquet"))
    ids = pool["example_id"].to_pylist()
    if labels.is_columns(settings.source):
        rows = [json.loads(row) for row in pool["row"].to_pylist()]
        scores = labels.column_scores(rows, ids, settings.source, settings.perspective)
        measured, counts = {"rows": 0, "folds": 0, "perspectives": {}}, {"tokens": 0}
    else:
        scores, measured, counts = _classify(context, pool)
    artifacts.write_table(
        context.path("difficulty/difficulty.parquet"),
        {"example_id": pool["example_id"]} | {p: pa.array(scores[p]) for p in config.PERSPECTIVES},
    )
    artifacts.write_json(context.path("difficulty/metrics.json"), measured)
    if settings.model_scores:
        started, found = time.time(), model_scores.run(context)
        counts |= {name: counts.get(name, 0) + tokens for name, tokens in found.items()}
        counts["model_scores"] = {"seconds": round(time.time() - started, 3), **found}
    shutil.rmtree(context.path(PARTIAL), ignore_errors=True)
    return {"rows": len(ids), **counts, "metrics": measured}


def measure(levels, expected, lengths, folds: int) -> dict[str, Any]:
    """Cross-validated agreement with the labels, beside what needs no model.

    Args:
        levels: (n, 3) labels, nan unknown; expected: (n, 3) out-of-fold expected levels.
        lengths: (n,) of the questions.

    Returns:
        rows, folds, and for perspectives that have labels {name: spearman, mae (levels), kappa
        (quadratic weights, of the rounded level), baselines: {question length, median level}}; None
        where undefined. The median is that of all labels: a little better than any that a fold
        could know.
    """
    found = {}
    for i, perspective in enumerate(config.PERSPECTIVES):
        known = np.isfinite(levels[:, i])
        if not known.any():
            continue
        label, level, length = levels[known, i], expected[known, i], lengths[known]
        median = np.full(len(label), np.median(label))
        found[perspective] = _agreement(label, level) | {
            "baselines": {
                "question length": {"spearman": metrics.finite(metrics.spearman(length, label))},
                "median level": _agreement(label, median),
            }
        }
    return {"rows": len(levels), "folds": folds, "perspectives": found}


def _agreement(label, level):
    rounded = np.rint(level).astype(int)
    return {
        "spearman": metrics.finite(metrics.spearman(level, label)),
        "mae": float(np.mean(np.abs(level - label))),
        "kappa": metrics.finite(
            metrics.quadratic_kappa(np.rint(label).astype(int), rounded, labels.LEVELS)
        ),
    }


def _classify(context, pool) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(scores of the pool rows, metrics, token counts)."""
    settings = context.config.difficulty
    questions, levels = labels.labelled_rows(settings.source)
    labelled = np.isfinite(levels).any(axis=0)
    if not labelled[config.PERSPECTIVES.index(settings.perspective)]:
        raise errors.UserError(
            f"difficulty.perspective={settings.perspective}, but {labels.FIELD} labels only "
            f"{', '.join(np.array(config.PERSPECTIVES)[labelled])}."
        )
    pretrained = _load(context)
    task = _task(context, pool, questions, levels, pretrained.cfg)
    with artifacts.Journal(context.path(f"{PARTIAL}/scores.jsonl")) as journal:
        counts = _score(context, task, pretrained, journal)
        probabilities = np.zeros((len(task.texts), *levels.shape[1:], labels.LEVELS))
        for entry in journal.entries:
            probabilities[entry["texts"]] = entry["probabilities"]
    expected = classifier.expected_level(probabilities)
    expected[:, ~labelled] = np.nan  # nobody has labelled the perspective
    lengths = np.array([len(question) for question in questions])
    measured = measure(levels, expected[task.labelled], lengths, settings.folds)
    scores = expected[task.pool]
    return {p: scores[:, i] for i, p in enumerate(config.PERSPECTIVES)}, measured, counts


def _load(context) -> Pretrained:
    settings = context.config.difficulty
    opened = checkpoint.open_checkpoint(settings.encoder, FIELD)
    cfg = model_config.encoder_config(opened.config, FIELD)
    if settings.max_tokens > cfg.max_positions:
        raise errors.UserError(
            f"difficulty.max_tokens must be at most {cfg.max_positions}, the positions of "
            f"{settings.encoder}; got {settings.max_tokens}."
        )
    params = hf.load_encoder(opened, cfg, np.float32, FIELD)
    layers = settings.layers or cfg.num_layers
    if layers > cfg.num_layers:
        raise errors.UserError(
            f"difficulty.layers must be at most {cfg.num_layers}, the layers of "
            f"{settings.encoder}; got {layers}."
        )
    params = params | {"layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
    cfg = dataclasses.replace(cfg, num_layers=layers)
    # One jit serves both strategies: the mesh is there under pmap too.
    placement = dataclasses.replace(context.placement, strategy="mesh")
    return Pretrained(placement.replicate(params), cfg, settings, placement)


def _task(context, pool, questions: Sequence[str], levels, cfg) -> Task:
    """Texts that the encoder cannot tell apart, being the same tokens, are one text."""
    settings = context.config.difficulty
    encode = tokenizer.load_tokenizer(settings.encoder, FIELD)
    asked = [*questions, *_pool_questions(context, pool)]
    ids = encode(asked, truncation=True, max_length=settings.max_tokens)["input_ids"]
    texts: dict[tuple[int, ...], int] = {}
    rows = np.array([texts.setdefault(tuple(row), len(texts)) for row in ids])
    largest = max(max(text) for text in texts)
    if largest >= cfg.vocab_size:
        raise errors.UserError(
            f"{FIELD}: the tokenizer of {settings.encoder} gives token {largest}, its encoder has "
            f"{cfg.vocab_size}."
        )
    labelled, in_pool = np.split(rows, [len(questions)])
    parts = labels.assign_parts(labelled, len(texts), settings.folds, settings.seed)
    return Task(list(texts), labelled, levels, in_pool, parts)


def _pool_questions(context, pool) -> list[str]:
    """The questions; of a pre-tokenised row, which has none, its prompt, decoded."""
    questions = pool["question"].to_pylist()
    missing = [i for i, question in enumerate(questions) if not question.strip()]
    if missing:
        decode = tokenizer.load_tokenizer(context.config.model.path, "model.path").decode
        rows = pool.select(["input_ids", "labels"]).take(missing).to_pylist()
        for i, row in zip(missing, rows, strict=True):
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            prompt = [token for token, label in pairs if label == example.IGNORED]
            questions[i] = decode(prompt, skip_special_tokens=True)
    return questions


def _score(context, task: Task, pretrained: Pretrained, journal) -> dict[str, int]:
    """Trains the model of each part that is not done, and journals its texts' probabilities."""
    settings, lengths = pretrained.settings, np.array([len(text) for text in task.texts])
    done = {text for entry in journal.entries for text in entry["texts"]}
    plan, examples, left, tokens = [], 0, 0, 0
    parts = np.unique(task.parts)
    for part in parts:
        mine, chosen = np.flatnonzero(task.parts == part), task.parts[task.labelled] != part
        batches = classifier.scoring_batches(task.texts, mine.tolist(), settings)
        batches = [batch for batch in batches if batch[0] not in done]
        weights = context.path(f"{PARTIAL}/part-{part}.safetensors")
        training = settings.epochs * int(chosen.sum())
        examples += training + len(mine)
        tokens += settings.epochs * int(lengths[task.labelled[chosen]].sum())
        tokens += int(lengths[mine].sum())
        if batches:
            left += sum(map(len, batches)) + (0 if weights.exists() else training)
            plan.append((int(part), chosen, batches, weights))

    pooled = _pooled(task, pretrained) if plan else None
    with progress.Progress("difficulty", examples, resumed=examples - left) as bar:
        for part, chosen, batches, weights in plan:
            shown = {"part": f"{part + 1}/{len(parts)}"}
            if weights.exists():
                params = _restore(weights, pretrained)
            else:
                params = _train(part, chosen, task, pretrained, pooled, bar, shown)
                _save(weights, params)
            for batch in batches:
                found = classifier.predict(
                    params, pretrained.cfg, settings, task.texts, batch, pretrained.placement
                )
                journal.append({"texts": batch, "probabilities": found.tolist()})
                bar.update(len(batch), int(lengths[batch].sum()), **shown)
            weights.unlink()
        return {"tokens": tokens, "resumed_tokens": tokens - bar.tokens}


def _pooled(task, pretrained) -> np.ndarray:
    """Features (n, D) of the labelled rows by the pretrained encoder, where all parts start."""
    p = pretrained
    out = np.zeros((len(task.texts), p.cfg.model_dim), np.float32)
    for batch in classifier.scoring_batches(task.texts, set(task.labelled.tolist()), p.settings):
        out[batch] = classifier.features(
            p.params, p.cfg, p.settings, task.texts, batch, p.placement
        )
    return out[task.labelled]


def _train(part, chosen, task, pretrained, pooled, bar, shown):
    return classifier.train(
        pretrained.params,
        pretrained.cfg,
        pretrained.settings,
        [task.texts[text] for text in task.labelled],
        task.levels,
        pooled,
        chosen,
        part,
        pretrained.placement,
        lambda rows, tokens, loss: bar.update(rows, tokens, loss=f"{loss:.3f}", **shown),
    )


def _save(path, params) -> None:
    arrays = trees.named_leaves(jax.tree.map(np.asarray, params))
    with artifacts.atomic(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary)


def _restore(path, pretrained):
    arrays = safetensors.numpy.load_file(path)
    tree = {"encoder": pretrained.params, "heads": {"kernel": 0, "bias": 0}}
    return pretrained.placement.replicate(trees.map_named(lambda name, _: arrays[name], tree))
