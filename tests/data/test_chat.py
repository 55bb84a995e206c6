"""Chat: prompt and completion are exactly what they should be, under templates that rewrite."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from diq_jax.common import errors
from diq_jax.data import chat
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


def read(tokenizer, encoded):
    """The text that is not scored, and the text that is."""
    scored = encoded.labels != example_lib.IGNORED
    np.testing.assert_array_equal(encoded.labels[scored], encoded.input_ids[scored])
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    return tokenizer.decode(encoded.input_ids[~scored]), tokenizer.decode(encoded.input_ids[scored])


def encode(tokenizer, example=TEXT, template="think", max_tokens=1000, truncation="error"):
    return chat.encode(example, tokenizer, template, max_tokens, truncation)


@pytest.mark.parametrize("template", [CHATML, QWEN3])
def test_prompt_and_completion(template):
    tokenizer = make_tokenizer(template)
    encoded, outcome = encode(tokenizer)
    prompt, completion = read(tokenizer, encoded)
    assert outcome == "whole" and encoded.answer_tokens == len(completion) - len("<|im_end|>") + 1
    assert prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "<think>\nSince.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, QWEN3, MISTRAL, OPENS_REASONING, None])
def test_the_prompt_is_the_one_of_generation(template):
    tokenizer = make_tokenizer(template, adds_bos=True)
    encoded, _ = encode(tokenizer)
    [prompt] = chat.prompt_ids([TEXT], tokenizer)
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert np.all(encoded.labels[: len(prompt)] == -100) and np.all(
        encoded.labels[len(prompt) :] != -100
    )
    if template:
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=True
        )
        assert prompt == expected["input_ids"]


def test_a_turn_ends_with_the_token_of_the_template():
    tokenizer = make_tokenizer(MISTRAL)
    assert read(tokenizer, encode(tokenizer)[0]) == (
        "<s>[INST] Why? [/INST]",
        "<think>\nSince.\n</think>\n\nSo.</s>",
    )


def test_a_prompt_that_opens_the_reasoning_is_continued():
    tokenizer = make_tokenizer(OPENS_REASONING)
    prompt, completion = read(tokenizer, encode(tokenizer)[0])
    assert prompt.endswith("assistant\n<think>\n")
    assert completion == "Since.\n</think>\n\nSo.<|im_end|>"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_without_a_chat_template(adds_bos):
    tokenizer = make_tokenizer(None, adds_bos)
    assert chat.uses_plain_template(tokenizer)
    assert not chat.uses_plain_template(make_tokenizer(CHATML))
    prompt, completion = read(tokenizer, encode(tokenizer, CHOICE)[0])
    bos = "<s>" if adds_bos else ""
    assert prompt + completion == f"{bos}Question: Which?\n\nA. one\nB. two\n\nAnswer: B. two</s>"
    assert completion == " B. two</s>"


def test_completions():
    def text(template, **changes):
        return chat.completion_text(dataclasses.replace(TEXT, **changes), template)

    assert text("plain") == "Since.\n\nSo."
    assert text("huatuo") == "## Thinking\n\nSince.\n\n## Final Response\n\nSo."
    assert text("huatuo", reasoning=" \n") == "So."
    assert text("\\boxed{{answer}} {x}", reasoning="") == "\\boxed{So.} {x}"
    assert text("{reasoning}|{answer}", reasoning="{answer}") == "{answer}|So."
    assert chat.completion_text(CHOICE, "plain") == "B. two"
    for template in ("huatou", "", "{reasoning}"):
        with pytest.raises(errors.UserError, match=r"data\.template"):
            text(template)
    with pytest.raises(errors.UserError, match="Did you mean 'huatuo'"):
        text("huatou")


def test_truncation():
    tokenizer = make_tokenizer(CHATML)
    whole, _ = encode(tokenizer)
    total, prompt = len(whole.input_ids), np.flatnonzero(whole.labels != -100)[0]
    assert encode(tokenizer, max_tokens=total)[1] == "whole"
    with pytest.raises(
        errors.UserError, match=rf"'x' has {total} tokens.*max_tokens = {total - 1}"
    ):
        encode(tokenizer, max_tokens=total - 1)
    assert encode(tokenizer, max_tokens=total - 1, truncation="drop") == (None, "dropped")

    end, outcome = encode(tokenizer, max_tokens=prompt + 1, truncation="end")
    assert outcome == "cut" and end.answer_tokens == 1
    np.testing.assert_array_equal(end.input_ids, whole.input_ids[: prompt + 1])
    assert encode(tokenizer, max_tokens=prompt, truncation="end") == (None, "dropped")

    kept, outcome = encode(tokenizer, max_tokens=total - prompt + 1, truncation="prompt")
    assert outcome == "cut" and kept.answer_tokens == whole.answer_tokens
    np.testing.assert_array_equal(kept.input_ids, whole.input_ids[prompt - 1 :])
    assert encode(tokenizer, max_tokens=total - prompt, truncation="prompt") == (None, "dropped")
    with pytest.raises(errors.UserError, match=r"model\.truncation .*'drp'.*'drop'"):
        encode(tokenizer, truncation="drp")


def test_pre_tokenised_examples_are_cut_alike():
    tokenizer = make_tokenizer(CHATML)
    assert encode(tokenizer, TOKENS)[0].labels.tolist() == [-100, -100, 7, 8]
    assert encode(tokenizer, TOKENS, max_tokens=3, truncation="end")[0].labels.tolist() == [
        -100,
        -100,
        7,
    ]
    cut, _ = encode(tokenizer, TOKENS, max_tokens=3, truncation="prompt")
    assert cut.input_ids.tolist() == [6, 7, 8] and cut.labels.tolist() == [-100, 7, 8]
    assert encode(tokenizer, TOKENS, max_tokens=2, truncation="prompt") == (None, "dropped")
    scored_first = dataclasses.replace(TOKENS, labels=(5, -100, -100, 8))
    assert encode(tokenizer, scored_first, max_tokens=3, truncation="end") == (None, "dropped")


def test_encode_all_is_encode_in_order():
    tokenizer = make_tokenizer(CHATML)
    long = dataclasses.replace(TEXT, example_id="long", answer="So. " * 100)
    examples = [CHOICE, TOKENS, long, TEXT]
    encoded, outcomes, dropped = chat.encode_all(examples, tokenizer, "plain", 120, "drop")
    assert outcomes == {"whole": 3, "dropped": 1} and dropped == ["long"]
    for example, got in zip([CHOICE, TOKENS, TEXT], encoded, strict=True):
        alone, _ = chat.encode(example, tokenizer, "plain", 120, "drop")
        assert got.example_id == example.example_id
        np.testing.assert_array_equal(got.input_ids, alone.input_ids)
        np.testing.assert_array_equal(got.labels, alone.labels)
    assert chat.encode_all([], tokenizer, "plain", 120, "drop") == ([], {}, [])


@pytest.mark.parametrize("template", [QWEN3, None])
def test_options_share_a_prompt_and_do_not_end_the_turn(template):
    tokenizer = make_tokenizer(template)
    options = chat.encode_options(CHOICE, tokenizer, 1000)
    assert [e.example_id for e in options] == ["c#A", "c#B"]
    right, _ = encode(tokenizer, CHOICE)
    np.testing.assert_array_equal(options[1].input_ids, right.input_ids[:-1])
    np.testing.assert_array_equal(options[1].labels, right.labels[:-1])
    assert read(tokenizer, options[0])[1].strip() == "A. one"


def test_options_with_a_long_prompt_are_cut_alike():
    tokenizer = make_tokenizer(CHATML)
    uneven = dataclasses.replace(CHOICE, options={"A": "one", "B": "twenty-two"})
    short, long = chat.encode_options(uneven, tokenizer, 20)
    assert (len(short.input_ids), len(long.input_ids)) == (13, 20)
    assert read(tokenizer, short)[0] == read(tokenizer, long)[0] == "istant\n"
    with pytest.raises(errors.UserError, match=r"model\.max_tokens = 13 .*'c'"):
        chat.encode_options(uneven, tokenizer, 13)


def test_a_chat_template_that_fails_is_a_user_error():
    tokenizer = make_tokenizer("{{ raise_exception('no system message') }}")
    with pytest.raises(errors.UserError, match=r"model\.path .*no system message"):
        encode(tokenizer)
