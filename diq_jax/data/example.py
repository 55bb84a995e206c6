"""What passes from file to model: an Example is text, an Encoded is token ids with a loss mask.

The `from_*` functions turn a row into an Example. For a row that does not hold what it must they
raise UserError, which begins with `where`, the place that the row came from.
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.run import reading

IGNORED = -100  # a label that is not scored, as in transformers
CONTRACT = {name: name for name in ("id", "question", "reasoning", "answer")}
# An answer such as "2" or "(B)" points at an option; it is no answer in words of its own.
LABEL = re.compile(r"\W*([A-Za-z]|\d{1,2})\W*")
OPTIONS = ("options", "choices", *(f"op{letter}" for letter in "abcdefghij"))  # columns
FILLERS = ("", "n/a")  # at the end of options, casefolded: MMLU-Pro fills its lists up to ten


@dataclasses.dataclass(frozen=True)
class Example:
    """Holds one row of a pool, a target set or a test set.

    Multiple-choice examples have `options` (letter -> text). Their `answer_idx` is the right letter
    and their `answer` the text of that option, unless the row answers in words of its own.
    Pre-tokenised examples have `input_ids` and `labels`; their texts are "". In a conversation
    `context` holds what stands before the question, {role, content} and an answer's `reasoning`.
    """

    example_id: str
    question: str
    reasoning: str
    answer: str
    row: dict[str, Any]  # as it came, under the original column names
    task: str = ""
    options: dict[str, str] | None = None
    answer_idx: str = ""
    input_ids: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    context: tuple[Mapping[str, str], ...] = ()
    every_turn: bool = False  # whether the answers in `context` are scored too


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Holds token ids (T,) int32 and labels (T,) int32, `IGNORED` where not scored.

    labels[t] is the token at t: position t predicts labels[t + 1], so labels[0] is never scored.
    """

    example_id: str
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def answer_tokens(self) -> int:
        """Returns how many tokens have a label, the first aside, which nothing predicts."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


def from_row(row: dict, where: str, example_id: str, task: str, columns: Mapping) -> Example:
    """Makes an example of token ids, of choices, or of texts, by what the row has."""
    if row.get("input_ids") is not None:
        return from_tokens(row, where, example_id, task)
    mapped = "+".join(columns.values()).split("+")  # such as question=question+options
    if has_options(row) and not {*mapped} & {*OPTIONS}:
        return from_choices(row, where, example_id, task, columns)
    return from_text(row, where, example_id, task, columns)


def from_text(row: dict, where: str, example_id: str, task: str, columns: Mapping) -> Example:
    """Makes an example of the mapped columns question, answer and reasoning, which may be empty."""
    return Example(
        example_id,
        question=_text(row, columns["question"], where),
        reasoning=_text(row, columns.get("reasoning", ""), where, required=False),
        answer=_text(row, columns["answer"], where),
        row=row,
        task=task,
    )


def from_choices(
    row: dict, where: str, example_id: str, task: str, columns: Mapping = CONTRACT
) -> Example:
    """Makes an example of a row with options {letter: text}, or a list that is lettered from A.

    The right one is `answer_idx`, a letter, or else what the answer's column names: a letter or the
    text of one option. An answer in words of its own is kept as it is.
    """
    options = lettered(options_of(row), where)
    letter, told = row.get("answer_idx"), row.get(columns["answer"])
    if letter is None:
        told = _text(row, columns["answer"], where)
    else:
        known = letter in list(options)
        errors.check(f"{where}: answer_idx", known, f"one of {', '.join(options)}", letter)
    named = _named(options, told)
    if len(named) > 1 if letter is None else named and letter not in named:
        raise errors.UserError(
            f"{where}: {columns['answer']} is {reading.shorten(told)}, option "
            f"{' and option '.join(named)}; answer_idx must be the letter of the right one, got "
            f"{letter!r}."
        )
    letter = letter or "".join(named)
    in_own_words = told if isinstance(told, str) and told.strip() and not named else ""
    if in_own_words and LABEL.fullmatch(in_own_words):
        raise errors.UserError(
            f"{where}: {columns['answer']} is {reading.shorten(told)}, which is none of "
            f"the options {', '.join(options)}; give the right one's letter (answer_idx) or text."
        )
    return Example(
        example_id,
        question=_text(row, columns["question"], where),
        reasoning=_text(row, columns.get("reasoning", ""), where, required=False),
        answer=in_own_words or options[letter],
        row=row,
        task=task,
        options=options,
        answer_idx=letter,
    )


def has_options(row: Mapping[str, Any]) -> bool:
    """Returns whether a row is multiple choice."""
    options = options_of(row)
    return bool(options.strip() if isinstance(options, str) else options)


def options_of(row: Mapping[str, Any]) -> Any:
    """Returns a row's options: of options, choices (list, object, ARC's) or opa, ..; or None."""
    for name in ("options", "choices"):
        options = row.get(name)
        if isinstance(options, dict) and options.keys() == {"text", "label"}:
            texts, labels = options["text"], options["label"]
            if isinstance(texts, list) and labels == [*string.ascii_uppercase[: len(texts)]]:
                options = texts
        if options not in (None, "", [], {}):
            return options
    return {name[-1].upper(): row[name] for name in OPTIONS[2:] if row.get(name)} or None


def lettered(options: Any, where: str) -> dict[str, str]:
    """Reads the options {letter: text} of a row, without the fillers at their end.

    Args:
        options: an object or a list, also as JSON in a text, since CSV holds texts only.

    Raises:
        UserError: neither an object nor a list, fewer than two or more than 26, or one is no text.
    """
    hint = ""
    if isinstance(options, str):
        hint = " A text is read by data.columns=question=question+options,answer=answer."
        if options.lstrip()[:1] in ("{", "["):
            options = reading.parse_json(options, f"{where}: options")
    if isinstance(options, list):
        names = [*string.ascii_uppercase, *range(len(string.ascii_uppercase), len(options))]
        options = dict(zip(names, options, strict=False))
    if not isinstance(options, dict):
        raise errors.UserError(
            f"{where}: options must be an object {{A: ...}} or a list; got "
            f"{reading.shorten(options)}.{hint}"
        )
    # Parquet gives every row of a struct column the same letters, None where a row lacks one.
    options = {letter: text for letter, text in options.items() if text is not None}
    while options and _is_filler(options[last := next(reversed(options))]):
        del options[last]
    some = 2 <= len(options) <= len(string.ascii_uppercase)
    expected = f"two to {len(string.ascii_uppercase)}, a letter each"
    errors.check(f"{where}: options", some, expected, len(options))
    for letter, text in options.items():
        if len(letter) != 1 or not letter.isalnum():
            raise errors.UserError(
                f"{where}: an option must be named by one letter, got {reading.shorten(letter)}."
            )
        if type(text) is not str or not text.strip():
            raise errors.UserError(
                f"{where}: option {letter} must be a text, got {reading.shorten(text)}."
            )
    return options


def from_tokens(row: dict, where: str, example_id: str, task: str) -> Example:
    """Makes an example of token ids and labels, without the padding that `attention_mask` marks.

    At least one label after the first is scored.
    """
    names = ["input_ids", "labels"]
    names += [name for name in ("attention_mask", "position_ids") if row.get(name) is not None]
    for name in names:
        value = row.get(name)
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise errors.UserError(f"{where}: {name} must be a list of whole numbers.")
        if len(value) != len(row["input_ids"]):
            raise errors.UserError(
                f"{where}: {name} must be as long as input_ids; got {len(value)} and "
                f"{len(row['input_ids'])}."
            )
    real = _unpadded(row, where)
    input_ids, labels = row["input_ids"][real], row["labels"][real]
    # Whether the vocabulary has such a token is for the caller to say, who has the model.
    if not all(0 <= t < 2**31 for t in (*input_ids, *(t for t in labels if t != IGNORED))):
        raise errors.UserError(
            f"{where}: a token must be in [0, 2**31), a label that or {IGNORED} (not scored)."
        )
    if all(t == IGNORED for t in labels[1:]):
        raise errors.UserError(
            f"{where}: labels must score a token after the first; all are {IGNORED}."
        )
    _check_labels(input_ids, labels, where)
    return Example(
        example_id, "", "", "", row, task, input_ids=tuple(input_ids), labels=tuple(labels)
    )


def draw(rows: Sequence, count: int, seed: int) -> list[int]:
    """Draws indices of `count` rows, or all if there are fewer, whatever the order of the file."""
    by_id = sorted(range(len(rows)), key=lambda i: rows[i].example_id)
    rng = np.random.Generator(np.random.PCG64(seed))
    return sorted(by_id[i] for i in rng.permutation(len(rows))[:count])


def row_id(row: dict, where: str, position: int, column: str = "id") -> str:
    """Returns the row's id as a text, "row-000017" for a row without one at position 17."""
    value = row.get(column)
    if value is None or value == "":
        return f"row-{position:06d}"
    ok = isinstance(value, str | int) and not isinstance(value, bool)
    errors.check(f"{where}: {column}", ok, "a text or a whole number", value)
    return str(value)


