"""Cross-validation: every distinct text is scored once, by a model that did not see it."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from diq_jax import config, errors, trees
from diq_jax.difficulty import classifier, heads, labels, words
from diq_jax.models import encoder
from diq_jax.run import devices, parts, progress, reading, sharding

# Folders of parts, and of the state of a training; the last two end in the number of the fold.
SCORES, MODEL, STATE = "scores", "model", "state"


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Holds the distinct texts of the labelled rows and of the pool, and which fold scores each.

    Attributes:
        texts: token ids of each; questions: the words of each.
        labelled: (n,) the text of each labelled row; levels (n, 3) are its labels, nan unknown.
        pool: (rows,) the text of each pool row.
        folds: (texts,) from labels.assign_folds.
    """

    texts: list[tuple[int, ...]]
    questions: list[str]
    labelled: np.ndarray
    levels: np.ndarray
    pool: np.ndarray
    folds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Holds the encoder before training, on its devices."""

    params: dict
    cfg: encoder.EncoderConfig
    settings: config.Difficulty
    placement: devices.Placement


def score(
    task: CrossValidation,
    pretrained: Pretrained,
    folder: pathlib.Path,
    pooled: np.ndarray | None = None,
    given: dict | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Trains each fold's model and scores its texts; `folder` keeps what a killed call had done.

    Args:
        pooled: features from `pool`, where they are known.
        given: the model of every fold, made by `fit`: then nothing is trained.

    Returns:
        (probabilities (texts, 3, 5), {tokens, resumed_tokens}).
    """
    finished = parts.Parts(folder / SCORES)
    plan, examples, left, resumed = _plan(task, pretrained, folder, finished.done)
    trained = 0  # tokens
    if plan and given is None and pooled is None:
        pooled = pool(task, pretrained)
    with progress.Progress("difficulty", examples, resumed=examples - left) as bar:
        for fold in plan:
            part, model = f"{fold.index + 1}/{task.folds.max() + 1}", given
            if model is None and fold.trained.done:
                model = _restore(fold.trained, pretrained)
            elif model is None:
                assert pooled is not None  # made above
                state = folder / f"{STATE}-{fold.index}"
                model, tokens = fit(fold.index, fold.chosen, task, pretrained, pooled, state)
                resumed += fold.tokens - tokens
                trained += tokens
                _keep(fold.trained, model, pretrained)
                parts.drop(state)
            # Of a frozen encoder the labelled texts' features are known.
            known = not pretrained.settings.epochs and fold.index < pretrained.settings.folds
            offsets = word_scores(model, task, fold.batches)
            for batch in fold.batches:
                found = predict(model, pretrained, task, batch, offsets, pooled if known else None)
                _check_finite(found, task, batch)
                finished.add(batch, {"probabilities": found.reshape(len(batch), -1)})
                bar.update(len(batch), sum(len(task.texts[text]) for text in batch), part=part)
            parts.drop(fold.trained.folder)
        counts = {"tokens": resumed + trained + bar.tokens, "resumed_tokens": resumed}
    probabilities = np.zeros((len(task.texts), task.levels.shape[1], labels.LEVELS))
    for rows, columns in finished.batches():
        probabilities[rows] = columns["probabilities"].reshape(-1, *probabilities.shape[1:])
    return probabilities, counts


@dataclasses.dataclass(frozen=True)
class _Fold:
    """Describes a fold: rows to train on (n,) bool and their tokens, batches, its model's place."""

    index: int
    chosen: np.ndarray
    batches: list[list[int]]
    trained: parts.Parts
    tokens: int


def _plan(task, pretrained, folder, done) -> tuple[list[_Fold], int, int, int]:
    """Returns (folds left, examples to score, those left, tokens of those done)."""
    settings, lengths = pretrained.settings, np.array([len(text) for text in task.texts])
    plan, examples, left, resumed = [], 0, 0, 0
    for fold in np.unique(task.folds):
        mine, chosen = np.flatnonzero(task.folds == fold), task.folds[task.labelled] != fold
        batches = list(classifier.scoring_batches(task.texts, mine.tolist(), settings))
        todo = [batch for batch in batches if not done.issuperset(batch)]
        trained = parts.Parts(folder / f"{MODEL}-{fold}")
        tokens = settings.epochs * int(lengths[task.labelled[chosen]].sum())
        examples += len(mine)
        left += sum(map(len, todo))
        resumed += sum(int(lengths[batch].sum()) for batch in batches if batch not in todo)
        if not todo or trained.done:
            resumed += tokens
        if todo:
            plan.append(_Fold(int(fold), chosen, todo, trained, tokens))
    return plan, examples, left, resumed


