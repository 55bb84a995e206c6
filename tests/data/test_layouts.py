"""Layouts: rows as public data sets have them are read without a flag, and say the same."""

import dataclasses

import folders
import numpy as np
import pytest

from diq_jax import errors
from diq_jax.data import chat, encoded, layouts, sources, wording

THOUGHT = "<think>\nwe think\n</think>\n\nbecause"
ASKED = {"role": "user", "content": "why?"}
# One row of each, made by hand; all ask "why?", think "we think" and answer "because".
ROWS = {
    "ours": {"question": "why?", "reasoning": "we think", "answer": "because"},
    "huatuo": {"Question": "why?", "Complex_CoT": "we think", "Response": "because"},
    "r1_distill": {
        "question": "why?",
        "reasoning (reasoning_content)": "we think",
        "response (content)": "because",
    },
    "m23k": {
        "answer_idx": 0, "source": "medqa", "answer_letter": "A", "answer_string": "b",
        "prompt": "why?", "reasoning": "we think", "distilled_answer_string": "because",
    },
    "medreason": {
        "dataset_name": "medmcqa", "id_in_dataset": 7, "question": "why?", "options": "A. x\nB. y",
        "reasoning": "we think", "answer": "because",
    },
    "messages": {
        "messages": [
            ASKED, {"role": "assistant", "content": "because", "reasoning_content": "we think"},
        ]
    },
    "ii_medical": {
        "model": "m", "question": "a stem", "problem": None,
        "messages": [ASKED, {"role": "assistant", "content": THOUGHT}],
    },
    "in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "why?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": THOUGHT}]},
        ]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": THOUGHT}]
    },
    "prompt_completion": {"prompt": "why?", "completion": THOUGHT},
    "prompt_completion of messages": {
        "prompt": [ASKED], "completion": [{"role": "assistant", "content": THOUGHT}],
    },
    "alpaca": {"instruction": "why?", "input": "", "output": THOUGHT},
    "finemed": {"instruction": "why?", "response": "because", "text": "t", "language": "en"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_public_rows_need_no_flag(tmp_path, capsys, name, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / f"a.{form}")
    if form == "jsonl":
        folders.write(tmp_path / "a.jsonl", [ROWS[name]])
    else:
        pq.write_table(pa.Table.from_pylist([ROWS[name]]), path)
    [example] = sources.load_examples(path)
    asked = "why?\n\nA. x\nB. y" if name == "medreason" else "why?"
    assert (example.question, example.answer) == (asked, "because")
    assert example.reasoning == ("" if name == "finemed" else "we think")
    assert sources.load_targets(path, 0, 0, "")[0].answer == "because"
    said = capsys.readouterr().err
    assert ("rows of the layout" in said) == (name != "ours") and said.count("\n") <= 2
    layout = name.split(" ")[0]
    if layout in layouts.LAYOUTS:
        assert dataclasses.replace(sources.load_examples(path, layout)[0]) == example


def test_an_input_follows_the_instruction(tmp_path):
    path = folders.write(tmp_path / "a.jsonl", [ROWS["alpaca"] | {"input": "say"}])
    assert sources.load_examples(path)[0].question == "why?\n\nsay"


def test_each_file_has_a_layout_of_its_own(tmp_path):
    paths = [folders.write(tmp_path / f"{n}.jsonl", [ROWS[n]]) for n in ("messages", "huatuo")]
    pool = sources.load_examples(",".join(paths))
    assert [(e.example_id, e.question) for e in pool] == [
        ("row-000000", "why?"), ("row-000001", "why?"),
    ]  # fmt: skip
    assert [e.row for e in pool] == [ROWS["messages"], ROWS["huatuo"]]


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no", "reasoning_content": "ah"},
]


def encode(tmp_path, turns, layout, template="think", rows=None):
    path = folders.write(tmp_path / "a.jsonl", rows or [{"messages": CHAT}])
    pool = sources.load_examples(path, turns=turns)
    return encoded.encode_all(pool, layout, template, 512, "error")[0], pool


def plain_layout(chat_template=True):
    tokenizer = folders.tokenizer(chat_template)
    return tokenizer, chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")


