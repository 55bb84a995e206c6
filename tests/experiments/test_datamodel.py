"""The linear datamodeling score: its statistics by hand, its training against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny

import datamodel
import lds_scores
from diq_jax.data import batches
from diq_jax.models import config as model_config
from diq_jax.models import loss


def test_subsets_are_of_one_size_and_depend_on_the_seed():
    subsets = datamodel.draw_subsets(7, 10, 0.5, 0)
    assert subsets.shape == (7, 10) and np.all(subsets.sum(axis=1) == 5)
    assert np.array_equal(subsets, datamodel.draw_subsets(7, 10, 0.5, 0))
    assert not np.array_equal(subsets, datamodel.draw_subsets(7, 10, 0.5, 1))


def test_an_epoch_takes_members_only_and_each_at_most_once():
    members = np.arange(20) % 2 == 0
    order = datamodel.order_of(members, epochs=3, batch_size=4, seed=5)
    assert order.shape == (6, 4)  # 10 members: two steps of 4 an epoch, two rows left out
    for epoch in order.reshape(3, 8):
        assert len(set(epoch)) == 8 and members[epoch].all()


def test_training_equals_a_plain_loop():
    model, rows = tiny.model(), tiny.rows(6, 12, 3)
    batch = jax.tree.map(jnp.asarray, batches.make_batch(rows, 6, 12, 12))
    order = datamodel.order_of(np.ones(6, bool), 2, 2, 0)
    trained = datamodel.fit(model.params, batch, order, 1e-2, model.cfg)

    # 6 rows, 2 a step, 2 epochs: 6 steps at 1e-2 times 1, 5/6, ..., 1/6.
    optimizer = optax.adam(lambda count: 1e-2 * (1 - count / 6))
    params, state = model.params, optimizer.init(model.params)
    for chosen in order:
        part = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
        gradient = jax.grad(
            lambda p, part=part: loss.example_losses(p, model.cfg, part, "mean").mean()
        )(params)
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
    for ours, plain in zip(jax.tree.leaves(trained.chosen), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        datamodel.losses(params, batch, model.cfg),
        loss.example_losses(params, model.cfg, batch, "mean"),
        rtol=1e-5,
    )


def test_a_loss_that_is_the_sum_of_scores_has_lds_one():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(30, 4)), datamodel.draw_subsets(12, 30, 0.5, 0)
    measured = 2.0 - 0.1 * (subsets @ scores)
    np.testing.assert_allclose(datamodel.lds(scores, subsets, measured), 1.0)
    np.testing.assert_allclose(datamodel.lds(-scores, subsets, measured), -1.0)
    np.testing.assert_array_equal(datamodel.lds(np.zeros((30, 4)), subsets, measured), 0.0)
    assert datamodel.interval(scores, subsets, measured, 100, 0) == pytest.approx((1.0, 1.0))


def test_lds_by_hand():
    # Sums of the halves {0}, {1}, {2}: 3, 1, 2; minus the losses: -1, -2, -3. Their ranks are
    # 3, 1, 2 and 3, 2, 1: Spearman is 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 0.5.
    scores, subsets = np.array([[3.0], [1.0], [2.0]]), np.eye(3, dtype=bool)
    measured = np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(datamodel.lds(scores, subsets, measured), 0.5)


def test_lds_equals_scipy_with_ties():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 3, size=(20, 3)).astype(float)
    subsets = datamodel.draw_subsets(15, 20, 0.5, 2)
    measured = rng.normal(size=(15, 3)).round(1)
    expected = [
        scipy.stats.spearmanr(subsets @ scores[:, m], -measured[:, m]).statistic for m in range(3)
    ]
    np.testing.assert_allclose(datamodel.lds(scores, subsets, measured), expected)


def test_reliability_by_hand():
    # Two seeds whose ranks agree at 0.5, as above: 2 x 0.5 / (1 + 0.5).
    measured = np.array([[[3.0], [3.0]], [[1.0], [2.0]], [[2.0], [1.0]]])
    assert datamodel.reliability(measured) == pytest.approx(2 / 3)
    assert datamodel.reliability(measured[:, [0, 0, 0]]) == pytest.approx(1.0)


def test_the_peers_model_is_the_study_s():
    cfg = tiny.decoder_config(num_kv_heads=4)
    assert model_config.decoder_config(lds_scores.hf_config(cfg), "the study's") == cfg
