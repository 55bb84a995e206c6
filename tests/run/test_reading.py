"""JSON and parquet of any origin: what cannot be used is refused in one sentence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diq_jax import errors
from diq_jax.run import reading


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "NaN or infinite"),
        ('{"a": -Infinity}', "NaN or infinite"),
        ('{"a": 1e999}', "NaN or infinite"),
        ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
        ('{"a": 0.' + "9" * 5000 + "}", "5,002 digits"),
        ("[" * 101 + "]" * 101, "nested deeper than 100"),
        ("[" * 90_000 + "]" * 90_000, "nested deeper than 100"),
        ('{"a": "x\\ud800y"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('{"a": 1', "at column"),
        ('{"b": {"a": 1, "a": 2}}', "names 'a' twice"),
        ("", "at column"),
    ],
)
def test_what_cannot_be_used_is_refused(text, says):
    with pytest.raises(errors.UserError, match=says):
        reading.parse_json(text, "here")


@pytest.mark.parametrize(
    "text",
    ["[" * 100 + "]" * 100, '{"a": "' + "3" * 5000 + '"}', '{"a": "\\ud83d\\ude00 [[[{{"}', "null"],
)
def test_what_can_be_used_is_read_as_it_is(text):
    assert reading.parse_json(text, "here") == json.loads(text)


def test_a_message_has_the_line():
    with pytest.raises(errors.UserError, match=r"^pool:9 is not JSON"):
        reading.parse_json('{"a":\n x}', "pool", first_line=8)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1], "must hold a JSON object"),
        ({"b": 1}, "has no field 'a'"),
        ({"a": True}, "a must be a whole number; got True"),
        ({"a": 1, "c": 3}, "c must be a text or null; got 3"),
    ],
)
def test_a_record_has_its_fields(value, says):
    with pytest.raises(errors.UserError, match=says):
        reading.check_record(value, "here", {"a": int}, {"c": (str, type(None))})


def test_an_int_is_a_float():
    assert reading.check_record({"a": 1}, "here", {"a": float}) == {"a": 1}


def test_files(tmp_path):
    file = tmp_path / "a.json"
    for content, says in ((b"\xff", "UTF-8"), (b"{}" + b" " * 99, "at most 50")):
        file.write_bytes(content)
        with pytest.raises(errors.UserError, match=says):
            reading.read_json(file, most_bytes=50)
    with pytest.raises(errors.UserError, match="missing"):
        reading.read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("kind", "column", "says"),
    [
        ("finite", pa.array([0.0, np.nan], pa.float32()), "row 1 is nan"),
        ("finite", pa.array([0.0, None], pa.float32()), "row 1 is null"),
        ("finite", pa.array([0, 1]), "its type is int64"),
        ("text", pa.array(["a", None]), "row 1 is null"),
        ("wholes", pa.array([[1], [None]], pa.list_(pa.int32())), r"row 1 is \[None\]"),
        ("finites", pa.array([[1.0], [], [np.inf]], pa.list_(pa.float32())), r"row 2 is \[inf\]"),
    ],
)
def test_a_column_holds_what_its_kind_allows(tmp_path, kind, column, says):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": column}), file)
    with pytest.raises(errors.UserError, match=says):
        reading.read_table(file, {"x": kind})


def test_whole_columns_pass(tmp_path):
    file = tmp_path / "a.parquet"
    table = pa.table(
        {
            "n": pa.array([np.nan], pa.float32()),
            "l": pa.array([[]], pa.list_(pa.float32())),
            "t": ["ä"],
        }
    )
    pq.write_table(table, file)
    kinds = {"n": "number", "l": "finites", "t": "text"}
    assert reading.read_table(file, kinds).num_rows == 1
    with pytest.raises(errors.UserError, match="no column 'm'"):
        reading.read_table(file, {"m": "number"})
    with pytest.raises(errors.UserError, match="at most 0"):
        reading.read_table(file, most_rows=0)


def test_damaged_parquet(tmp_path):
    """A text that is no UTF-8, a codec that fails, half a file."""
    file = tmp_path / "a.parquet"
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32).tobytes()),
                         pa.py_buffer(b"\xff\xfe")],
    )  # fmt: skip
    pq.write_table(pa.table({"x": text}), file)
    with pytest.raises(errors.UserError, match="not a readable parquet"):
        reading.read_table(file)
    table = pa.table({"x": np.random.Generator(np.random.PCG64(0)).normal(size=5000)})
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    whole = file.read_bytes()
    for damage in (whole[:500], whole[:9000] + bytes(400) + whole[9400:], b""):
        file.write_bytes(damage)
        with pytest.raises(errors.UserError, match="not a readable parquet"):
            reading.read_table(file)
