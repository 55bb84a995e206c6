"""Does a score predict what training on a subset does? The linear datamodeling score (LDS).

Models are trained on random subsets (arXiv 2303.14186), and each subset's measured target loss is
compared with the sum of its rows' scores.

For models that train in seconds: the whole pool is one batch on the device, and a training run is
one compiled scan over its optimiser steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from diq_jax.influence import direction
from diq_jax.models import loss, training


def draw_subsets(count: int, pool: int, share: float, seed: int) -> np.ndarray:
    """(count, pool) bool, each row with the same number of members, drawn apart."""
    rng = np.random.Generator(np.random.PCG64(seed))
    size = max(1, round(share * pool))
    subsets = np.zeros((count, pool), bool)
    for row in subsets:
        row[rng.permutation(pool)[:size]] = True
    return subsets


def order_of(members, epochs: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the rows of each optimizer step, (steps, batch_size) int32; full steps alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows, per_epoch = np.flatnonzero(members), int(np.sum(members)) // batch_size
    each = [rng.permutation(rows)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(each).reshape(-1, batch_size).astype(np.int32)


@functools.partial(jax.jit, static_argnames="cfg")
def fit(params, batch, order, peak, cfg) -> direction.Point:
    """Trains all parameters on the mean loss with AdamW (no weight decay), linear to 0 from `peak`.

    Args:
        batch: data.batches.Batch of the whole pool.
        order: (steps, batch_size), from `order_of`.
    """
    optimizer = training.adamw()

    def step(state, inputs):
        rows, rate = inputs
        part = jax.tree.map(lambda x: x[rows], batch)

        def mean(params):
            return jnp.mean(loss.example_losses(params, cfg, part, "mean"))

        return training.apply(optimizer, state, jax.grad(mean)(state.factors), rate), None

    rates = peak * (1 - jnp.arange(order.shape[0]) / order.shape[0])
    start = training.TrainState(params, optimizer.init(params))
    state, _ = jax.lax.scan(step, start, (order, rates))
    moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu", "count"))
    return direction.Point(state.factors, *moments)


@functools.partial(jax.jit, static_argnames="cfg")
def losses(params, batch, cfg):
    """(B,) float32, a few rows at a time."""
    rows = jax.tree.map(lambda x: x[:, None], batch)
    return jax.lax.map(
        lambda row: loss.example_losses(params, cfg, row, "mean")[0], rows, batch_size=32
    )


def lds(scores, subsets, measured) -> np.ndarray:
    """For each target, Spearman over subsets of the summed scores with minus the measured loss.

    Args:
        scores: (pool, M), larger is better for that target; subsets: (S, pool) bool.
        measured: (S, M) losses.

    Returns:
        (M,) float64.
    """
    return _rank_correlation(subsets.astype(np.float64) @ scores, -np.asarray(measured))


def reliability(measured) -> float:
    """Computes how well means over K seeds agree with K others', by the Spearman-Brown formula.

    Args:
        measured: (S, K, M), K at least 2.
    """
    K = measured.shape[1]
    pairs = [(a, b) for a in range(K) for b in range(a)]
    r = np.mean([_rank_correlation(measured[:, a], measured[:, b]).mean() for a, b in pairs])
    return float(K * r / (1 + (K - 1) * r))


def _rank_correlation(left, right):
    """Spearman of each column, (M,); 0 where one is constant."""
    ranks = [scipy.stats.rankdata(x, axis=0) for x in (left, right)]
    ranks = [x - x.mean(axis=0) for x in ranks]
    norms = np.prod([np.sqrt(np.sum(x * x, axis=0)) for x in ranks], axis=0)
    return np.sum(ranks[0] * ranks[1], axis=0) / np.where(norms > 0, norms, 1.0)


def interval(scores, subsets, measured, samples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean LDS, targets and subsets both drawn with replacement."""
    rng = np.random.Generator(np.random.PCG64(seed))
    S, M = measured.shape
    means = []
    for _ in range(samples):
        rows, columns = rng.integers(0, S, S), rng.integers(0, M, M)
        drawn = lds(scores[:, columns], subsets[rows], measured[np.ix_(rows, columns)])
        means.append(np.mean(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
