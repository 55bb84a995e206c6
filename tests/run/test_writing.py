"""Nothing that is not a number is written, and what stood there before stays."""

import numpy as np
import pyarrow as pa
import pytest

from diq_jax import errors
from diq_jax.run import artifacts, columns

IDS = ["a", "b", "c"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_table_names_the_column_and_the_row_that_are_not_finite(bad, tmp_path):
    file = tmp_path / "t.parquet"
    artifacts.write_table(file, {"example_id": IDS, "x": pa.array([1.0, 2.0, 3.0])})
    before = file.read_bytes()
    for column in (pa.array([1, 2, bad], pa.float32()), pa.array([[], [1, 2], [3, bad]])):
        with pytest.raises(errors.UserError, match=f"t.parquet is not written: x of 'c'.*{bad}"):
            artifacts.write_table(file, {"example_id": IDS, "x": column})
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_an_unknown_number_may_be_nan_but_not_infinite(tmp_path):
    columns = {"example_id": IDS, "x": pa.array([np.nan, 1.0, None]), "n": pa.array([1, None, 2])}
    artifacts.write_table(tmp_path / "t", columns, unknown=("x",))
    with pytest.raises(errors.UserError, match="y of '1' would be inf"):
        artifacts.write_table(tmp_path / "t", {"y": pa.array([0.0, np.inf])}, unknown=("y",))


def test_rows_are_counted_over_chunks():
    lists = pa.chunked_array([[[1.0], []], [], [None, [2.0, np.inf], [np.nan]], [[3.0]]])
    assert columns.finite_rows(lists).tolist() == [True, True, True, False, False, True]
    assert columns.finite_rows(lists, nan=True).tolist() == [True] * 3 + [False, True, True]


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": [0.0, {"b": float("nan")}]}, r"a\[1\].b would be nan"),
        ({"a": float("-inf")}, "a would be -inf"),
        ({"a": "half \ud83d"}, r"a would be 'half \\ud83d'"),
    ],
)
def test_json_names_the_place(value, message, tmp_path):
    for write in (artifacts.write_json, lambda path, value: artifacts.write_jsonl(path, [value])):
        with pytest.raises(errors.UserError, match=message):
            write(tmp_path / "x.json", value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_with_the_next_write_and_nothing_else(tmp_path):
    others = [".x[1].json.notes.tmp", ".x1.json.abcdefgh.tmp", "x[1].json.abcdefgh.tmp"]
    for name in [".x[1].json.abcdefgh.tmp", *others]:
        (tmp_path / name).write_text("half")
    with artifacts.atomic(tmp_path / "x[1].json") as slow:
        slow.write_text("the slow writer's")
        artifacts.write_json(tmp_path / "x[1].json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"x[1].json", *others}
    assert (tmp_path / "x[1].json").read_text() == "the slow writer's"
