"""What passes from file to model: an Example is text, an Encoded is token ids with a loss mask.

The three `from_*` functions turn a row into an Example. For a row that does not hold what it must
they raise UserError, which begins with `where`, the place that the row came from.
"""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax.common import errors

IGNORED = -100  # a label that is not scored, as in transformers


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a pool, a target set or a test set.

    Multiple-choice examples have `options` (letter -> text) and `answer_idx` (a letter); their
    `answer` is the text of the right option. Pre-tokenised examples have `input_ids` and `labels`;
    their texts are "".
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


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids (T,) int32 and labels (T,) int32, `IGNORED` where not scored.

    labels[t] is the token at t: position t predicts labels[t + 1], so labels[0] is never scored.
    """

    example_id: str
    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def answer_tokens(self) -> int:
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


def from_text(row: dict, where: str, example_id: str, task: str, columns: Mapping) -> Example:
    """An example of the mapped columns question, answer and, which may be empty, reasoning."""
    return Example(
        example_id,
        question=_text(row, columns["question"], where),
        reasoning=_text(row, columns.get("reasoning", ""), where, required=False),
        answer=_text(row, columns["answer"], where),
        row=row,
        task=task,
    )


def from_choices(row: dict, where: str, example_id: str, task: str) -> Example:
    """A question with options {letter: text}, or a list that is lettered from A, and answer_idx."""
    options = row.get("options")
    if isinstance(options, list):
        options = dict(zip(string.ascii_uppercase, options, strict=False))
    if not isinstance(options, dict):
        got = repr(options) if "options" in row else f"columns {', '.join(row)}"
        raise errors.UserError(
            f"{where}: options must be an object {{A: ...}} or a list; got {got}."
        )
    # Parquet gives every row of a struct column the same letters, None where a row lacks one.
    options = {letter: text for letter, text in options.items() if text is not None}
    if len(options) < 2:
        raise errors.UserError(f"{where}: options must be two or more, got {len(options)}.")
    for letter, text in options.items():
        if not isinstance(text, str) or not text.strip():
            raise errors.UserError(f"{where}: option {letter} must be a text, got {text!r}.")
    answer_idx = row.get("answer_idx")
    if answer_idx not in list(options):
        raise errors.UserError(
            f"{where}: answer_idx must be one of {', '.join(options)}; got {answer_idx!r}."
        )
    return Example(
        example_id,
        question=_text(row, "question", where),
        reasoning=_text(row, "reasoning", where, required=False),
        answer=options[answer_idx],
        row=row,
        task=task,
        options=options,
        answer_idx=answer_idx,
    )


def from_tokens(row: dict, where: str, example_id: str, task: str) -> Example:
    """Token ids and labels as they are; at least one label after the first is scored."""
    for name in ("input_ids", "labels"):
        value = row.get(name)
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise errors.UserError(f"{where}: {name} must be a list of whole numbers.")
    input_ids, labels = row["input_ids"], row["labels"]
    if len(input_ids) != len(labels):
        raise errors.UserError(
            f"{where}: labels must be as long as input_ids; got {len(labels)} and {len(input_ids)}."
        )
    # Whether the vocabulary has such a token is for the caller to say, who has the model.
    if not all(0 <= t < 2**31 for t in (*input_ids, *(t for t in labels if t != IGNORED))):
        raise errors.UserError(
            f"{where}: a token must be in [0, 2**31), a label that or {IGNORED} (not scored)."
        )
    if all(t == IGNORED for t in labels[1:]):
        raise errors.UserError(
            f"{where}: labels must score a token after the first; all are {IGNORED}."
        )
    return Example(
        example_id, "", "", "", row, task, input_ids=tuple(input_ids), labels=tuple(labels)
    )


def draw(rows: Sequence, count: int, seed: int) -> list[int]:
    """Indices of `count` rows, or all if there are fewer, drawn over the order of their
    example_ids: the order of the file does not matter.
    """
    by_id = sorted(range(len(rows)), key=lambda i: rows[i].example_id)
    rng = np.random.Generator(np.random.PCG64(seed))
    return sorted(by_id[i] for i in rng.permutation(len(rows))[:count])


def row_id(row: dict, where: str, position: int, column: str = "id") -> str:
    """The row's id as a text; "row-000017" for a row without one at position 17."""
    value = row.get(column)
    if value is None or value == "":
        return f"row-{position:06d}"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise errors.UserError(
            f"{where}: {column} must be a text or a whole number; got {value!r}."
        )
    return str(value)


def _text(row: dict, columns: str, where: str, required: bool = True) -> str:
    """The text of a column, or of "a+b" joined by a blank line; the first may be required."""
    parts = []
    for column in columns.split("+"):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise errors.UserError(f"{where}: {column} must be a text, got {value!r}.")
        if required and not parts and not (value or "").strip():
            near = errors.nearest(column, [name for name in row if name != column])
            problem = "is empty" if column in row else f"is missing from columns {', '.join(row)}"
            raise errors.UserError(f"{where}: {column} {problem}.{near}")
        parts.append(value or "")
    return "\n\n".join(part for part in parts if part.strip())
