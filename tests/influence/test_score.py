"""Scores in memory: equal to the oracle's, and the same bits where finished rows are given back."""

import jax
import numpy as np
import oracle
import pytest
import tiny

from diq_jax import influence_config
from diq_jax.data import batches
from diq_jax.influence import direction, score, warmup
from diq_jax.run import parts

POOL, TARGETS = tiny.rows(9, 24, seed=1), tiny.rows(4, 20, seed=7)
SETTINGS = {
    "exact": influence_config.Influence(batch_tokens=96, targets="task"),
    "projected": influence_config.Influence(
        engine="projected", parameters="lora", batch_tokens=96, targets="task",
        projection=influence_config.Projection(dim=64),
    ),
    "factored": influence_config.Influence(
        engine="factored", batch_tokens=96, projection=influence_config.Projection(dim=100)
    ),
    "less": influence_config.Influence(
        engine="projected", parameters="lora", batch_tokens=96, targets="task", direction="less",
        normalize="cosine", projection=influence_config.Projection(dim=64),
        warmup=influence_config.Warmup(epochs=2, fraction=0.5, batch_size=4),
    ),
}  # fmt: skip
REPEATED = sorted(SETTINGS.keys() - {"exact", "less"})


def scored(name, **more):
    tasks = ["a", "b", "a", "a"]
    return score.score(tiny.model(), POOL, TARGETS, SETTINGS[name], tiny.placement(), tasks, **more)


def test_scores_are_the_oracles():
    found, model = scored("exact"), tiny.model()
    space = direction.make_space(model, SETTINGS["exact"], tiny.placement())
    gradients, ends = (
        oracle.gradients(*space, batches.make_batch(rows, len(rows), 24, 24), model.cfg)
        for rows in (POOL, TARGETS)
    )
    gbar = jax.tree.map(lambda g: g.mean(axis=0), ends)
    expected = np.asarray(oracle.dots(gradients, gbar))
    np.testing.assert_allclose(found.influence, expected, atol=1e-5 * np.abs(expected).max())
    second = np.asarray(oracle.dots(gradients, jax.tree.map(lambda g: g[1], ends)))
    np.testing.assert_allclose(found.by_target[:, 1], second, atol=1e-5 * np.abs(second).max())
    assert found.groups == ["a", "b"] and found.example_ids == [row.example_id for row in POOL]
    assert found.tokens.tolist() == [row.answer_tokens for row in POOL]
    assert found.parameters == sum(x.size for x in jax.tree.leaves(model.params))


# less keeps projected gradients, over epochs: the other two repeat a part of it.
@pytest.mark.parametrize(
    "name", ["exact", "less", *(pytest.param(n, marks=pytest.mark.slow) for n in REPEATED)]
)
def test_finished_rows_and_epochs_are_not_computed_again(name, tmp_path):
    """Without one part, the bits are those of a call that was not killed; so are those on disk."""
    whole, epochs = scored(name), warmup.EpochMemory()

    def keep(checkpoint):
        return parts.Parts(tmp_path / f"rows{checkpoint}")

    scored(name, keep=keep, epochs=epochs)
    for epoch in [k for k in epochs if k > 1]:
        del epochs[epoch]
    kept = sorted(tmp_path.rglob("part-*"))
    assert len(kept) > 1
    kept[1].unlink()
    again = scored(name, keep=keep, epochs=epochs)
    for field in ("influence", "loss", "by_target", "alignment", "target_losses"):
        np.testing.assert_array_equal(getattr(again, field), getattr(whole, field))
