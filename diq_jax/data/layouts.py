"""How rows name what they hold: the one table of layouts, and which of them a source has.

A layout is told by its columns (`recognise`), unless data.columns names one of `LAYOUTS` or maps
columns itself. The column names of public data sets are those of their cards, or of loaders that
read them.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from diq_jax import errors
from diq_jax.data import example as example_lib
from diq_jax.run import reading

# "<think> .. </think> answer": the opening tag is missing where the prompt has it.
THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
CUT_OFF = re.compile(r"\s*<think>(.*)()", re.DOTALL)
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
# What a user's own columns are likely called, to write a mapping that can be pasted.
LIKELY = {
    "question": ("question", "prompt", "instruction", "query", "problem", "input", "text"),
    "reasoning": ("reasoning", "cot", "complex_cot", "rationale", "thinking", "explanation"),
    "answer": ("answer", "response", "output", "completion", "solution", "target", "label"),
}
REPEATED_ROWS = 20  # fewer rows do not show that a column is no question


class Place(NamedTuple):
    """Says where a row stands, for messages, and its example's id and task."""

    where: str
    example_id: str
    task: str


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Describes one way of naming columns.

    Attributes:
        needs: the columns that tell the layout; "a|b" is any of them.
        read: (row, place) -> the example.
        id_column: where the row's id is.
        columns: all that are read, where each stands for one of our names.
    """

    needs: tuple[str, ...]
    read: Callable[[dict, Place], example_lib.Example]
    id_column: str = "id"
    columns: tuple[str, ...] = ()

    def fits(self, known: Iterable[str]) -> bool:
        """Returns whether rows with these columns may have the layout."""
        return all(set(need.split("|")) & set(known) for need in self.needs)

    def lacks(self, known: Iterable[str]) -> list[str]:
        """Returns which of the needed columns are not there."""
        return [need for need in self.needs if not set(need.split("|")) & set(known)]


def mapped(columns: Mapping[str, str], needs: Sequence[str] = ()) -> RowLayout:
    """Makes a layout of columns by our names; "a+b" joins two columns by a blank line."""

    def read(row, place):
        return example_lib.from_row(row, place.where, place.example_id, place.task, columns)

    told = [columns[name] for name in ("question", "answer")]
    return RowLayout(
        tuple(needs) or tuple("+".join(told).split("+")),
        read,
        columns.get("id", "id"),
        tuple("+".join(columns.values()).split("+")),
    )


def split_thought(text: str) -> tuple[str, str]:
    """Splits an answer into its reasoning, inside <think> and </think>, and what follows.

    Nothing follows where the reasoning was cut off before its end.
    """
    found = THOUGHT.fullmatch(text) or CUT_OFF.fullmatch(text)
    return (found[1].strip(), found[2].strip()) if found else ("", text)


def from_messages(
    messages: Any, row: dict, place: Place, what: str = "messages"
) -> example_lib.Example:
    """Makes an example of a conversation that ends with an answer of the assistant.

    The answer is split from its reasoning: the message's `reasoning_content` (or `reasoning`), or
    what stands between <think> and </think>. What precedes the last question is its context.

    Raises:
        UserError: no list of messages; a role, or content, that is none; or it does not end with a
            question and its answer.
    """
    said = read_messages(messages, f"{place.where}: {what}")
    roles = [message["role"] for message in said]
    if roles[-2:] != ["user", "assistant"]:
        got = ", ".join(roles[-3:]) or "none"
        raise errors.UserError(
            f"{place.where}: {what} must end with a message of the user and the assistant's answer "
            f"to it; the last are {got}."
        )
    *context, question, answer = said
    _check_text(question["content"], f"{place.where}: {what}: the last question")
    _check_text(answer["content"], f"{place.where}: {what}: the answer after its reasoning")
    return example_lib.Example(
        place.example_id,
        question["content"],
        answer.get("reasoning", ""),
        answer["content"],
        row,
        place.task,
        context=tuple(context),
    )


def read_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Reads a list of messages as {role, content[, reasoning]}, by any of the usual names.

    Raises:
        UserError: it is no list, or a message is not as it must be.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = reading.parse_json(messages, where)  # CSV holds texts only
    errors.check(where, isinstance(messages, list) and messages, "a list of messages", messages)
    return [_message(message, f"{where}: message {i}") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    role, content = MESSAGE_KEYS[isinstance(message, dict) and "from" in message]
    if isinstance(message, dict) and isinstance(parts := message.get(content), list):
        message = message | {content: _joined(parts, where)}
    reading.check_record(message, where, {role: str, content: str})
    named = ROLES.get(message[role].strip().lower())
    known = named is not None
    errors.check(f"{where}: {role}", known, "system, user or assistant", message[role])
    made = {"role": named, "content": message[content]}
    if named != "assistant":
        return made
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    errors.check(f"{where}: its reasoning", isinstance(thought, str), "a text", thought)
    inside, answer = split_thought(message[content])
    return made | {"content": answer, "reasoning": thought or inside}


def _joined(parts: list, where: str) -> str:
    """Joins content that is a list of parts, each a text."""
    for part in parts:
        ok = isinstance(part, dict) and isinstance(part.get("text"), str)
        errors.check(f"{where}: its parts", ok, "texts {type: text, text: ...}", part)
    return "\n".join(part["text"] for part in parts)


def _chat(column: str) -> RowLayout:
    return RowLayout(
        (column,), lambda row, place: from_messages(row.get(column), row, place, column)
    )


def _completed(row: dict, place: Place) -> example_lib.Example:
    """Reads prompt and completion, each a text or a list of messages."""
    said = [
        message
        for name, role in (("prompt", "user"), ("completion", "assistant"))
        for message in as_messages(row.get(name), role, f"{place.where}: {name}")
    ]
    return from_messages(said, row, place, "prompt and completion")


def as_messages(value: Any, role: str, where: str) -> list:
    """Returns a text as one message of `role`, and a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return value
    raise errors.UserError(
        f"{where} must be a text or a list of messages; got {reading.shorten(value)}."
    )


