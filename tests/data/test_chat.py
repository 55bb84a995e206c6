"""Chat: prompt and completion are exactly what they should be, under templates that rewrite."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from diq_jax import errors
from diq_jax.data import chat, wording
from diq_jax.data import encoded as encoded_lib
from diq_jax.data import example as example_lib

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 does: drops the reasoning of a message, and puts an empty one before it.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral does: begins with bos, trims, ends a turn with a space and eos.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content|trim"
    " + ' [/INST]' }}{% else %}{{ m.content|trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OPENS_REASONING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")

TEXT = example_lib.Example("x", "Why?", "Since.", "So.", row={})
CHOICE = example_lib.Example(
    "c", "Which?", "", "two", row={}, options={"A": "one", "B": "two"}, answer_idx="B"
)
TOKENS = example_lib.Example(
    "t", "", "", "", row={}, input_ids=(5, 6, 7, 8), labels=(-100, -100, 7, 8)
)


def make_tokenizer(chat_template, adds_bos=False):
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=chat_template,
    )


def make_layout(chat_template, adds_bos=False):
    tokenizer = make_tokenizer(chat_template, adds_bos)
    return chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")


def read(layout, encoded):
    """The text that is not scored, and the text that is."""
    scored = encoded.labels != example_lib.IGNORED
    np.testing.assert_array_equal(encoded.labels[scored], encoded.input_ids[scored])
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    return tuple(layout.tokenizer.decode(encoded.input_ids[mask]) for mask in (~scored, scored))


def encode(layout, example=TEXT, template="think", max_tokens=1000, truncation="error"):
    made, outcomes, _ = encoded_lib.encode_all([example], layout, template, max_tokens, truncation)
    return (made[0] if made else None), next(iter(outcomes))


@pytest.mark.parametrize("template", [CHATML, QWEN3])
def test_prompt_and_completion(template):
    layout = make_layout(template)
    encoded, outcome = encode(layout)
    prompt, completion = read(layout, encoded)
    assert outcome == "whole" and encoded.answer_tokens == len(completion) - len("<|im_end|>") + 1
    assert prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "<think>\nSince.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, QWEN3, MISTRAL, OPENS_REASONING, None])
def test_the_prompt_is_the_one_of_generation(template):
    layout = make_layout(template, adds_bos=True)
    encoded, _ = encode(layout)
    [prompt] = chat.prompt_ids([TEXT], layout)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert np.all(encoded.labels[: len(prompt)] == -100) and np.all(
        encoded.labels[len(prompt) :] != -100
    )
    if template:
        expected = layout.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=True
        )
        assert prompt == expected["input_ids"]


def test_a_turn_ends_with_the_token_of_the_template():
    layout = make_layout(MISTRAL)
    assert read(layout, encode(layout)[0]) == (
        "<s>[INST] Why? [/INST]",
        "<think>\nSince.\n</think>\n\nSo. </s>",
    )


def test_a_prompt_that_opens_the_reasoning_is_continued():
    layout = make_layout(OPENS_REASONING)
    prompt, completion = read(layout, encode(layout)[0])
    assert prompt.endswith("assistant\n<think>\n")
    assert completion == "Since.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_without_a_chat_template(adds_bos):
    layout = make_layout(None, adds_bos)
    assert layout.template is None
    prompt, completion = read(layout, encode(layout, CHOICE)[0])
    bos = "<s>" if adds_bos else ""
    assert prompt + completion == f"{bos}Question: Which?\n\nA. one\nB. two\n\nAnswer: B. two</s>"
    assert completion == " B. two</s>"


def test_completions():
    def text(template, **changes):
        return wording.completion_text(dataclasses.replace(TEXT, **changes), template)

    assert text("plain") == "Since.\n\nSo."
    assert text("huatuo") == "## Thinking\n\nSince.\n\n## Final Response\n\nSo."
    assert text("huatuo", reasoning=" \n") == "So."
    assert text("\\boxed{{answer}} {x}", reasoning="") == "\\boxed{So.} {x}"
    assert text("{reasoning}|{answer}", reasoning="{answer}") == "{answer}|So."
    assert wording.completion_text(CHOICE, "plain") == "B. two"
    for template in ("huatou", "", "{reasoning}"):
        with pytest.raises(errors.UserError, match=r"data\.template"):
            text(template)
    with pytest.raises(errors.UserError, match="Did you mean 'huatuo'"):
        text("huatou")


def test_truncation():
    layout = make_layout(CHATML)
    whole, _ = encode(layout)
    total, prompt = len(whole.input_ids), np.flatnonzero(whole.labels != -100)[0]
    assert encode(layout, max_tokens=total)[1] == "whole"
    with pytest.raises(
        errors.UserError, match=rf"'x' has {total} tokens.*max_tokens = {total - 1}"
    ):
        encode(layout, max_tokens=total - 1)
    assert encode(layout, max_tokens=total - 1, truncation="drop") == (None, "dropped")

    end, outcome = encode(layout, max_tokens=prompt + 1, truncation="end")
    assert outcome == "cut" and end.answer_tokens == 1
    np.testing.assert_array_equal(end.input_ids, whole.input_ids[: prompt + 1])
    assert encode(layout, max_tokens=prompt, truncation="end") == (None, "dropped")

    kept, outcome = encode(layout, max_tokens=total - prompt + 1, truncation="prompt")
    assert outcome == "cut" and kept.answer_tokens == whole.answer_tokens
    np.testing.assert_array_equal(kept.input_ids, whole.input_ids[prompt - 1 :])
    assert encode(layout, max_tokens=total - prompt, truncation="prompt") == (None, "dropped")
    with pytest.raises(errors.UserError, match=r"model\.truncation .*'drp'.*'drop'"):
        encode(layout, truncation="drp")


def test_pre_tokenised_examples_are_cut_alike():
    layout = make_layout(CHATML)
    assert encode(layout, TOKENS)[0].labels.tolist() == [-100, -100, 7, 8]
    assert encode(layout, TOKENS, max_tokens=3, truncation="end")[0].labels.tolist() == [
        -100,
        -100,
        7,
    ]
    cut, _ = encode(layout, TOKENS, max_tokens=3, truncation="prompt")
    assert cut.input_ids.tolist() == [6, 7, 8] and cut.labels.tolist() == [-100, 7, 8]
    assert encode(layout, TOKENS, max_tokens=2, truncation="prompt") == (None, "dropped")
    scored_first = dataclasses.replace(TOKENS, labels=(5, -100, -100, 8))
    assert encode(layout, scored_first, max_tokens=3, truncation="end") == (None, "dropped")


def test_encode_all_is_encode_in_order():
    layout = make_layout(CHATML)
    long = dataclasses.replace(TEXT, example_id="long", answer="So. " * 100)
    examples = [CHOICE, TOKENS, long, TEXT]
    encoded, outcomes, dropped = encoded_lib.encode_all(examples, layout, "plain", 120, "drop")
    assert outcomes == {"whole": 3, "dropped": 1} and dropped == ["long"]
    for example, got in zip([CHOICE, TOKENS, TEXT], encoded, strict=True):
        alone, _ = encode(layout, example, "plain", 120, "drop")
        assert got.example_id == example.example_id
        np.testing.assert_array_equal(got.input_ids, alone.input_ids)
        np.testing.assert_array_equal(got.labels, alone.labels)
    assert encoded_lib.encode_all([], layout, "plain", 120, "drop") == ([], {}, [])


@pytest.mark.parametrize("template", [QWEN3, None])
def test_options_share_a_prompt_and_do_not_end_the_turn(template):
    layout = make_layout(template)
    [options] = encoded_lib.encode_options([CHOICE], layout, 1000)
    assert [e.example_id for e in options] == ["c#A", "c#B"]
    right, _ = encode(layout, CHOICE)
    np.testing.assert_array_equal(options[1].input_ids, right.input_ids[:-1])
    np.testing.assert_array_equal(options[1].labels, right.labels[:-1])
    assert read(layout, options[0])[1].strip() == "A. one"


def test_options_with_a_long_prompt_are_cut_alike():
    layout = make_layout(CHATML)
    uneven = dataclasses.replace(CHOICE, options={"A": "one", "B": "twenty-two"})
    [[short, long]] = encoded_lib.encode_options([uneven], layout, 20)
    assert (len(short.input_ids), len(long.input_ids)) == (13, 20)
    assert read(layout, short)[0] == read(layout, long)[0] == "istant\n"
    with pytest.raises(errors.UserError, match=r"model\.max_tokens = 13 .*'c'"):
        encoded_lib.encode_options([uneven], layout, 13)


NO_HEADER = CHATML.partition("{% if add")[0]
PARTS = NO_HEADER.replace("m.content", "m.content[0].text")
LIST_ONLY = CHATML.replace(
    "m.content + '<|im_end|>\n' }}",
    "'' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}",
)
THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}"
)
# As Qwen3's thinking models: an answer without reasoning stands after an empty block.
CLOSES = OPENS_REASONING.replace(
    "m.role + '\n'", "m.role + ('\n' if m.role == 'user' else '\n<think>\n\n</think>\n\n')"
)


@pytest.mark.parametrize("template", [NO_HEADER, PARTS, LIST_ONLY])
def test_a_template_that_needs_adapting_gives_what_chatml_gives(template):
    """Content as a list of parts, or no generation prompt: the prompt is what stands before the
    assistant's message in a whole conversation.
    """
    layout = make_layout(template)
    assert read(layout, encode(layout)[0]) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nSince.\n</think>\n\nSo.<|im_end|>",
    )


@pytest.mark.parametrize("template", ["plain", "think", "huatuo"])
@pytest.mark.parametrize("chat_template", [OPENS_REASONING, THINKING, CLOSES])
def test_an_opened_block_of_reasoning_is_closed(chat_template, template):
    layout = make_layout(chat_template)
    rows = [TEXT, dataclasses.replace(TEXT, reasoning=""), CHOICE]
    encoded = [encode(layout, row, template)[0] for row in rows]
    encoded += [
        option
        for options in encoded_lib.encode_options([CHOICE], layout, 999)
        for option in options
    ]
    for row in encoded:
        text = layout.tokenizer.decode(row.input_ids)
        assert text.count("<think>") == text.count("</think>") == 1
    assert read(layout, encoded[2])[1] == "\n</think>\n\nB. two<|im_end|>"
    assert read(layout, encoded[-1])[1] == "\n</think>\n\nB. two"
    if template == "plain":
        assert read(layout, encoded[0])[1] == "\n</think>\n\nSince.\n\nSo.<|im_end|>"


@pytest.mark.parametrize("said", ["", "<think>\n\n</think>\n\n"])
def test_a_prompt_with_a_closed_block_is_followed_by_the_answer(said):
    """Whether or not the template writes the block before an assistant's message too."""
    block = "<think>\n\n</think>\n\n"
    template = CHATML.replace("assistant\n' }}{% endif", f"assistant\n{block}' }}}}{{% endif")
    template = template.replace(
        "+ m.content", f"+ ('{said}' if m.role != 'user' else '') + m.content"
    )
    layout = make_layout(template)
    prompt, completion = read(layout, encode(layout, template="plain")[0])
    assert prompt.endswith(f"assistant\n{block}") and completion == "Since.\n\nSo.<|im_end|>"


