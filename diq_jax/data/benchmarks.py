"""The nine benchmarks by name: where each is on the hub, and how a row of it becomes one of ours.

`benchmark:NAME` in data.targets or data.tests; `benchmark:NAME:FILE` reads a local copy of the same
rows; `benchmark:standard`, `benchmark:challenging` and `benchmark:all` are lists of names.

The groups: the paper (arXiv 2508.01450) averages over three standard benchmarks (AvgS), six
challenging ones (AvgC) and all nine (AvgA); its tables satisfy AvgA = (3 AvgS + 6 AvgC) / 9. Which
nine they are could not be checked: the names and groups here are ours, and `evaluate.groups` takes
others. Compare averages with the paper's only after you have checked them.

Targets steer the selection, so they are never test rows: they come from a training or validation
split with answers where there is one, else from the tenth of the rows that is held out of the
tests, by a hash of the question; so one FILE may serve as both there, and nowhere else. MMLU-Pro
repeats some questions of MMLU: a target of the one may be a test of the other.
"""

import ast
import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from diq_jax import errors
from diq_jax.data import example, files

MMLU_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
    "professional_medicine",
)  # fmt: skip
HELD_OUT = 10  # one question in so many is a target where there is no other split


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Describes one benchmark.

    Attributes:
        group: standard or challenging.
        convert: a row as published -> question, options, answer_idx and, where there are any, id
            and subject; None for a row that does not belong.
        tests, targets: as `sources` names them. Where they are the same, targets are held out.
        counted: the column that holds the right option's number, from 0; "" where there is none.
        told: where there is one: a row -> the right letter by another of its columns, or None.
    """

    group: str
    convert: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    tests: str
    targets: str
    counted: str = ""
    told: Callable[[Mapping[str, Any]], str | None] = lambda row: None


def _medqa(row):
    return {name: row[name] for name in ("question", "options", "answer_idx")}


def _medmcqa(row):
    """Reads cop: 0 to 3 on the hub, 1 to 4 in the files of the authors, -1 where it is withheld."""
    options = [row[f"op{letter}"] for letter in "abcd"]
    known = {"id": row["id"], "subject": row["subject_name"]}
    return _row(row["question"], options, row["cop"]) | known


def _told_medmcqa(row):
    """Returns the letter that most explanations begin with: "Ans. is 'c' i.e. ..."."""
    found = re.match(
        r"\s*(?:ans(?:wer)?|correct)\b[\W_]*(?:is\b)?[\W_]*([a-d])\b", str(row.get("exp")), re.I
    )
    return found and found[1].upper()


def _mmlu_med(row):
    if row["subject"] not in MMLU_SUBJECTS:
        return None
    return _row(row["question"], row["choices"], row["answer"]) | {"subject": row["subject"]}


def _pubmedqa(row):
    """Puts the abstract, without its conclusion, before the question."""
    decisions = ("yes", "no", "maybe")
    question = "\n\n".join([*row["context"]["contexts"], row["question"]])
    right = decisions.index(row["final_decision"])
    return _row(question, list(decisions), right) | {"id": row["pubid"]}


def _mmlu_pro_health(row):
    if row["category"] != "health":
        return None
    made = _row(row["question"], row["options"], row["answer_index"]) | {"id": row["question_id"]}
    if row.get("answer", made["answer_idx"]) != made["answer_idx"]:
        raise ValueError(
            f"answer_index {row['answer_index']} is {made['answer_idx']}, counted from 0, but "
            f"answer is {row['answer']!r}"
        )
    return made


def _medxpertqa(row):
    """Cuts the options off the end of the published question: writing them is ours."""
    question = row["question"].partition("\nAnswer Choices:")[0]
    known = {"id": row["id"], "subject": row["medical_task"], "answer_idx": row["label"]}
    return {"question": question, "options": row["options"]} | known


def _biomed_eval(row):
    """Reads options that are a text: JSON, or a dict as Python prints it."""
    options = row["options"]
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:
            options = ast.literal_eval(options)
    known = {"id": row["id"], "options": options, "answer_idx": row["answer_idx"]}
    return {"question": row["question"]} | known


def _row(question, options, right):
    options = example.lettered(options, "its row")
    letters = string.ascii_uppercase
    if type(right) is not int:
        raise ValueError(f"the answer must be a whole number, got {right!r}")
    if not 0 <= right < len(letters) or letters[right] not in options:
        raise ValueError(f"the answer is number {right} of {len(options)}, counted from 0")
    return {"question": question, "options": options, "answer_idx": letters[right]}


def _hub(name: str, *splits: str) -> tuple[str, str]:
    """Returns the sources of tests and targets, which are the same where there is one split."""
    return f"hub:{name}:{splits[0]}", f"hub:{name}:{splits[-1]}"


COUNTED = {
    "medmcqa": ("cop", _told_medmcqa),
    "mmlu_med": ("answer",),
    "mmlu_pro_health": ("answer_index", lambda row: row.get("answer")),
}
BENCHMARKS = {
    name: Benchmark(group, convert, *_hub(*hub), *COUNTED.get(name, ()))
    for name, group, convert, *hub in (
        ("medqa", "standard", _medqa, "GBaker/MedQA-USMLE-4-options:", "test", "train"),
        # The test split has no answers.
        ("medmcqa", "standard", _medmcqa, "openlifescienceai/medmcqa:", "validation", "train"),
        ("mmlu_med", "standard", _mmlu_med, "cais/mmlu:all", "test", "validation"),
        # All thousand labelled rows: the hub has no split of them.
        ("pubmedqa", "challenging", _pubmedqa, "qiaojin/PubMedQA:pqa_labeled", "train"),
        # Its validation split has five health questions.
        ("mmlu_pro_health", "challenging", _mmlu_pro_health, "TIGER-Lab/MMLU-Pro:", "test"),
        # MedBullets and the biomedical multiple-choice part of HLE as arXiv 2505.11462 collects
        # them: text only, with options.
        ("medbullets_op4", "challenging", _biomed_eval,
         "zou-lab/BioMed-R1-Eval:medbullets_op4", "test"),
        ("medbullets_op5", "challenging", _biomed_eval,
         "zou-lab/BioMed-R1-Eval:medbullets_op5", "test"),
        ("medxpertqa", "challenging", _medxpertqa, "TsinghuaC3I/MedXpertQA:Text", "test"),
        ("hle_biomed", "challenging", _biomed_eval, "zou-lab/BioMed-R1-Eval:hle_biomed", "test"),
    )
}  # fmt: skip


def expand(spec: str, field: str) -> list[tuple[str, str]]:
    """Returns (name, file or "") of each benchmark that `benchmark:NAME[:FILE]` names.

    Raises:
        UserError: no such name, with the nearest; or a list of names with a file.
    """
    name, _, file = spec.removeprefix(files.BENCHMARK).partition(":")
    groups = dict.fromkeys(b.group for b in BENCHMARKS.values())
    errors.check_choice(
        f"{field}: the name after {files.BENCHMARK}", name, (*BENCHMARKS, *groups, "all")
    )
    if name in BENCHMARKS:
        return [(name, file)]
    if file:
        raise errors.UserError(f"{field}: {spec} is several benchmarks; name a file for each.")
    return [(n, "") for n, b in BENCHMARKS.items() if name in ("all", b.group)]


def convert_all(
    name: str, rows: Iterable[tuple[dict, str]], is_target: bool, is_hub: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """Converts the rows of a benchmark, each with its place, as `convert` does.

    Rows whose answer is withheld (-1) are left out, and their number is said.

    Args:
        is_hub: the rows are the hub's, known to count answers from 0; copies may count from 1.

    Raises:
        UserError: as `convert`; a copy counts from 1, or does not show from where; or every answer
            is withheld.
    """
    rows, counted = list(rows), BENCHMARKS[name].counted
    known = [i for i, (row, _) in enumerate(rows) if not counted or row.get(counted) != -1]
    if len(known) < len(rows):
        place, count = rows[0][1], f"{len(rows) - len(known)} of {len(rows)}"
        withheld = f"{place} and the rows after it: {count} withhold their answer ({counted} is -1)"
        if not known:
            raise errors.UserError(f"{withheld}: use a split with answers.")
        logging.warning("%s and are left out.", withheld)
    if counted and not is_hub:
        _check_counting(name, rows)
    for i in known:
        row, where = rows[i]
        made = convert(name, row, where, i, is_target)
        if made is not None:
            yield made, where


def convert(
    name: str, row: Mapping[str, Any], where: str, index: int, is_target: bool
) -> dict[str, Any] | None:
    """Converts a row, to None where it does not belong; its id begins with the benchmark's name.

    Args:
        index: stands for an id where the benchmark has none.
        is_target: whether targets are read, or tests.

    Raises:
        UserError: the row is not as that benchmark publishes it.
    """
    benchmark = BENCHMARKS[name]
    try:
        made = benchmark.convert(row)
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError) as e:
        problem = f"it lacks {e}" if isinstance(e, KeyError) else str(e).rstrip(".")
        raise errors.UserError(
            f"{where} is no row as {benchmark.tests} has it: {problem}; its columns are "
            f"{', '.join(row)}."
        ) from None
    if made is None:
        return None
    if benchmark.tests == benchmark.targets and _held_out(made["question"]) != is_target:
        return None
    return made | {"id": f"{name}-{made.get('id', index)}", "task": name}


def _check_counting(name: str, rows: list[tuple[dict, str]]) -> None:
    """Raises UserError unless the rows show that their answers are counted from 0.

    One is 0, or -1, the hub's word for a withheld one, or most agree with the letter told
    elsewhere.
    """
    benchmark, numbers, gaps = BENCHMARKS[name], set(), []
    for row, _ in rows:
        number, letter = row.get(benchmark.counted), benchmark.told(row)
        if type(number) is int:
            numbers.add(number)
            if number >= 0 and isinstance(letter, str) and len(letter) == 1:
                gaps.append(number - string.ascii_uppercase.find(letter))
    from_zero, from_one = gaps.count(0), gaps.count(1)
    if not numbers:
        return  # `convert` refuses each row
    if from_zero > from_one or (from_zero == from_one and not {0, -1}.isdisjoint(numbers)):
        return
    fact = (
        "counts the options from 1" if from_one > from_zero else "is never 0, as if counted from 1"
    )
    raise errors.UserError(
        f"{rows[0][1]} and the rows after it: {benchmark.counted} {fact}, but {benchmark.tests} "
        f"counts from 0: subtract 1 from each, or give rows with options and answer_idx, a letter."
    )


def _held_out(question: str) -> bool:
    """Returns whether a question is a target; equal questions stand on one side."""
    digest = hashlib.sha256(str(question).strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0
