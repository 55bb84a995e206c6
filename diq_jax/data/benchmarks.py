"""The nine benchmarks by name: where each is on the hub, and how a row of it becomes one of ours.

`benchmark:NAME` in data.targets or data.tests; `benchmark:NAME:FILE` reads a local copy of the same
rows; `benchmark:standard`, `benchmark:challenging` and `benchmark:all` are lists of names.

The groups: the paper (arXiv 2508.01450) averages over nine benchmarks: standard ones (AvgS),
challenging ones (AvgC) and all (AvgA). Here four are standard, exams and abstracts that have long
been in use, and five challenging, made to be harder or filtered for it. The paper's own lists
could not be checked: compare averages with its tables only after you have.

Targets steer the selection, so they are never test rows: they come from a training or validation
split with answers where there is one, else from the tenth of the rows that is held out of the
tests, by a hash of the question; so one FILE may serve as both there, and nowhere else. MMLU-Pro
repeats some questions of MMLU: a target of the one may be a test of the other.
"""

import ast
import dataclasses
import hashlib
import json
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diq_jax.common import errors

PREFIX = "benchmark:"
MMLU_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
    "professional_medicine",
)  # fmt: skip
HELD_OUT = 10  # one question in so many is a target where there is no other split


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        group: standard or challenging.
        convert: a row as published -> question, options, answer_idx and, where there are any, id
            and subject; None for a row that does not belong.
        tests, targets: as `sources` names them. Where they are the same, targets are held out.
    """

    group: str
    convert: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    tests: str
    targets: str


def _medqa(row):
    return {name: row[name] for name in ("question", "options", "answer_idx")}


def _medmcqa(row):
    """cop: 0 to 3; -1 where the answer is withheld."""
    options = {letter: row[f"op{letter.lower()}"] for letter in "ABCD"}
    known = {"id": row["id"], "subject": row["subject_name"]}
    return _row(row["question"], options, row["cop"]) | known


def _mmlu_med(row):
    if row["subject"] not in MMLU_SUBJECTS:
        return None
    options = dict(zip("ABCD", row["choices"], strict=True))
    return _row(row["question"], options, row["answer"]) | {"subject": row["subject"]}


def _pubmedqa(row):
    """The abstract without its conclusion, then the question."""
    decisions = ("yes", "no", "maybe")
    question = "\n\n".join([*row["context"]["contexts"], row["question"]])
    options = dict(zip("ABC", decisions, strict=True))
    return _row(question, options, decisions.index(row["final_decision"])) | {"id": row["pubid"]}


def _mmlu_pro_health(row):
    if row["category"] != "health":
        return None
    options = dict(zip(string.ascii_uppercase, row["options"], strict=False))
    return _row(row["question"], options, row["answer_index"]) | {"id": row["question_id"]}


def _medxpertqa(row):
    """The published question ends with the options, which are ours to write."""
    question = row["question"].partition("\nAnswer Choices:")[0]
    known = {"id": row["id"], "subject": row["medical_task"], "answer_idx": row["label"]}
    return {"question": question, "options": row["options"]} | known


def _biomed_eval(row):
    """Options are a text: JSON, or a dict as Python prints it."""
    options = row["options"]
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:
            options = ast.literal_eval(options)
    known = {"id": row["id"], "options": options, "answer_idx": row["answer_idx"]}
    return {"question": row["question"]} | known


def _row(question, options, right):
    letters = list(options)
    if not 0 <= right < len(letters):
        raise ValueError(f"the answer is number {right} of {len(letters)}")
    return {"question": question, "options": options, "answer_idx": letters[right]}


def _hub(name: str, *splits: str) -> tuple[str, str]:
    """The sources of tests and targets; of one split, the same."""
    return f"hub:{name}:{splits[0]}", f"hub:{name}:{splits[-1]}"


BENCHMARKS = {
    name: Benchmark(group, convert, *_hub(*hub))
    for name, group, convert, *hub in (
        ("medqa", "standard", _medqa, "GBaker/MedQA-USMLE-4-options:", "test", "train"),
        # The test split has no answers.
        ("medmcqa", "standard", _medmcqa, "openlifescienceai/medmcqa:", "validation", "train"),
        ("mmlu_med", "standard", _mmlu_med, "cais/mmlu:all", "test", "validation"),
        # All thousand labelled rows: the hub has no split of them.
        ("pubmedqa", "standard", _pubmedqa, "qiaojin/PubMedQA:pqa_labeled", "train"),
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
AVERAGES = {"AvgS": ("standard",), "AvgC": ("challenging",), "AvgA": ("standard", "challenging")}


def expand(spec: str, field: str) -> list[tuple[str, str]]:
    """(name, file or "") of each benchmark that `benchmark:NAME[:FILE]` names.

    Raises:
        UserError: no such name, with the nearest; or a list of names with a file.
    """
    name, _, file = spec.removeprefix(PREFIX).partition(":")
    groups = dict.fromkeys(b.group for b in BENCHMARKS.values())
    errors.check_choice(f"{field}: the name after {PREFIX}", name, (*BENCHMARKS, *groups, "all"))
    if name in BENCHMARKS:
        return [(name, file)]
    if file:
        raise errors.UserError(f"{field}: {spec} is several benchmarks; name a file for each.")
    return [(n, "") for n, b in BENCHMARKS.items() if name in ("all", b.group)]


def convert(
    name: str, row: Mapping[str, Any], where: str, index: int, is_target: bool
) -> dict[str, Any] | None:
    """Our row, or None for one that does not belong; its id begins with the benchmark's name.

    Args:
        index: stands for an id where the benchmark has none.
        is_target: whether targets are read, or tests.

    Raises:
        UserError: the row is not as that benchmark publishes it.
    """
    benchmark = BENCHMARKS[name]
    try:
        made = benchmark.convert(row)
    except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as e:
        problem = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise errors.UserError(
            f"{where} is no row as {benchmark.tests} has it: {problem}; its columns are "
            f"{', '.join(row)}."
        ) from None
    if made is None:
        return None
    if benchmark.tests == benchmark.targets and _held_out(made["question"]) != is_target:
        return None
    return made | {"id": f"{name}-{made.get('id', index)}", "task": name}


def _held_out(question: str) -> bool:
    """By the question, so that repeats stand on one side."""
    digest = hashlib.sha256(str(question).strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def averages(tasks: Iterable[str]) -> dict[str, list[str]]:
    """{AvgS, AvgC, AvgA: its tasks} of the tasks that are benchmarks; none is empty."""
    known = [task for task in tasks if task in BENCHMARKS]
    found = {
        name: [task for task in known if BENCHMARKS[task].group in groups]
        for name, groups in AVERAGES.items()
    }
    return {name: members for name, members in found.items() if members}
