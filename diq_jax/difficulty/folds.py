"""Cross-validation: every distinct text is scored once, by a model that did not see it."""

import dataclasses
import pathlib

import jax
import numpy as np
import safetensors.numpy

from diq_jax import config, errors, trees
from diq_jax.difficulty import classifier, heads, labels, words
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, devices, progress, reading


@dataclasses.dataclass(frozen=True)
class Task:
    """The distinct texts of the labelled rows and of the pool, and who may score them.

    Attributes:
        texts: token ids of each; questions: the words of each.
        labelled: (n,) the text of each labelled row; levels (n, 3) are its labels, nan unknown.
        pool: (rows,) the text of each pool row.
        parts: (texts,) from labels.assign_parts.
    """

    texts: list[tuple[int, ...]]
    questions: list[str]
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


def score(
    task: Task, pretrained: Pretrained, folder: pathlib.Path, pooled=None, given=None
) -> tuple[np.ndarray, dict[str, int]]:
    """Trains the model of each part and scores its texts; with what a killed call left in `folder`
    it continues after the last finished batch.

    Args:
        pooled: features from `pool`, where they are known.
        given: the model of every part, made by `fit`: then nothing is trained.

    Returns:
        (probabilities (texts, 3, 5), {tokens, resumed_tokens}).
    """
    with artifacts.Journal(folder / "scores.jsonl") as journal:
        counts = _score(task, pretrained, folder, pooled, given, journal)
        probabilities = np.zeros((len(task.texts), task.levels.shape[1], labels.LEVELS))
        for entry in journal.entries:
            probabilities[entry["texts"]] = entry["probabilities"]
    return probabilities, counts


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part with texts to score: the labelled rows to train on (n,) bool, batches of texts, and
    where the trained model waits until they are scored.
    """

    index: int
    chosen: np.ndarray
    batches: list[list[int]]
    weights: pathlib.Path


def _plan(task, pretrained, folder, journal) -> tuple[list[_Part], int, int, int]:
    """(parts that are not done, examples to train on and to score, those left, tokens done)."""
    settings, lengths = pretrained.settings, np.array([len(text) for text in task.texts])
    done = {text for entry in journal.entries for text in entry["texts"]}
    plan, examples, left, resumed = [], 0, 0, 0
    for part in np.unique(task.parts):
        mine, chosen = np.flatnonzero(task.parts == part), task.parts[task.labelled] != part
        batches = list(classifier.scoring_batches(task.texts, mine.tolist(), settings))
        todo = [batch for batch in batches if batch[0] not in done]
        weights = folder / f"part-{part}.safetensors"
        untrained = bool(todo) and not weights.exists()
        training = settings.epochs * int(chosen.sum())
        examples += training + len(mine)
        left += sum(map(len, todo)) + training * untrained
        resumed += sum(int(lengths[batch].sum()) for batch in batches if batch[0] in done)
        if not untrained:
            resumed += settings.epochs * int(lengths[task.labelled[chosen]].sum())
        if todo:
            plan.append(_Part(int(part), chosen, todo, weights))
    return plan, examples, left, resumed


def _score(task, pretrained, folder, pooled, given, journal) -> dict[str, int]:
    settings = pretrained.settings
    plan, examples, left, resumed = _plan(task, pretrained, folder, journal)
    if plan and given is None and pooled is None:
        pooled = pool(task, pretrained)
    with progress.Progress("difficulty", examples, resumed=examples - left) as bar:
        for part in plan:
            shown = {"part": f"{part.index + 1}/{task.parts.max() + 1}"}
            if given is not None:
                model = given
            elif part.weights.exists():
                model = _restore(part.weights, pretrained)
            else:
                model = fit(part.index, part.chosen, task, pretrained, pooled, bar, shown)
                _save(part.weights, model, pretrained)
            # Of a frozen encoder the labelled texts' features are known.
            known = not settings.epochs and part.index < settings.folds
            offsets = word_scores(model, task, part.batches)
            for batch in part.batches:
                found = predict(model, pretrained, task, batch, offsets, pooled if known else None)
                _check_finite(found, task, batch)
                journal.append({"texts": batch, "probabilities": found.tolist()})
                bar.update(len(batch), sum(len(task.texts[text]) for text in batch), **shown)
            part.weights.unlink(missing_ok=True)
        return {"tokens": resumed + bar.tokens, "resumed_tokens": resumed}


def _check_finite(found, task, batch) -> None:
    finite = np.isfinite(found).all(axis=(1, 2))
    if not finite.all():
        question = task.questions[batch[int(np.argmin(finite))]]
        raise errors.UserError(
            f"The difficulty of the question {reading.shorten(question)} is not finite; check "
            "difficulty.encoder and difficulty.learning_rate."
        )


def pool(task: Task, pretrained: Pretrained) -> np.ndarray:
    """Features (texts, F) by the pretrained encoder, where all parts start: of the labelled texts;
    0 for others.
    """
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


def fit(part: int, chosen, task: Task, pretrained: Pretrained, pooled, bar, shown) -> dict:
    """The model of the labelled rows that are `chosen` (n,): {"encoder", "heads"} and, with
    difficulty.words, "words" (words.to_arrays, and "kernel" (V, 3, S)).

    Raises:
        UserError: training leaves parameters that are not finite.
    """
    settings, placement = pretrained.settings, pretrained.placement
    texts = [task.texts[text] for text in task.labelled]
    rows, held = classifier.hold_out(texts, np.flatnonzero(chosen), settings, part)
    asked = [task.questions[task.labelled[row]] for row in rows]
    vectorizer = words.fit(asked) if settings.words else None
    found, kernel = heads.fit(
        pooled[task.labelled[rows]],
        None if vectorizer is None else vectorizer.transform(asked),
        task.levels[rows],
        settings,
    )
    model = {"encoder": pretrained.params, "heads": placement.replicate(found)}
    offsets = None
    if vectorizer is not None:
        model["words"] = words.to_arrays(vectorizer) | {"kernel": kernel}
        questions = [task.questions[text] for text in task.labelled]
        offsets = words.scores(model["words"], questions) if settings.epochs else None
    if not settings.epochs:
        return sound(model)
    trained = classifier.train(
        {name: model[name] for name in ("encoder", "heads")},
        pretrained.cfg,
        settings,
        texts,
        task.levels,
        offsets,
        rows,
        held,
        part,
        placement,
        lambda rows, tokens, loss: bar.update(rows, tokens, loss=f"{loss:.3f}", **shown),
    )
    return sound(model | trained)


def sound(model):
    """Returns the model. Raises UserError where its training ruined it."""
    if bad := trees.not_finite({name: model[name] for name in ("encoder", "heads")}):
        raise errors.UserError(
            f"The difficulty classifier has parameters that are not finite after its training "
            f"({bad[0]}): try a lower difficulty.learning_rate."
        )
    return model


def word_scores(model, task: Task, batches: list[list[int]]) -> np.ndarray | None:
    """What words add to the scores of the batches' texts, (texts, 3, S), 0 for other texts; None
    for a model without words.
    """
    if "words" not in model:
        return None
    mine = [text for batch in batches for text in batch]
    found = words.scores(model["words"], [task.questions[text] for text in mine])
    out = np.zeros((len(task.texts), *found.shape[1:]), np.float32)
    out[mine] = found
    return out


def predict(
    model, pretrained: Pretrained, task: Task, batch: list[int], offsets, pooled
) -> np.ndarray:
    """Probabilities (len(batch), 3, 5) float32 of one batch of classifier.scoring_batches.

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


def _save(path, model, pretrained) -> None:
    """Without an encoder that is as it was."""
    kept = {name: tree for name, tree in model.items() if tree is not pretrained.params}
    with artifacts.atomic(path) as temporary:
        arrays = trees.named_leaves(jax.tree.map(np.asarray, kept))
        safetensors.numpy.save_file(arrays, temporary)


def _restore(path, pretrained):
    tree = trees.insert({}, safetensors.numpy.load_file(path))
    placed = {
        name: pretrained.placement.replicate(x) for name, x in tree.items() if name != "words"
    }
    return {"encoder": pretrained.params} | tree | placed
