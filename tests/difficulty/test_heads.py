"""Heads: their shares by hand, and their fit at the optimum of what it maximises."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from diq_jax.difficulty import heads


def data(rows=40, features=6, terms=9, seed=0):
    rng = np.random.default_rng(seed)
    words = scipy.sparse.random(rows, terms, 0.4, "csr", np.float32, seed)
    levels = rng.integers(1, 6, (rows, 3)).astype(np.float32)
    return rng.normal(size=(rows, features)).astype(np.float32), words, levels


def test_a_level_between_two_belongs_to_both_and_an_unknown_one_to_none():
    got = heads.shares(jnp.asarray([2.0, 3.25, 5.0, np.nan]))
    expected = [[0, 1, 0, 0, 0], [0, 0, 0.75, 0.25, 0], [0, 0, 0, 0, 1], [0] * 5]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_fit_is_stationary(monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 500)
    pooled, words, levels = data()
    levels[::7, 1] = np.nan
    fitted, kernel = heads.fit(pooled, words, levels)
    mean = pooled.mean(0)
    scale = np.sqrt(np.mean(np.sum((pooled - mean) ** 2, 1)))
    bias = fitted["bias"] + np.einsum("f,fps->ps", mean, fitted["kernel"])

    def objective(kernel, own, bias):
        x, w = jnp.asarray((pooled - mean) / scale), jnp.asarray(words.toarray())
        log_p = heads.apply({"kernel": kernel, "bias": bias}, x, jnp.einsum("nv,vps->nps", w, own))
        prior = heads.ENCODER_PRECISION * jnp.sum(kernel**2)
        prior += heads.WORDS_PRECISION * jnp.sum(own**2)
        prior += heads.BIAS_PRECISION * jnp.sum(bias**2)
        return prior / 2 - jnp.sum(heads.shares(jnp.asarray(levels)) * log_p)

    at = (jnp.asarray(fitted["kernel"] * scale), jnp.asarray(kernel), jnp.asarray(bias))
    for leaf in jax.grad(objective, (0, 1, 2))(*at):
        assert np.abs(leaf).max() < 0.02


def test_fit_is_the_same_again_and_without_words_and_leaves_unknown_perspectives_at_zero():
    pooled, words, levels = data()
    levels[:, 0] = np.nan
    (one, kernel), (other, again) = (heads.fit(pooled, words, levels) for _ in "ab")
    np.testing.assert_array_equal(one["kernel"], other["kernel"])
    np.testing.assert_array_equal(kernel, again)
    assert not one["kernel"][:, 0].any() and not kernel[:, 0].any() and kernel[:, 1].any()
    plain, none = heads.fit(pooled, None, levels)
    assert none is None and plain["kernel"].shape == one["kernel"].shape


def test_constant_features_do_no_harm():
    _, _, levels = data()
    fitted, _ = heads.fit(np.ones((40, 6), np.float32), None, levels)
    assert all(np.isfinite(x).all() for x in fitted.values())
