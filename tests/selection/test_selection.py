"""DIQ's order: hand-computed, total, nested, and independent of the order of the file."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from diq_jax.common import config
from diq_jax.selection import methods, quadrants


def make_scores(difficulty, influence, id_order=None):
    n = len(difficulty)
    order = np.arange(n) if id_order is None else id_order
    columns = {p: jnp.asarray(difficulty, jnp.float32) for p in config.PERSPECTIVES}
    return columns | {
        "influence": jnp.asarray(influence, jnp.float32),
        "id_order": jnp.asarray(order, jnp.int32),
    }


def ranks(method, scores, seed=0):
    return np.asarray(methods.ranks(method, scores, "overall", 50.0, seed))


def test_diq_by_hand():
    # Median difficulty of 1 2 3 4 5 is 3, median influence of -1 0 1 2 3 is 1.
    #   row  difficulty influence  quadrant
    #    0       5          3      Q1
    #    1       1          2      Q2
    #    2       4          0      Q3
    #    3       2         -1      Q4
    #    4       3          1      Q1 (both at the threshold: high), after row 0 by influence
    scores = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1])
    tau_d, m_dot = quadrants.thresholds(scores["overall"], scores["influence"], 50.0)
    assert (tau_d, m_dot) == (3, 1)
    got = quadrants.quadrants(scores["overall"], scores["influence"], tau_d, m_dot)
    np.testing.assert_array_equal(got, [1, 2, 3, 4, 1])
    np.testing.assert_array_equal(ranks("diq", scores), [1, 3, 4, 5, 2])


def test_ties_go_to_difficulty_and_then_to_the_id():
    # All of Q1 by the thresholds (3, 1); equal influence: harder first, then the smaller id.
    scores = make_scores([3, 4, 3, 3], [1, 1, 1, 1], id_order=[3, 2, 0, 1])
    np.testing.assert_array_equal(ranks("diq", scores), [4, 1, 2, 3])


@pytest.mark.parametrize("method", config.METHODS)
@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(-3, 3)), min_size=7, max_size=7),
    st.permutations(range(7)),
)
def test_every_method_is_a_total_order_of_the_examples_not_of_the_rows(method, values, shuffle):
    difficulty, influence = np.array(values, float).T
    shuffle = np.array(shuffle)
    here = ranks(method, make_scores(difficulty, influence))
    assert sorted(here) == list(range(1, 8))
    there = ranks(method, make_scores(difficulty[shuffle], influence[shuffle], shuffle))
    np.testing.assert_array_equal(there, here[shuffle])


def test_baselines_sort_by_their_column():
    scores = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1])
    np.testing.assert_array_equal(ranks("influence", scores), [1, 2, 4, 5, 3])
    np.testing.assert_array_equal(ranks("difficulty_overall", scores), [1, 5, 2, 4, 3])


def test_random_depends_on_its_seed_only():
    scores = make_scores(np.arange(50), np.arange(50))
    first, again, other = (ranks("random", scores, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "ratio, pool, keep", [(0.01, 160, 2), (0.1, 160, 16), (0.1, 5, 1), (0.001, 5, 1), (1.0, 7, 7)]
)
def test_budget(ratio, pool, keep):
    assert methods.budget(ratio, pool) == keep