def _text(row: dict, columns: str, where: str, required: bool = True) -> str:
    """Reads the text of a column, or of "a+b" joined by a blank line; the first may be required."""
    parts = []
    for column in columns.split("+"):
        value = row.get(column)
        if value is not None and type(value) is not str:  # no reading.Base64 either
            raise errors.UserError(
                f"{where}: {column} must be a text, got {reading.shorten(value)}."
            )
        if required and not parts and not (value or "").strip():
            near = errors.nearest(column, [name for name in row if name != column])
            problem = "is empty" if column in row else f"is missing from columns {', '.join(row)}"
            raise errors.UserError(f"{where}: {column} {problem}.{near}")
        parts.append(value or "")
    return "\n\n".join(part for part in parts if part.strip())


def ask(question: str, options: Mapping[str, str] | None) -> str:
    """Writes the question, with a line "A. text" for each option of a multiple-choice one."""
    if options is None:
        return question
    return question + "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in options.items())


def _named(options: Mapping[str, str], told: Any) -> list[str]:
    """Returns the letters of the options that an answer names by letter, by text, or by both."""
    words = told.strip().casefold() if isinstance(told, str) else ""
    return [
        letter
        for letter, text in options.items()
        if words
        in (name.casefold() for name in (letter, text.strip(), f"{letter}. {text.strip()}"))
    ]


