"""Preference rows: what is read, what is refused, what fits."""

import folders
import pytest

from diq_jax import errors
from diq_jax.data import chat, preferences, wording

GOOD = {"id": "a", "question": "why?", "chosen": "because", "rejected": "no"}


def load(tmp_path, rows, limit=0):
    path = folders.write(tmp_path / "pairs.jsonl", rows)
    return preferences.load_preferences(path, limit, "finetune.dpo.data")


def encode(pairs, max_tokens):
    tokenizer = folders.tokenizer()
    layout = chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")
    return preferences.encode(pairs, layout, "plain", max_tokens, "end", "finetune.dpo.data")


def test_a_side_is_a_text_or_an_object(tmp_path):
    told = {"reasoning": "we think", "answer": "because"}
    rows = [GOOD, GOOD | {"id": "b", "chosen": told}, {**GOOD, "id": None}]
    (plain, _), (reasoned, rejected), (unnamed, _) = load(tmp_path, rows)
    assert (plain.question, plain.answer, plain.reasoning) == ("why?", "because", "")
    assert (reasoned.reasoning, reasoned.answer, rejected.answer) == ("we think", "because", "no")
    assert reasoned.example_id == rejected.example_id == "b"
    assert unnamed.example_id == "row-000002"
    assert len(load(tmp_path, rows, limit=2)) == 2


def message(role, content, **more):
    return {"role": role, "content": content} | more


def test_sides_as_messages(tmp_path):
    asked = [message("user", "why?")]
    sides = {
        "chosen": [message("assistant", "because", reasoning_content="we think")],
        "rejected": [message("assistant", "no")],
    }
    whole = {name: asked + side for name, side in sides.items()}
    rows = [
        {"id": "a"} | whole,
        {"id": "b", "prompt": "why?"} | whole,
        {"id": "c", "prompt": asked} | sides,
        {"id": "d", "prompt": "why?", "chosen": "because", "rejected": "no"},
        {"id": "e", "prompt": asked, "chosen": sides["chosen"][0], "rejected": "no"},
        {"id": "f", "conversations": [{"from": "human", "value": "why?"}], **sides}
        | {"rejected": {"from": "gpt", "value": "no"}},
    ]
    for chosen, rejected in load(tmp_path, rows):
        assert {chosen.question, rejected.question} == {"why?"}
        assert (chosen.answer, rejected.answer) == ("because", "no")
        assert chosen.reasoning == ("" if chosen.example_id == "d" else "we think")
    for change, expected in (
        ({"prompt": "when?"}, "must answer the same messages"),
        ({"rejected": "no"}, "rejected must end with a message of the user"),
        ({"rejected": 3}, "rejected must be a text or a list of messages; got 3"),
        ({"rejected": sides["rejected"][:0]}, r"rejected must be a list of messages; got \[\]"),
        ({"rejected": asked}, "rejected must end with a message of the user and .* last are user"),
        ({"rejected": [{"role": "assistant"}]}, "rejected: message 0 has no field 'content'"),
        ({"rejected": [message("system", "s"), *whole["rejected"]]}, "answer the same messages"),
        (sides, "chosen must end with a message of the user"),
    ):
        with pytest.raises(errors.UserError, match=rf"pairs\.jsonl:1: .*{expected}"):
            load(tmp_path, [whole | change])


def test_both_sides_may_follow_earlier_turns(tmp_path):
    turns = [message("system", "s"), message("user", "so?"), message("assistant", "hm")]
    before = [*turns, message("user", "why?")]
    whole = {k: [*before, message("assistant", k)] for k in preferences.SIDES}
    for row in (
        whole,
        whole | {"prompt": before},
        {k: v[-1:] for k, v in whole.items()} | {"prompt": before},
    ):
        [(chosen, rejected)] = load(tmp_path, [{"id": "a"} | row])
        assert [m["content"] for m in chosen.context] == ["s", "so?", "hm"]
        assert chosen.context == rejected.context and chosen.question == "why?"
        assert (chosen.answer, rejected.answer) == preferences.SIDES


def test_options_belong_to_the_question(tmp_path):
    row = GOOD | {"options": {"A": "no", "B": "so"}, "answer_idx": "B", "chosen": "so"}
    for side, text in zip(*load(tmp_path, [row]), ("B. so", "A. no"), strict=True):
        assert wording.question_text(side) == "why?\n\nA. no\nB. so"
        assert wording.completion_text(side, "plain") == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "rejected is empty"),
        ({"chosen": 3}, "chosen must be a text, got 3"),
        ({"chosen": {"reasoning": "hm"}}, "chosen: answer is missing from columns reasoning"),
        ({"rejected": "because"}, "chosen and rejected are the same"),
        ({"question": ""}, "question is empty"),
        ({"id": "a"}, "id 'a' stands at .*pairs.jsonl:1 and again at .*pairs.jsonl:2"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, change, message):
    with pytest.raises(errors.UserError, match=rf"^finetune.dpo.data: .*{message}") as caught:
        load(tmp_path, [GOOD, GOOD | {"id": "b"} | change])
    assert "pairs.jsonl:2" in str(caught.value)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"^finetune.dpo.data holds no rows"):
        load(tmp_path, [])


def test_both_sides_follow_one_prompt(tmp_path):
    (pair,), dropped = encode(load(tmp_path, [GOOD]), 64)
    assert not dropped and pair.tokens == sum(len(s.input_ids) for s in pair.sides)
    prompts = [side.input_ids[side.labels == -100].tolist() for side in pair.sides]
    assert prompts[0] == prompts[1]
    assert [side.answer_tokens for side in pair.sides] == [8, 3]  # one a byte, and the end
    assert pair.longer.answer_tokens == 8 and pair.longer.example_id == "a"


def test_pairs_that_a_cut_makes_equal_are_left_out(tmp_path):
    # The prompt takes six tokens: at 10 both sides keep their first four letters.
    rows = [GOOD, {"id": "b", "question": "why?", "chosen": "because", "rejected": "becalmed"}]
    pairs, dropped = encode(load(tmp_path, rows), 10)
    assert [pair.example_id for pair in pairs] == ["a"] and dropped == ["b"]