def test_the_last_answer_is_scored_after_the_earlier_turns(tmp_path):
    tokenizer, layout = plain_layout()
    [row], [example] = encode(tmp_path, "last", layout)
    # The template by hand: earlier answers stand without their reasoning.
    before = (
        "<|system|>be brief<|end|><|user|>one?<|end|><|assistant|>yes<|end|><|user|>two?<|end|>"
        "<|assistant|>"
    )
    answer = "<think>\nah\n</think>\n\nno<|end|>"
    assert tokenizer.decode(row.input_ids) == before + answer
    assert tokenizer.decode(row.input_ids[row.labels != -100]) == answer
    assert wording.asked_text(example) == "be brief\n\none?\n\nyes\n\ntwo?"


def test_all_answers_are_scored(tmp_path):
    tokenizer, layout = plain_layout()
    [row], [example] = encode(tmp_path, "all", layout)
    scored = row.labels != -100
    # Of both answers the words and the end of the turn.
    first, second = "<think>\nhm\n</think>\n\nyes<|end|>", "<think>\nah\n</think>\n\nno<|end|>"
    assert tokenizer.decode(row.input_ids[scored]) == first + second
    assert np.count_nonzero(np.diff(scored.astype(int)) == 1) == 2
    whole = tokenizer.apply_chat_template(wording.conversation(example, "think"), tokenize=False)
    assert tokenizer.decode(row.input_ids) == whole
    single = [{"messages": CHAT[3:]}]
    (one,), _ = encode(tmp_path, "all", layout, rows=single)
    (same,), _ = encode(tmp_path, "last", layout, rows=single)
    assert one.input_ids.tolist() == same.input_ids.tolist()
    assert one.labels.tolist() == same.labels.tolist()


def test_a_template_that_rewrites_earlier_turns_cannot_score_them(tmp_path):
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
        "so {% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>so {% endif %}"
    )
    layout = chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")
    encode(tmp_path, "last", layout)
    with pytest.raises(errors.UserError, match=r"'row-000000': .* set data\.turns=last"):
        encode(tmp_path, "all", layout)
    _, layout = plain_layout(chat_template=False)
    with pytest.raises(errors.UserError, match=r"set data\.turns=last"):
        encode(tmp_path, "all", layout)


def test_without_a_chat_template_turns_are_written_plainly(tmp_path):
    tokenizer, layout = plain_layout(chat_template=False)
    [row], _ = encode(tmp_path, "last", layout, "plain")
    assert tokenizer.decode(row.input_ids) == (
        "be brief\n\nQuestion: one?\n\nAnswer: yes\n\nQuestion: two?\n\nAnswer: ah\n\nno<|end|>"
    )


