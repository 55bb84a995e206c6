"""Two models on the same questions: accuracies, the paired difference, and whether it is chance.

Dims: Q questions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.evaluate import calibration, intervals, predictions, significance

LEVEL = 0.05  # a p-value below it is called a difference
PROPER = ("choice_loss", "choice_loss_letters", "brier")  # of likelihoods; less is better
CHOICES = {"accuracy": "prediction", "accuracy_norm": "prediction_norm"}  # metric: column


def common(first: predictions.ById, second: predictions.ById) -> list[str]:
    """Returns the ids that both have, in the order of the first.

    Raises:
        UserError: none, or a question whose task or right answer is not the same in both.
    """
    ids = [name for name in first if name in second]
    if not ids:
        raise errors.UserError("the two models have no example_id in common.")
    for name in ids:
        for column in ("task", "answer"):
            a, b = first[name].get(column), second[name].get(column)
            if a != b:
                raise errors.UserError(
                    f"question {name!r} is not the same in both: its {column} is {a!r} and {b!r}."
                )
    return ids


def correct(rows: predictions.ById, ids: Sequence[str], metric: str) -> np.ndarray:
    """Marks right answers, (Q,) float64: 1 where the model's choice is right; no choice is wrong.

    Raises:
        UserError: a row without the columns.
    """
    column = CHOICES[metric]
    for name in ids:
        if rows[name].get("answer") is None or column not in rows[name]:
            raise errors.UserError(
                f"question {name!r} must have answer and {column}; got {', '.join(rows[name])}."
            )
    return np.array([rows[name][column] == rows[name]["answer"] for name in ids], np.float64)


def unparsable(rows: predictions.ById, ids: Sequence[str], metric: str) -> np.ndarray:
    """Marks, (Q,) bool, questions that the model answered without a choice that can be read."""
    return np.array([rows[name][CHOICES[metric]] is None for name in ids])


def paired(hits: np.ndarray, unread: np.ndarray, samples: int, seed: int) -> dict[str, Any]:
    """Compares (Q, 2) right answers: accuracies, first - second, and McNemar's exact p.

    Also what only one of the two gets right, and how many of each are unparsable.

    Args:
        unread: (Q, 2) of `unparsable`.
    """
    drawn = intervals.estimates(hits, samples, seed)
    first, second = (int(np.sum(hits[:, i] > hits[:, 1 - i])) for i in (0, 1))
    return {
        "questions": len(hits),
        "accuracy": [intervals.summary(drawn[:, i]) for i in (0, 1)],
        "difference": intervals.summary(drawn[:, 0] - drawn[:, 1]),
        "only_first": first,
        "only_second": second,
        "p": significance.sign_test(first, second),
        "unparsable": np.sum(unread, axis=0).tolist(),
    }


def proper(
    models: Sequence[predictions.ById], ids: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Compares two models by PROPER: `means` and `difference`, with 95 % intervals.

    These move long before an accuracy does. Only what all rows have.
    """
    found = {}
    for metric in PROPER:
        values = [[rows[name].get(metric) for rows in models] for name in ids]
        if all(isinstance(value, int | float) for row in values for value in row):
            drawn = intervals.estimates(np.array(values, np.float64), samples, seed)
            found[metric] = {
                "means": [intervals.summary(drawn[:, i]) for i in (0, 1)],
                "difference": intervals.summary(drawn[:, 0] - drawn[:, 1]),
            }
    return found


def by_group(
    hits: np.ndarray, unread: np.ndarray, labels: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns {label: `paired` of its questions, with `p_holm`, adjusted over the labels}."""
    names = np.asarray(labels)
    groups = {x: names == x for x in sorted(set(labels))}
    found = {x: paired(hits[of], unread[of], samples, seed) for x, of in groups.items()}
    adjusted = significance.holm({name: value["p"] for name, value in found.items()})
    return {name: value | {"p_holm": adjusted[name]} for name, value in found.items()}


def winner(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """Names the better model where p, Holm's where there is one, is below LEVEL; else ""."""
    if value.get("p_holm", value["p"]) >= LEVEL:
        return ""
    return names[0 if value["difference"]["mean"] > 0 else 1]


def sentence(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """Writes what the overall comparison says."""
    gap = value["difference"]
    better = names[0 if gap["mean"] >= 0 else 1]
    ends = sorted(100 * abs(gap[end]) for end in ("low", "high"))
    points = f"{abs(100 * gap['mean']):.1f} points"
    if winner(value, names):
        inside = gap["low"] <= 0 <= gap["high"]
        spread = "" if inside else f" (95 % interval {ends[0]:.1f} to {ends[1]:.1f})"
        return f"{better} is better by {points}{spread}: chance alone would rarely show so much."
    if gap["mean"] == 0:
        return f"No difference: both are right on as many of {value['questions']:,} questions."
    return (
        f"No difference is shown: {better} is ahead by {points} on {value['questions']:,} "
        "questions, which chance alone may well show."
    )


def calibrated(rows: predictions.ById, ids: Sequence[str]) -> dict[str, Any] | None:
    """Returns `ece` and its table; None unless all rows were chosen by summed log-likelihood."""
    given = [rows[name].get("log_likelihoods") for name in ids]
    if not all(given) or any("answers" in rows[name] for name in ids):
        return None
    sure = [calibration.confidence(list(values.values())) for values in given if values]
    table = calibration.reliability(sure, correct(rows, ids, "accuracy"))
    return {"ece": calibration.error(table), "reliability": table}
