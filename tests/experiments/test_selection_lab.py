"""The selection lab: many trainings at once equal each alone, and its numbers by hand."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from diq_jax import config, errors, finetune_config
from diq_jax.evaluate import intervals, measure, options, significance
from diq_jax.finetune import fit, sft
from diq_jax.run import devices
from lab import arms, summary, trainings


def question(example_id="q"):
    ids = [np.array(ids, np.int32) for ids in ((7, 8, 9), (5, 6), (11, 12, 13))]
    return options.Question(example_id, "task", ids[0], ("A", "B"), tuple(ids[1:]), 1, (2,))


def make_lab(**finetune):
    """A lab of 10 tiny rows, 2 targets, a held-out row and a question, without a model folder."""
    settings = dataclasses.replace(
        finetune_config.Finetune(), batch_size=4, epochs=2, learning_rate=1e-2, **finetune
    )
    model, rows = tiny.model(), tiny.rows(13, 24, 5)
    asked = measure.ask(rows[10:], [question()], model.cfg, tiny.placement(), 256)
    return trainings.Lab(
        model, settings, rows[:10], trainings.lay_out(rows[:10]),
        tuple(trainings.for_seeds(part, settings.trains_adapter) for part in asked),
        [question()], 2, "shared",
    )  # fmt: skip


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_trainings_at_once_equal_each_alone(parameters):
    lab = make_lab(parameters=parameters)
    # Six rows in steps of four: the second step of an epoch holds two, and padding.
    chosen = [(0, 2, 3, 5, 7, 9), (1, 2, 4, 5, 8, 9)]
    weights, losses = trainings.train(lab, chosen, [0, 3])
    found = trainings.evaluate(lab, weights, 2)
    placement = devices.make_placement(config.Parallel())
    asked = measure.ask(tiny.rows(13, 24, 5)[10:], [question()], lab.model.cfg, placement, 256)
    for k, seed in enumerate((0, 3)):
        rows = [lab.pool[i] for i in chosen[k]]
        fitted = fit.fit(lab.model, rows, lab.settings, seed, placement)
        np.testing.assert_allclose(
            losses[k], [record["loss"] for record in fitted.records], rtol=1e-5
        )
        alone = measure.measure("alone", sft.merge(lab.model.params, fitted.factors, fitted.frozen),
                                asked)  # fmt: skip
        both = np.concatenate([found["target_loss"][k], found["held_out_loss"][k]])
        np.testing.assert_allclose(both, alone["target"]["loss"], rtol=1e-4)
        rows = options.predictions("alone", [question()], alone["question"])
        for name, value in zip(
            intervals.METRICS, options.outcomes(rows, intervals.METRICS)[0], strict=True
        ):
            np.testing.assert_allclose(found[name][k], value, rtol=1e-4, err_msg=name)


def test_the_base_is_the_model_itself():
    lab = make_lab()
    found = trainings.measure_base(lab, 2)
    asked = measure.ask(tiny.rows(13, 24, 5)[10:], [], lab.model.cfg, tiny.placement(), 256)[0]
    alone = measure.measure("base", (lab.model.params, None), [asked])["target"]["loss"]
    both = np.concatenate([found["target_loss"][0], found["held_out_loss"][0]])
    np.testing.assert_allclose(both, alone, rtol=1e-5)


def test_a_run_goes_on_to_the_same_numbers(tmp_path):
    lab, rows = make_lab(), [(0, 1, 2, 3)] * 3
    first = trainings.run(lab, tmp_path / "once", rows, 3)
    trainings.run(lab, tmp_path / "twice", rows[:2], 2)
    second = trainings.run(lab, tmp_path / "twice", rows, 2)
    for name in trainings.METRICS:
        assert first[name].shape[0] == 3
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (below the last: 0.06 stays), 0.5 * 1.
    found = significance.holm({"a": 0.5, "b": 0.01, "c": 0.03, "d": 0.02})
    np.testing.assert_allclose(list(found.values()), [0.5, 0.04, 0.06, 0.06])


def test_budgets_nest_and_random_is_the_seed_s_own():
    ids = [f"row-{i:03d}" for i in range(40)]
    ranks = arms.random_ranks(ids, 3)
    assert sorted(ranks) == list(range(1, 41))
    assert set(arms.chosen(ranks, 0.05)) < set(arms.chosen(ranks, 0.1))
    assert not np.array_equal(ranks, arms.random_ranks(ids, 4))


def test_targets_are_drawn_from_what_follows_the_candidates():
    some = [arms.drawn_targets(10, 6, 4, seed) for seed in range(3)]
    assert all(len(set(rows)) == 4 and set(rows) <= set(range(10, 16)) for rows in some)
    assert len(set(some)) > 1
    assert arms.drawn_targets(10, 6, 9, 0) == tuple(range(10, 16))


def test_difference_to_random_is_paired():
    rng = np.random.default_rng(0)
    values = {m: rng.normal(size=(4, 6)) for m in trainings.METRICS}
    moved = {m: x - 1 for m, x in values.items()}
    about = {"rows": 3, "answer_tokens": 2.0, "seeds": 4}
    found = {("random", 0.1): values, ("diq", 0.1): moved}
    base = {m: x[:1] for m, x in values.items()}
    rows = summary.rows(found, base, dict.fromkeys(found, about), 200, 0)
    [diq] = [row for row in rows if row["arm"] == "diq"]
    versus = diq["metrics"]["choice_loss_letters"]["versus_random"]
    # Each value is 1 below its pair, whatever is drawn.
    assert versus["mean"] == pytest.approx(-1) and versus["high"] == pytest.approx(-1)
    assert versus["p"] == versus["p_holm"] == 2 / 200
    assert len(summary.lines(rows)) == 3 * len(trainings.METRICS)
    assert "diq" in summary.as_markdown(rows, "title")


def test_settings_that_a_vmapped_training_lacks_are_refused():
    c = config.default()
    c.model.path, c.finetune.packing = "model", True
    with pytest.raises(errors.UserError, match=r"finetune\.packing must be False in the lab"):
        trainings.make_lab(config.resolve(c), [], [], [], [])


def test_padding_changes_nothing():
    lab = make_lab()
    order = trainings.plan(lab, [(0, 1, 2, 3, 4)], [0])
    assert order.shape == (1, 4, 4)  # five rows in steps of four, two epochs
    assert np.count_nonzero(order < 0) == 2 * 3
    assert jax.tree.leaves(lab.batch)[0].shape[0] == 10
