"""Correlation, agreement and intervals, in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Computes the Pearson correlation; nan where either side is constant."""
    a, b = (np.asarray(v, np.float64) - np.mean(np.asarray(v)) for v in (x, y))
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Computes the Pearson correlation of average ranks."""
    from scipy import stats  # seconds to import

    return pearson(stats.rankdata(x), stats.rankdata(y))


def quadratic_kappa(labels: ArrayLike, predictions: ArrayLike, levels: int) -> float:
    """Computes Cohen's kappa, quadratic weights, for 1..levels; nan where both are one constant."""
    observed = np.zeros((levels, levels))
    np.add.at(observed, (np.asarray(labels) - 1, np.asarray(predictions) - 1), 1)
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    weights = np.subtract.outer(np.arange(levels), np.arange(levels)) ** 2
    chance = np.sum(weights * expected)
    return float(1 - np.sum(weights * observed) / chance) if chance > 0 else float("nan")


def krippendorff_alpha(ratings: ArrayLike, scale: str) -> float:
    """Computes the agreement of raters, 1 - observed / expected disagreement (Krippendorff 2011).

    Args:
        ratings: (raters, units), nan where a rater gave none. Units with fewer than two ratings do
            not count.
        scale: ordinal, or interval (squared differences).

    Returns:
        At most 1; nan where fewer than two values are left, or all are the same.
    """
    ratings = np.asarray(ratings, np.float64)
    values, codes = np.unique(ratings, return_inverse=True)
    finite = np.isfinite(values)
    # (units, values): how often a unit got a value.
    counts = (codes.reshape(ratings.shape).T[..., None] == np.flatnonzero(finite)).sum(1)
    counts, values = counts[counts.sum(1) > 1], values[finite]
    totals = counts.sum(0)
    places = values if scale == "interval" else np.cumsum(totals) - totals / 2
    distances = np.subtract.outer(places, places) ** 2
    # Pairs of ratings inside a unit, each unit weighing as many ratings as it has.
    inside = np.einsum("uc,uk,ck->u", counts, counts, distances) / (counts.sum(1) - 1)
    chance = totals @ distances @ totals
    return float(1 - (totals.sum() - 1) * inside.sum() / chance) if chance > 0 else float("nan")


def bootstrap_spearman(columns: ArrayLike, y: ArrayLike, samples: int, seed: int) -> np.ndarray:
    """Computes Spearman of each column (n, C) with y (n,) over resampled rows: (samples, C).

    The rows are the same for all columns, so that differences of columns are paired. nan where
    either side is constant.
    """
    columns, out = np.asarray(columns), np.empty((samples, np.shape(columns)[1]))
    groups = [np.unique(x, return_inverse=True)[1] for x in (y, *columns.T)]
    rng = np.random.Generator(np.random.PCG64(seed))
    for row in out:
        times = np.bincount(rng.integers(0, len(columns), len(columns)), minlength=len(columns))
        ranks = []
        for group in groups:
            # The average rank of equal values: those below, and half of their own.
            own = np.bincount(group, times)
            rank = (np.cumsum(own) - own / 2)[group]
            ranks.append(rank - times @ rank / len(rank))
        norms = [times @ np.square(rank) for rank in ranks]
        for c, (rank, norm) in enumerate(zip(ranks[1:], norms[1:], strict=True)):
            scale = np.sqrt(norm * norms[0])
            row[c] = times @ (rank * ranks[0]) / scale if scale > 0 else np.nan
    return out


def finite(value: float) -> float | None:
    """Returns the value, or None where it is not a number, as JSON needs it."""
    return float(value) if np.isfinite(value) else None
