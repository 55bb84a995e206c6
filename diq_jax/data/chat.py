"""Text -> token ids with a loss mask: the prompt is read, the completion is scored.

prompt + completion + end is one text, tokenised as a whole, as the tokenizer would read a rendered
conversation. `make_layout` finds out once how the chat template writes one, and refuses a template
of which prompt and completion cannot be told apart.

The prompt is what the chat template makes of the question, as at generation time. The completion
is ours (wording.py). It never passes through the chat template, because some (Qwen3) rewrite what
they take for reasoning. The end is what the template puts after a message of the assistant, up to
its first special token. A tokenizer without a chat template gets "Question: ... Answer: ..." and
its end-of-sequence token.

**The border.** Scored tokens are what a model has to generate after the prompt's tokens, and those
are the prompt's alone, since generation has nothing else. So the whole is cut after as many tokens
as the prompt has, which must be the prompt's. Where they are not, a token stands across the border
(a prompt that ends with a line break before a completion that begins with one), and the completion
is tokenised as it is after another text (`ANCHORS`): its tokens spell the completion, and nothing
of the prompt, but not as the tokenizer would spell the whole. The same holds at the end.

**Reasoning.** A prompt that opens <think> is continued: a completion with tags loses its own
opening tag, and one without tags comes after the block, which is closed at once.
"""

import dataclasses
import re
from collections.abc import Sequence

from diq_jax import errors
from diq_jax.data import chat_template, token_ids, wording
from diq_jax.data import example as example_lib
from diq_jax.run import reading