@pytest.mark.parametrize(
    "reasoning", ["<think>\nSince.\n</think>", "Since.\n</think>\n", " <think>\n\nSince."]
)
def test_reasoning_is_not_tagged_twice(reasoning):
    tagged = dataclasses.replace(TEXT, reasoning=reasoning)
    assert wording.completion_text(tagged, "think") == wording.completion_text(TEXT, "think")
    layout = make_layout(OPENS_REASONING)
    assert read(layout, encode(layout, tagged)[0])[1] == "Since.\n</think>\n\nSo.<|im_end|>"
    empty = dataclasses.replace(TEXT, reasoning="<think>\n\n</think>")
    assert wording.completion_text(empty, "think") == "So."


def test_a_completion_that_closes_the_block_itself_is_left_alone():
    layout = make_layout(OPENS_REASONING)
    for answer in ("Since.\n</think>\n\nSo.", "<think>\nSince.\n</think>\n\nSo."):
        row = dataclasses.replace(TEXT, reasoning="", answer=answer)
        assert read(layout, encode(layout, row)[0])[1] == "Since.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user or the assi"),
        ("{{ messages[0].content }}", "leaves out what the user or the assistant says"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "says it twice"),
        (CHATML.replace("assistant\n", "bot\n"), "whose generation prompt is not how it begins"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError: can only concatenate str"),
    ],
)
def test_a_template_that_cannot_be_held_against_the_prompt_is_refused(template, message):
    with pytest.raises(errors.UserError, match=rf"^model\.path has a chat template .*{message}"):
        make_layout(template)


