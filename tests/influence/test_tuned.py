"""Scores from losses before and after a short training: by hand, resumed, and what they mean."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import tuned, warmup
from diq_jax.models import loss
from diq_jax.run import parts

POOL, TARGETS = tiny.rows(9, 20, seed=3), tiny.rows(4, 20, seed=4)
MODEL = functools.cache(tiny.model)


def settings(**changes):
    values = {"learning_rate": 1e-3, "epochs": 2, "batch_size": 2, "first_tokens": 3}
    asked = influence_config.Tuned(**(values | changes))
    return influence_config.Influence(lora=influence_config.Lora(rank=2), tuned=asked)


def run(asked, pool=POOL, targets=TARGETS, **more):
    return tuned.scores(MODEL(), pool, targets, asked, tiny.placement(), **more)


def test_nothing_is_computed_where_nothing_is_asked():
    assert run(settings()) == {}


def test_color_is_the_fall_of_the_loss_and_follows_the_influence_for_small_steps():
    """One full-batch step of Adam at a tiny rate moves along the signs of the mean gradient; rows
    that are the targets themselves gain, and color tends to <g(z), sign-like direction>.
    """
    asked = settings(color=True, epochs=1, batch_size=4, learning_rate=1e-4)
    got = run(asked, [*POOL, *TARGETS])["color"]
    assert got.shape == (13,) and np.mean(got[9:]) > 0
    # Twice the rate, about twice the fall: the first order dominates.
    changed = dataclasses.replace(asked.tuned, learning_rate=2e-4)
    twice = run(dataclasses.replace(asked, tuned=changed), [*POOL, *TARGETS])["color"]
    np.testing.assert_allclose(twice, 2 * got, rtol=0.15, atol=0.1 * np.abs(got).max())


def test_mixed_weights_are_a_share_of_the_update():
    """Merged into the weights, half the adapter's scale is half the update of every matrix."""
    model = MODEL()
    trainer = tuned._Trainer(model, settings(), tiny.placement())
    _, space = trainer.train("x", TARGETS, 1.0, warmup.EpochMemory())
    batch = batches.make_batch(POOL, 9, 20, 20)

    def updates(share):
        chosen, rest = tuned.mixed(space, share)
        both = trees.combine(chosen, rest)["adapter"]
        leaves = trees.named_leaves(both)
        return {
            name[:-2]: (leaves[name] @ leaves[f"{name[:-2]}/b"]
                        - leaves[f"{name[:-2]}/a0"] @ leaves[f"{name[:-2]}/b0"])
            * leaves[f"{name[:-2]}/scale"].reshape(-1, 1, 1)
            for name in leaves if name.endswith("/a")
        }  # fmt: skip

    whole, half = updates(1.0), updates(0.5)
    assert max(np.abs(x).max() for x in whole.values()) > 0
    for name, update in whole.items():
        np.testing.assert_allclose(half[name], update / 2, rtol=1e-6)
    base = loss.token_losses(model.params, model.cfg, batch)
    none = tuned._first_losses(*tuned.mixed(space, 0.0), batch, model.cfg, "mean", 20)["first"]
    np.testing.assert_allclose(none, base[:, :20], atol=1e-5)


def test_temp_reads_the_first_tokens():
    """At a share of 0 the mix is the base model, whose losses are known."""
    got = run(settings(temp=True, mix=0.0, clusters=2))
    model, batch = MODEL(), batches.make_batch(POOL, 9, 20, 20)
    base = np.asarray(jax.jit(loss.token_losses, static_argnums=1)(model.params, model.cfg, batch))
    for i, row in enumerate(POOL):
        own = base[i, : min(3, row.answer_tokens)]
        assert got["temp"][i] == pytest.approx(own.mean(), rel=1e-4)
    assert set(got["temp_cluster"]) == {0, 1}
    other = run(settings(temp=True, mix=1.0))["temp"]
    assert np.abs(other - got["temp"]).max() > 1e-5


def test_short_rows_are_filled_by_their_mean_by_hand():
    # Row 0 has two tokens, (1 + 3) / 2 = 2; row 1 has three, (0 + 3 + 6) / 3 = 3.
    vectors, means = tuned.fill(np.float32([[1, 3, 0], [0, 3, 6]]), np.array([2, 3]))
    np.testing.assert_array_equal(vectors, [[1, 3, 2], [0, 3, 6]])
    np.testing.assert_array_equal(means, [2, 3])
    labels = tuned.cluster(np.float32([[0, 0], [9, 9], [0, 1]]), 5, 0)
    assert len(set(labels)) == 3  # three distinct rows make at most three clusters


def test_a_resumed_pass_gives_the_same(tmp_path):
    asked = settings(color=True, epochs=1)
    epochs = warmup.EpochMemory()
    whole = run(asked, keep=lambda name: parts.Parts(tmp_path / name), epochs=lambda name: epochs)
    assert {path.name for path in tmp_path.iterdir()} == {"color-before", "color-after"}
    next((tmp_path / "color-after").glob("part-*")).unlink()
    again = run(asked, keep=lambda name: parts.Parts(tmp_path / name), epochs=lambda name: epochs)
    assert set(epochs) == {1} and set(whole) == {"color"}
    np.testing.assert_array_equal(again["color"], whole["color"])


def test_a_ruined_training_names_its_field():
    with pytest.raises(errors.UserError, match=r"Try a lower influence\.tuned\.learning_rate"):
        run(settings(color=True, learning_rate=1e38, epochs=3))