def _instructed(row: dict, place: Place) -> example_lib.Example:
    """Reads Alpaca's instruction, input (which may be empty) and output."""
    columns = {"question": "instruction+input", "answer": "output"}
    made = example_lib.from_row(row, place.where, place.example_id, place.task, columns)
    reasoning, answer = split_thought(made.answer)
    _check_text(answer, f"{place.where}: output after its reasoning")
    return dataclasses.replace(made, reasoning=reasoning, answer=answer)


def _check_text(value: str, where: str) -> None:
    if not value.strip():
        raise errors.UserError(f"{where} is empty.")


# In the order in which they are tried.
LAYOUTS: dict[str, RowLayout] = {
    "tokens": mapped(example_lib.CONTRACT, ("input_ids",)),  # and labels (example.from_row)
    # Our own names; rows of choices too.
    "ours": mapped(example_lib.CONTRACT, ("question", "answer|answer_idx|options|choices|opa")),
    # FreedomIntelligence/medical-o1-reasoning-SFT: as in data/demo_data.json of its repository.
    "huatuo": mapped({"question": "Question", "reasoning": "Complex_CoT", "answer": "Response"}),
    # FreedomIntelligence/Medical-R1-Distill-Data: the names that public loaders found in it.
    "r1_distill": mapped(
        {
            "question": "question",
            "reasoning": "reasoning (reasoning_content)",
            "answer": "response (content)",
        }
    ),
    # UCSC-VLAA/m23k-tokenized: the names that its authors' tokenising script reads.
    "m23k": mapped(
        {"question": "prompt", "reasoning": "reasoning", "answer": "distilled_answer_string"}
    ),
    # UCSC-VLAA/MedReason: the names that several public loaders read. The options are a text of
    # their own, and without them "which of the following" asks nothing.
    "medreason": mapped(
        {"question": "question+options", "reasoning": "reasoning", "answer": "answer"},
        ("question", "options", "reasoning", "answer"),
    ),
    # OpenMed/Medical-Reasoning-SFT-* (reasoning_content), Intelligent-Internet's
    # II-Medical-Reasoning-SFT (<think> in the content, several turns), and what TRL trains on.
    "messages": _chat("messages"),
    "conversations": _chat("conversations"),  # ShareGPT
    "prompt_completion": RowLayout(("prompt", "completion"), _completed),
    # Alpaca; also lingshu-medical-mllm/ReasonMed and lavita/ChatDoctor-HealthCareMagic-100k.
    "alpaca": RowLayout(("instruction", "output"), _instructed),
    # hongzhouyu/FineMed-SFT: the names that public loaders read. It has no column of reasoning.
    "finemed": mapped({"question": "instruction", "answer": "response"}),
}
OURS = LAYOUTS["ours"]


