"""Selections by people: an order from a file, and single decisions."""

import json

import numpy as np
import pytest

from diq_jax import errors
from diq_jax.selection import by_hand
from diq_jax.selection import select as selecting

IDS = ["a", "b", "c", "d", "e"]
SCORES = {"example_ids": IDS, "influence": np.array([5, 4, 3, 2, 1.0]), "tokens": np.full(5, 9)}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chosen(found):
    return [IDS[i] for i in np.argsort(found.ranks)[: found.keep]]


def test_a_file_is_taken_in_its_order_then_by_influence(tmp_path):
    path = written(tmp_path, {"example_id": "d"}, {"example_id": "b"})
    scores = SCORES | {"listed": by_hand.listed(path, IDS)}
    found = selecting.select(scores, method=f"file:{path}", retention_ratio=0.4)
    assert chosen(found) == ["d", "b"]
    # d and b stand on lines 1 and 2; then a, c, e by influence 5, 3, 1.
    assert found.ranks.tolist() == [3, 2, 4, 1, 5]
    assert found.why[3] == "line 1 of the file"
    assert found.why[0] == "not listed; beyond the budget of 2"
    with pytest.raises(errors.UserError, match=r"lists 2 .* set selection.retention_ratio=0.4 \(2"):
        selecting.select(scores, method=f"file:{path}", retention_ratio=0.6)


def test_kept_ones_rank_first_and_refused_ones_last(tmp_path):
    rows = (
        {"example_id": "a", "decision": "never", "reason": "wrong dose"},
        {"example_id": "e", "decision": "keep"},
    )
    decided = by_hand.decisions(written(tmp_path, *rows), IDS)
    found = selecting.select(SCORES, method="influence", retention_ratio=0.4, decided=decided)
    # By influence a b c d e; e before all, a after all: e b c d a.
    assert found.ranks.tolist() == [5, 2, 3, 4, 1]
    assert found.why[4].endswith("; always kept, decided by hand")
    assert found.why[0].endswith("; never taken, decided by hand: wrong dose")
    assert found.orders["influence"].tolist() == [1, 2, 3, 4, 5]  # a method's own order stays


def test_decisions_that_do_not_fit_the_budget_are_refused():
    def decided(what, *ids):
        return {i: by_hand.Decision(what) for i in ids}

    kept, dropped = decided("keep", "a", "b", "c"), decided("never", *IDS)
    with pytest.raises(errors.UserError, match="keeps 3 examples, and the budget is 2"):
        selecting.select(SCORES, method="influence", retention_ratio=0.4, decided=kept)
    with pytest.raises(errors.UserError, match="leaves 0 examples, and the budget is 2"):
        selecting.select(SCORES, method="influence", retention_ratio=0.4, decided=dropped)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"example_id": "aa"}], r"rows.jsonl:1: the pool has no example 'aa'.* mean 'a'"),
        ([{"id": "a"}], r'rows.jsonl:1: expected {"example_id": ".."}; got'),
        ([["a"]], r"rows.jsonl:1: expected"),
        ([{"example_id": "a", "decision": "never"}] * 2, r"rows.jsonl:2: 'a' stands twice"),
        ([{"example_id": "a", "decision": "nevr"}], r":1: decision must be one of .*'never'"),
        ([{"example_id": "a", "decision": "keep", "reason": 3}], r":1: reason must be text"),
        ([], "is empty"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, rows, message):
    with pytest.raises(errors.UserError, match=message):
        by_hand.decisions(written(tmp_path, *rows), IDS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(errors.UserError, match=r"selection\.edits: there is no file"):
        by_hand.decisions(str(tmp_path / "none.jsonl"), IDS)
