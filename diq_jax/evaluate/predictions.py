"""What models answered, read back: the rows of predictions.jsonl, by model.

A spec is a run's folder, its evaluate folder or a JSONL file, and after a colon the model, where
there are several: `runs/mine:selected`. The smallest row that can be judged is
`{"example_id": ..., "question": ..., "text": ...}`; the smallest that can be compared is
`{"example_id": ..., "answer": "B", "prediction": "C"}`. In a run's folder, what a row lacks comes
from prepare/tests.parquet. A row of several generated answers has the text of one of them.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from diq_jax import errors
from diq_jax.data import sources
from diq_jax.run import reading, records

TESTS = ("example_id", "question", "options", "choices", "answer")
ById = dict[str, dict[str, Any]]  # by example_id, in the order of the file


def read_all(specs: Sequence[str], field: str, verified: bool = True) -> dict[str, ById]:
    """Reads {name: rows} of each spec: a model's name where the names differ, else the specs.

    Args:
        verified: whether a run's files are held against its records.

    Raises:
        UserError: naming `field`: no such file or model, a bad row, or a spec that stands twice.
    """
    found = [_read(spec, field, verified) for spec in specs]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        names = list(specs)
    if len(set(names)) < len(names):
        raise errors.UserError(f"{field} names {names[0]!r} and others twice; name each once.")
    return dict(zip(names, (rows for _, rows in found), strict=True))


def _read(spec: str, field: str, verified: bool) -> tuple[str, ById]:
    path, model = (spec, "") if os.path.exists(spec) else spec.rpartition(":")[::2]
    file = _file(path or spec, field)
    if verified:
        records.verify(file)
    rows = [(row, where) for row, where in sources.read_rows(str(file), field)]
    models = list(dict.fromkeys(str(row.get("model", "")) for row, _ in rows))
    if not model and len(models) > 1:
        raise errors.UserError(
            f"{field}: {file} has {len(models)} models; name one: "
            f"{', '.join(f'{spec}:{name}' for name in models)}."
        )
    if model:
        errors.check_choice(f"{field}: the model of {file}", model, models)
    tests = _tests(file, verified)
    found: ById = {}
    for row, where in rows:
        if model and str(row.get("model", "")) != model:
            continue
        name = str(row.get("example_id", row.get("id", "")))
        if not name or name in found:
            problem = "stands twice" if name else "is missing"
            raise errors.UserError(f"{field}: {where}: example_id {name or ''!r} {problem}.")
        found[name] = tests.get(name, {}) | _text(row) | row
    if not found:
        raise errors.UserError(f"{field}: {file} has no rows.")
    return model or models[0] or file.stem, found


def _file(path: str, field: str) -> pathlib.Path:
    given = pathlib.Path(path).expanduser()
    places = (given, given / "predictions.jsonl", given / "evaluate" / "predictions.jsonl")
    for place in places:
        if place.is_file():
            return place
    raise errors.UserError(
        f"{field}: {path} is no file and no folder with (evaluate/)predictions.jsonl; expected "
        "RUN, RUN:MODEL, FILE.jsonl or FILE.jsonl:MODEL."
    )


def _text(row: dict[str, Any]) -> dict[str, str]:
    """Returns the first answer that chooses what was predicted, or the first; {} without any."""
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(a, dict) for a in answers):
        return {}
    chosen = (a for a in answers if a.get("letter") == row.get("prediction"))
    answer = next(chosen, answers[0] if answers else {})
    return {"text": answer["text"]} if "text" in answer else {}


def _tests(file: pathlib.Path, verified: bool) -> ById:
    """Returns the run's tests by question: its text with the options, and the right one."""
    path = file.parent.parent / "prepare" / "tests.parquet"
    if file.parent.name != "evaluate" or not path.is_file():
        return {}
    if verified:
        records.verify(path)
    if "choices" not in reading.read_table(path).column_names:
        return {}  # a run of an earlier version keeps no texts
    kinds = records.COLUMNS["prepare/tests.parquet"]
    table = reading.read_table(path, {name: kinds[name] for name in TESTS})
    out = {}
    for row in table.to_pylist():
        lines = [f"{a}. {text}" for a, text in zip(row["options"], row["choices"], strict=True)]
        known = {"question": row["question"] + "\n\n" + "\n".join(lines)}
        known["reference"] = lines[row["answer"]]
        known |= {"subject": row["subject"]} if row.get("subject") else {}
        out[row["example_id"]] = known
    return out
