"""Difficulty-influence quadrants, and ranks."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="percentile")
def thresholds(
    difficulty: jax.Array, influence: jax.Array, percentile: float
) -> tuple[jax.Array, jax.Array]:
    """Returns tau_d, the `percentile` of the difficulty, and m_dot, the median influence."""
    return jnp.percentile(difficulty, percentile), jnp.median(influence)


@jax.jit
def quadrants(
    difficulty: jax.Array, influence: jax.Array, tau_d: jax.Array, m_dot: jax.Array
) -> jax.Array:
    """Returns the quadrant of each example, (n,) int8; at the threshold counts as high.

    1: high difficulty, high influence. 2: low difficulty, high influence. 3: high difficulty, low
    influence. 4: neither.
    """
    hard, useful = difficulty >= tau_d, influence >= m_dot
    return (1 + jnp.where(hard, 0, 1) + jnp.where(useful, 0, 2)).astype(jnp.int8)


def of(scores: Mapping[str, Any], settings: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the quadrants (n,) of scores and their thresholds (tau_d, m_dot).

    Args:
        scores: influence, and the difficulty of settings.perspective.
        settings: perspective and percentile (methods.OrderSettings).
    """
    difficulty, influence = scores[settings.perspective], scores["influence"]
    taus = thresholds(difficulty, influence, settings.percentile)
    return quadrants(difficulty, influence, *taus), taus


def ranks_of(order: jax.Array) -> jax.Array:
    """Turns an order (the row in each place) into ranks from 1 (the place of each row), int32."""
    places = jnp.arange(1, order.shape[0] + 1, dtype=jnp.int32)
    return jnp.zeros(order.shape, jnp.int32).at[order].set(places)