def test_named_templates():
    assert make_layout({"rag": "x", "default": CHATML}).template is not None
    with pytest.raises(errors.UserError, match=r"of the names rag, tool_use; expected one named"):
        make_layout({"tool_use": CHATML, "rag": CHATML})


def test_a_template_never_sees_the_day():
    dated = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
    layout = make_layout(dated)
    prompt, _ = read(layout, encode(layout)[0])
    assert prompt.startswith("26 Jul 2024\n<|im_start|>user")


def test_a_token_without_embedding_is_refused_by_name():
    tokenizer = make_tokenizer(CHATML)
    layout = chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")
    tokenizer.add_tokens(["[DOSE]"])
    where = r"token 260 \('\[DOSE\]'\); the model's vocabulary ends at 259"
    row = dataclasses.replace(TEXT, answer="[DOSE]")
    with pytest.raises(errors.UserError, match=f"^Example 'x' has {where}"):
        encode(layout, row)
    with pytest.raises(errors.UserError, match=f"^The prompt of example 'x' has {where}"):
        chat.prompt_ids([dataclasses.replace(TEXT, question="[DOSE]")], layout)
    choice = dataclasses.replace(CHOICE, options={"A": "[DOSE]", "B": "two"})
    with pytest.raises(errors.UserError, match=r"^The prompt of question 'c' has token 260"):
        encoded_lib.encode_options([choice], layout, 999)  # options stand in the question too
    for name in ("input_ids", "labels"):
        row = dataclasses.replace(TOKENS, **{name: (5, 6, 7, 999)})
        with pytest.raises(errors.UserError, match=r"^Example 't' has token 999; the model's voc"):
            encode(layout, row)


