"""Token ids with a loss mask: made from examples, and to and from parquet tables."""

import collections
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from diq_jax import errors
from diq_jax.data import chat, wording
from diq_jax.data import example as example_lib

COLUMNS = ("example_id", "input_ids", "labels")
TRUNCATIONS = ("error", "drop", "end", "prompt")


def columns(rows: Sequence[example_lib.Encoded]) -> dict[str, pa.Array]:
    """Makes the columns input_ids and labels, lists of int32."""
    kind = pa.list_(pa.int32())
    return {
        "input_ids": pa.array([row.input_ids for row in rows], kind),
        "labels": pa.array([row.labels for row in rows], kind),
    }


def from_table(table: pa.Table) -> list[example_lib.Encoded]:
    """Undoes `columns` on a table that also holds example_id."""
    ids, tokens, labels = (table[name].to_pylist() for name in COLUMNS)
    return [
        example_lib.Encoded(i, np.asarray(t, np.int32), np.asarray(y, np.int32))
        for i, t, y in zip(ids, tokens, labels, strict=True)
    ]


def encode_all(
    examples: Sequence[example_lib.Example],
    layout: chat.Layout,
    template: str,
    max_tokens: int,
    truncation: str,
    where: str = "Example",
) -> tuple[list[example_lib.Encoded], collections.Counter, list[str]]:
    """Encodes examples; pre-tokenised ones are used as they are, but for their length.

    Args:
        truncation: what to do with an example over `max_tokens`: `error`, `drop`, cut the `end` of
            the completion, or cut the beginning of the `prompt`. One with nothing left to score, or
            whose completion alone is too long for `prompt`, is dropped.
        where: what the examples are, for messages.

    Returns:
        The encoded examples in order, the counts of whole, cut and dropped, the dropped ids.

    Raises:
        UserError: with `error`, naming the first example that is too long; or the model has no
            embedding for a token.
    """
    errors.check_choice("model.truncation", truncation, TRUNCATIONS)
    texts = [example for example in examples if example.input_ids is None]
    end = list(layout.end_ids)
    answers = [[wording.completion_text(e, template)] for e in texts]
    tokens = iter(_pairs(texts, answers, layout, where, template))
    made, outcomes, dropped = [], collections.Counter(), []
    for example in examples:
        if example.input_ids is None or example.labels is None:
            prompt, [completion] = next(tokens)
            ids = prompt + completion + end
            labels = [example_lib.IGNORED] * len(prompt) + completion + end
            if example.every_turn:
                for start, stop in chat.earlier_answers(example, template, layout):
                    labels[start:stop] = ids[start:stop]
        else:
            ids, labels = example.input_ids, example.labels
        chat.check_tokens([*ids, *labels], layout, f"{where} {example.example_id!r}")
        ids, labels = np.array(ids, np.int32), np.array(labels, np.int32)
        whole = len(ids) <= max_tokens
        if not whole and truncation == "error":
            raise errors.UserError(
                f"Example {example.example_id!r} has {len(ids)} tokens, over model.max_tokens = "
                f"{max_tokens}: raise it, or set model.truncation to drop, end or prompt."
            )
        kept = slice(None) if whole else _kept(labels, max_tokens, truncation)
        row = example_lib.Encoded(example.example_id, ids[kept], labels[kept])
        if row.answer_tokens:
            made.append(row)
            outcomes["whole" if whole else "cut"] += 1
        else:
            dropped.append(example.example_id)
            outcomes["dropped"] += 1
    return made, outcomes, dropped


def turn_marks(layout: chat.Layout) -> re.Pattern[str] | None:
    """Returns a pattern of the special tokens that begin or end a turn; None where there are none.

    In a text they are read as these tokens, as tokenizers do.
    """
    [prompt] = chat.prompt_ids([example_lib.Example("", "a", "", "a", {})], layout)
    known = layout.tokenizer.added_tokens_decoder
    found = {known[i].content for i in (*prompt, *layout.end_ids) if i in known}
    return re.compile("|".join(map(re.escape, sorted(found)))) if found else None


def texts_of(example: example_lib.Example, template: str) -> str:
    """Returns all texts of an example, as they are encoded."""
    if example.input_ids is not None:
        return ""
    return "\n".join(message["content"] for message in wording.conversation(example, template))


def encode_options(
    examples: Sequence[example_lib.Example], layout: chat.Layout, max_tokens: int
) -> list[list[example_lib.Encoded]]:
    """Encodes for each example the prompt with each option as its answer, "B. text", named "ID#B".

    The token that ends a turn is left out, so that likelihoods compare the answers only. A prompt
    too long for the longest option is cut from its beginning, for all options alike.

    Raises:
        UserError: an option leaves no room for its prompt, or has a token that the model has no
            embedding for.
    """
    answers = [
        [f"{letter}. {text}" for letter, text in (e.options or {}).items()] for e in examples
    ]
    made = []
    for example, pair in zip(examples, _pairs(examples, answers, layout), strict=True):
        (prompt, completions), asked = pair, f"question {example.example_id!r}"
        chat.check_tokens(prompt, layout, f"The prompt of {asked}")
        room = max_tokens - max(map(len, completions))
        if room < 1:
            raise errors.UserError(
                f"model.max_tokens = {max_tokens} has no room for an option of "
                f"{example.example_id!r}."
            )
        prompt, rows = prompt[-room:], []
        for letter, ids in zip(example.options or {}, completions, strict=True):
            chat.check_tokens(ids, layout, f"Option {letter} of {asked}")
            labels = [example_lib.IGNORED] * len(prompt) + ids
            whole = (np.array(numbers, np.int32) for numbers in (prompt + ids, labels))
            rows.append(example_lib.Encoded(f"{example.example_id}#{letter}", *whole))
        made.append(rows)
    return made


def _kept(labels: np.ndarray, max_tokens: int, truncation: str) -> slice:
    """Returns which tokens of a too long example stay: none where its completion is too long."""
    if truncation == "end":
        return slice(max_tokens)
    prompt = np.flatnonzero(labels != example_lib.IGNORED)[0]
    excess = len(labels) - max_tokens
    fits = truncation == "prompt" and excess < prompt
    return slice(excess, None) if fits else slice(0)


def _pairs(
    examples: Sequence[example_lib.Example],
    completions: Sequence[Sequence[str]],
    layout: chat.Layout,
    where: str = "Question",
    template: str = "plain",
) -> list[tuple[list[int], list[list[int]]]]:
    """Tokenises as `chat.pairs`; an error names the first example that it comes of."""
    try:
        return chat.pairs(examples, completions, layout, template)
    except errors.UserError:
        for example, own in zip(examples, completions, strict=True):
            try:
                chat.pairs([example], [own], layout, template)
            except errors.UserError as e:
                raise errors.UserError(f"{where} {example.example_id!r}: {e}") from None
        raise
