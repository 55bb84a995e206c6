"""Sources: what is read is what was written; a mistake is a sentence that names its place."""

import collections
import datetime
import decimal
import gzip
import json
import math
import os

import datasets
import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from diq_jax import errors
from diq_jax.data import sources, wording

ROWS = [
    {"id": f"r{i}", "question": f"Why {i}?", "reasoning": "", "answer": f"Because\u2028 {i}."}
    for i in range(5)
]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def choice(i, task="t", **changes):
    row = {"id": f"{task}{i}", "task": task, "question": "Which?", "answer_idx": "B"}
    return row | {"options": {"A": "a", "B": "b"}} | changes


def write(path, rows):
    """Writes rows in the format that the name of `path` says."""
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(rows).encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        cells = [[f'"{row[name]}"' for name in ROWS[0]] for row in rows]
        between = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text("\n".join(map(between.join, [list(ROWS[0]), *cells])), encoding="utf-8")
    elif path.suffix == ".zst":
        with pa.output_stream(path, compression="zstd") as f:
            f.write(jsonl(rows).encode())
    elif path.suffix in (".arrow", ".feather"):
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        path = path.with_suffix(".arrow")
        with new(path, table.schema) as f:
            f.write_table(table)
    elif path.suffix == ".saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_text(jsonl(rows), encoding="utf-8")
    return str(path)


FORMATS = (
    "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.csv", "a.tsv", "a.arrow",
    "a.feather", "a.saved",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    rows, places = zip(*sources.read_rows(path, "data.pool"), strict=True)
    assert list(rows) == ROWS
    line = ":1" if ".jsonl" in name else ":2" if name in ("a.csv", "a.tsv") else " row 0"
    assert places[0] == path + line
    assert sources.fingerprint(path, "data.pool") == sources.fingerprint(path, "data.pool")


def test_a_saved_dataset_of_splits(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "a")
    assert len(sources.read_rows(str(tmp_path / "a"), "data.pool")) == len(ROWS)
    assert len(sources.read_rows(str(tmp_path / "a/test"), "data.pool")) == 1
    before = sources.fingerprint(str(tmp_path / "a"), "data.pool")
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "b")
    assert sources.fingerprint(str(tmp_path / "b"), "data.pool") != before
    with pytest.raises(errors.UserError, match=r"^data\.pool.*has the splits dev"):
        sources.read_rows(str(tmp_path / "b"), "data.pool")


def test_lists_and_globs_are_read_in_order(tmp_path):
    for name, rows in (("b", ROWS[:2]), ("a", ROWS[2:4]), ("c", ROWS[4:])):
        write(tmp_path / f"{name}.jsonl", rows)
    pool = sources.load_examples(f"{tmp_path}/c.jsonl , {tmp_path}/[ab].jsonl", "", 0)
    assert [e.example_id for e in pool] == ["r4", "r2", "r3", "r0", "r1"]
    assert sources.load_examples(f"{tmp_path}/c.jsonl,{tmp_path}/[ab].jsonl", "", 2) == pool[:2]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]).encode() + b"\n \n")
    assert [row for row, _ in sources.read_rows(str(path), "f")] == ROWS[:1]


