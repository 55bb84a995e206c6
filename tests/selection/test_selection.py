"""Every method's order: hand-computed, total, nested, and independent of the order of the file."""

import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from diq_jax import config, errors
from diq_jax.selection import methods, orders, quadrants, select


def make_scores(difficulty, influence, id_order=None, **more):
    """All scores that a method may read; those not given follow difficulty and influence."""
    difficulty, influence = (np.asarray(v, np.float32) for v in (difficulty, influence))
    columns = {p: difficulty for p in config.PERSPECTIVES} | {
        "influence": influence,
        "id_order": np.arange(len(difficulty)) if id_order is None else id_order,
        "answer_tokens": (difficulty + 1).astype(np.int32),
        "reasoning_tokens": difficulty.astype(np.int32),
        "loss": difficulty / 2,
        "similarity": influence / 4,
        "ifd": np.where(influence == 0, np.nan, 1 + influence / 8),
        "k_center": difficulty,
        "facility_location": influence,
        "by_target": np.stack([influence, difficulty, -influence], axis=1),
        "alignment": -influence,
        "color": influence,
        "listed": np.where(difficulty > 3, np.inf, difficulty),
        "temp": influence,
        "temp_cluster": difficulty.astype(np.int32) % 2,
    }
    return {name: jnp.asarray(value) for name, value in (columns | more).items()}


def ranks(method, scores, seed=0, **changes):
    settings = methods.OrderSettings("overall", 50.0, seed, **changes)
    return np.asarray(methods.ranks(method, scores, settings))


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


@pytest.mark.parametrize("method", methods.METHODS)
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
    assert select.budget(ratio, pool) == keep


def test_quadrants_in_another_order():
    # Rows are of Q1 Q2 Q3 Q4 Q1 (test_diq_by_hand); row 0 leads row 4 by influence.
    scores = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1])
    order = (4, 2, 1, 3)
    np.testing.assert_array_equal(ranks("diq", scores, quadrants=order), [3, 2, 5, 1, 4])
    np.testing.assert_array_equal(ranks("quadrant_3", scores), [2, 4, 1, 5, 3])
    np.testing.assert_array_equal(ranks("quadrant_3", scores, quadrants=order), [4, 3, 1, 2, 5])
    np.testing.assert_array_equal(ranks("quadrant_1", scores), ranks("diq", scores))


def test_targets_take_turns_by_hand():
    # Target 1 takes row 0 (5), target 2 its best that is left, row 1 (8, after 9 is gone); again
    # target 1: rows 0 and 1 are gone, row 2 (3); target 2: row 4 (1) before row 3 (0).
    by_target = np.array([[5, 9], [4, 8], [3, 2], [0, 0], [-1, 1]], np.float32)
    places, takers = orders.take_turns(by_target, np.arange(5))
    np.testing.assert_array_equal(places, [0, 1, 2, 4, 3])
    np.testing.assert_array_equal(takers, [0, 1, 0, 0, 1])
    scores = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1], by_target=by_target)
    np.testing.assert_array_equal(ranks("round_robin", scores), [1, 2, 3, 5, 4])
    # The rows are of Q1 Q2 Q3 Q4 Q1 (test_diq_by_hand): rows 0 and 4 first, then 1, 2, 3.
    np.testing.assert_array_equal(ranks("diq_round_robin", scores), [1, 3, 4, 5, 2])
    one = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1], by_target=np.float32([[1]] * 5))
    np.testing.assert_array_equal(ranks("round_robin", one), [1, 2, 3, 4, 5])  # ties go by id


def test_the_band_moves_with_the_budget_by_hand():
    # Percentiles of 1 2 3 4: 12.5, 37.5, 62.5, 87.5; all are useful but row 0 (median 1).
    scores = make_scores([1, 2, 3, 4], [0, 1, 2, 1])
    # At 1 % the band is 25 to 75: rows 1 and 2, by influence; then the useful row 3; then row 0.
    np.testing.assert_array_equal(ranks("adaptive", scores, ratio=0.01), [4, 2, 1, 3])
    # At 10 % it is 50 to 100: rows 2 and 3; then row 1; then row 0.
    np.testing.assert_array_equal(ranks("adaptive", scores, ratio=0.1), [4, 3, 1, 2])
    assert methods.OrderSettings(ratio=0.1).edges == (50, 100)
    assert methods.OrderSettings(ratio=1e-9).edges == (-25, 25)
    assert [name for name, of in methods.METHODS.items() if not of.nests] == ["adaptive"]


