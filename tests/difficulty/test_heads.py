"""Heads: their links by hand, and their fit at the optimum of what it maximises."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from diq_jax.difficulty import heads


def settings(**changes):
    return types.SimpleNamespace(**{"head": "categorical", "class_weights": "none"} | changes)


def data(rows=40, features=6, terms=9, seed=0):
    rng = np.random.default_rng(seed)
    words = scipy.sparse.random(rows, terms, 0.4, "csr", np.float32, seed)
    levels = rng.integers(1, 6, (rows, 3)).astype(np.float32)
    return rng.normal(size=(rows, features)).astype(np.float32), words, levels


def test_a_level_between_two_belongs_to_both_and_an_unknown_one_to_none():
    got = heads.shares(jnp.asarray([2.0, 3.25, 5.0, np.nan]))
    expected = [[0, 1, 0, 0, 0], [0, 0, 0.75, 0.25, 0], [0, 0, 0, 0, 1], [0] * 5]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_ordinal_probabilities_by_hand_and_in_order():
    # Thresholds -1, 0, 1, 2 (gaps of 1: logs 0), score 0.5: P(level <= 2) = sigmoid(-0.5).
    raw = jnp.asarray([[-1.0, 0.0, 0.0, 0.0]])
    p = np.exp(heads.link({"thresholds": raw}, jnp.asarray([[[0.5]]])))[0, 0]
    below = 1 / (1 + np.exp(-(np.array([-1.0, 0.0, 1.0, 2.0]) - 0.5)))
    np.testing.assert_allclose(p, np.diff([0, *below, 1]), rtol=1e-5)
    # Whatever is kept, thresholds are in order and the five sum to one; extreme scores are finite.
    raw = jnp.asarray(np.random.default_rng(0).normal(0, 3, (3, 4)), jnp.float32)
    assert (np.diff(heads.thresholds(raw)) > 0).all()
    scores = jnp.asarray([-90.0, -2.0, 0.3, 90.0]).reshape(4, 1, 1) * jnp.ones((1, 3, 1))
    log_p = heads.link({"thresholds": raw}, scores)
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    # A higher score moves the whole distribution up.
    assert (np.diff(np.exp(log_p) @ np.arange(1, 6), axis=0) > 0).all()


def test_balanced_weights_by_hand():
    # Perspective 0: levels 1 1 1 2, so n / (K n_l) = 4 / (2 * 3) and 4 / (2 * 1); 1 is balanced.
    levels = np.array([[1, 1, 5], [1, 2, 5], [1, 3, np.nan], [2, 4, 5]], np.float32)
    weights = heads.class_weights(levels, "balanced")
    np.testing.assert_allclose(weights[0], [2 / 3, 2, 1, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(weights[1:], 1)
    np.testing.assert_array_equal(heads.class_weights(levels, "none"), np.ones((3, 5)))


@pytest.mark.parametrize("head", ["categorical", "ordinal"])
@pytest.mark.parametrize("balance", ["none", "balanced"])
def test_the_fit_is_stationary(head, balance, monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 500)
    pooled, words, levels = data()
    levels[::7, 1] = np.nan
    fitted, kernel = heads.fit(pooled, words, levels, settings(head=head, class_weights=balance))
    weights = jnp.asarray(heads.class_weights(levels, balance))
    mean = pooled.mean(0)
    scale = np.sqrt(np.mean(np.sum((pooled - mean) ** 2, 1)))
    name = "bias" if head == "categorical" else "thresholds"
    shift = np.einsum("f,fps->ps", mean, fitted["kernel"])
    constants = fitted[name] + shift if head == "categorical" else fitted[name].copy()
    if head == "ordinal":
        constants[:, :1] -= shift

    def objective(kernel, own, constants):
        x, w = jnp.asarray((pooled - mean) / scale), jnp.asarray(words.toarray())
        scores = jnp.einsum("nf,fps->nps", x, kernel) + jnp.einsum("nv,vps->nps", w, own)
        log_p = heads.link({name: constants}, scores)
        prior = heads.ENCODER_PRECISION * jnp.sum(kernel**2)
        prior += heads.WORDS_PRECISION * jnp.sum(own**2)
        prior += heads.BIAS_PRECISION * jnp.sum(constants**2)
        return prior / 2 - jnp.sum(heads.shares(jnp.asarray(levels)) * weights[None] * log_p)

    at = (jnp.asarray(fitted["kernel"] * scale), jnp.asarray(kernel), jnp.asarray(constants))
    gradient = jax.grad(objective, (0, 1, 2))(*at)
    for leaf in gradient:
        assert np.abs(leaf).max() < 0.02


def test_fit_is_the_same_again_and_without_words_and_leaves_unknown_perspectives_at_zero():
    pooled, words, levels = data()
    levels[:, 0] = np.nan
    (one, kernel), (other, again) = (heads.fit(pooled, words, levels, settings()) for _ in "ab")
    np.testing.assert_array_equal(one["kernel"], other["kernel"])
    np.testing.assert_array_equal(kernel, again)
    assert not one["kernel"][:, 0].any() and not kernel[:, 0].any() and kernel[:, 1].any()
    plain, none = heads.fit(pooled, None, levels, settings())
    assert none is None and plain["kernel"].shape == one["kernel"].shape


def test_constant_features_do_no_harm():
    _, _, levels = data()
    fitted, _ = heads.fit(np.ones((40, 6), np.float32), None, levels, settings())
    assert all(np.isfinite(x).all() for x in fitted.values())