def _is_filler(text: Any) -> bool:
    return isinstance(text, str) and text.strip().casefold() in FILLERS


def _unpadded(row: dict, where: str) -> slice:
    """Returns which positions of a pre-tokenised row are no padding."""
    mask = row.get("attention_mask")
    if mask is None:
        mask = [1] * len(row["input_ids"])
    start, length = (mask.index(1) if 1 in mask else 0), mask.count(1)
    real = slice(start, start + length)
    if not set(mask) <= {0, 1} or not all(mask[real]):
        raise errors.UserError(
            f"{where}: attention_mask must be ones in one piece, with zeros before or after it."
        )
    positions = row.get("position_ids")
    if positions is not None and positions[real] != list(range(length)):
        raise errors.UserError(
            f"{where}: position_ids must count the tokens from 0: a row holds one example, not "
            "several packed ones."
        )
    return real


def _check_labels(input_ids: list[int], labels: list[int], where: str) -> None:
    scored = [t for t, label in enumerate(labels) if label != IGNORED]
    wrong = next((t for t in scored if labels[t] != input_ids[t]), None)
    if wrong is None:
        return
    following = [*input_ids[1:], None]
    if all(labels[t] == following[t] for t in scored if t + 1 < len(labels)):
        raise errors.UserError(
            f"{where}: labels are shifted already (each is the token after its place); give them "
            f"as input_ids has the tokens, with {IGNORED} where none is scored."
        )
    raise errors.UserError(
        f"{where}: labels must be the tokens of input_ids, or {IGNORED} where they are not scored; "
        f"at place {wrong} they are {labels[wrong]} and {input_ids[wrong]}."
    )