ANCHORS = ("\n", "a", ".")  # texts of which no token goes on into most completions
OPEN, CLOSE = wording.OPEN, "\n</think>\n\n"
_USER, _ASSISTANT = "what-the-user-says", "what-the-assistant-says"  # stand for messages
_EMPTY_BLOCK = r"\s*<think>\s*</think>\s*"


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Describes how a tokenizer and its chat template lay out a conversation (`make_layout`).

    Attributes:
        template: how messages are rendered; None without a chat template.
        field: the config field or flag that names the model, for messages.
        vocab_size: the tokens that the model has an embedding for.
        parts: the template reads content as a list of parts, not as a text.
        derived: the template has no generation prompt; a prompt is what it writes before the
            assistant's message.
        opened: the opening tag of reasoning that prompts end with, with its white space, or "".
        close: what ends that block.
        lead: what stands between a prompt and a completion.
        end: what ends a completion, as text; "" where end_ids do not come of a text.
        end_ids: its tokens.
        first: tokens before a prompt: a chat template writes its own.
    """

    tokenizer: token_ids.Tokenizer
    template: chat_template.ChatTemplate | None
    field: str
    vocab_size: int
    parts: bool = False
    derived: bool = False
    opened: str = ""
    close: str = ""
    lead: str = ""
    end: str = ""
    end_ids: tuple[int, ...] = ()
    first: tuple[int, ...] = ()


def make_layout(tokenizer: token_ids.Tokenizer, vocab_size: int, date: str, field: str) -> Layout:
    """Finds out how the chat template writes a conversation, by rendering one of marked messages.

    Args:
        vocab_size: of the model, which may be smaller than the tokenizer's.
        date: the day, YYYY-MM-DD, that a template takes for today.
        field: the config field or flag that names the model, for messages.

    Raises:
        UserError: the template fails, leaves out a message whether its content is a text or a list
            of parts, or has a generation prompt that is not how it begins an assistant's message.
    """
    template = chat_template.of_tokenizer(tokenizer, date, field)
    end = token_ids.eos_id(tokenizer)
    eos = () if end is None else (end,)
    layout = Layout(tokenizer, template, field, vocab_size)
    if template is None:
        return dataclasses.replace(layout, lead=" ", end_ids=eos, first=token_ids.first(tokenizer))
    layout, prompt, whole = _readable(layout)
    before, after = _around(whole)
    derived = prompt == _render(layout, _messages(_USER, None), False)
    layout = dataclasses.replace(layout, derived=derived)
    [prompt] = _prompts([_messages(_USER, None)], layout)
    # Qwen3 writes an empty block of reasoning: before an answer that has none of its own, and at
    # the end of prompts that ask for none.
    start = re.sub(r"<think>\s*(</think>\s*)?$", "", prompt)
    block = prompt[len(start) :]
    opened = "" if "</think>" in block else block
    if not before.startswith(start):
        raise errors.UserError(
            f"{field} has a chat template whose generation prompt is not how it begins an "
            f"assistant's message: the prompt ends with {prompt[-40:]!r}, the message follows "
            f"{before[-40:]!r}."
        )
    gap = before[len(start) :]
    rest = gap.removeprefix(block)
    layout = dataclasses.replace(
        layout,
        opened=opened,
        close=rest if opened and "</think>" in rest else CLOSE,
        lead="" if opened or re.fullmatch(_EMPTY_BLOCK, rest) else rest,
        end=_end_text(after, tokenizer),
    )
    ends = _after(before + _ASSISTANT, layout.end, layout) if layout.end else list(eos)
    return dataclasses.replace(layout, end_ids=tuple(ends or _tokenize([layout.end], layout)[0]))


def prompt_ids(examples: Sequence[example_lib.Example], layout: Layout) -> list[list[int]]:
    """Tokenises each prompt, up to where the model is to answer: `encode_all` scores what follows.

    Raises:
        UserError: the model has no embedding for a token.
    """
    found = _tokenize(
        _prompts([wording.before_answer(e, "plain") for e in examples], layout), layout
    )
    for example, ids in zip(examples, found, strict=True):
        check_tokens(ids, layout, f"The prompt of example {example.example_id!r}")
    return [[*layout.first, *ids] for ids in found]


def write_conversation(
    messages: Sequence[dict], layout: Layout, add_generation_prompt: bool
) -> str:
    """Writes messages with role and content, a text, as the chat template does.

    The text ends where the assistant is to answer, or else with the last message's content.

    Raises:
        UserError: the model has no chat template, or it fails.
    """
    if layout.template is None:
        raise errors.UserError(f"{layout.field} has no chat template.")
    if add_generation_prompt:
        return _ask([list(messages)], layout)[0]
    last = messages[-1]["content"].strip()
    before, _, _ = _render(layout, messages, False).rpartition(last)
    return before + last


def check_tokens(ids: Sequence[int], layout: Layout, where: str) -> None:
    """Raises UserError, which begins with `where`, for a token that the model does not have."""
    largest = max(ids, default=0)
    if largest >= layout.vocab_size:
        token = layout.tokenizer.convert_ids_to_tokens(largest)
        named = "" if token is None else f" ({token!r})"
        raise errors.UserError(
            f"{where} has token {largest}{named}; the model's vocabulary ends at "
            f"{layout.vocab_size - 1}: the tokenizer of {layout.field} is not that of its weights."
        )


def count_tokens(texts: Sequence[str], layout: Layout) -> list[int]:
    """Counts the tokens of each text where it stands inside of another."""
    return [len(_inside(text, layout)) for text in texts]


def _readable(layout: Layout) -> tuple[Layout, str, str]:
    """Returns the layout with `parts` set, the prompt and the whole of a conversation of marks."""
    problem = None
    for parts in (False, True):
        layout = dataclasses.replace(layout, parts=parts)
        try:
            prompt = _render(layout, _messages(_USER, None), True)
            whole = _render(layout, _messages(_USER, _ASSISTANT), False)
        except errors.UserError as e:
            problem = problem or e
            continue
        once = whole.count(_ASSISTANT) == 1
        if once and _USER in prompt and _USER in whole.partition(_ASSISTANT)[0]:
            return layout, prompt, whole
    raise problem or errors.UserError(
        f"{layout.field} has a chat template that leaves out what the user or the assistant says, "
        "or says it twice."
    )


def _messages(question: str, answer: str | None) -> list[dict]:
    said = {"user": question} | ({} if answer is None else {"assistant": answer})
    return [{"role": role, "content": text} for role, text in said.items()]


def _as_parts(messages: Sequence[dict], parts: bool) -> list[dict]:
    if not parts:
        return list(messages)
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _render(layout: Layout, messages: Sequence[dict], asks: bool) -> str:
    assert layout.template is not None  # the caller knows
    return layout.template.render(_as_parts(messages, layout.parts), asks)


def _around(whole: str) -> tuple[str, str]:
    """Returns what a rendered conversation has before and after the assistant's message."""
    before, _, after = whole.rpartition(_ASSISTANT)
    return before, after


