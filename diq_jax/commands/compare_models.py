"""Compares two models that were evaluated on the same questions: who wins where, and is it chance?

    diq compare-models RUN:selected RUN:random [--metric=accuracy_norm]

Each of the two is a run's folder, its evaluate folder or a predictions.jsonl, and after a colon
the model, where there are several. For each task (and each subject, where rows have one) and
overall: both accuracies, the paired difference with its 95 % bootstrap interval, McNemar's exact
test, adjusted over tasks by Holm's method; then choice loss and Brier score, where the rows have
them, and the calibration of both. A generated answer that
cannot be read is wrong; where there are any, they are counted.
"""

from typing import Any

import numpy as np
from absl import flags

from diq_jax.commands import cli
from diq_jax.evaluate import compare, predictions
from diq_jax.report import outcomes, tables
from diq_jax.run import artifacts

VERIFY = cli.define_verify()
METRIC = flags.DEFINE_enum(
    "metric", "accuracy", list(compare.CHOICES), "By summed or by length-normalised likelihood."
)
OUT = flags.DEFINE_string("out", "", "A .json file for the numbers; empty = print only.")
BOOTSTRAP_SAMPLES = flags.DEFINE_integer("bootstrap_samples", 2000, "Of each interval.", 100)
SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.", lower_bound=0)
ARGUMENTS = ("RUN:MODEL", "RUN:MODEL")


def read(specs: list[str]) -> tuple[list[str], list[predictions.ById], list[str]]:
    """Reads the names and rows of both models, and the questions that both answered."""
    specs = [cli.run_folder(spec, "the models") for spec in specs]
    found = predictions.read_all(specs, "the models", cli.verify(VERIFY))
    names, (first, second) = list(found), found.values()
    ids = compare.common(first, second)
    if not len(first) == len(second) == len(ids):
        print(
            f"{names[0]} has {len(first):,} questions, {names[1]} {len(second):,}: compared are "
            f"the {len(ids):,} that both have."
        )
    return names, [first, second], ids


def measure(rows: list[predictions.ById], ids: list[str]) -> dict[str, Any]:
    """Compares the two models on the questions `ids`: the JSON that --out writes."""
    hits, unread = (
        np.stack([of(model, ids, METRIC.value) for model in rows], axis=1)
        for of in (compare.correct, compare.unparsable)
    )
    chosen = BOOTSTRAP_SAMPLES.value, SEED.value
    tasks = [str(rows[0][name].get("task") or "(none)") for name in ids]
    subjects = [str(rows[0][name].get("subject") or "") for name in ids]
    named = [i for i, subject in enumerate(subjects) if subject]
    by_subject = compare.by_group(
        hits[named], unread[named], [f"{tasks[i]}: {subjects[i]}" for i in named], *chosen
    )
    return {
        "metric": METRIC.value,
        "overall": compare.paired(hits, unread, *chosen),
        "tasks": compare.by_group(hits, unread, tasks, *chosen),
        "subjects": by_subject,
        "proper": compare.proper(rows, ids, *chosen),
        "calibration": [compare.calibrated(of, ids) for of in rows],
    }


def points(value: dict[str, float], sign: bool = False) -> tables.Cell:
    """Writes a share and its interval in points of percent."""
    mean, low, high = (tables.number(100 * value[e], 1, sign) for e in ("mean", "low", "high"))
    return tables.Cell(mean, f"{low} to {high}")


def table(title: str, groups: dict[str, dict], names: list[str]) -> tables.Table:
    """Tables each group's accuracies, their difference and its p-values."""
    headers = [title, "questions", f"{names[0]} (%)", f"{names[1]} (%)", "difference (points)"]
    headers += [f"only {name}" for name in names] + ["p", "p (Holm)", "better"]
    any_unread = any(any(value["unparsable"]) for value in groups.values())
    headers += [f"{name} unparsable" for name in names] * any_unread
    rows = []
    for name, value in groups.items():
        ps = (f"{value[k]:.3g}" if k in value else "" for k in ("p", "p_holm"))
        counts = (f"{value[k]:,}" for k in ("only_first", "only_second"))
        rows.append([
            tables.Cell(name), tables.Cell(f"{value['questions']:,}"),
            *map(points, value["accuracy"]), points(value["difference"], sign=True),
            *map(tables.Cell, (*counts, *ps, compare.winner(value, names) or "-")),
            *(tables.Cell(f"{count:,}") for count in value["unparsable"] * any_unread),
        ])  # fmt: skip
    return tables.Table(headers, rows)


def proper_table(found: dict[str, dict], names: list[str]) -> tables.Table:
    """Tables the proper scores of both models."""
    headers = ["less is better", *names, "difference"]
    return tables.Table(
        headers,
        [
            [tables.Cell(outcomes.METRICS[metric][0])]
            + [number(mean) for mean in value["means"]]
            + [number(value["difference"], sign=True)]
            for metric, value in found.items()
        ],
    )


def number(value: dict[str, float], sign: bool = False) -> tables.Cell:
    """Writes a value and its interval."""
    mean, low, high = (tables.number(value[e], 3, sign) for e in ("mean", "low", "high"))
    return tables.Cell(mean, f"{low} to {high}")


def calibration_table(name: str, found: dict[str, Any]) -> tables.Table:
    """Tables how often a model is right, by how sure it is."""
    headers = [f"{name} is sure (%)", "questions", "mean (%)", "right (%)"]
    rows = []
    for row in found["reliability"]:
        ends = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"
        shares = (tables.number(100 * row[k], 1) for k in ("confidence", "accuracy"))
        rows.append([*map(tables.Cell, (ends, f"{row['questions']:,}", *shares))])
    return tables.Table(headers, rows)


def print_all(found: dict[str, Any], names: list[str]) -> None:
    """Prints all tables of `measure`."""
    print(table("task", found["tasks"] | {"all": found["overall"]}, names).plain())
    if found["subjects"]:
        print("\n" + table("subject", found["subjects"], names).plain())
    print("\n" + compare.sentence(found["overall"], names))
    if found["proper"]:
        print("\n" + proper_table(found["proper"], names).plain())
    for name, value in zip(names, found["calibration"], strict=True):
        if value is None:
            print(f"\n{name}: it did not choose by likelihood, so its calibration is not known")
            continue
        print(f"\n{name}: expected calibration error {100 * value['ece']:.1f} points")
        print(calibration_table(name, value).plain())


def main(first: str, second: str) -> None:
    """Compares the two models that the arguments name."""
    out = cli.output(OUT, ".json") if OUT.value else None
    names, rows, ids = read([first, second])
    found = {"models": names} | measure(rows, ids)
    print_all(found, names)
    if out:
        artifacts.write_json(out, found)
