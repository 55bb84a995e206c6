"""Difficulty-influence quadrants, and ranks."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="percentile")
def thresholds(difficulty, influence, percentile):
    """tau_d, the `percentile` of the difficulty, and m_dot, the median influence: float32."""
    return jnp.percentile(difficulty, percentile), jnp.median(influence)


@jax.jit
def quadrants(difficulty, influence, tau_d, m_dot):
    """The quadrant of each example, (n,) int8; at the threshold counts as high.

    1: high difficulty, high influence. 2: low difficulty, high influence. 3: high difficulty, low
    influence. 4: neither.
    """
    hard, useful = difficulty >= tau_d, influence >= m_dot
    return (1 + jnp.where(hard, 0, 1) + jnp.where(useful, 0, 2)).astype(jnp.int8)


def ranks_of(order):
    """Turns an order (the row in each place) into ranks from 1 (the place of each row), int32."""
    places = jnp.arange(1, order.shape[0] + 1, dtype=jnp.int32)
    return jnp.zeros(order.shape, jnp.int32).at[order].set(places)