def test_difficulty_and_length_by_hand():
    # Percentiles of difficulty 5 4 4 1: 87.5, 50, 50, 12.5; of length 10 30 20 20: 12.5, 87.5, 50,
    # 50. Means: 50, 68.75, 50, 31.25; rows 0 and 2 tie and go by id.
    scores = make_scores([5, 4, 4, 1], [0] * 4, reasoning_tokens=[10, 30, 20, 20])
    np.testing.assert_array_equal(orders.percentiles(np.array([5, 4, 4, 1])), [87.5, 50, 50, 12.5])
    np.testing.assert_array_equal(ranks("difficulty_length", scores), [2, 1, 3, 4])


def test_clusters_take_turns_by_hand():
    # Cluster 0: rows 0 (2.0), 2 (5.0), 3 (4.0); cluster 1: rows 1 (1.0), 4 (3.0). First turn: 5.0
    # and 3.0; second: 4.0 and 1.0; third: 2.0.
    scores = make_scores(
        [1] * 5, [0] * 5, temp=[2.0, 1.0, 5.0, 4.0, 3.0], temp_cluster=[0, 1, 0, 0, 1]
    )
    np.testing.assert_array_equal(ranks("temp", scores), [5, 4, 1, 3, 2])
    np.testing.assert_array_equal(ranks("color", scores), [1, 2, 3, 4, 5])


def test_diq_of_a_perspective_is_diq_by_it():
    scores = make_scores([5, 1, 4, 2, 3], [3, 2, 0, -1, 1], knowledge=[1, 5, 2, 4, 3])
    # By knowledge rows 1, 3 and 4 are hard: Q2 Q1 Q4 Q3 Q1.
    np.testing.assert_array_equal(ranks("diq_knowledge", scores), [3, 1, 5, 4, 2])
    np.testing.assert_array_equal(ranks("diq_overall", scores), ranks("diq", scores))


def test_model_scored_methods_by_hand():
    loss = [2.0, 1.0, 4.0, 2.5, 9.0]
    ifd = [0.9, 1.4, np.nan, 0.95, 1.0]
    scores = make_scores(
        [1] * 5, [1] * 5, loss=loss, ifd=ifd, similarity=[0, 0.5, -1, 0.5, 0.2],
        answer_tokens=[7, 3, 9, 7, 1], reasoning_tokens=[0, 2, 5, 6, 0],
    )  # fmt: skip
    expected = {
        "perplexity": [4, 5, 2, 3, 1],
        # From the median 2.5: 0.5, 1.5, 1.5, 0, 6.5; rows 1 and 2 tie and go by id.
        "middle_perplexity": [2, 3, 4, 1, 5],
        # 0.95 and 0.9 are below 1; then 1.0 and 1.4; then the row without one.
        "ifd": [2, 4, 5, 1, 3],
        "similarity": [4, 1, 5, 2, 3],
        "short_answers": [3, 2, 5, 4, 1],
        "long_answers": [2, 4, 1, 3, 5],
        "long_reasoning": [4, 3, 2, 1, 5],
    }
    for method, places in expected.items():
        np.testing.assert_array_equal(ranks(method, scores), places, err_msg=method)


def test_what_a_method_needs_follows_from_what_it_reads():
    settings, least = methods.OrderSettings(), ("influence", "answer_tokens", "id_order")
    free = [m for m in methods.METHODS if not methods.missing(m, dict.fromkeys(least), settings)]
    assert {"random", "influence", "short_answers", "long_answers"} <= set(free)
    scores = make_scores([1], [1])
    assert not any(methods.missing(m, scores, settings) for m in methods.METHODS)
    known = {name for names in methods.PARTS.values() for name in names} | set(least)
    assert all(set(method.reads) <= known for method in methods.METHODS.values())


def asked(**changes):
    c = config.default()
    c.model.path = "x"
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return config.resolve(c)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"selection__method": "digq"}, r"selection.method must be one of .*Did you mean 'diq'"),
        ({"finetune__baselines": "random,ranom"}, r"finetune.baselines must .*mean 'random'"),
        ({"selection__method": "ifd"}, "=ifd needs difficulty.model_scores=True"),
        ({"finetune__baselines": "k_center"}, "=k_center needs the base model's gradient store"),
    ],
)
def test_a_method_that_cannot_run_is_refused_from_the_config_alone(changes, message):
    methods.check(asked(selection__method="difficulty_knowledge"))
    with pytest.raises(errors.UserError, match=message) as caught:
        methods.check(asked(**changes))
    assert "\n" not in str(caught.value)


