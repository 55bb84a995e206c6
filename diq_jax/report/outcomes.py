"""The results of the evaluation: tables and sentences for the page and the terminal.

A difference is marked where its interval excludes 0.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diq_jax.report import tables

METRICS = {  # name: (title, unit, factor, decimals)
    "test_loss": ("Test loss", "nats/token", 1, 3),
    "test_loss_without_end": ("Test loss without the end of turn", "nats/token", 1, 3),
    "target_loss": ("Target loss", "nats/token", 1, 3),
    "held_out_loss": ("Loss on held-out rows", "nats/token", 1, 3),  # of selection_lab.py
    "accuracy": ("Accuracy", "%", 100, 1),
    "accuracy_norm": ("Accuracy, length-normalised", "%", 100, 1),
    "choice_loss": ("Choice loss", "nats", 1, 3),
    "choice_loss_letters": ("Choice loss of the letters", "nats", 1, 3),
    "brier": ("Brier score", "0 to 2", 1, 3),
    "margin": ("Margin", "nats", 1, 3),
}
# Two tables: how well answers are written, and how well they are told from the other options.
WRITTEN, CHOSEN = list(METRICS)[:6], list(METRICS)[6:]
REFERENCES = ("base", "random")  # what an arm is compared with


def arms(results: Mapping[str, Any]) -> list[str]:
    """Lists base, selected, then the baselines, as far as they were evaluated."""
    models = results["models"]
    return sorted(models, key=lambda arm: {"base": 0, "selected": 1}.get(arm, 2))


def headline(results: Mapping[str, Any] | None, study: str = "") -> str:
    """Says what loss and accuracy show of the selection in this run, which is one seed.

    Args:
        study: what several seeds showed, if there are any.
    """
    if not results or "selected" not in results["models"]:
        return study or "Not evaluated: whether this selection helps is not known."
    models = results["models"]
    versus = models["selected"].get("versus", {})
    against = next((name for name in ("random", "base") if name in versus), None)
    said = [f"One seed, {results['tests']} held-out questions."]
    for metric, better in (("test_loss", "low"), ("accuracy", "high"), ("choice_loss", "low")):
        if metric in models["selected"]:
            said.append(_claim(models, metric, better, against))
    if against is None:
        said.append("The selection was compared with nothing.")
    elif against == "base":
        said.append("No random subset was trained to compare with.")
    said.append(study or "Another seed may differ: compare_selection.py runs several.")
    return " ".join(said)


def _claim(models, metric, better, against):
    """Writes one sentence on one metric: its levels, the paired difference, and what that shows."""
    what, unit, factor, decimals = METRICS[metric]
    names = {"selected": "selected", against: "the base model" if against == "base" else against}
    means = (
        f"{name} {tables.number(factor * models[arm][metric]['mean'], decimals)}"
        for arm, name in names.items()
        if arm is not None
    )
    said = f"{what}: {', '.join(means)} {unit}"
    delta = models["selected"].get("versus", {}).get(against, {}).get(metric)
    if not delta:
        return f"{said}."
    found = _measure(delta, metric, sign=True)
    verdict = "no difference is shown, as the interval includes 0"
    if found.strong:
        verdict = "better" if (delta["high"] < 0) == (better == "low") else "worse"
        verdict += f" than {names[against]} in this run"
    gap = f"{found.text} {unit.replace('%', 'points')} (95 % interval {found.interval})"
    return f"{said}, paired difference {gap}: {verdict}."


def levels(
    results: Mapping[str, Any], task: str | None = None, metrics: Iterable[str] = WRITTEN
) -> tables.Table | None:
    """Tables metrics of each arm, of all questions or one task; None where no arm has any."""
    found = {arm: results["models"][arm] for arm in arms(results)}
    if task is not None:
        found = {arm: values.get("tasks", {}).get(task, {}) for arm, values in found.items()}
    shown = _measured(found.values(), metrics)
    if not shown:
        return None
    headers, counted = ["Model", *map(title, shown)], []
    if "accuracy" in shown and any("unparsable" in values for values in found.values()):
        headers, counted = [*headers, "Unparsable (questions)"], ["unparsable"]
    rows = []
    for arm, values in found.items():
        counts = (tables.Cell(tables.number(values.get(name), 0)) for name in counted)
        rows.append([tables.Cell(arm), *(_measure(values.get(m), m) for m in shown), *counts])
    return tables.Table(headers, rows)


def differences(
    results: Mapping[str, Any], metrics: Iterable[str] = WRITTEN
) -> tables.Table | None:
    """Tables differences, arm - reference; strong where the interval excludes 0. None without."""
    found = _versus(results)
    shown = _measured(found.values(), metrics)
    if not shown:
        return None
    rows = [
        [tables.Cell(name), *(_measure(values.get(m), m, sign=True) for m in shown)]
        for name, values in found.items()
    ]
    headers = [title(m).replace("(%)", "(points)") for m in shown]
    return tables.Table(["Difference", *headers], rows)


def _versus(results) -> dict[str, Mapping[str, Any]]:
    """Finds the paired differences of all arms, {"arm − reference": differences}."""
    found = {}
    for reference in REFERENCES:
        for arm in arms(results):
            values = results["models"][arm].get("versus", {}).get(reference)
            if values and arm != reference:
                found[f"{arm} − {reference}"] = values
    return found


def _measured(found: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> list[str]:
    """Lists the metrics that any has: generated answers have no length-normalised accuracy."""
    names = set().union(*found)
    return [metric for metric in metrics if metric in names]


def averages(results: Mapping[str, Any]) -> tables.Table | None:
    """Tables accuracies averaged over groups of benchmarks, and their differences; None without."""
    models = {arm: results["models"][arm] for arm in arms(results)}
    found = models[arms(results)[0]].get("averages")
    if not found:
        return None
    shown = [m for m in ("accuracy", "accuracy_norm") if any(m in v for v in found.values())]
    columns = [(group, metric) for metric in shown for group in found]

    def row(name, values, sign=False):
        cells = (_measure(values[group].get(metric), metric, sign) for group, metric in columns)
        return [tables.Cell(name), *cells]

    rows = [row(arm, values["averages"]) for arm, values in models.items()]
    for name, gaps in _versus(results).items():
        if "averages" in gaps:
            rows.append(row(name, gaps["averages"], sign=True))
    marks = {"accuracy": "%", "accuracy_norm": "%, length-normalised"}
    headers = [f"{_group_title(results, group, found)} ({marks[m]})" for group, m in columns]
    return tables.Table(["Mean over tasks", *headers], rows)


def _group_title(results, group, found):
    """Writes the group and how many of its tasks were tested: fewer make another average."""
    tested = found[group]["tasks"]
    size = results.get("group_sizes", {}).get(group, tested)
    return f"{group}, {tested} tasks" if tested == size else f"{group}, {tested} of {size} tasks"


def panels(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, dict]], bool]]:
    """Prepares figures.comparison: two levels, two paired differences to random or else base."""
    models = {arm: results["models"][arm] for arm in arms(results)}

    def dots(metric, reference=None):
        for arm, values in models.items():
            values = values.get("versus", {}).get(reference) if reference else values
            if values and metric in values:
                factor = METRICS[metric][2]
                yield arm, {end: factor * values[metric][end] for end in ("mean", "low", "high")}

    reference = "random" if "random" in models else "base"
    accuracy = list(dots("accuracy_norm"))
    found = [
        ("Test loss (nats/token)", list(dots("test_loss")), False),
        ("Accuracy, length-norm. (%)", accuracy, False),
        ("Accuracy (%)", [] if accuracy else list(dots("accuracy")), False),
        (f"Test loss − {reference}", list(dots("test_loss", reference)), True),
        (f"Choice loss − {reference}", list(dots("choice_loss", reference)), True),
    ]
    return [panel for panel in found if panel[1]]


def task_names(results: Mapping[str, Any]) -> dict[str, int]:
    """Counts the questions of each task, in order."""
    first = results["models"][arms(results)[0]].get("tasks", {})
    return {task: values["questions"] for task, values in sorted(first.items())}


def title(metric: str) -> str:
    """Writes what a metric is called, with its unit."""
    name, unit, _, _ = METRICS[metric]
    return f"{name} ({unit})"


def _measure(value, metric, sign=False):
    _, _, factor, decimals = METRICS[metric]
    if not value:
        return tables.Cell("–")
    outside = sign and (value["low"] > 0 or value["high"] < 0)
    decimals = tables.enough(value, decimals, factor)
    text = tables.number(value["mean"] * factor, decimals, sign)
    return tables.Cell(text, tables.interval(value, decimals, factor), outside)