BAD = {
    "none": ({"messages": None}, r"messages must be a list of messages; got None"),
    "a text": ({"messages": "why?"}, "must be a list of messages; got 'why"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "role must be system, user or"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 has no field 'content'"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "its parts must be texts",
    ),
    "a user last": ({"messages": [ASKED]}, "must end with a message of the user and the assistant"),
    "no answer": (
        {"messages": [ASKED, {"role": "assistant", "content": "<think>x</think> "}]},
        "the answer after its reasoning is empty",
    ),
    "reasoning cut off": (
        {"messages": [ASKED, {"role": "assistant", "content": "<think>x and on"}]},
        "the answer after its reasoning is empty",
    ),
    "no question": (
        {"messages": [{"role": "user", "content": " "}, CHAT[-1]]}, "the last question is empty",
    ),
    "reasoning": (
        {"messages": [ASKED, {"role": "assistant", "content": "x", "reasoning_content": [1]}]},
        "its reasoning must be a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_chat_is_a_user_error_with_its_line(tmp_path, case):
    row, message = BAD[case]
    path = folders.write(tmp_path / "a.jsonl", [ROWS["messages"], row])
    with pytest.raises(errors.UserError, match=rf"^data\.pool: .*a\.jsonl:2: .*{message}"):
        sources.load_examples(path)


def test_columns_of_no_layout_name_the_nearest_and_a_flag(tmp_path):
    path = folders.write(tmp_path / "a.jsonl", [{"query": "why?", "response": "so", "id": 1}])
    with pytest.raises(errors.UserError) as raised:
        sources.load_examples(path)
    said = str(raised.value)
    assert "query, response, id" in said and "the nearest is finemed, but for instruction" in said
    flag = "--config.data.columns=question=query,answer=response"
    assert said.endswith(flag)
    assert sources.load_examples(path, flag.partition("columns=")[2])[0].answer == "so"
    path = folders.write(tmp_path / "b.jsonl", [{"q": "why?", "a": "so"}])
    with pytest.raises(errors.UserError, match=r"no layout that is known \(tokens, ours, huatuo"):
        sources.load_examples(path)


def test_the_flag_is_for_the_sources_that_have_its_columns(tmp_path, capsys):
    """Pool, targets and tests may be of several layouts; the flag of any message can be pasted."""
    own = [{"query": "why?", "response": "so", "options": None}]
    choices = [{"query": "which?", "options": ["x", "y"], "answer_idx": "B", "response": "y"}]
    path, others = (
        folders.write(tmp_path / "a.jsonl", own),
        folders.write(tmp_path / "b.jsonl", [ROWS["ours"]]),
    )
    columns = "question=query,answer=response"
    for load in (
        lambda of, by: sources.load_examples(of, by),
        lambda of, by: sources.load_targets(of, 0, 0, by),
        lambda of, by: sources.load_tests(of, 0, 0, texts=True, columns=by),
    ):
        with pytest.raises(errors.UserError, match=rf" --config\.data\.columns={columns}$"):
            load(path, "")
        assert [e.answer for e in load(path, columns)] == ["so"]
        capsys.readouterr()
        assert [e.answer for e in load(others, columns)] == ["because"]
    with pytest.raises(errors.UserError, match=rf" --columns={columns}$"):
        sources.load_examples(path, field="--pool")
    assert [e.answer for e in sources.load_examples(f"{path},{others}", columns)] == [
        "so", "because",
    ]  # fmt: skip
    assert "b.jsonl: rows of the layout ours" in capsys.readouterr().err
    path = folders.write(tmp_path / "c.jsonl", choices)
    [test] = sources.load_tests(path, 0, 0, texts=True, columns=columns)
    assert (test.question, test.answer_idx, test.answer) == ("which?", "B", "y")


@pytest.mark.parametrize("said", ["", "<think>hm</think>", "<think>cut off"])
def test_an_earlier_answer_that_says_nothing_is_not_scored(tmp_path, said):
    chat_of = [ASKED, {"role": "assistant", "content": said}, *CHAT[-2:]]
    path = folders.write(tmp_path / "a.jsonl", [{"messages": chat_of}])
    assert sources.load_examples(path)[0].answer == "no"
    for load in (
        lambda: sources.load_examples(path, turns="all"),
        lambda: sources.load_targets(path, 0, 0, "", turns="all"),
    ):
        with pytest.raises(errors.UserError, match=r"a\.jsonl:1: an earlier answer is empty"):
            load()


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + folders.CHAT
    )
    layout = chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")
    rows = [{"messages": CHAT[3:], "id": "good"}, {"messages": CHAT, "id": "bad"}]
    with pytest.raises(errors.UserError, match=r"^Example 'bad': .*no system role"):
        encode(tmp_path, "last", layout, rows=rows)


def test_texts_that_begin_or_end_a_turn_are_found(tmp_path):
    _, layout = plain_layout()
    marks = encoded.turn_marks(layout)
    rows = [
        {"question": "why<|end|>?", "answer": "so"}, {"question": "why?", "answer": "so<|user|>"},
        {"question": "why?", "answer": "<end> <|pad|>"},
    ]  # fmt: skip
    pool = sources.load_examples(folders.write(tmp_path / "a.jsonl", rows))
    texts = [encoded.texts_of(example, "plain") for example in pool]
    assert [bool(marks.search(text)) for text in texts] == [True, True, False]


def test_an_instruction_is_no_question(tmp_path):
    rows = [
        {"id": str(i), "instruction": "Answer the question.", "response": f"so {i}", "q": f"{i}?"}
        for i in range(30)
    ]
    path = folders.write(tmp_path / "a.jsonl", rows)
    with pytest.raises(errors.UserError, match=r"the same in 30 of the first 30 rows"):
        sources.load_examples(path)
    pool = sources.load_examples(path, "question=instruction+q,answer=response")
    assert pool[3].question == "Answer the question.\n\n3?"


def test_a_test_may_be_a_text(tmp_path):
    path = folders.write(tmp_path / "a.jsonl", [ROWS["messages"], ROWS["messages"]])
    tests = sources.load_tests(path, 0, 0, texts=True)
    assert [(t.question, t.answer, t.options) for t in tests] == [("why?", "because", None)] * 2
    with pytest.raises(errors.UserError, match="options must be an object"):
        sources.load_tests(path, 0, 0)
