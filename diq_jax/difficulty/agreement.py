"""How well the cross-validated classifier agrees with its labels, beside what needs no encoder."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diq_jax import config, stats
from diq_jax.difficulty import calibration, classifier, heads, labels, words

SAMPLES = 1000  # of the bootstrap
APART = 8  # questions that are listed
TF_IDF = "tf-idf + ridge"


def measure(
    levels: np.ndarray,
    probabilities: np.ndarray,
    questions: Sequence[str],
    parts: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Measures out-of-fold agreement, calibration and confusion.

    Args:
        levels: (n, 3) labels, nan unknown; probabilities: (n, 3, 5) out of fold.
        questions: of the rows, as the encoder reads them; parts: (n,) their folds.
        seed: of the bootstrap over rows.

    Returns:
        rows, folds, and for perspectives that have labels {name: spearman, mae (levels), kappa
        (quadratic weights, of the rounded level), interval (95 %, of the Spearman), baselines:
        {question length, median level, tf-idf + ridge on the same folds}, difference (Spearman,
        model - tf-idf + ridge, on the same resampled rows), calibration (calibration.measure),
        confusion (rows at a label's level, predicted level: 5 x 5), apart (the questions
        whose level is farthest from their label)}; None where undefined. The median is that of all
        labels: a little better than any that a fold could know.
    """
    found = {}
    for i, perspective in enumerate(config.PERSPECTIVES):
        known = np.flatnonzero(np.isfinite(levels[:, i]))
        if known.size:
            texts = [questions[row] for row in known.tolist()]
            found[perspective] = _perspective(
                levels[known, i], probabilities[known, i], texts, parts[known], seed
            )
    return {"rows": len(levels), "folds": len(np.unique(parts)), "perspectives": found}


def _perspective(label, probabilities, texts, parts, seed):
    level = classifier.expected_level(probabilities)
    length = np.array([len(text) for text in texts])
    ridge = words.ridge(texts, label, parts)
    baselines = {
        "question length": {"spearman": stats.finite(stats.spearman(length, label))},
        "median level": _agreement(label, np.full(len(label), np.median(label))),
        TF_IDF: _agreement(label, ridge),
    }
    drawn = stats.bootstrap_spearman(np.stack([level, ridge], 1), label, SAMPLES, seed)
    own = _agreement(label, level)
    difference = _interval(drawn[:, 0] - drawn[:, 1])
    if difference and baselines[TF_IDF]["spearman"] is not None:
        difference = {"mean": own["spearman"] - baselines[TF_IDF]["spearman"]} | difference
    with np.errstate(divide="ignore"):  # a sure level leaves 0 to another
        log_p = np.maximum(np.log(np.asarray(probabilities, np.float64)), -100)
    shares = np.asarray(heads.shares(jnp.asarray(label, jnp.float32)), np.float64)
    return own | {
        "interval": _interval(drawn[:, 0]),
        "baselines": baselines,
        "difference": {TF_IDF: difference},
        "calibration": calibration.measure(log_p, shares, parts),
        "confusion": _confusion(label, level),
        "apart": [
            {"question": texts[i], "label": float(label[i]), "level": float(level[i])}
            for i in np.argsort(-np.abs(level - label), kind="stable")[:APART]
        ],
    }


def _agreement(label, level):
    return {
        "spearman": stats.finite(stats.spearman(level, label)),
        "mae": float(np.mean(np.abs(level - label))),
        "kappa": stats.finite(stats.quadratic_kappa(_whole(label), _whole(level), labels.LEVELS)),
    }


def _confusion(label, level) -> list[list[int]]:
    counts = np.zeros((labels.LEVELS, labels.LEVELS), int)
    np.add.at(counts, (_whole(label) - 1, _whole(level) - 1), 1)
    return counts.tolist()


def _whole(level):
    return np.rint(level).astype(int)


def _interval(values) -> dict[str, float]:
    """Returns the middle 95 %; empty where a resampling has no value."""
    if not np.isfinite(values).all():
        return {}
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}
