"""Text -> token ids with a loss mask: the prompt is read, the completion is scored.

The prompt is what the tokenizer's chat template makes of the question, as at generation time. The
completion is ours (`TEMPLATES`) and ends with the token that the chat template puts after a message
of the assistant. It never passes through the chat template, because some (Qwen3) rewrite what they
take for reasoning. The two are tokenised apart, so that the mask is exact. A tokenizer without a
chat template gets "Question: ... Answer: ..." and its end-of-sequence token.
"""

import collections
import re
from collections.abc import Sequence

import jinja2
import numpy as np
import transformers

from diq_jax.common import errors
from diq_jax.data import example as example_lib

Tokenizer = transformers.PreTrainedTokenizerBase

TEMPLATES = {
    "plain": "{reasoning}\n\n{answer}",
    "huatuo": "## Thinking\n\n{reasoning}\n\n## Final Response\n\n{answer}",
    "think": "<think>\n{reasoning}\n</think>\n\n{answer}",
}
TRUNCATIONS = ("error", "drop", "end", "prompt")
_MARK = "assistant-message"  # stands for a completion while its end is looked up


def question_text(example: example_lib.Example) -> str:
    """The question; for multiple choice, a blank line and a line "A. text" for each option."""
    return example_lib.ask(example.question, example.options)


def completion_text(example: example_lib.Example, template: str) -> str:
    """Reasoning and answer in `template`, a name of `TEMPLATES` or a text with {answer}.

    An example without reasoning gets its answer alone where the template has {reasoning}. The
    answer of a multiple-choice example is "B. text", or its own words.
    """
    if template not in TEMPLATES and "{answer}" not in template:
        raise errors.UserError(
            f"data.template must be one of {', '.join(TEMPLATES)} or a text with {{answer}} in it; "
            f"got {template!r}.{errors.nearest(template, TEMPLATES)}"
        )
    template = TEMPLATES.get(template, template)
    answer = example.answer
    if example.options is not None and answer == example.options.get(example.answer_idx):
        answer = f"{example.answer_idx}. {answer}"
    if "{reasoning}" in template and not example.reasoning.strip():
        return answer
    values = {"{reasoning}": example.reasoning, "{answer}": answer}
    # Not str.format: templates hold other braces (\boxed{}), and so do texts.
    return re.sub(r"\{reasoning\}|\{answer\}", lambda match: values[match[0]], template)


def uses_plain_template(tokenizer: Tokenizer) -> bool:
    return not tokenizer.chat_template