def _end_text(after: str, tokenizer: token_ids.Tokenizer) -> str:
    """Returns what ends a message of the assistant: up to the first special token.

    Without one, that is all but white space at its end.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {tokenizer.eos_token} if isinstance(tokenizer.eos_token, str) else set()
    found = [(after.find(token), -len(token)) for token in special if token and token in after]
    if not found:
        return after.rstrip()
    place, length = min(found)
    return after[: place - length]


def _prompts(conversations: Sequence[list[dict]], layout: Layout) -> list[str]:
    """Writes each prompt, of messages that end with a question."""
    if layout.template is None:
        return ["".join(map(wording.plainly, asked)) + "Answer:" for asked in conversations]
    prompts = _ask(conversations, layout)
    for asked, prompt in zip(conversations, prompts, strict=True):
        for said in (m["content"] for m in asked if m["role"] != "assistant"):
            if said.strip() not in prompt:
                raise errors.UserError(
                    f"{layout.field} has a chat template that changes what the user says, or "
                    f"leaves part of it out: {reading.shorten(said)}."
                )
    return prompts


def _ask(conversations: Sequence[list[dict]], layout: Layout) -> list[str]:
    """Writes the texts up to where the assistant is to answer."""
    assert layout.template is not None  # the caller knows
    if layout.derived:
        answer = {"role": "assistant", "content": _ASSISTANT}
        conversations = [[*messages, answer] for messages in conversations]
    conversations = [_as_parts(messages, layout.parts) for messages in conversations]
    texts = layout.template.render_all(conversations, not layout.derived)
    if not layout.derived:
        return texts
    # A space belongs to the word that follows it: the completion begins with it (`lead`).
    return [re.sub(rf"{_EMPTY_BLOCK}$", "", _around(text)[0]).rstrip(" ") for text in texts]


def _completion(text: str, layout: Layout) -> str:
    """Writes a completion as it stands after a prompt."""
    if not layout.opened:
        return layout.lead + text
    if text.lstrip().startswith(OPEN):
        inside = text.lstrip().removeprefix(OPEN)
        return inside.lstrip("\n") if layout.opened.endswith("\n") else inside
    return text if CLOSE.strip() in text else layout.close + text


def pairs(
    examples: Sequence[example_lib.Example],
    completions: Sequence[Sequence[str]],
    layout: Layout,
    template: str = "plain",
) -> list[tuple[list[int], list[list[int]]]]:
    """Tokenises each example's prompt, and each of its completions without the end."""
    prompts = _prompts([wording.before_answer(example, template) for example in examples], layout)
    written = [[_completion(text, layout) for text in texts] for texts in completions]
    wholes = [
        prompt + text + layout.end
        for prompt, texts in zip(prompts, written, strict=True)
        for text in texts
    ]
    ids = iter(_tokenize(wholes, layout))
    end = list(layout.end_ids) if layout.end else []
    found = []
    for whole, texts in zip(_tokenize(prompts, layout), written, strict=True):
        cut = [_between(whole, next(ids), end) for _ in texts]
        kept = [own or _inside(text, layout) for own, text in zip(cut, texts, strict=True)]
        found.append(([*layout.first, *whole], kept))
    return found


def earlier_answers(
    example: example_lib.Example, template: str, layout: Layout
) -> list[tuple[int, int]]:
    """Finds where earlier answers, each with its end, stand in the tokens of a prompt.

    Raises:
        UserError: there is no chat template, or the prompt up to an answer does not begin the whole
            prompt, as where the template writes earlier turns otherwise than the last.
    """
    messages, spans = wording.before_answer(example, template), []
    [whole] = _prompts([messages], layout)
    ids = _tokenize([whole], layout)[0]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        [before] = _prompts([messages[:i]], layout)
        stop = whole.find(layout.end, len(before)) if layout.end else -1
        start, after = _tokenize([before, whole[: stop + len(layout.end)]], layout)
        if stop < 0 or ids[: len(start)] != start or ids[: len(after)] != after:
            raise errors.UserError(
                f"Example {example.example_id!r}: {layout.field} has no chat template that writes "
                "an earlier answer as it writes the last one: set data.turns=last."
            )
        spans.append((len(layout.first) + len(start), len(layout.first) + len(after)))
    return spans


def _between(prompt: list[int], ids: list[int], end: list[int]) -> list[int]:
    """Cuts out what `ids` have between the two; nothing where they do not begin and end so."""
    stop = len(ids) - len(end)
    return ids[len(prompt) : stop] if ids[: len(prompt)] == prompt and ids[stop:] == end else []


def _after(before: str, text: str, layout: Layout) -> list[int]:
    """Tokenises `text` after `before`; gives nothing where a token stands across."""
    head, whole = _tokenize([before, before + text], layout)
    return _between(head, whole, [])


def _inside(text: str, layout: Layout) -> list[int]:
    """Tokenises a text that stands inside another: some vocabularies have tokens for a start."""
    for anchor in ANCHORS:
        if found := _after(anchor, text, layout):
            return found
    return _tokenize([text], layout)[0]


def _tokenize(texts: Sequence[str], layout: Layout) -> list[list[int]]:
    if not texts:
        return []
    try:
        rows = layout.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
    except Exception as e:  # tokenizers raises no narrower one for a vocabulary that lacks a token
        raise errors.UserError(
            f"{layout.field} has a tokenizer that fails on a text: {type(e).__name__}: {e}."
        ) from None
    return rows["input_ids"]
