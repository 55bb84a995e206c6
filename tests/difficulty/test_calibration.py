"""Temperatures, reliability, agreement and word features."""

import numpy as np
import pytest

from diq_jax import stats
from diq_jax.difficulty import agreement, calibration, words


def sure(temperature, rows=4000, seed=0):
    """Labels drawn from a softmax, and its log-probabilities sharpened by a temperature."""
    rng = np.random.default_rng(seed)
    log_p = calibration.tempered(rng.normal(0, 1.5, (rows, 5)), 1.0)
    labels = (np.cumsum(np.exp(log_p), 1) < rng.random((rows, 1))).sum(1)
    return calibration.tempered(log_p, 1 / temperature), np.eye(5)[np.minimum(labels, 4)]


def test_tempered_by_hand():
    # log 4 and log 1 (p 0.8, 0.2) at temperature 2 are log 2 and log 1: 2/3 and 1/3.
    p = np.exp(calibration.tempered(np.log([0.8, 0.2]), 2.0))
    np.testing.assert_allclose(p, [2 / 3, 1 / 3])
    np.testing.assert_allclose(np.exp(calibration.tempered(np.log([0.8, 0.2]), 1.0)), [0.8, 0.2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_that_was_put_in_is_found(temperature):
    log_p, shares = sure(temperature)
    assert calibration.fit_temperature(log_p, shares) == pytest.approx(temperature, rel=0.06)
    found = calibration.measure(log_p, shares, np.arange(len(log_p)) % 5)
    assert found["after"]["nll"] <= found["before"]["nll"] + 1e-3
    assert found["after"]["ece"] < 0.04
    assert temperature == 1 or found["before"]["ece"] > 0.08


def test_reliability_by_hand():
    # Confidences 0.6, 0.6 (right, wrong) and 0.9 (a label halfway: right by a half).
    p = np.array([[0.6, 0.4, 0, 0, 0], [0.6, 0.4, 0, 0, 0], [0.1, 0.9, 0, 0, 0]]) + 1e-12
    shares = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    bins = calibration.reliability(np.log(p), shares)
    assert [b["rows"] for b in bins] == [2, 1]
    assert [b["right"] for b in bins] == [0.5, 0.5]
    # (2 * |0.5 - 0.6| + |0.5 - 0.9|) / 3
    assert calibration.expected_error(bins) == pytest.approx(0.2)
    assert calibration.nll(np.log(p[:1]), shares[:1]) == pytest.approx(-np.log(0.6))


def asked(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    hard = rng.integers(0, 2, rows)
    texts = [
        " ".join([*rng.choice(["liver", "heart", "dose", "gene"], 6), ("easy", "rare")[h]])
        for h in hard
    ]
    return texts, np.where(hard, 4.0, 2.0)


def test_ridge_learns_from_the_other_folds_only():
    texts, levels = asked()
    parts = np.arange(60) % 5
    found = words.ridge(texts, levels, parts)
    assert stats.spearman(found, levels) > 0.8
    changed = levels.copy()
    changed[parts == 0] = 5 - changed[parts == 0]
    again = words.ridge(texts, changed, parts)
    np.testing.assert_array_equal(found[parts == 0], again[parts == 0])
    assert (found[parts == 1] != again[parts == 1]).any()


def test_a_vocabulary_is_its_arrays_and_knows_no_word_of_other_texts():
    texts, _ = asked()
    made = words.fit(texts[:20])
    arrays = words.to_arrays(made)
    back = words.from_arrays(arrays)
    np.testing.assert_array_equal(made.transform(texts).toarray(), back.transform(texts).toarray())
    norms = np.linalg.norm(made.transform(texts).toarray(), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert not made.transform(["entirely other"]).nnz
    kernel = np.ones((len(arrays["idf"]), 3, 1), np.float32)
    scores = words.scores(arrays | {"kernel": kernel}, texts[:2])
    np.testing.assert_allclose(scores[:, 0, 0], made.transform(texts[:2]).sum(1).A1, rtol=1e-5)


def test_measure_of_a_perfect_classifier():
    texts, _ = asked(50)
    levels = np.repeat(np.arange(50)[:, None] % 5 + 1.0, 3, axis=1)
    levels[:, 1] = np.nan
    probabilities = np.eye(5)[np.nan_to_num(levels, nan=1).astype(int) - 1]
    found = agreement.measure(levels, probabilities, texts, np.arange(50) // 10, 0)
    assert found["rows"] == 50 and found["folds"] == 5
    assert list(found["perspectives"]) == ["knowledge", "overall"]
    overall = found["perspectives"]["overall"]
    assert overall["spearman"] == pytest.approx(1) and overall["mae"] == 0
    assert overall["kappa"] == 1
    assert overall["interval"]["low"] == pytest.approx(1)
    assert overall["confusion"] == (10 * np.eye(5, dtype=int)).tolist()
    # (2 + 1 + 0 + 1 + 2) / 5 levels
    median = {"spearman": None, "mae": 1.2, "kappa": 0}
    assert overall["baselines"]["median level"] == median
    ridge = overall["baselines"]["tf-idf + ridge"]["spearman"]
    difference = overall["difference"]["tf-idf + ridge"]
    assert difference["mean"] == pytest.approx(1 - ridge)
    assert difference["low"] < difference["mean"] < difference["high"]


def test_bootstrap_spearman_is_the_spearman_of_the_drawn_rows():
    rng = np.random.default_rng(0)
    y, columns = rng.integers(0, 5, 40), rng.integers(0, 9, (40, 2))
    found = stats.bootstrap_spearman(columns, y, 3, 7)
    draws = np.random.Generator(np.random.PCG64(7))
    for row in found:
        drawn = draws.integers(0, 40, 40)
        expected = [stats.spearman(columns[drawn, c], y[drawn]) for c in (0, 1)]
        np.testing.assert_allclose(row, expected, atol=1e-12)
    assert np.isnan(stats.bootstrap_spearman(np.ones((40, 1)), y, 1, 0)).all()