def test_selection_in_memory():
    # The rows of test_diq_by_hand: quadrants 1 2 3 4 1; 40 % of five are two.
    scores = {"example_ids": list("abcde"), "influence": [3, 2, 0, -1, 1], "tokens": [9] * 5}
    got = select.select(scores, np.array([5, 1, 4, 2, 3.0]), method="diq", retention_ratio=0.4)
    np.testing.assert_array_equal(got.ranks, [1, 3, 4, 5, 2])
    np.testing.assert_array_equal(got.quadrants, [1, 2, 3, 4, 1])
    assert got.selected.tolist() == [True, False, False, False, True] and got.keep == 2
    assert got.thresholds == (3, 1)
    assert got.why[1] == (
        "Q2: difficulty 1 < 3, influence 2 >= 1; place 1 of 1 in Q2; beyond the budget of 2"
    )
    held = types.SimpleNamespace(groups=["mean"], **scores, loss=None)  # as influence.score returns
    assert select.select(held, method="influence").selected.tolist() == [True, *[False] * 4]
    with pytest.raises(errors.UserError, match="needs the difficulty perspective 'overall'"):
        select.select(held)
    with pytest.raises(errors.UserError, match=r"retention_ratio must be in \(0, 1\]; got 2"):
        select.select(held, method="influence", retention_ratio=2)


def test_a_cap_takes_by_rank_and_passes_over_full_sources():
    # Budget 4, at most 2 of a source: a a | a is full | b b; the rest follow by rank.
    sources = list("aaabbb")
    got, passed = select.capped(np.arange(1, 7), sources, 4, 2)
    np.testing.assert_array_equal(got, [1, 2, 5, 3, 4, 6])
    np.testing.assert_array_equal(passed, [0, 0, 1, 0, 0, 0])
    assert [select.source_limit(*x) for x in ((0.29, 100), (0.5, 3), (0.1, 2))] == [29, 1, 1]


@hypothesis.given(st.lists(st.sampled_from("abc"), min_size=12, max_size=12), st.integers(2, 6))
@hypothesis.settings(deadline=None, max_examples=30)
def test_a_capped_order_is_total_and_keeps_the_cap(sources, keep):
    order = np.random.default_rng(0).permutation(12) + 1
    got, _ = select.capped(order, sources, keep, 2)
    assert sorted(got) == list(range(1, 13))
    room = sum(min(2, sources.count(s)) for s in "abc")
    taken = [s for s, rank in zip(sources, got, strict=True) if rank <= min(keep, room)]
    assert max(taken.count(s) for s in "abc") <= 2


def test_the_residual_by_hand():
    # log tokens 0 1 2 (tokens 1, e, e^2), influence 5 1 3: means 1 and 3, slope (-1 * 2) / 2
    # = -1, so the fit is 4 3 2 and the residual 1 -2 1.
    tokens = np.exp([0.0, 1.0, 2.0])
    got = select.length_residual(np.array([5.0, 1.0, 3.0]), tokens, np.arange(3))
    np.testing.assert_allclose(got, [1, -2, 1], atol=1e-6)
    same = select.length_residual(np.array([5.0, 1.0, 3.0]), np.full(3, 7), np.arange(3))
    np.testing.assert_allclose(same, [2, -2, 0], atol=1e-6)


@hypothesis.given(st.permutations(range(9)))
@hypothesis.settings(deadline=None, max_examples=15)
def test_the_residual_does_not_depend_on_the_order_of_the_file(shuffle):
    rng, shuffle = np.random.default_rng(0), np.array(shuffle)
    influence, tokens = rng.normal(size=9).astype(np.float32), rng.integers(1, 500, 9)
    here = select.length_residual(influence, tokens, np.arange(9))
    there = select.length_residual(influence[shuffle], tokens[shuffle], shuffle)
    np.testing.assert_array_equal(there, here[shuffle])


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"influence": [0.1, float("nan")]}, {}, "influence of example 'b' is not finite"),
        ({"influence": [0.1]}, {}, "influence has 1 values for 2 examples"),
        ({}, {"retention_ratio": float("nan")}, "retention_ratio must be finite"),
        ({}, {"retention_rate": 0.5}, "retention_rate does not exist. Did you mean 'retention_"),
        ({}, {"percentile": 101.0}, "difficulty.percentile must be at most 100"),
    ],
)
def test_what_cannot_be_ordered_is_refused(change, settings, message):
    scores = {"example_ids": ["a", "b"], "influence": [0.1, 0.2], "tokens": [3, 4]} | change
    with pytest.raises(errors.UserError, match=message):
        select.select(scores, **settings)
