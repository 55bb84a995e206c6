"""Heads: from scores linear in the features to probabilities of 5 levels for each perspective.

A head is {"kernel" (F, 3, 5), "bias" (3, 5)}, a softmax over the levels. The features are those of
an encoder, dense, and with difficulty.words also those of words.py, sparse. The words' kernel
(V, 3, 5) is kept apart: their part of the scores is an offset that training does not change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse
import threadpoolctl

from diq_jax.difficulty import labels
from diq_jax.trees import Array

# Gaussian priors, as inverse variances, for rows whose features have a mean square norm of 1: those
# of the encoder after centring, and TF-IDF. A compromise of cross-validations on the sample and on
# two sets of exam items. The bias's only keeps a level without rows finite.
ENCODER_PRECISION, WORDS_PRECISION, BIAS_PRECISION = 0.5, 0.1, 1.0
STEPS = 100  # of L-BFGS, at most


def apply(heads: dict, features: Array, offsets: Array | None = None) -> jax.Array:
    """Returns log-probabilities (B, 3, 5) from features (B, F) and scores (B, 3, 5) to add."""
    scores = jnp.einsum("bf,fps->bps", features, heads["kernel"])
    if offsets is not None:
        scores = scores + offsets
    return jax.nn.log_softmax(scores + heads["bias"][None])


def shares(levels: Array) -> jax.Array:
    """Returns each level's share in each whole level: (...,) -> (..., 5), sum 1; nan gives 0.

    A level between two whole ones belongs to both by its nearness, so that the expected level is
    fitted to it.
    """
    known = jnp.isfinite(levels)[..., None]
    whole = jnp.arange(1.0, labels.LEVELS + 1).reshape((1,) * levels.ndim + (-1,))
    near = jnp.maximum(1.0 - jnp.abs(jnp.where(known, levels[..., None], 1.0) - whole), 0.0)
    return jnp.where(known, near, 0.0)


def fit(
    pooled: np.ndarray, words: scipy.sparse.csr_matrix | None, levels: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Finds the most probable heads on fixed features, under a Gaussian prior and without a seed.

    Args:
        pooled: (n, F) float32, the encoder's features.
        words: (n, V) float32 of words.py, or None.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.

    Returns:
        (heads for features as they are, the words' kernel (V, 3, 5) or None), numpy float32. A
        perspective without labels has zero kernels.
    """
    mean = pooled.mean(axis=0)
    scale = np.sqrt(np.mean(np.sum(np.square(pooled - mean), axis=1))) or 1.0
    x = (pooled - mean) / scale
    fitted = []
    for levels_p in levels.T:
        known = np.flatnonzero(np.isfinite(levels_p))
        fitted.append(_fit(x[known], None if words is None else words[known], levels_p[known]))
    kernels, offsets, bias = (np.stack(parts) for parts in zip(*fitted, strict=True))
    kernels /= scale
    bias -= np.einsum("f,pfs->ps", mean, kernels)
    # In one piece, since safetensors writes the buffer behind an array.
    kernel, own, bias = (
        np.ascontiguousarray(array, np.float32)
        for array in (kernels.transpose(1, 0, 2), offsets.transpose(1, 0, 2), bias)
    )
    return {"kernel": kernel, "bias": bias}, None if words is None else own


def _fit(x, words, levels):
    """Fits one perspective: (kernel (F, 5), the words' kernel (V, 5), bias (5,))."""
    F, V, S = x.shape[1], 0 if words is None else words.shape[1], labels.LEVELS
    if not len(levels):
        return np.zeros((F, S)), np.zeros((V, S)), np.zeros(S)
    precision = np.repeat([ENCODER_PRECISION, WORDS_PRECISION, BIAS_PRECISION], [F * S, V * S, S])

    def objective(flat):
        kernel = flat[:-S].reshape(F + V, S).astype(np.float32)
        scores = x @ kernel[:F] + (words @ kernel[F:] if V else 0)
        (_, losses), (d_bias, d_scores) = _losses(flat[-S:].astype(np.float32), scores, levels)
        d_scores = np.asarray(d_scores)
        parts = [x.T @ d_scores, np.zeros((0, S)) if words is None else words.T @ d_scores]
        gradient = np.concatenate([*(part.ravel() for part in parts), d_bias])
        value = np.sum(np.asarray(losses), dtype=np.float64) + 0.5 * np.sum(precision * flat**2)
        return value / len(x), (gradient + precision * flat) / len(x)

    # One thread: the products are small, and their sums then depend on no number of cores.
    with threadpoolctl.threadpool_limits(1):
        found = scipy.optimize.minimize(
            objective, np.zeros((F + V + 1) * S), jac=True, method="L-BFGS-B",
            options={"maxiter": STEPS},
        ).x  # fmt: skip
    kernel = found[:-S].reshape(F + V, S)
    return kernel[:F], kernel[F:], found[-S:]


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def _losses(bias, scores, levels):
    """Returns ((sum, only for gradients; each row's (n,), to add up in float64), gradients)."""
    losses = -jnp.sum(shares(levels) * jax.nn.log_softmax(scores + bias[None]), axis=-1)
    return jnp.sum(losses), losses
