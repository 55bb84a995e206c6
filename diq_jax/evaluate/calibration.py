"""Whether a model is right as often as it is sure: expected calibration error and its table.

Dims: Q questions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

BINS = 10  # of equal width


def confidence(log_likelihoods: Sequence[float]) -> float:
    """Computes the likeliest option's share of the softmax over log-likelihoods in nats."""
    values = np.asarray(log_likelihoods, np.float64)
    return float(1 / np.exp(values - values.max()).sum())


def reliability(confidences: ArrayLike, correct: ArrayLike) -> list[dict[str, float]]:
    """Lists for each bin that is not empty: low, high, questions, confidence and accuracy (means).

    Args:
        confidences: (Q,) in [0, 1]; a bin holds its lower end, the last one its upper end too.
        correct: (Q,) of 0 and 1.
    """
    confidences, correct = (np.asarray(x, np.float64) for x in (confidences, correct))
    places = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "questions": int(np.sum(places == k)),
            "confidence": float(confidences[places == k].mean()),
            "accuracy": float(correct[places == k].mean()),
        }
        for k in np.unique(places).tolist()
    ]


def error(table: Sequence[dict[str, float]]) -> float:
    """Computes the mean |accuracy - confidence| of `reliability` (arXiv 1706.04599, eq. 3)."""
    total = sum(row["questions"] for row in table)
    gaps = (row["questions"] * abs(row["accuracy"] - row["confidence"]) for row in table)
    return sum(gaps) / total
