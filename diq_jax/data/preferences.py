"""Preference rows: a question, the completion that is preferred, and one that is not."""

import dataclasses
import itertools
from collections.abc import Sequence

from diq_jax import errors
from diq_jax.data import chat, encoded, layouts, sources
from diq_jax.data import example as example_lib

SIDES = ("chosen", "rejected")
ASKED = ("prompt", "question", "conversations")  # the first of them that a row has


@dataclasses.dataclass(frozen=True, eq=False)
class PreferencePair:
    """Holds both completions of one question, tokenised."""

    example_id: str
    chosen: example_lib.Encoded
    rejected: example_lib.Encoded

    @property
    def sides(self) -> tuple[example_lib.Encoded, example_lib.Encoded]:
        """Returns chosen, then rejected."""
        return self.chosen, self.rejected

    @property
    def tokens(self) -> int:
        """Returns the tokens of both sides."""
        return sum(len(side.input_ids) for side in self.sides)

    @property
    def longer(self) -> example_lib.Encoded:
        """Returns the side whose shape both fit, under the pair's id: steps are planned by it."""
        side = max(self.sides, key=lambda side: (len(side.input_ids), side.answer_tokens))
        return dataclasses.replace(side, example_id=self.example_id)


def load_preferences(
    spec: str, limit: int, field: str
) -> list[tuple[example_lib.Example, example_lib.Example]]:
    """Loads (chosen, rejected) examples: the first `limit` rows, or all for 0.

    A row has id, question (or prompt), chosen and rejected; each of the two is a text, or an object
    with `answer` and, which may be empty, `reasoning`; or the prompt (or conversations), or one of
    the two, is a message or a list of messages: then both end with the assistant's answer and share
    what stands before it. `options` belong to the question.

    Raises:
        UserError: naming `field`, the file and the line, where a row is not like that, prefers a
            completion to itself, or repeats an id.
    """

    def read():
        rows = itertools.islice(sources.read_rows(spec, field), limit or None)
        for position, (row, where) in enumerate(rows):
            yield _from_row(row, f"{field}: {where}", position), where

    return [pair for pair, _ in sources.unique(read, spec, field, lambda p: p[0].example_id)]


def encode(
    pairs: Sequence[tuple[example_lib.Example, example_lib.Example]],
    layout: chat.Layout,
    template: str,
    max_tokens: int,
    truncation: str,
    field: str,
) -> tuple[list[PreferencePair], list[str]]:
    """Tokenises pairs as `encoded.encode_all` does examples; `field` is for messages.

    Returns:
        The pairs in order, and the ids of those left out: a side has nothing to score within
        `max_tokens`, or both are the same once they are cut.
    """
    sides = (f"{field}: the {name} side of pair" for name in SIDES)
    chosen, rejected = (
        {
            row.example_id: row
            for row in encoded.encode_all(side, layout, template, max_tokens, truncation, where)[0]
        }
        for where, side in zip(sides, zip(*pairs, strict=True), strict=True)
    )
    made, dropped = [], []
    for id_ in (pair[0].example_id for pair in pairs):
        both = [side[id_] for side in (chosen, rejected) if id_ in side]
        if len(both) == 2 and both[0].input_ids.tolist() != both[1].input_ids.tolist():
            made.append(PreferencePair(id_, *both))
        else:
            dropped.append(id_)
    return made, dropped


def _from_row(row, where, position):
    place = layouts.Place(where, example_lib.row_id(row, where, position), "")
    # Whole chats, or one message.
    parts = {
        name: [value] if isinstance(value, dict) and {"role", "from"} & value.keys() else value
        for name in (*ASKED, *SIDES)
        if (value := row.get(name)) is not None
    }
    if any(isinstance(value, list) for value in parts.values()):
        chosen, rejected = _from_messages(row, parts, place)
    else:
        if "question" not in row and "prompt" in row:
            row = {**row, "question": row["prompt"]}
        chosen, rejected = (_side(row, name, place) for name in SIDES)
    if all(getattr(chosen, k) == getattr(rejected, k) for k in ("reasoning", "answer")):
        raise errors.UserError(f"{where}: chosen and rejected are the same.")
    return chosen, rejected


def _side(row, name, place):
    """Makes one side an example of the row's question; it may be a text or an object."""
    columns = {"question": "question", "answer": name}
    side, where = row.get(name), place.where
    # A side answers for itself: which option is right says nothing about the other one.
    asked = {k: row[k] for k in row if k not in ("answer_idx", "input_ids")}
    if isinstance(side, dict):
        columns = {"question": "question", "reasoning": "reasoning", "answer": "answer"}
        kept = {k: asked[k] for k in ("question", "options") if k in asked}
        asked, where = {**side, **kept}, f"{where}: {name}"
    return example_lib.from_row(asked, where, place.example_id, "", columns)


def _from_messages(row, parts, place):
    """Makes both sides of lists of messages, after those of the prompt where there is one."""
    given = next((name for name in ASKED if parts.get(name)), None)
    asked = _messages(parts, given, "user", place) if given else []
    sides = []
    for name in SIDES:
        said = _messages(parts, name, "assistant", place)
        if asked and said[: len(asked)] != asked:
            if len(said) > 1:
                raise _different(place)
            said = asked + said
        sides.append(layouts.from_messages(said, row, place, name))
    if any(getattr(sides[0], k) != getattr(sides[1], k) for k in ("question", "context")):
        raise _different(place)
    return sides


def _messages(parts, name, role, place):
    where = f"{place.where}: {name}"
    return layouts.read_messages(layouts.as_messages(parts.get(name), role, where), where)


def _different(place):
    return errors.UserError(
        f"{place.where}: chosen and rejected must answer the same messages (and the prompt, where "
        "there is one)."
    )