def named(columns: str) -> RowLayout | None:
    """Returns the layout that data.columns asks for; None where rows are to be recognised.

    Raises:
        UserError: neither empty, nor a name of `LAYOUTS`, nor a mapping.
    """
    if not columns or columns in LAYOUTS:
        return LAYOUTS.get(columns)
    pairs = [[text.strip() for text in part.partition("=")] for part in columns.split(",")]
    mapping = {name: column for name, _, column in pairs}
    if "=" not in columns or not all(mapping.values()):
        raise errors.UserError(
            f"data.columns must be empty, one of {', '.join(LAYOUTS)}, or like "
            f"question=Q,reasoning=R,answer=A; got {columns!r}.{errors.nearest(columns, LAYOUTS)}"
        )
    for name in mapping:
        errors.check_choice("data.columns: the name before =", name, example_lib.CONTRACT)
    for name in ("question", "answer"):
        if name not in mapping:
            raise errors.UserError(f"data.columns must map {name} too; got {columns!r}.")
    return mapped(mapping)


def recognise(
    rows: Sequence[dict], where: str, flag: str = "--config.data.columns"
) -> tuple[str, RowLayout]:
    """Finds the layout of a source by the columns of its first rows; `flag` takes a mapping.

    Raises:
        UserError: none fits; the nearest is named, and a flag that can be pasted.
    """
    known = list(dict.fromkeys(name for row in rows for name, v in row.items() if v is not None))
    for name, layout in LAYOUTS.items():
        if layout.fits(known):
            found = "medreason" if name == "ours" and _has_lettered_text(rows, known) else name
            return found, LAYOUTS[found]
    lacks = {name: layout.lacks(known) for name, layout in LAYOUTS.items()}
    nearest = min(LAYOUTS, key=lambda name: len(lacks[name]) / len(LAYOUTS[name].needs))
    told = " and ".join(need.replace("|", " or ") for need in lacks[nearest])
    near = len(lacks[nearest]) < len(LAYOUTS[nearest].needs)
    hint = f"; the nearest is {nearest}, but for {told}" if near else f" ({', '.join(LAYOUTS)})"
    raise errors.UserError(
        f"{where}: the rows have the columns {', '.join(known) or '(none)'}, which are no layout "
        f"that is known{hint}. Say which hold the question and the answer, such as "
        f"{flag}={_guess(known)}"
    )


def concerns(layout: RowLayout, rows: Sequence[dict], where: str) -> bool:
    """Returns whether a source is of the layout that data.columns asks for.

    It is not where it has none of the columns for question and answer: pool, targets and tests may
    be of several layouts.

    Raises:
        UserError: it has one of these, and lacks a column of the layout: a typo.
    """
    known = {column for row in rows for column in row}
    if "input_ids" in known:
        return True
    if len(layout.lacks(known)) == len(layout.needs):
        return False
    for column in () if layout is OURS else layout.columns or layout.lacks(known):
        if column not in known:
            raise errors.UserError(
                f"data.columns names the column {column!r}, but the rows from {where} on have "
                f"{', '.join(sorted(known))}.{errors.nearest(column, known)}"
            )
    return True


def check_questions(examples: Sequence[example_lib.Example], where: str) -> None:
    """Refuses a column of questions that says the same in most rows: an instruction."""
    asked = [
        (e.question, *(m["content"] for m in e.context), *(e.options or {}).values())
        for e in examples
        if e.input_ids is None
    ]
    if len(asked) < REPEATED_ROWS:
        return
    [(most, count)] = collections.Counter(asked).most_common(1)
    if count > len(asked) / 2:
        raise errors.UserError(
            f"{where}: the question is the same in {count:,} of the first {len(asked):,} rows, "
            f"{reading.shorten(most[0])}: that is an instruction. Name the column that holds the "
            "question: --config.data.columns=question=A,answer=B, or question=A+B for two columns."
        )


def _has_lettered_text(rows: Sequence[dict], known: Sequence[str]) -> bool:
    """Whether the options of rows by our names are one text, as MedReason has them."""
    texts = [row["options"] for row in rows if isinstance(row.get("options"), str)]
    texts = [text.lstrip() for text in texts if text.strip()]
    return LAYOUTS["medreason"].fits(known) and bool(texts) and texts[0][0] not in "{["


def _guess(known: Sequence[str]) -> str:
    """Writes the mapping that the names of columns suggest."""
    left, made = {name.lower(): name for name in known}, {}
    for ours, names in LIKELY.items():
        column = next((left.pop(name) for name in names if name in left), None)
        if column or ours != "reasoning":
            made[ours] = column or f"{ours.upper()}_COLUMN"
    return ",".join(f"{ours}={column}" for ours, column in made.items())