def test_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = sources.read_rows("hub:me/pool,hub:me/pool:en,hub:me/pool::train[:10]", "data.pool")
    assert asked == [
        ("me/pool", None, "train"),
        ("me/pool", "en", "train"),
        ("me/pool", None, "train[:10]"),
    ]
    assert rows[2] == (ROWS[2], "me/pool row 2")
    tests = [choice(0, task=""), choice(1, task="")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: tests)
    assert {e.task for e in sources.load_tests("hub:me/medqa", 0, 0)} == {"medqa"}


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError])
def test_an_unreachable_hub_is_a_user_error(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(errors.UserError, match=r"data\.pool: hub:me/pool cannot be .*offline"):
        sources.load_examples("hub:me/pool", "", 0)


BAD_FILES = {
    "broken JSON line": ("a.jsonl", jsonl(ROWS[:1]) + '{"id": \n', r"a\.jsonl:2 is not JSON"),
    "row is no object": ("a.jsonl", jsonl(ROWS[:1]) + "[1]\n", r"a\.jsonl:2 must be an object"),
    "broken JSON": ("a.json", '[{"id": 1},\n {"id" 2}]', r"a\.json:2 is not JSON"),
    "no list": ("a.json", '{"id": 1}', r"a\.json must hold a list"),
    "item is no object": ("a.json", '[{"id": 1}, 3]', r"a\.json row 1 must be an object"),
    "unknown extension": ("a.txt", "x", r"a\.txt must end in \.jsonl"),
    "not UTF-8": ("a.jsonl", jsonl(ROWS[:1]).encode() + b'"\xff"\n', r"a\.jsonl:2 is not UTF-8"),
    "csv not UTF-8": ("a.csv", b"id\n\xff\n", r"a\.csv:2 is not UTF-8"),
    "csv with too many cells": ("a.csv", "id,answer\n1,2\n1,2,3\n", r"a\.csv:3 must have 2 cells"),
    "csv with an open quote": ("a.csv", 'id,answer\n1,"2\n', r"a\.csv:2 has a quote that is left"),
    "tsv with bare quotes": (
        "a.tsv",
        'id\tanswer\n1\t"a" b\n',
        r"a\.tsv:2 has a quote that is left",
    ),
    "lines in .json": ("a.json", jsonl(ROWS[:2]), r"a\.json must hold a list .*name it \.jsonl"),
    "no parquet": ("a.parquet", "PAR1 not", r"a\.parquet is not a readable parquet file"),
    "half a surrogate": ("a.jsonl", '{"id": "\\ud800"}', r"a\.jsonl:1 .* half of a surrogate pair"),
    "deep": ("a.jsonl", '{"id": ' + "[" * 20000 + "]" * 20000 + "}", r"a\.jsonl:1 .*nested deeper"),
    "long number": ("a.jsonl", '{"id": ' + "9" * 5000 + "}", r"a\.jsonl:1 .*has 5,000 digits"),
    "NaN": ("a.jsonl", '\n{"id": NaN}', r"a\.jsonl:2 .*NaN or infinite"),
    "a name twice": ("a.jsonl", '{"id": 1, "id": 2}', r"a\.jsonl:1 .*names 'id' twice"),
    "csv with a name twice": ("a.csv", "id,answer,answer\n1,2,3\n", r"a\.csv:1 .*'answer' twice"),
    "tsv with few cells": ("a.tsv", "id\tanswer\n1\n", r"a\.tsv:2 must have 2 cells"),
    "no zstd": ("a.jsonl.zst", "{}", r"a\.jsonl\.zst cannot be read"),
    "truncated zstd": (
        "a.jsonl.zst",
        pa.compress(jsonl(ROWS).encode(), "zstd", asbytes=True)[:-20],
        r"a\.jsonl\.zst cannot be read",
    ),
    "no arrow": ("a.arrow", "ARROW1 not", r"a\.arrow cannot be read"),
    "empty arrow": ("a.arrow", "", r"a\.arrow cannot be read"),
    "no gzip": ("a.jsonl.gz", "{}", r"a\.jsonl\.gz cannot be read"),
    "truncated gzip": (
        "a.jsonl.gz",
        gzip.compress(jsonl(ROWS).encode())[:-20],
        r"a\.jsonl\.gz cannot be read",
    ),
    "empty": ("a.jsonl", "", r"holds no rows: .*a\.jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_user_error(tmp_path, case):
    name, content, message = BAD_FILES[case]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UserError, match=rf"^data\.pool.*{message}"):
        sources.load_examples(str(tmp_path / name), "", 0)


def test_a_bad_spec_is_a_user_error(tmp_path):
    write(tmp_path / "pool.jsonl", ROWS)
    (tmp_path / "none").mkdir()
    for spec, message in (
        (f"{tmp_path}/pol.jsonl", r"there is no file .*Did you mean 'pool\.jsonl'\?"),
        (f"{tmp_path}/absent/pool.jsonl", r"there is no file"),
        (f"{tmp_path}/*.json", r"no file matches"),
        (f"{tmp_path}/none", r"is a folder with no file that ends in \.jsonl"),
        (" , ", r"must name a file"),
        ("hub:", r"must be hub:NAME"),
    ):
        with pytest.raises(errors.UserError, match=rf"^data\.pool.*{message}"):
            sources.load_examples(spec, "", 0)


def test_a_folder_is_its_files_of_one_format(tmp_path):
    for name, rows in (("b.jsonl", ROWS[3:]), ("a.jsonl", ROWS[:3]), (".c.jsonl", ROWS)):
        write(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("of no format")
    assert [e.row for e in sources.load_examples(str(tmp_path))] == ROWS
    write(tmp_path / "a.parquet", ROWS)
    with pytest.raises(errors.UserError, match=r"is a folder with \.jsonl and \.parquet; name"):
        sources.load_examples(str(tmp_path))


def test_a_folder_of_splits_is_no_pool(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "trainees", "testimony"):
        write(tmp_path / f"{name}.jsonl", [ROWS[0] | {"id": name}])
    assert len(sources.load_examples(str(tmp_path))) == 4
    write(tmp_path / "test-00000-of-00001.jsonl", ROWS)
    with pytest.raises(errors.UserError, match="is a folder with the splits test and train; name"):
        sources.load_examples(str(tmp_path))


def test_a_file_counts_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    for spec in (f"{path},{path}", f"{tmp_path}/*.jsonl,{tmp_path}/../{tmp_path.name}/a.jsonl"):
        with pytest.raises(errors.UserError, match=r"^data\.pool names .*a\.jsonl 2 times"):
            sources.load_examples(spec)


@pytest.mark.parametrize("state", ["[]", "{}", None])
def test_a_damaged_saved_dataset_is_a_user_error(tmp_path, state):
    datasets.Dataset.from_list(ROWS).select(range(5 if state else 0)).save_to_disk(tmp_path / "a")
    if state:
        (tmp_path / "a/state.json").write_text(state)
    with pytest.raises(errors.UserError, match=r"^data\.pool: .*a is not a folder of rows"):
        sources.load_examples(str(tmp_path / "a"))


def test_what_is_no_file_is_named(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    for spec in (tmp_path, tmp_path / "*.jsonl", tmp_path / "b.jsonl"):
        with pytest.raises(errors.UserError, match=r"b\.jsonl is a link to what is not there"):
            sources.load_examples(str(spec))
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(errors.UserError, match=r"c\.jsonl is neither a file nor a folder"):
        sources.load_examples(str(tmp_path / "c.jsonl"))


def test_bytes_are_no_text(tmp_path):
    made = {"question": [b"Why?"], "answer": ["So."], "options": [[b"x", b"y"]]}
    for table, message in (
        ({k: made[k] for k in ("question", "answer")}, "question must be a text, got 'V2h5Pw=='"),
        (made | {"question": ["Why?"]}, "option A must be a text, got 'eA=='"),
    ):
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        with pytest.raises(errors.UserError, match=message):
            sources.load_examples(str(tmp_path / "a.parquet"))


def test_the_pool_keeps_its_rows_and_names_those_without_an_id(tmp_path):
    rows = [ROWS[0] | {"extra": [1]}, {"question": "q", "answer": "a"}, ROWS[1] | {"id": 7}]
    pool = sources.load_examples(write(tmp_path / "a.jsonl", rows), "", 0)
    assert [e.example_id for e in pool] == ["r0", "row-000001", "7"]
    assert [e.row for e in pool] == rows
    assert (pool[1].question, pool[1].reasoning, pool[1].answer) == ("q", "", "a")


def test_mappings(tmp_path):
    huatuo = [{"Question": "q", "Complex_CoT": "r", "Response": "a"}]
    example = sources.load_examples(write(tmp_path / "a.jsonl", huatuo), "huatuo", 0)[0]
    assert (example.question, example.reasoning, example.answer) == ("q", "r", "a")
    own = [{"Q": "q", "A": "a", "no": 3}]
    example = sources.load_examples(
        write(tmp_path / "b.jsonl", own), "question=Q, answer=A,id=no", 0
    )
    assert [(e.example_id, e.question, e.reasoning, e.answer) for e in example] == [
        ("3", "q", "", "a")
    ]
    two = [
        {"question": "q", "options": "A. x", "reasoning": "r", "answer": "a"},
        {"question": "q", "options": "", "reasoning": "r", "answer": "a"},
    ]
    pool = sources.load_examples(write(tmp_path / "c.jsonl", two), "medreason", 0)
    assert [e.question for e in pool] == ["q\n\nA. x", "q"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("huatou", "Did you mean 'huatuo'"),
        ("question=qestion,answer=answer", "'qestion', but .* Did you mean 'question'"),
        ("question=question,answer=answer,reasoning=cot", "'cot'"),
        ("question=question", "must map answer"),
        ("question=,answer=answer", "must be empty, one of"),
        ("qustion=question,answer=answer", "Did you mean 'question'"),
    ],
)
def test_a_bad_mapping_is_a_user_error(tmp_path, columns, message):
    with pytest.raises(errors.UserError, match=rf"^data\.columns.*{message}"):
        sources.load_examples(write(tmp_path / "a.jsonl", ROWS), columns, 0)


TOKENS = {"id": "x", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
BAD_POOL_ROWS = {
    "no question": ({"answer": "a"}, "question is missing from columns answer"),
    "near question": ({"Question": "q", "answer": "a"}, "Did you mean 'Question'"),
    "empty question": ({"question": " ", "answer": "a"}, "question is empty"),
    "no answer": ({"question": "q"}, "answer is missing"),
    "null answer": ({"question": "q", "answer": None}, "answer is empty"),
    "number as answer": ({"question": "q", "answer": 3}, "answer must be a text, got 3"),
    "list as reasoning": ({"question": "q", "answer": "a", "reasoning": []}, "reasoning must be"),
    "list as id": ({"question": "q", "answer": "a", "id": [1]}, "id must be a text or"),
    "the same id": (ROWS[0], r"'r0' stands at .*a\.jsonl:1 and again at .*a\.jsonl:2"),
    "no labels": ({"input_ids": [1, 2]}, "labels must be a list"),
    "float tokens": (TOKENS | {"input_ids": [1, 2.0, 3]}, "input_ids must be a list of whole"),
    "bool tokens": (TOKENS | {"input_ids": [1, True, 3]}, "input_ids must be a list of whole"),
    "short labels": (TOKENS | {"labels": [2]}, "must be as long as input_ids; got 1 and 3"),
    "negative token": (TOKENS | {"input_ids": [1, -2, 3]}, r"must be in \[0, 2"),
    "negative label": (TOKENS | {"labels": [-100, -1, 3]}, r"must be in \[0, 2"),
    "huge token": (TOKENS | {"input_ids": [1, 2**31, 3]}, r"must be in \[0, 2"),
    "short mask": (TOKENS | {"attention_mask": [1]}, "attention_mask must be as long"),
    "mask with a hole": (TOKENS | {"attention_mask": [1, 0, 1]}, "must be ones in one piece"),
    "mask of segments": (TOKENS | {"attention_mask": [1, 1, 2]}, "must be ones in one piece"),
    "mask of lengths": (TOKENS | {"attention_mask": [1, 1, 2**62]}, "must be ones in one piece"),
    "mask of nothing": (TOKENS | {"attention_mask": [0, 0, 0]}, "must score a token after"),
    "packed": (TOKENS | {"position_ids": [0, 1, 0]}, "position_ids must count the tokens from 0"),
    "shifted": (TOKENS | {"labels": [2, 3, -100]}, "labels are shifted already"),
    "other labels": (TOKENS | {"labels": [-100, 2, 1]}, "at place 2 they are 1 and 3"),
    "nothing scored": (TOKENS | {"labels": [1, -100, -100]}, "must score a token after the first"),
}


@pytest.mark.parametrize("case", BAD_POOL_ROWS)
def test_a_bad_pool_row_is_a_user_error(tmp_path, case):
    row, message = BAD_POOL_ROWS[case]
    path = write(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(errors.UserError, match=message) as raised:
        sources.load_examples(path, "", 0)
    assert str(raised.value).startswith("data.pool: ") and f"{path}:2" in str(raised.value)
    assert len(sources.load_examples(path, "", 1)) == 1


def test_pre_tokenised_rows_are_used_as_they_are(tmp_path):
    path = write(tmp_path / "a.parquet", [TOKENS])
    example = sources.load_examples(path, "huatuo", 0)[0]
    assert (example.input_ids, example.labels) == ((1, 2, 3), (-100, 2, 3))
    assert (example.question, example.answer) == ("", "")
    assert sources.load_targets(path, 0, 0, "")[0].labels == (-100, 2, 3)


def test_padding_is_left_out_on_either_side(tmp_path):
    rows = [
        {"id": f"{k}", "input_ids": [9] * left + [1, 2, 3] + [9] * right,
         "labels": [-100] * left + [-100, 2, 3] + [last] * right,
         "attention_mask": [0] * left + [1] * 3 + [0] * right}
        for k, (left, right, last) in enumerate([(2, 0, 0), (0, 2, -100), (0, 1, 9), (1, 1, -100)])
    ]  # fmt: skip
    for example in sources.load_examples(write(tmp_path / "a.jsonl", rows), "", 0):
        assert (example.input_ids, example.labels) == ((1, 2, 3), (-100, 2, 3))


def test_pool_rows_with_options_are_what_targets_are(tmp_path):
    choices = {"question": "Which?", "options": ["x", "y", "N/A"]}
    rows = [
        choices | {"id": "idx", "answer_idx": "B"},
        choices | {"id": "both", "answer_idx": "B", "answer": "Y", "reasoning": "so"},
        choices | {"id": "text", "answer": "y"},
        choices | {"id": "letter", "answer": "b"},
        choices | {"id": "words", "answer_idx": "B", "answer": "It is y, of course."},
        choices | {"id": "only words", "answer": "None is right."},
        choices | {"id": "json", "answer_idx": "B", "options": '["x", "y"]'},
        {"id": "hub", "question": "Which?", "choices": ["x", "y"], "answer": "y"},
        {
            "id": "arc",
            "question": "Which?",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answer": "B",
        },
        {"id": "medmcqa", "question": "Which?", "opa": "x", "opb": "y", "answer": "b"},
        {"id": "none", "question": "Why?", "options": None, "answer": "So."},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    pool, targets = sources.load_examples(path, "", 0), sources.load_targets(path, 0, 0, "")
    assert [wording.completion_text(e, "plain") for e in pool] == [
        "B. y", "so\n\nB. y", "B. y", "B. y", "It is y, of course.", "None is right.", "B. y",
        "B. y", "B. y", "B. y", "So.",
    ]  # fmt: skip
    assert {wording.question_text(e) for e in pool[:10]} == {"Which?\n\nA. x\nB. y"}
    for text in (wording.question_text, lambda e: wording.completion_text(e, "plain")):
        assert [text(e) for e in pool] == [text(e) for e in targets]
    for change, message in (
        ({"answer_idx": "C"}, "answer_idx must be one of A, B; got 'C'"),
        ({"answer_idx": "B", "answer": "x"}, "answer is 'x', option A; .* got 'B'"),
        ({"options": {"": "x", "B": "y"}}, "an option must be named by one letter, got ''"),
        ({"options": {"one": "x", "two": "y"}}, "an option must be named by .* got 'one'"),
        ({"answer": "2"}, "answer is '2', which is none of the options A, B; give"),
        ({"answer": "(C)"}, r"answer is '\(C\)', which is none"),
        ({"answer_idx": "B", "answer": "1"}, "answer is '1', which is none"),
        ({"answer": "x", "options": ["x", "X"]}, "answer is 'x', option A and option B"),
        ({"answer": 1}, "answer must be a text, got 1"),
        ({}, "answer is missing"),
        ({"options": {"text": "xy", "label": ["A", "B"]}}, "an option must be named by"),
        ({"options": "{'A': 'x'}"}, "options is not JSON"),
        ({"options": "A. x", "answer": "x"}, "options must be .* by data.columns=question"),
        (
            {"answer_idx": "C", "options": [f"o{i}" for i in range(27)]},
            "options must be two to 26, .* got 27",
        ),
    ):
        write(tmp_path / "a.jsonl", [choices | change])
        with pytest.raises(errors.UserError, match=rf"^data\.pool: .*:1: {message}"):
            sources.load_examples(path, "", 0)


def test_rows_are_json_whatever_parquet_holds(tmp_path, caplog):
    made = pa.table(
        {
            "id": ["a", "b"],
            "score": [math.nan, 0.5],
            "image": [b"\xff\xd8", None],
            "when": [datetime.date(2024, 1, 2), None],
            "price": [decimal.Decimal("1.10"), None],
            "inner": [{"x": [math.inf, 1.0]}, None],
        }
    )
    pq.write_table(made, tmp_path / "a.parquet")
    rows = [row for row, _ in sources.read_rows(str(tmp_path / "a.parquet"), "data.pool")]
    assert rows[0] == {
        "id": "a", "score": None, "image": "/9g=", "when": "2024-01-02", "price": "1.10",
        "inner": {"x": [None, 1.0]},
    }  # fmt: skip
    assert rows[1]["score"] == 0.5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 5 and "a.parquet row 0: column score holds nan" in said[0]


def test_parquet_that_cannot_be_rows_is_a_user_error(tmp_path):
    path = tmp_path / "a.parquet"
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    for table in (
        pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["id", "id"]),
        pa.table({"question": text}),
        pa.table({"when": pa.array([2**31 - 1], pa.date32())}),
    ):
        pq.write_table(table, path)
        with pytest.raises(errors.UserError, match=r"^data\.pool: .*a\.parquet"):
            sources.load_examples(str(path), "", 0)


def test_choices_come_as_an_object_a_list_or_a_parquet_struct(tmp_path):
    as_object = choice(0, options={"A": "x", "B": "y"})
    as_list = choice(1, options=["x", "y"])
    of_three = choice(2, options={"A": "x", "B": "y", "C": "z"})
    path = write(tmp_path / "a.jsonl", [as_object, as_list])
    parquet = write(tmp_path / "b.parquet", [of_three, choice(3, options={"A": "x", "B": "y"})])
    tests = sources.load_tests(f"{path},{parquet}", 0, 0)
    assert [list(e.options) for e in tests] == [["A", "B"], ["A", "B"], ["A", "B", "C"], ["A", "B"]]
    assert {(e.answer_idx, e.answer, e.question) for e in tests} == {("B", "y", "Which?")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_idx": "E"}, "answer_idx must be one of A, B; got 'E'"),
        ({"answer_idx": 1}, "answer_idx must be one of A, B; got 1"),
        ({"answer_idx": ["A"]}, "answer_idx must be one of"),
        ({"answer_idx": None, "answer": "so"}, "answer_idx must be one of A, B; got None"),
        ({"options": {"A": "x"}}, "options must be two to 26, a letter each; got 1"),
        ({"options": "A. x"}, "options must be an object"),
        ({"options": {"A": "x", "B": 3}}, "option B must be a text, got 3"),
        ({"question": ""}, "question is empty"),
        ({"task": 3}, "task must be a text, got 3"),
    ],
)
def test_a_bad_test_row_is_a_user_error(tmp_path, changes, message):
    path = write(tmp_path / "a.jsonl", [choice(0), choice(1, **changes)])
    with pytest.raises(errors.UserError, match=rf"^data\.tests: .*a\.jsonl:2: {message}"):
        sources.load_tests(path, 0, 0)


def test_targets_take_choices_and_examples_and_the_mapping_where_it_fits(tmp_path):
    rows = [
        choice(0),
        {"Question": "q", "Response": "a"},
        {"id": "z", "question": "p", "answer": "b"},
    ]
    targets = sources.load_targets(write(tmp_path / "own.jsonl", rows), 0, 0, "huatuo")
    assert [(e.question, e.answer, e.task) for e in targets] == [
        ("Which?", "b", "t"),
        ("q", "a", "own"),
        ("p", "b", "own"),
    ]


def test_a_task_is_named_after_its_file_or_folder(tmp_path):
    for name in ("medqa/target.jsonl", "medqa/extra.jsonl.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write(path, [choice(path.stem, task="")])
    tests = sources.load_tests(f"{tmp_path}/medqa/*", 0, 0)
    assert [e.task for e in tests] == ["extra", "medqa"]


def test_the_same_id_in_two_tasks_is_a_user_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [choice(0), choice(0) | {"task": "u"}])
    with pytest.raises(errors.UserError, match=r"^data\.tests: id 't0' .*:1 and again at .*:2"):
        sources.load_tests(path, 1, 0)


def test_the_draw_does_not_depend_on_order_or_on_other_tasks(tmp_path):
    rows = [choice(i, task, question=f"Which {i}?") for task in "abc" for i in range(9)]
    one = write(tmp_path / "one.jsonl", rows)
    two = write(tmp_path / "two.jsonl", [row for row in reversed(rows) if row["task"] != "c"])

    def drawn(path, count, seed=0):
        return [e.example_id for e in sources.load_tests(path, count, seed)]

    assert collections.Counter(id_[0] for id_ in drawn(one, 4)) == dict.fromkeys("abc", 4)
    assert [i for i in drawn(one, 4) if i[0] != "c"] == drawn(two, 4)[::-1]
    assert drawn(one, 4) == sorted(drawn(one, 4))  # the order of the file
    assert set(drawn(one, 3)) < set(drawn(one, 4)) < set(drawn(one, 0))
    assert drawn(one, 0) == drawn(one, 100) == [row["id"] for row in rows]
    assert drawn(one, 4, seed=1) != drawn(one, 4)


def test_the_sample_loads():
    pool = sources.load_examples("sample", "", 0)
    targets, tests = sources.load_targets("sample", 4, 0, ""), sources.load_tests("sample", 0, 0)
    tasks = collections.Counter(e.task for e in targets)
    assert len(pool) >= 100 and len(tasks) >= 2 and set(tasks.values()) == {4}
    assert {e.task for e in tests} == set(tasks)
    assert not {e.example_id for e in targets} & {e.example_id for e in tests}


def test_real_tasks(shared_data):
    targets = sources.load_targets(f"{shared_data}/tasks/*/target.jsonl", 20, 0, "")
    assert set(collections.Counter(e.task for e in targets).values()) == {20}


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["id", "question", "answer", "reasoning", "input_ids", "labels"]),
            st.none()
            | st.integers(-101, 3)
            | st.text("ab \n", max_size=2)
            | st.lists(st.integers()),
        ),
        max_size=3,
    )
)
def test_any_rows_load_or_are_a_user_error(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)
    try:
        assert len(sources.load_examples(path, "", 0)) == len(rows)
    except errors.UserError as e:
        assert "data.pool" in str(e)
