"""Bootstrap intervals: cases by hand, the paired difference, agreement with stats."""

import bootstrap
import numpy as np

from diq_jax.evaluate import intervals

THREE = ("test_loss", "accuracy", "accuracy_norm")


def test_two_questions_by_hand():
    # Resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    drawn = intervals.estimates([0.0, 1.0], 4000, 0)
    assert drawn[0] == 0.5
    values, counts = np.unique(drawn[1:], return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
    assert intervals.summary(drawn) == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_columns_have_the_draws_of_bootstrap_interval():
    values = np.random.default_rng(0).normal(size=(23, 2, 3))
    drawn = intervals.estimates(values, 300, 7)
    for i, k in np.ndindex(2, 3):
        low, high = bootstrap.bootstrap_interval(values[:, i, k], lambda x: x.mean(1), 300, 7)
        got = intervals.summary(drawn[:, i, k])
        np.testing.assert_allclose([got["low"], got["high"]], [low, high], rtol=1e-12)


def test_a_constant_gap_is_certain_however_noisy_the_models():
    losses = np.random.default_rng(1).normal(size=(30, 1))
    targets = np.concatenate([losses, losses - 0.25], axis=1)
    questions = np.zeros((4, 2, 3))
    questions[:, 1] = [-0.5, 1, 0]  # loss half a nat lower, always right, never right by length
    out = intervals.results(
        ["base", "selected"],
        targets,
        questions,
        ["x", "y", "x", "x"],
        {"base": [], "selected": ["base"]},
        200,
        0,
        THREE,
    )
    base, selected = out["base"], out["selected"]
    assert base["versus"] == {}
    assert base["target_loss"]["high"] - base["target_loss"]["low"] > 0.3
    gaps = {metric: list(v.values()) for metric, v in selected["versus"]["base"].items()}
    expected = {"target_loss": -0.25, "test_loss": -0.5, "accuracy": 1.0, "accuracy_norm": 0.0}
    assert gaps.keys() == expected.keys()
    for metric, value in expected.items():
        np.testing.assert_allclose(gaps[metric], value, atol=1e-12)
    assert {task: v["questions"] for task, v in selected["tasks"].items()} == {"x": 3, "y": 1}
    assert selected["tasks"]["y"]["test_loss"] == {"mean": -0.5, "low": -0.5, "high": -0.5}


def test_the_difference_is_paired():
    # Question by question b - a is 0.1, -0.1, 0.1, -0.1, though each has a spread of tens.
    a = np.array([10.0, -30.0, 20.0, 5.0])
    b = a + np.array([0.1, -0.1, 0.1, -0.1])
    questions = np.zeros((4, 2, 3))
    out = intervals.results(
        ["base", "b"],
        np.stack([a, b], 1),
        questions,
        ["t"] * 4,
        {"base": [], "b": ["base"]},
        500,
        0,
        THREE,
    )
    gap = out["b"]["versus"]["base"]["target_loss"]
    np.testing.assert_allclose([gap["mean"], gap["low"], gap["high"]], [0, -0.1, 0.1], atol=1e-9)


def test_averages_weigh_tasks_alike_and_pair_models():
    # Task x: 3 of 3 and 0 of 3 right; task y: 0 of 1 and 1 of 1. By question 3/4, by task 1/2.
    questions = np.zeros((4, 2, 3))
    questions[:3, 0, 1:] = questions[3, 1, 1:] = 1
    out = intervals.results(
        ["base", "b"], np.zeros((2, 2)), questions, ["x", "x", "x", "y"],
        {"base": [], "b": ["base"]}, 100, 0, THREE, groups={"AvgS": ["x"], "AvgA": ["x", "y"]},
    )  # fmt: skip
    means = out["base"]["averages"]
    assert means["AvgA"]["accuracy"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert means["AvgS"]["accuracy_norm"]["mean"] == 1 and means["AvgA"]["tasks"] == 2
    gaps = out["b"]["versus"]["base"]["averages"]
    assert gaps["AvgS"]["accuracy"]["mean"] == -1 and gaps["AvgA"]["accuracy"]["mean"] == 0
