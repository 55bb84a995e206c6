"""Whether the classifier's probabilities mean what they say, from out-of-fold predictions.

A label between two levels counts for both by its nearness (heads.shares). Temperature scaling
(arXiv 1706.04599) divides the log-probabilities by one number for each perspective.
"""

from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

BINS = 10  # of the confidence, equally wide


def tempered(log_p: np.ndarray, temperature: float) -> np.ndarray:
    """Returns log-probabilities (..., 5) at a temperature, float64: above 1 they are less sure."""
    return scipy.special.log_softmax(np.asarray(log_p, np.float64) / temperature, axis=-1)


def fit_temperature(log_p: np.ndarray, shares: np.ndarray) -> float:
    """Finds the temperature in [1/8, 8] of the least mean negative log-likelihood."""
    found = scipy.optimize.minimize_scalar(
        lambda log_t: nll(tempered(log_p, np.exp(log_t)), shares),
        bounds=(-np.log(8), np.log(8)),
        method="bounded",
    )
    return float(np.exp(found.x))


def nll(log_p: np.ndarray, shares: np.ndarray) -> float:
    """Returns the mean negative log-likelihood in nats."""
    return float(-np.mean(np.sum(shares * log_p, axis=-1)))


def reliability(log_p: np.ndarray, shares: np.ndarray) -> list[dict[str, float]]:
    """Counts for each bin of the confidence that has rows: rows, mean confidence, share right.

    The confidence is the probability of the likeliest level; right is the label's share in it.
    """
    likeliest = np.argmax(log_p, axis=-1)
    rows = np.arange(len(log_p))
    confidence, right = np.exp(log_p[rows, likeliest]), shares[rows, likeliest]
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "rows": int(np.sum(places == k)),
            "confidence": float(np.mean(confidence[places == k])),
            "right": float(np.mean(right[places == k])),
        }
        for k in np.unique(places)
    ]


def expected_error(bins: list[dict[str, float]]) -> float:
    """Returns the expected calibration error (ECE): |right - confidence|, mean over rows."""
    total = sum(b["rows"] for b in bins)
    return sum(b["rows"] * abs(b["right"] - b["confidence"]) for b in bins) / total


def measure(log_p: np.ndarray, shares: np.ndarray, parts: np.ndarray) -> dict[str, Any]:
    """Measures what the temperature would change, for one perspective.

    Each fold is judged at the temperature of the other folds' predictions, so that `after` is not
    flattered by its own labels; `temperature` is that of all of them.

    Args:
        log_p: (n, 5) out-of-fold; shares: (n, 5) of the labels; parts: (n,) folds.

    Returns:
        temperature, and before and after: nll (nats), ece, reliability.
    """
    log_p = tempered(log_p, 1.0)  # float32 probabilities do not quite sum to 1
    after = np.empty_like(log_p)
    for part in np.unique(parts):
        mine = parts == part
        after[mine] = tempered(log_p[mine], fit_temperature(log_p[~mine], shares[~mine]))
    out: dict[str, Any] = {"temperature": fit_temperature(log_p, shares)}
    for name, found in (("before", log_p), ("after", after)):
        bins = reliability(found, shares)
        out[name] = {"nll": nll(found, shares), "ece": expected_error(bins), "reliability": bins}
    return out
