"""Where difficulty comes from (config difficulty.source): columns of the pool, or labelled rows.

The encoder reads the question alone. The rubric judges the question, and a reasoning that is wrong
or short would leak its flaw and its length into the score. Measured on the sample (5 folds, ridge
on MiniLM's fourth layer), reasoning and answer add nothing: Spearman with `overall` is 0.64 for the
question, 0.64 with the answer, 0.67 with both, on 160 rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config, errors
from diq_jax.data import example, sources
from diq_jax.run import reading

FIELD = "difficulty.source"
LEVELS = 5
COLUMNS = {p: f"difficulty_{p}" for p in config.PERSPECTIVES}
P_CORRECT = "p_correct"


def is_columns(source: str) -> bool:
    """Tells whether the scores are columns of the pool, so that nothing is trained."""
    return source.partition(":")[0] == "columns"


def column_scores(
    rows: Sequence[Mapping[str, Any]], ids: Sequence[str], source: str, needed: str
) -> dict[str, np.ndarray]:
    """Reads scores that stand in the pool's rows: {perspective: (n,) float32 in [1, 5]}.

    Args:
        rows: the pool's rows as they came; ids: theirs, for messages.
        source: `columns` (those of difficulty_knowledge, difficulty_reasoning, difficulty_overall
            that any row has) or `columns:knowledge=A,overall=B` (each must be there).
        needed: the perspective that selection uses. Another may be left out: it is nan throughout.

    Raises:
        UserError: a wrong mapping, a missing column, a value that is no number in [1, 5].
    """
    mapping = column_names(source, needed)
    if mapping is COLUMNS:
        known = {name for row in rows for name in row}
        mapping = {p: c for p, c in COLUMNS.items() if c in known or p == needed}
    scores = {p: np.full(len(rows), np.nan, np.float32) for p in config.PERSPECTIVES}
    for i, (row, example_id) in enumerate(zip(rows, ids, strict=True)):
        for perspective, column in mapping.items():
            where = f"{FIELD}: the pool's row {example_id!r}"
            scores[perspective][i] = _level(row, column, where, f"a number in [1, {LEVELS}]")
    return scores


def labelled_rows(source: str) -> tuple[list[str], np.ndarray]:
    """Reads questions and their levels (n, 3) float32 in [1, 5], ordered as config.PERSPECTIVES.

    A row holds the columns difficulty_knowledge, difficulty_reasoning and difficulty_overall
    (integers), or `p_correct`, the share of those asked (people or models) who answered right: its
    overall level is 1 + 4 (1 - p), so that the levels meet at 0.875, 0.625, 0.375 and 0.125, and
    the other two are nan, unknown. `options` ({letter: text}, or a list) are part of the question,
    as they are of a pool row's.

    Raises:
        UserError: no rows, a row without a question, a level that is no integer in 1..5, a
            p_correct outside [0, 1].
    """
    questions, levels = [], []
    for row, where in sources.read_rows(source, FIELD, sample="pool"):
        place = f"{FIELD}: {where}"
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            got = reading.shorten(question) if "question" in row else f"columns {', '.join(row)}"
            raise errors.UserError(f"{place}: question must be a text; got {got}.")
        if example.has_options(row):
            question = _with_options(question, example.options_of(row), place)
        measured = P_CORRECT in row and not any(column in row for column in COLUMNS.values())
        levels.append(_from_share(row, place) if measured else _likert(row, place))
        questions.append(question)
    if not questions:
        raise errors.UserError(f"{FIELD} holds no rows: {source}.")
    return questions, np.array(levels, np.float32)


def _with_options(question, options, place):
    """As a pool row's question has them; a text that is no JSON as data.columns joins it."""
    if isinstance(options, str) and options.lstrip()[0] not in "{[":
        return f"{question}\n\n{options}"
    return example.ask(question, example.lettered(options, place))


def _likert(row, place):
    expected = f"an integer in 1..{LEVELS}"
    found = [_level(row, column, place, expected) for column in COLUMNS.values()]
    for column, level in zip(COLUMNS.values(), found, strict=True):
        errors.check(f"{place}: {column}", level == int(level), expected, row[column])
    return found


def _from_share(row, place):
    value = row[P_CORRECT]
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    errors.check(f"{place}: {P_CORRECT}", ok, "in [0, 1]", value)
    overall = 1 + (LEVELS - 1) * (1 - value)
    return [overall if p == "overall" else math.nan for p in config.PERSPECTIVES]


def fingerprint(source: str) -> str:
    """Hashes the label files; of a hub data set, its name."""
    return sources.fingerprint(source, FIELD, sample="pool")


def assign_folds(
    labelled: Sequence[int] | np.ndarray, texts: int, folds: int, seed: int
) -> np.ndarray:
    """Returns the fold (texts,) that scores each text: 0..folds-1 if labelled, else `folds`.

    The model of a fold is trained on the labelled rows of all other folds, so that no text is
    scored by a model that saw it; that of fold `folds`, which has no labelled text, on every one.

    Args:
        labelled: the text of each labelled row; rows of one text share its fold.

    Raises:
        UserError: fewer labelled texts than folds.
    """
    distinct = np.unique(labelled)
    if len(distinct) < folds:
        raise errors.UserError(
            f"difficulty.folds={folds} needs as many different labelled questions; {FIELD} has "
            f"{len(distinct)}."
        )
    found = np.full(texts, folds)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(distinct))
    found[distinct[order]] = np.arange(len(distinct)) % folds
    return found


def column_names(source: str, needed: str) -> dict[str, str]:
    """Reads difficulty.source=columns..: {perspective: column}, COLUMNS where none is named.

    Raises:
        UserError: it is not written as it must be, or leaves out the perspective `needed`.
    """
    text = source.removeprefix("columns").removeprefix(":")
    if not text:
        return COLUMNS
    mapping = {}
    for part in text.split(","):
        perspective, _, column = (piece.strip() for piece in part.partition("="))
        errors.check_choice(f"{FIELD}: the name before =", perspective, config.PERSPECTIVES)
        ok = column and perspective not in mapping
        errors.check(FIELD, ok, "like columns:knowledge=A,reasoning=B,overall=C", source)
        mapping[perspective] = column
    if needed not in mapping:
        raise errors.UserError(
            f"{FIELD}={source} leaves out {needed}, the perspective that difficulty.perspective "
            "asks for."
        )
    return mapping


def _level(row, column, where, expected) -> float:
    """Reads the number in a column; a text that is a number counts, since CSV holds only text."""
    if column not in row:
        raise errors.UserError(
            f"{where} has no column {column!r}; expected {expected}.{errors.nearest(column, row)}"
        )
    value = row[column]
    try:
        level = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        level = math.nan
    errors.check(f"{where}: {column}", 1 <= level <= LEVELS, expected, value)
    return level
