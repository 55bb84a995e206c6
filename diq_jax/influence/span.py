"""The span of the targets' gradients, and each row's alignment inside it (after arXiv 2602.18584).

By the singular vectors V (P, k) of the targets' gradients G (Q, P), a row's gradient g has the
coordinates V'g, and its score is the mean cosine of these with those of the targets. G itself is
not needed: with G G' = U S^2 U', V'g = S^-1 U' (G g), from the inner products with each target
alone, and a target's coordinates are U S. So k directions cost what the Q inner products cost.
"""

from typing import Any

import numpy as np

LEAST = 1e-6  # of the largest eigenvalue: below is rounding


def align(
    by_target: np.ndarray, gram: np.ndarray, weights: np.ndarray, directions: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores rows by their alignment with the targets inside the span of these.

    Args:
        by_target: (n, Q), the inner product of each row's gradient with each target's.
        gram: (Q, Q), those of the targets' gradients.
        weights: (Q,), the share of each target in the mean.
        directions: how many of the leading ones span the subspace; fewer where there are no more.

    Returns:
        (n,) float32 in [-1, 1], 0 for a row that is orthogonal to all of them; and for records the
        directions taken, and the share of the targets' squared norms in them.
    """
    gram = np.asarray(gram, np.float64)
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    leading = np.argsort(-values)[:directions]
    leading = leading[values[leading] > LEAST * max(values.max(), 0)]
    roots = np.sqrt(values[leading])
    rows = np.asarray(by_target, np.float64) @ vectors[:, leading] / roots
    mean = weights @ _unit(vectors[:, leading] * roots)
    energy = values[leading].sum() / np.trace(gram) if len(leading) else 0.0
    record = {"directions": len(leading), "energy": float(energy)}
    return (_unit(rows) @ mean).astype(np.float32), record


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