def prompt_ids(examples: Sequence[example_lib.Example], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt, up to where the model is to answer: what `encode` scores after."""
    return _tokenize(_prompts(examples, tokenizer), tokenizer, _bos(tokenizer))


def encode_all(
    examples: Sequence[example_lib.Example],
    tokenizer: Tokenizer,
    template: str,
    max_tokens: int,
    truncation: str,
) -> tuple[list[example_lib.Encoded], collections.Counter, list[str]]:
    """Encodes examples; pre-tokenised ones are used as they are, but for their length.

    Args:
        truncation: what to do with an example over `max_tokens`: `error`, `drop`, cut the `end` of
            the completion, or cut the beginning of the `prompt`. One with nothing left to score, or
            whose completion alone is too long for `prompt`, is dropped.

    Returns:
        The encoded examples in order, the counts of whole, cut and dropped, the dropped ids.

    Raises:
        UserError: with `error`, naming the first example that is too long.
    """
    errors.check_choice("model.truncation", truncation, TRUNCATIONS)
    texts = [example for example in examples if example.input_ids is None]
    end = end_ids(tokenizer)
    tokens = iter(_pairs(texts, [completion_text(e, template) for e in texts], tokenizer))
    encoded, outcomes, dropped = [], collections.Counter(), []
    for example in examples:
        if example.input_ids is None:
            prompt, completion = next(tokens)
            ids = prompt + completion + end
            labels = [example_lib.IGNORED] * len(prompt) + completion + end
        else:
            ids, labels = example.input_ids, example.labels
        ids, labels = np.array(ids, np.int32), np.array(labels, np.int32)
        whole = len(ids) <= max_tokens
        if not whole and truncation == "error":
            raise errors.UserError(
                f"Example {example.example_id!r} has {len(ids)} tokens, over model.max_tokens = "
                f"{max_tokens}: raise it, or set model.truncation to drop, end or prompt."
            )
        kept = slice(None) if whole else _kept(labels, max_tokens, truncation)
        result = example_lib.Encoded(example.example_id, ids[kept], labels[kept])
        if result.answer_tokens:
            encoded.append(result)
            outcomes["whole" if whole else "cut"] += 1
        else:
            dropped.append(example.example_id)
            outcomes["dropped"] += 1
    return encoded, outcomes, dropped


def encode(
    example: example_lib.Example,
    tokenizer: Tokenizer,
    template: str,
    max_tokens: int,
    truncation: str,
) -> tuple[example_lib.Encoded | None, str]:
    """Encodes one example as `encode_all` does; the outcome is whole, cut, or dropped (None)."""
    encoded, outcomes, _ = encode_all([example], tokenizer, template, max_tokens, truncation)
    return (encoded[0] if encoded else None), next(iter(outcomes))


def encode_options(
    example: example_lib.Example, tokenizer: Tokenizer, max_tokens: int
) -> list[example_lib.Encoded]:
    """One prompt and each option as its answer, "B. text", named "ID#B".

    The token that ends a turn is left out, so that likelihoods compare the answers only. A prompt
    too long for the longest option is cut from its beginning, for all options alike.
    """
    answers = [f"{letter}. {text}" for letter, text in example.options.items()]
    pairs = _pairs([example] * len(answers), answers, tokenizer)
    room = max_tokens - max(len(completion) for _, completion in pairs)
    if room < 1:
        raise errors.UserError(
            f"model.max_tokens = {max_tokens} has no room for an option of {example.example_id!r}."
        )
    prompt = pairs[0][0][-room:]
    ignored = [example_lib.IGNORED] * len(prompt)
    return [
        example_lib.Encoded(
            f"{example.example_id}#{letter}",
            np.array(prompt + completion, np.int32),
            np.array(ignored + completion, np.int32),
        )
        for letter, (_, completion) in zip(example.options, pairs, strict=True)
    ]


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The end of an assistant's turn: what the template puts there, to its first special token."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if uses_plain_template(tokenizer):
        return eos
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    _, found, text = _render(tokenizer, messages, generate=False).rpartition(_MARK)
    tail = _tokenize([text.strip()], tokenizer)[0] if found else []
    added = tokenizer.added_tokens_decoder
    for i, token in enumerate(tail):
        if token == tokenizer.eos_token_id or (token in added and added[token].special):
            return tail[: i + 1]
    return tail or eos


def _kept(labels: np.ndarray, max_tokens: int, truncation: str) -> slice:
    """Which tokens of a too long example stay; nothing where the prompt gives too little room."""
    if truncation == "end":
        return slice(max_tokens)
    prompt = np.flatnonzero(labels != example_lib.IGNORED)[0]
    excess = len(labels) - max_tokens
    fits = truncation == "prompt" and excess < prompt
    return slice(excess, None) if fits else slice(0)


def _prompts(examples: Sequence[example_lib.Example], tokenizer: Tokenizer) -> list[str]:
    if uses_plain_template(tokenizer):
        return [f"Question: {question_text(example)}\n\nAnswer:" for example in examples]
    messages = [[{"role": "user", "content": question_text(example)}] for example in examples]
    return [_render(tokenizer, m, generate=True) for m in messages]


def _render(tokenizer: Tokenizer, messages: list[dict], generate: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=generate, tokenize=False
        )
    except jinja2.TemplateError as e:
        raise errors.UserError(f"model.path has a chat template that fails: {e}.") from None


def _pairs(
    examples: Sequence[example_lib.Example], completions: Sequence[str], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion ids. The completion carries on where the prompt ends."""
    prompts = _prompts(examples, tokenizer)
    if uses_plain_template(tokenizer):
        completions = [f" {text}" for text in completions]
    else:  # some templates open the reasoning themselves, at the end of the prompt
        opened = "<think>\n"
        completions = [
            text.removeprefix(opened) if prompt.endswith(opened) else text
            for prompt, text in zip(prompts, completions, strict=True)
        ]
    ids = _tokenize(prompts, tokenizer, _bos(tokenizer)), _tokenize(completions, tokenizer)
    return list(zip(*ids, strict=True))


def _tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, first: Sequence[int] = ()
) -> list[list[int]]:
    if not texts:
        return []
    rows = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [[*first, *ids] for ids in rows["input_ids"]]


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The token to begin a prompt with: a chat template writes its own."""
    bos = tokenizer.bos_token_id
    if not uses_plain_template(tokenizer) or bos is None:
        return []
    return [bos] if tokenizer("a")["input_ids"][0] == bos else []
