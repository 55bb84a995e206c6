"""A language model as annotator: a question's level, 1 to 5, from each of the three perspectives.

The model sees the question alone, as the classifier does (see `labels`), and judges it by the
rubric of the shipped sample (diq_jax/data/sample/README.md), in the same words.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config, stats
from diq_jax.clients import answers as answers_lib
from diq_jax.difficulty import labels

RUBRIC = """\
You rate how difficult medical questions are. Judge the question itself, for a reader who gets no \
answer options to choose from. Do not answer it. Rate three perspectives, each with a level from 1 \
to 5.

knowledge: what must be known.
1 everyday health knowledge
2 first-year textbook fact
3 core clinical knowledge
4 specialist detail or a drug-specific fact
5 sub-specialist or rare-disease knowledge

reasoning: what must be done with that knowledge.
1 nothing; recall of one fact
2 one inference
3 two linked steps, or one distractor to set aside
4 three or more steps, or competing hypotheses weighed
5 many steps, a calculation or a trap with a misleading finding

overall: who answers it right (students and residents of medicine).
1 nearly every layperson with an interest
2 a first-year student
3 a final-year student
4 a resident in the field
5 a specialist, and not every one

knowledge and reasoning are independent: a rare fact may need no reasoning, a puzzle no rare fact. \
overall is a judgement of its own, not their mean, and at most one level away from the larger of \
the two. The length of a question is no measure. Use the whole scale.

For each perspective give first the reason, in at most fifteen words, then the level. Answer with \
a JSON object of the fields {fields}; each level is a whole number."""

LEVELS = range(1, labels.LEVELS + 1)
SCHEMA = answers_lib.choices_schema(dict.fromkeys(config.PERSPECTIVES, LEVELS))
SYSTEM = {"role": "system", "content": RUBRIC.format(fields=", ".join(SCHEMA["required"]))}


def messages(question: str) -> tuple[dict[str, str], ...]:
    """Writes a question's messages: the rubric first, so that a server may cache it."""
    asked = f"Rate this question.\n\n<question>\n{question.strip()}\n</question>"
    return SYSTEM, {"role": "user", "content": asked}


def levels(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns {perspective: level} of one question: the lower median of its checked answers."""
    middle = (len(answers) - 1) // 2
    return {p: sorted(answer[p] for answer in answers)[middle] for p in config.PERSPECTIVES}


def labelled(row: Mapping[str, Any], question: str, found: Mapping[str, int]) -> dict[str, Any]:
    """Returns the row as it came, with the columns of difficulty.source in the place of any it had.

    A row that calls its question otherwise also gets the column `question`, which
    difficulty.source reads.
    """
    named = {} if "question" in row else {"question": question}
    return dict(row) | named | {labels.COLUMNS[p]: found[p] for p in config.PERSPECTIVES}


def agreement(found: Sequence[Sequence[Mapping[str, int]]]) -> dict[str, float]:
    """Returns {perspective: kappa}, quadratically weighted, the mean over pairs of draws.

    Args:
        found: for each question its answers, one of each draw. Of a single draw kappa is nan.
    """
    kappas = {}
    for p in config.PERSPECTIVES:
        draws = np.array([[answer[p] for answer in mine] for mine in found]).T
        pairs = [
            stats.quadratic_kappa(first, second, labels.LEVELS)
            for first, second in itertools.combinations(draws, 2)
        ]
        kappas[p] = float(np.mean(pairs)) if pairs else float("nan")
    return kappas


def apart(
    questions: Sequence[str], found: Sequence[Sequence[Mapping[str, int]]], most: int
) -> list[dict[str, Any]]:
    """Lists `most` questions {question, perspective, levels}, draws farthest apart first."""
    rows = [
        {"question": question, "perspective": p, "levels": [answer[p] for answer in mine]}
        for question, mine in zip(questions, found, strict=True)
        for p in config.PERSPECTIVES
    ]
    wide = [row for row in rows if len(set(row["levels"])) > 1]
    return sorted(wide, key=lambda row: min(row["levels"]) - max(row["levels"]))[:most]


def histogram(found: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Counts {perspective: questions of level 1, 2, ..., 5}."""
    return {
        p: [sum(row[p] == level for row in found) for level in LEVELS] for p in config.PERSPECTIVES
    }
