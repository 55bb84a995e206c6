"""Words beside the encoder: TF-IDF of single words and pairs, fitted on training rows alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn import linear_model
from sklearn.feature_extraction import text

RIDGE = 1.0  # of the baseline
MOST_TERMS = 200_000  # the most frequent; a kernel has up to 15 numbers for each


def fit(texts: Sequence[str]) -> text.TfidfVectorizer:
    """Fits vocabulary and inverse document frequencies of training texts; rows get length 1."""
    return _vectorizer().fit(texts)


def to_arrays(vectorizer: text.TfidfVectorizer) -> dict[str, np.ndarray]:
    """Returns {"terms": UTF-8, one a line; "idf": (V,) float32}, in the order of the columns."""
    terms = "\n".join(vectorizer.get_feature_names_out())
    return {
        "terms": np.frombuffer(terms.encode(), np.uint8),
        "idf": np.asarray(vectorizer.idf_, np.float32),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> text.TfidfVectorizer:
    """Undoes `to_arrays`."""
    vectorizer = _vectorizer(vocabulary=arrays["terms"].tobytes().decode().split("\n"))
    vectorizer.idf_ = arrays["idf"]
    return vectorizer


def scores(arrays: Mapping[str, np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Computes what words add to a head's scores, (n, 3, S) float32; `arrays` has "kernel" too."""
    kernel = arrays["kernel"]
    found = from_arrays(arrays).transform(texts) @ kernel.reshape(len(kernel), -1)
    return found.reshape(len(texts), *kernel.shape[1:])


def _vectorizer(**changes):
    options: dict[str, Any] = {"sublinear_tf": True, "ngram_range": (1, 2), "dtype": np.float32}
    return text.TfidfVectorizer(max_features=MOST_TERMS, **options, **changes)


def ridge(texts: Sequence[str], levels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Predicts what a bag of words knows: ridge on TF-IDF, out of fold.

    Args:
        levels: (n,) without unknown ones.
        parts: (n,) the fold of each text, which its model does not see.

    Returns:
        (n,) float64 predicted levels, clipped to those that a label can have.
    """
    out = np.zeros(len(texts))
    for part in np.unique(parts):
        seen = np.flatnonzero(parts != part).tolist()
        held = np.flatnonzero(parts == part).tolist()
        vectorizer = fit([texts[i] for i in seen])
        model = linear_model.Ridge(alpha=RIDGE)
        model.fit(vectorizer.transform([texts[i] for i in seen]), levels[seen])
        out[held] = model.predict(vectorizer.transform([texts[i] for i in held]))
    return np.clip(out, 1, 5)