def test_a_token_across_the_border_leaves_the_prompt_of_generation():
    """One token for two line breaks: the prompt ends with a line break of its own."""
    layout = make_layout(CHATML)
    core = tokenizers.Tokenizer(
        models.BPE({**layout.tokenizer.get_vocab(), "ĊĊ": len(layout.tokenizer)}, [("Ċ", "Ċ")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", additional_special_tokens=SPECIAL[2:],
        chat_template=CHATML,
    )  # fmt: skip
    layout = chat.make_layout(tokenizer, len(tokenizer), "2024-07-26", "model.path")
    row = dataclasses.replace(TEXT, reasoning="", answer="\nSo.\n\nNo.")
    encoded, _ = encode(layout, row)
    [prompt] = chat.prompt_ids([row], layout)
    scored = tokenizer.convert_ids_to_tokens(encoded.input_ids[len(prompt) :])
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert scored == ["Ċ", "S", "o", ".", "ĊĊ", "N", "o", ".", "<|im_end|>"]


def test_a_chat_template_that_fails_is_a_user_error():
    with pytest.raises(errors.UserError, match=r"model\.path .*no system message"):
        make_layout("{{ raise_exception('no system message') }}")


@pytest.mark.parametrize("change", ["content[:30]", "content | replace('W', 'w')"])
def test_a_template_that_changes_a_question_is_refused(change):
    layout = make_layout(CHATML.replace("content", change))
    long = dataclasses.replace(TEXT, question="Which of these is the right one, and Why?")
    with pytest.raises(errors.UserError, match=r": model\.path has a chat template that changes"):
        encode(layout, long)
    with pytest.raises(errors.UserError, match="leaves part of it out: 'Which of these"):
        chat.prompt_ids([long], layout)
