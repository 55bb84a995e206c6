"""How ranks settle with more targets, by hand."""

import numpy as np
import pytest

from lab import settling


def test_agreement_by_hand():
    # Best two: rows 0, 1 and rows 0, 2: one of two is in both. Ranks 1 2 3 4 against 1 3 2 4:
    # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8.
    spearman, overlap = settling.agreement(
        np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 2.0, 3.0, 1.0]), 2
    )
    assert spearman == pytest.approx(0.8) and overlap == 0.5


def test_a_draw_is_even_over_tasks_and_takes_none_twice():
    tasks = ["a"] * 10 + ["b"] * 10 + ["c"] * 2
    drawn = settling.draw(tasks, 12, np.random.default_rng(0))
    counts = [int(np.sum(np.array(tasks)[drawn] == task)) for task in "abc"]
    assert len(set(drawn.tolist())) == 12 and counts == [5, 5, 2]


def test_targets_that_agree_need_no_number():
    by_target = np.tile(np.arange(50.0)[:, None], (1, 12))
    rows = settling.study(by_target, ["t"] * 12, [2, 6, 12], 3, 5, 0)
    assert [(row["size"], row["kind"]) for row in rows] == [
        (2, "all"), (2, "apart"), (6, "all"), (6, "apart"), (12, "all"),
    ]  # fmt: skip
    for row in rows:
        assert row["spearman"]["low"] == pytest.approx(1) and row["overlap"]["low"] == 1


def test_all_targets_agree_with_themselves():
    by_target = np.random.default_rng(0).normal(size=(40, 8))
    *_, last = settling.study(by_target, ["a", "b"] * 4, [2, 8], 4, 4, 0)
    assert last["spearman"]["mean"] == pytest.approx(1) and last["overlap"]["mean"] == 1
