"""Columns, labelled rows, and who may score whom."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from diq_jax import config, errors
from diq_jax.difficulty import labels

ROW = {
    "id": "a",
    "question": "Why?",
    "difficulty_knowledge": 1,
    "difficulty_reasoning": 3,
    "difficulty_overall": 5,
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_labelled_rows_keep_their_order(tmp_path):
    rows = [ROW, ROW | {"question": "How?", "difficulty_overall": "2"}]
    questions, levels = labels.labelled_rows(write(tmp_path / "l.jsonl", rows))
    assert questions == ["Why?", "How?"]
    np.testing.assert_array_equal(levels, [[1, 3, 5], [1, 3, 2]])
    assert levels.dtype == np.float32


def test_a_share_of_right_answers_is_a_level(tmp_path):
    """1 + 4 (1 - p): 1, 2.2 and 5; the options are part of the question."""
    options = {"A": "this", "B": "that"}
    rows = [{"question": "Why?", "p_correct": p, "options": options} for p in (1, 0.7, 0.0)]
    questions, levels = labels.labelled_rows(write(tmp_path / "l.jsonl", rows))
    assert questions == ["Why?\n\nA. this\nB. that"] * 3
    for told, asked in (('["this", "that"]', questions[0]), ("(a) this", "Why?\n\n(a) this")):
        source = write(tmp_path / "t.jsonl", [rows[0] | {"options": told}])
        assert labels.labelled_rows(source)[0] == [asked]
    np.testing.assert_allclose(levels[:, 2], [1, 2.2, 5], rtol=1e-6)
    assert np.isnan(levels[:, :2]).all()
    for bad in (1.1, True, "0.5", None):
        source = write(tmp_path / "bad.jsonl", [rows[0], rows[1] | {"p_correct": bad}])
        message = rf"bad.jsonl:2: p_correct must be in \[0, 1\]; got {bad!r}"
        with pytest.raises(errors.UserError, match=message):
            labels.labelled_rows(source)


def test_sample_is_the_shipped_pool():
    questions, levels = labels.labelled_rows("sample")
    assert len(questions) == len(levels) == 160
    assert set(np.unique(levels)) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"difficulty_overall": 6},
            r"l.jsonl:2: difficulty_overall must be an integer in 1..5; got 6",
        ),
        ({"difficulty_overall": 2.5}, r"l.jsonl:2: difficulty_overall must be an integer.* 2.5"),
        ({"difficulty_overall": True}, r"l.jsonl:2: difficulty_overall .* got True"),
        ({"difficulty_overall": None}, r"l.jsonl:2: difficulty_overall .* got None"),
        ({"difficulty_overall": "hard"}, r"l.jsonl:2: difficulty_overall .* got 'hard'"),
        ({"difficulty_overall": float("nan")}, r"l.jsonl:2 is not JSON .* NaN or infinite"),
        ({"difficulty_overall": 10**399}, r"l.jsonl:2: difficulty_overall .* got 1000"),
        ({"question": " "}, r"l.jsonl:2: question must be a text; got ' '"),
        ({"question": 7}, r"l.jsonl:2: question must be a text; got 7"),
    ],
)
def test_bad_labelled_row_is_named(tmp_path, change, message):
    source = write(tmp_path / "l.jsonl", [ROW, ROW | change])
    with pytest.raises(errors.UserError, match="difficulty.source: .*" + message):
        labels.labelled_rows(source)


@pytest.mark.parametrize("column", ["question", "difficulty_reasoning"])
def test_missing_column_is_named(tmp_path, column):
    row = {k: v for k, v in ROW.items() if k != column} | {column.upper(): 3}
    with pytest.raises(errors.UserError, match=f"l.jsonl:1.*{column}"):
        labels.labelled_rows(write(tmp_path / "l.jsonl", [row]))


def test_empty_source_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="holds no rows"):
        labels.labelled_rows(write(tmp_path / "l.jsonl", []))


def test_fingerprint_depends_on_content_alone(tmp_path):
    a, b, c = (
        write(tmp_path / f"{name}.jsonl", [ROW | {"difficulty_overall": level}])
        for name, level in (("a", 1), ("b", 1), ("c", 2))
    )
    assert labels.fingerprint(a) == labels.fingerprint(b) != labels.fingerprint(c)


def test_columns_are_read_as_they_are():
    rows = [{"k": 1, "o": 2.5}, {"k": "5", "o": 4}]
    scores = labels.column_scores(rows, ["a", "b"], "columns:knowledge=k, overall=o", "overall")
    assert set(scores) == set(config.PERSPECTIVES)
    np.testing.assert_array_equal(scores["knowledge"], [1, 5])
    np.testing.assert_array_equal(scores["overall"], [2.5, 4])
    assert np.isnan(scores["reasoning"]).all() and scores["overall"].dtype == np.float32


def test_default_columns_are_those_that_the_pool_has():
    scores = labels.column_scores([{"difficulty_overall": 3}], ["a"], "columns", "overall")
    assert scores["overall"] == [3] and np.isnan(scores["knowledge"]).all()
    with pytest.raises(errors.UserError, match="'a' has no column 'difficulty_knowledge'"):
        labels.column_scores([{"difficulty_overall": 3}], ["a"], "columns", "knowledge")


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("columns:overal=o", {"o": 3}, "Did you mean 'overall'"),
        ("columns:overall", {"o": 3}, "must be like columns:knowledge=A"),
        ("columns:overall=o,overall=p", {"o": 3}, "must be like columns:knowledge=A"),
        ("columns:knowledge=o", {"o": 3}, "leaves out overall"),
        ("columns:overall=o", {"oo": 3}, "'a' has no column 'o'.*Did you mean 'oo'"),
        ("columns:overall=o", {"o": 0.9}, r"o must be a number in \[1, 5\]; got 0.9"),
        ("columns:overall=o", {"o": None}, r"o must be a number in \[1, 5\]; got None"),
    ],
)
def test_bad_columns_are_named(source, row, message):
    with pytest.raises(errors.UserError, match=message):
        labels.column_scores([row], ["a"], source, "overall")


@hypothesis.given(
    labelled=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    folds=st.integers(2, 6),
    seed=st.integers(0, 3),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_parts_partition_the_labelled_texts_evenly(labelled, folds, seed):
    distinct = np.unique(labelled)
    hypothesis.assume(len(distinct) >= folds)
    parts = labels.assign_folds(labelled, 31, folds, seed)
    unlabelled = np.setdiff1d(np.arange(31), distinct)
    assert (parts[unlabelled] == folds).all()
    sizes = np.bincount(parts[distinct], minlength=folds)
    assert len(sizes) == folds and sizes.max() - sizes.min() <= 1


def test_parts_depend_on_the_seed():
    first, again, other = (labels.assign_folds(range(40), 40, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_fewer_texts_than_folds_is_refused():
    with pytest.raises(errors.UserError, match=r"difficulty.folds=5 .* has 2"):
        labels.assign_folds([0, 0, 1, 1, 1], 2, 5, 0)