def _check_finite(found, task, batch) -> None:
    finite = np.isfinite(found).all(axis=(1, 2))
    if not finite.all():
        question = task.questions[batch[int(np.argmin(finite))]]
        raise errors.UserError(
            f"The difficulty of the question {reading.shorten(question)} is not finite; check "
            "difficulty.encoder and difficulty.learning_rate."
        )


def pool(task: CrossValidation, pretrained: Pretrained) -> np.ndarray:
    """Returns the pretrained encoder's features (texts, F) of the labelled texts; 0 for others."""
    p = pretrained
    out = np.zeros((len(task.texts), p.cfg.num_layers * p.cfg.model_dim), np.float32)
    rows = set(task.labelled.tolist())
    with progress.Progress("features", len(rows)) as bar:
        for batch in classifier.scoring_batches(task.texts, rows, p.settings):
            out[batch] = classifier.features(
                p.params, p.cfg, p.settings, task.texts, batch, p.placement
            )
            bar.update(len(batch), sum(len(task.texts[text]) for text in batch))
    return out


def fit(
    fold: int,
    chosen: np.ndarray,
    task: CrossValidation,
    pretrained: Pretrained,
    pooled: np.ndarray,
    folder: pathlib.Path,
) -> tuple[dict, int]:
    """Trains on the labelled rows that are `chosen` (n,).

    Args:
        folder: where the state of the training goes when SIGTERM comes.

    Returns:
        {"encoder", "heads"} and, with difficulty.words, "words" (words.to_arrays, and "kernel" (V,
        3, 5)); tokens of this call.

    Raises:
        UserError: training leads to a loss or parameters that are not finite.
    """
    settings, placement = pretrained.settings, pretrained.placement
    texts = [task.texts[text] for text in task.labelled]
    rows = np.flatnonzero(chosen)
    asked = [task.questions[task.labelled[row]] for row in rows]
    vectorizer = words.fit(asked) if settings.words else None
    terms = None if vectorizer is None else vectorizer.transform(asked)
    found, kernel = heads.fit(pooled[task.labelled[rows]], terms, task.levels[rows])
    model: dict[str, Any] = {"encoder": pretrained.params, "heads": placement.replicate(found)}
    offsets, tokens = None, 0
    if vectorizer is not None and kernel is not None:
        model["words"] = words.to_arrays(vectorizer) | {"kernel": kernel}
        questions = [task.questions[text] for text in task.labelled]
        offsets = words.scores(model["words"], questions) if settings.epochs else None
    if settings.epochs:
        params, _, tokens = classifier.train(
            {name: model[name] for name in ("encoder", "heads")},
            pretrained.cfg, settings, texts, task.levels, offsets, rows, fold, placement, folder,
        )  # fmt: skip
        model |= params
    return sound(model), tokens


def sound(model: dict) -> dict:
    """Returns the model. Raises UserError where its training ruined it."""
    if bad := trees.not_finite({name: model[name] for name in ("encoder", "heads")}):
        raise errors.UserError(
            f"The difficulty classifier has parameters that are not finite after its training "
            f"({bad[0]}): try a lower difficulty.learning_rate."
        )
    return model


def word_scores(model: dict, task: CrossValidation, batches: list[list[int]]) -> np.ndarray | None:
    """Returns what words add to the batches' texts, (texts, 3, 5); None for a model without."""
    if "words" not in model:
        return None
    mine = [text for batch in batches for text in batch]
    found = words.scores(model["words"], [task.questions[text] for text in mine])
    out = np.zeros((len(task.texts), *found.shape[1:]), np.float32)
    out[mine] = found
    return out


def predict(
    model: dict,
    pretrained: Pretrained,
    task: CrossValidation,
    batch: list[int],
    offsets: np.ndarray | None,
    pooled: np.ndarray | None,
) -> np.ndarray:
    """Returns probabilities (len(batch), 3, 5) float32 of one batch of classifier.scoring_batches.

    Args:
        offsets: from `word_scores`; pooled: features (texts, F) where they are known, or None.
    """
    p = pretrained
    if pooled is None:
        found = classifier.features(
            model["encoder"], p.cfg, p.settings, task.texts, batch, p.placement
        )
    else:
        found = pooled[batch]
    own = None if offsets is None else offsets[batch]
    return np.exp(heads.apply(jax.device_get(model["heads"]), found, own))


def _keep(trained, model, pretrained):
    """Keeps a model as one part, without an encoder that is as it was."""
    kept = {name: tree for name, tree in model.items() if tree is not pretrained.params}
    data = safetensors.numpy.save(trees.named_leaves(jax.tree.map(sharding.whole, kept)))
    trained.add([0], {"safetensors": [data]})


def _restore(trained, pretrained) -> dict:
    tree = trees.insert({}, safetensors.numpy.load(trained.columns()["safetensors"][0]))
    placed = {
        name: pretrained.placement.replicate(x) for name, x in tree.items() if name != "words"
    }
    return {"encoder": pretrained.params} | tree | placed
