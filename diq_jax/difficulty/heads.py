"""Heads: from scores that are linear in the features to probabilities of the 5 levels, for each
perspective; and their fit on fixed features.

- categorical: {"kernel" (F, 3, 5), "bias" (3, 5)}, a softmax over the levels.
- ordinal: {"kernel" (F, 3, 1), "thresholds" (3, 4)}, proportional odds (McCullagh 1980): one score
  s for each perspective, P(level <= j) = sigmoid(theta_j - s). What is kept is theta_1 and the logs
  of the gaps between the thresholds, so that they stay in order whatever the training does.

The features are an encoder's, dense, and with difficulty.words also those of words.py, sparse. The
words' kernel (V, 3, S) is kept apart: their part of the scores is an offset that stays as fitted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import threadpoolctl

from diq_jax import config
from diq_jax.difficulty import labels

# Gaussian priors, as inverse variances, for rows whose features have a mean square norm of 1: those
# of the encoder after centring, and TF-IDF. A compromise of cross-validations on the sample and on
# two sets of exam items. The bias's only keeps a level without rows finite.
ENCODER_PRECISION, WORDS_PRECISION, BIAS_PRECISION = 0.5, 0.1, 1.0
STEPS = 100  # of L-BFGS, at most


def apply(heads, features, offsets=None):
    """Log-probabilities of the levels: (B, F), and scores (B, 3, S) to add or None -> (B, 3, 5)."""
    scores = jnp.einsum("bf,fps->bps", features, heads["kernel"])
    if offsets is not None:
        scores = scores + offsets
    return link({name: x for name, x in heads.items() if name != "kernel"}, scores)


def link(constants, scores):
    """Log-probabilities (..., 5) from scores (..., S) and {"bias"} or {"thresholds"}, without
    their batch axis: see above.
    """
    lead = (1,) * (scores.ndim - next(iter(constants.values())).ndim)
    if "bias" in constants:
        bias = constants["bias"]
        return jax.nn.log_softmax(scores + bias.reshape(lead + bias.shape))
    raw = constants["thresholds"]
    above = thresholds(raw).reshape(lead + raw.shape) - scores  # (..., 4): theta_j - s
    below_j, above_j = jax.nn.log_sigmoid(above), jax.nn.log_sigmoid(-above)
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): nothing cancels.
    gaps = jnp.log(-jnp.expm1(-jnp.exp(raw[..., 1:]))).reshape(*lead, *raw.shape[:-1], -1)
    middle = below_j[..., 1:] + above_j[..., :-1] + gaps
    return jnp.concatenate([below_j[..., :1], middle, above_j[..., -1:]], axis=-1)


def thresholds(raw):
    """The ordered thresholds (..., 4) of what an ordinal head keeps of them."""
    return jnp.cumsum(jnp.concatenate([raw[..., :1], jnp.exp(raw[..., 1:])], axis=-1), axis=-1)


def shares(levels):
    """The level's share in each whole level: (...,) -> (..., 5), sum 1; nan (unknown) gives 0.

    A level between two whole ones belongs to both by its nearness, so that the expected level is
    fitted to it.
    """
    known = jnp.isfinite(levels)[..., None]
    whole = jnp.arange(1.0, labels.LEVELS + 1).reshape((1,) * levels.ndim + (-1,))
    near = jnp.maximum(1.0 - jnp.abs(jnp.where(known, levels[..., None], 1.0) - whole), 0.0)
    return jnp.where(known, near, 0.0)


def class_weights(levels, kind: str) -> np.ndarray:
    """(3, 5) float32 for levels (n, 3): 1 for `none`; for `balanced` n / (K n_l), with n_l the rows
    of the level and K the levels that have any, so that each of those weighs the same in sum.
    """
    counts = np.asarray(shares(jnp.asarray(levels)), np.float64).sum(axis=0)
    if kind == "none":
        return np.ones(counts.shape, np.float32)
    used = counts > 0
    rows, kinds = counts.sum(1, keepdims=True), np.maximum(used.sum(1, keepdims=True), 1)
    return np.where(used, rows / (kinds * np.where(used, counts, 1)), 1).astype(np.float32)


def fit(pooled, words, levels, settings: config.Difficulty):
    """The most probable heads on fixed features, under a Gaussian prior; no seed is involved.

    Args:
        pooled: (n, F) float32, the encoder's features.
        words: (n, V) scipy.sparse float32 of words.py, or None.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.

    Returns:
        (heads for features as they are, the words' kernel (V, 3, S) or None), numpy float32. A
        perspective without labels has zero kernels.
    """
    weights = class_weights(levels, settings.class_weights)
    mean = pooled.mean(axis=0)
    scale = np.sqrt(np.mean(np.sum(np.square(pooled - mean), axis=1))) or 1.0
    x = (pooled - mean) / scale
    fitted = []
    for levels_p, weights_p in zip(levels.T, weights, strict=True):
        known = np.flatnonzero(np.isfinite(levels_p))
        own = None if words is None else words[known]
        fitted.append(_fit(x[known], own, levels_p[known], weights_p, settings.head))
    kernels, offsets, constants = (np.stack(parts) for parts in zip(*fitted, strict=True))
    kernels /= scale
    shift = np.einsum("f,pfs->ps", mean, kernels)
    if settings.head == "ordinal":
        constants[:, :1] += shift
    else:
        constants -= shift
    name = "thresholds" if settings.head == "ordinal" else "bias"
    heads = {"kernel": kernels.transpose(1, 0, 2), name: constants}
    heads = {name: np.ascontiguousarray(x, np.float32) for name, x in heads.items()}
    # In one piece, since safetensors writes the buffer behind an array.
    offsets = np.ascontiguousarray(offsets.transpose(1, 0, 2), np.float32)
    return heads, None if words is None else offsets


def _fit(x, words, levels, weights, kind):
    """One perspective: (kernel (F, S), the words' kernel (V, S), bias or thresholds)."""
    F, V = x.shape[1], 0 if words is None else words.shape[1]
    S, name = (1, "thresholds") if kind == "ordinal" else (labels.LEVELS, "bias")
    # One apart, around 0: where a score of 0 means the middle.
    start = np.array([-1.5, 0, 0, 0]) if kind == "ordinal" else np.zeros(labels.LEVELS)
    flat = np.concatenate([np.zeros((F + V) * S), start])
    precision = np.repeat([ENCODER_PRECISION, WORDS_PRECISION], [F * S, V * S])
    precision = np.concatenate([precision, np.full(len(start), BIAS_PRECISION)])
    if not len(levels):
        return np.zeros((F, S)), np.zeros((V, S)), start

    def objective(flat):
        kernel = flat[: -len(start)].reshape(F + V, S).astype(np.float32)
        scores = x @ kernel[:F] + (words @ kernel[F:] if V else 0)
        constants = {name: flat[-len(start) :].astype(np.float32)}
        (_, losses), (d_constants, d_scores) = _losses(constants, scores, levels, weights)
        d_scores = np.asarray(d_scores)
        parts = [x.T @ d_scores, words.T @ d_scores if V else np.zeros((0, S))]
        gradient = np.concatenate([*(part.ravel() for part in parts), d_constants[name]])
        value = np.sum(np.asarray(losses), dtype=np.float64) + 0.5 * np.sum(precision * flat**2)
        return value / len(x), (gradient + precision * flat) / len(x)

    # One thread: the products are small, and their sums then depend on no number of cores.
    with threadpoolctl.threadpool_limits(1):
        found = scipy.optimize.minimize(
            objective, flat, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
        ).x
    kernel = found[: -len(start)].reshape(F + V, S)
    return kernel[:F], kernel[F:], found[-len(start) :]


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def _losses(constants, scores, levels, weights):
    """((sum, each row's (n,)), gradients); the sum is for the gradients alone, the rows' are
    added up in float64.
    """
    losses = -jnp.sum(shares(levels) * weights[None] * link(constants, scores), axis=-1)
    return jnp.sum(losses), losses
