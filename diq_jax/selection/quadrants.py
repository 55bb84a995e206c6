"""DIQ's total order: difficulty-influence quadrants, then influence, then difficulty, then id."""

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


@jax.jit
def diq_ranks(quadrant, difficulty, influence, id_order):
    """Ranks from 1: by quadrant, influence descending, difficulty descending, example id.

    Args:
        id_order: (n,) int32, the position of each example in the order of ids; it makes the ranking
            total, so that a smaller budget is inside a larger one.

    Returns:
        (n,) int32.
    """
    return ranks_of(jnp.lexsort((id_order, -difficulty, -influence, quadrant)))


def ranks_of(order):
    """Turns an order (the row in each place) into ranks from 1 (the place of each row), int32."""
    places = jnp.arange(1, order.shape[0] + 1, dtype=jnp.int32)
    return jnp.zeros(order.shape, jnp.int32).at[order].set(places)
