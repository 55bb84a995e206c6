"""Preference rows: a question, the completion that is preferred, and one that is not."""

import dataclasses
from collections.abc import Sequence

from diq_jax import errors
from diq_jax.data import chat, encoded, sources
from diq_jax.data import example as example_lib
from diq_jax.run import reading

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, eq=False)
class PreferencePair:
    """Both completions of one question, tokenised."""

    example_id: str
    chosen: example_lib.Encoded
    rejected: example_lib.Encoded

    @property
    def sides(self) -> tuple[example_lib.Encoded, example_lib.Encoded]:
        return self.chosen, self.rejected

    @property
    def tokens(self) -> int:
        return sum(len(side.input_ids) for side in self.sides)

    @property
    def longer(self) -> example_lib.Encoded:
        """Returns the side whose shape both fit, under the pair's id, by which steps are
        planned.
        """
        side = max(self.sides, key=lambda side: (len(side.input_ids), side.answer_tokens))
        return dataclasses.replace(side, example_id=self.example_id)


def load_preferences(
    spec: str, limit: int, field: str
) -> list[tuple[example_lib.Example, example_lib.Example]]:
    """Loads (chosen, rejected) examples: the first `limit` rows, or all for 0.

    A row has id, question (or prompt), chosen and rejected; each of the two is a text, or an object
    with `answer` and, which may be empty, `reasoning`; or both are lists of messages that end with
    the assistant's and share what stands before it, one message of the user. `options` belong to
    the question.

    Raises:
        UserError: naming `field`, the file and the line, where a row is not like that, prefers a
            completion to itself, or repeats an id.
    """
    rows = sources.read_rows(spec, field)[: limit or None]
    pairs = [
        _from_row(row, f"{field}: {where}", position) for position, (row, where) in enumerate(rows)
    ]
    sources.check_ids([chosen for chosen, _ in pairs], [where for _, where in rows], spec, field)
    return pairs


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
        pair = (
            PreferencePair(id_, chosen[id_], rejected[id_])
            if id_ in chosen and id_ in rejected
            else None
        )
        if pair is None or _same(*pair.sides):
            dropped.append(id_)
        else:
            made.append(pair)
    return made, dropped


def _same(left, right):
    return left.input_ids.tolist() == right.input_ids.tolist()


def _from_row(row, where, position):
    example_id = example_lib.row_id(row, where, position)
    if any(isinstance(row.get(name), list) for name in SIDES):
        row = _from_messages(row, where)
    elif "question" not in row and "prompt" in row:
        row = {**row, "question": row["prompt"]}
    sides = [_side(row, name, where, example_id) for name in SIDES]
    if all(getattr(sides[0], k) == getattr(sides[1], k) for k in ("reasoning", "answer")):
        raise errors.UserError(f"{where}: chosen and rejected are the same.")
    return tuple(sides)


def _side(row, name, where, example_id):
    """Makes one side an example of the row's question; it may be a text or an object."""
    columns = {"question": "question", "answer": name}
    side = row.get(name)
    # A side answers for itself: which option is right says nothing about the other one.
    asked = {k: row[k] for k in row if k not in ("answer_idx", "input_ids")}
    if isinstance(side, dict):
        columns = {"question": "question", "reasoning": "reasoning", "answer": "answer"}
        kept = {k: asked[k] for k in ("question", "options") if k in asked}
        asked, where = {**side, **kept}, f"{where}: {name}"
    return example_lib.from_row(asked, where, example_id, "", columns)


def _from_messages(row, where):
    """Returns the row with a question and two objects instead of messages."""
    made, contexts = dict(row), []
    given = row.get("prompt") or row.get("question")
    if given is not None:
        asked = [{"role": "user", "content": given}] if isinstance(given, str) else given
        contexts.append(_messages(asked, f"{where}: prompt"))
    for name in SIDES:
        *before, (role, text) = _messages(row.get(name), f"{where}: {name}")
        if role != "assistant":
            raise errors.UserError(
                f"{where}: {name} must end with a message of the assistant; got one of {role}."
            )
        contexts += [before] if before else []
        made[name] = {"answer": text, "reasoning": row[name][-1].get("reasoning_content")}
    if not contexts or any(context != contexts[0] for context in contexts):
        raise errors.UserError(
            f"{where}: chosen and rejected must answer the same messages (and the prompt, where "
            "there is one)."
        )
    roles = [role for role, _ in contexts[0]]
    if roles != ["user"]:
        raise errors.UserError(
            f"{where}: one message of the user must stand before the answer; got "
            f"{', '.join(roles)}."
        )
    return {**made, "question": contexts[0][0][1]}


def _messages(value, where) -> list[tuple[str, str]]:
    """Returns (role, content) of each message."""
    if not isinstance(value, list) or not value:
        raise errors.UserError(
            f"{where} must be a list of messages, as the other side is; got "
            f"{reading.shorten(value)}."
        )
    for i, message in enumerate(value):
        reading.check_record(message, f"{where} message {i}", {"role": str, "content": str})
    return [(message["role"], message["content"]) for message in value]
