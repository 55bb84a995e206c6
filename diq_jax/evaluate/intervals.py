"""What the benchmark numbers say: means with bootstrap intervals, and paired differences of models.

Dims: Q questions, M models, S bootstrap samples.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

# Of each question, by likelihoods; see `results`.
METRICS = (
    "test_loss", "test_loss_without_end", "accuracy", "accuracy_norm",
    "choice_loss", "choice_loss_letters", "brier", "margin",
)  # fmt: skip
# Where an answer is a text, without options.
TEXT_METRICS = ("test_loss", "test_loss_without_end")
# Where answers are generated: accuracy is of those.
GENERATED_METRICS = tuple(metric for metric in METRICS if metric != "accuracy_norm")
HIGHER_IS_BETTER = ("accuracy", "accuracy_norm", "margin")  # of all others less is better


def estimates(values: ArrayLike, samples: int, seed: int | Sequence[int]) -> np.ndarray:
    """Computes the mean over questions, then in each resampling: (Q, ...) -> (1 + S, ...) float64.

    Questions are drawn with replacement, the same for every column; so the difference of two
    columns is the paired bootstrap of their difference.
    """
    values = np.asarray(values, np.float64)
    flat = values.reshape(len(values), -1)
    out = np.empty((1 + samples, flat.shape[1]))
    out[0] = np.mean(flat, axis=0)
    rng = np.random.Generator(np.random.PCG64(seed))
    for resampled in out[1:]:
        # Counts instead of a gather: (S, Q, ...) would not fit for large test sets.
        counts = np.bincount(rng.integers(0, len(flat), len(flat)), minlength=len(flat))
        resampled[:] = counts @ flat / len(flat)
    return out.reshape(1 + samples, *values.shape[1:])


def summary(column: np.ndarray) -> dict[str, float]:
    """Summarizes a column (1 + S,) of `estimates` as its mean and 95 % percentile interval."""
    low, high = np.percentile(column[1:], [2.5, 97.5])
    return {"mean": float(column[0]), "low": float(low), "high": float(high)}


def results(
    names: Sequence[str],
    targets: np.ndarray,
    questions: np.ndarray,
    tasks: Sequence[str],
    versus: Mapping[str, Sequence[str]],
    samples: int,
    seed: int,
    metrics: Sequence[str] = METRICS,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """Makes the `models` part of evaluate/results.json.

    Args:
        names: M models.
        targets: (targets, M) mean answer-token losses, nats per token.
        questions: (Q, M, len(metrics)), for each question and model; of METRICS the loss of the
            right option in nats per token, with and without the end of the turn; 1 for a right
            choice by raw and by length-normalised likelihood, else 0; the choice loss by raw
            likelihoods and by those of the letters, the Brier score and the margin (options.py).
        tasks: the task of each question.
        versus: for each model, those that it is compared with: its own value minus theirs.
        groups: {name: tasks} to average over, each task weighing the same.
    """

    def by_metric(questions):
        drawn = estimates(questions, samples, seed)
        return {metric: drawn[..., k] for k, metric in enumerate(metrics)}

    whole = {"target_loss": estimates(targets, samples, seed), **by_metric(questions)}
    labels, groups = np.asarray(tasks), groups or {}
    by_task = {task: by_metric(questions[labels == task]) for task in sorted(set(tasks))}
    means = averages(questions, tasks, groups, samples, seed, metrics)

    def averaged(column):
        return {
            group: {"tasks": len(groups[group])} | {m: summary(column(x)) for m, x in found.items()}
            for group, found in means.items()
        }

    out = {}
    for i, name in enumerate(names):
        out[name] = {metric: summary(x[:, i]) for metric, x in whole.items()}
        out[name]["tasks"] = {
            task: {"questions": int(np.count_nonzero(labels == task))}
            | {metric: summary(x[:, i]) for metric, x in drawn.items()}
            for task, drawn in by_task.items()
        }
        others = {other: names.index(other) for other in versus[name]}
        out[name]["versus"] = {
            other: {metric: summary(x[:, i] - x[:, j]) for metric, x in whole.items()}
            for other, j in others.items()
        }
        if means:
            out[name]["averages"] = averaged(lambda x, i=i: x[:, i])
            for other, j in others.items():
                gaps = averaged(lambda x, i=i, j=j: x[:, i] - x[:, j])
                out[name]["versus"][other]["averages"] = gaps
    return out


def averages(
    questions: np.ndarray,
    tasks: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    samples: int,
    seed: int,
    metrics: Sequence[str] = METRICS,
) -> dict[str, dict[str, np.ndarray]]:
    """Averages accuracies over each group's tasks: {group: {metric: (1 + S, M)}} as `estimates`.

    Each task's questions are drawn apart from every other task's, as they were collected.
    """
    labels = np.asarray(tasks)
    drawn = {
        task: estimates(questions[labels == task], samples, [seed, k])
        for k, task in enumerate(sorted({task for of in groups.values() for task in of}))
    }
    return {
        name: {
            metric: np.mean([drawn[task][..., metrics.index(metric)] for task in of], axis=0)
            for metric in metrics
        }
        for name, of in groups.items()
    }
