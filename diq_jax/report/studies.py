"""Methods compared by training: what compare_selection.py or selection_lab.py left in a folder."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np

from diq_jax import config, errors
from diq_jax.report import outcomes, style, tables
from diq_jax.run import artifacts, reading

COMPARISON, LAB = "compare/results.json", "lab.json"
EVERYWHERE = ("base", "full")  # the arms whose level stands beside every budget
SHOWN = (  # in a table
    "choice_loss_letters", "choice_loss", "test_loss_without_end", "test_loss", "target_loss",
    "held_out_loss", "accuracy", "accuracy_norm",
)  # fmt: skip
PANELS = ("choice_loss_letters", "test_loss_without_end", "held_out_loss", "accuracy")
MOST_PANELS = 3
SURE = 0.05  # Holm's p below which a difference is marked
COLORS = (style.SELECTED, *style.ARMS[:2], style.MUTED)
ENDS = ("mean", "low", "high")
NUMBERS = dict.fromkeys(ENDS, float)


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """Holds what the trainings of one arm at one budget gave.

    Attributes:
        budget: a share of the pool, in rows or tokens (unit); 0 of the base model.
        means: {metric: mean over questions and seeds}.
        versus: {metric: {mean, low, high, p_holm} of the paired difference to random}.
    """

    arm: str
    budget: float
    unit: str
    rows: int
    means: Mapping[str, float]
    versus: Mapping[str, Mapping[str, float]]

    @property
    def cell(self) -> tuple[float, str]:
        """Returns what arms are compared in."""
        return self.budget, self.unit


@dataclasses.dataclass(frozen=True)
class Study:
    """Holds the arms that one study trained.

    Attributes:
        about: the sentence that says on what.
        model, pool: model.path and the rows of the pool; "" and 0 of a lab, whose model is its own.
    """

    name: str
    about: str
    model: str
    pool: int
    seeds: int
    outcomes: Sequence[ArmResult]

    @property
    def compared(self) -> list[ArmResult]:
        """Returns those that have a difference to random."""
        return [found for found in self.outcomes if found.versus]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the study's file in a folder, if there is one."""
    return [path for path in (folder / COMPARISON, folder / LAB) if path.is_file()][:1]


def load(folder: str | os.PathLike, field: str) -> Study:
    """Reads the study in a folder.

    Args:
        field: the flag that names it, for messages.

    Raises:
        UserError: there is none, or its file is not as the studies write it.
    """
    found = files(pathlib.Path(folder))
    if not found:
        raise errors.UserError(
            f"{field}: {folder} has neither {COMPARISON} of compare_selection.py nor {LAB} of "
            "selection_lab.py."
        )
    return read(found[0])


def read(path: pathlib.Path) -> Study:
    """Reads a study's file. Raises UserError where it is not as the studies write it."""
    record = reading.read_record(path, {"settings": dict, "rows": list}, {"title": str})
    settings, of_lab = record["settings"], path.name == LAB
    arm, versus = ("arm", "versus_random") if of_lab else ("method", "versus")
    made = [
        _outcome(row, arm, versus, f"{path}: rows[{i}]") for i, row in enumerate(record["rows"])
    ]
    if of_lab:
        seeds = max((row.get("seeds", 0) for row in record["rows"]), default=0)
        return Study(path.parent.name, record.get("title", ""), "", 0, seeds, made)
    counted = dict.fromkeys(("seeds", "pool", "targets", "tests", "tasks"), int)
    reading.check_record(settings, f"{path}: settings", {"model": str, **counted})
    about = (
        "{model}, pool of {pool:,}, {targets:,} targets, {tests:,} questions of {tasks} tasks, "
        "{seeds} seeds"
    ).format(**settings)
    name, model, pool = path.parent.parent.name, settings["model"], settings["pool"]
    return Study(name, about, model, pool, settings["seeds"], made)


def _outcome(row, arm, versus, where) -> ArmResult:
    kinds = {arm: str, "budget": float, "metrics": dict}
    reading.check_record(row, where, kinds, {"unit": str, "rows": int, "seeds": int})
    means, gaps = {}, {}
    for metric in outcomes.METRICS.keys() & row["metrics"].keys():
        place = f"{where}.metrics.{metric}"
        cell = reading.check_record(row["metrics"][metric], place, {"mean": float})
        means[metric] = cell["mean"]
        if cell.get(versus) is not None:
            kinds = {**NUMBERS, "p_holm": float}
            gaps[metric] = reading.check_record(cell[versus], f"{place}.{versus}", kinds)
    unit, rows = row.get("unit", "rows"), row.get("rows", 0)
    return ArmResult(row[arm], row["budget"], unit, rows, means, gaps)


def fingerprints(folder: pathlib.Path) -> dict[str, str]:
    """Returns {name: hash} of the study's file, which no stage has made."""
    return {path.name: artifacts.sha256(path) for path in files(folder)}


def claim(study: Study | None, cfg: config.Config, pool: int) -> str:
    """Writes what the study found of a run's method at its budget; empty where it has neither.

    Args:
        pool: rows of the run's; a study of another model or pool says nothing of the run.
    """
    if study is None or (study.model, study.pool) != (cfg.model.path, pool):
        return ""
    method, ratio = cfg.selection.method, cfg.selection.retention_ratio
    found = [o for o in study.compared if (o.arm, *o.cell) == (method, ratio, "rows")]
    said = []
    for metric in ("test_loss", "accuracy", "choice_loss"):
        if found and metric in found[0].versus:
            name, unit, factor, decimals = outcomes.METRICS[metric]
            cell = _difference(found[0].versus[metric], factor, decimals)
            verdict = "shown" if cell.strong else "not shown"
            unit = unit.replace("%", "points")
            said.append(f"{name.lower()} {cell.text} {unit} ({cell.interval}; {verdict})")
    if not said:
        return ""
    return (
        f"Over {study.seeds} seeds, {method} − random at {100 * ratio:g} %: {', '.join(said)}; "
        "95 % intervals over questions and seeds, shown where Holm's corrected p is below "
        f"{SURE:g}."
    )


def _difference(cell: Mapping[str, float], factor: float, decimals: int) -> tables.Cell:
    decimals = tables.enough(cell, decimals, factor)
    text = tables.number(factor * cell["mean"], decimals, sign=True)
    return tables.Cell(text, tables.interval(cell, decimals, factor), cell["p_holm"] < SURE)


def tabled(study: Study) -> list[tuple[str, tables.Table]]:
    """Tables the arms, (budget, table) in order: differences to random, levels of those without."""
    shown = [m for m in SHOWN if any(m in found.means for found in study.outcomes)]
    headers = ["Arm", "Rows"]
    headers += [outcomes.title(m).replace("(%)", "(%, points)") for m in shown]
    made = []
    for cell in sorted({found.cell for found in study.compared}):
        levels = [o for o in study.outcomes if not o.versus]
        levels = [o for o in levels if o.cell == cell or o.arm in EVERYWHERE]
        arms = [found for found in study.compared if found.cell == cell]
        arms.sort(key=lambda found: found.versus.get(shown[0], {"mean": 0.0})["mean"])
        rows = []
        for found in (*levels, *arms):
            name = found.arm if found.versus else f"{found.arm} (level)"
            rows.append([tables.Cell(name), tables.Cell(f"{found.rows:,}" if found.rows else "")])
            for metric in shown:
                _, _, factor, decimals = outcomes.METRICS[metric]
                if metric in found.versus:
                    rows[-1].append(_difference(found.versus[metric], factor, decimals))
                else:
                    mean = found.means.get(metric)
                    mean = None if mean is None else factor * mean
                    rows[-1].append(tables.Cell(tables.number(mean, decimals)))
        made.append((_budget(cell), tables.Table(headers, rows)))
    return made


def draw(study: Study) -> matplotlib.figure.Figure:
    """Draws differences to random: a panel for each metric, a color for each budget."""
    metrics = _panels(study)
    cells = sorted({found.cell for found in study.compared})
    names = _by_mean(study.compared, metrics[0])
    figure = matplotlib.figure.Figure((11, 0.3 * len(names) + 1.6))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        title, unit, factor, _ = outcomes.METRICS[metric]
        for k, cell in enumerate(cells):
            mine = [o for o in study.compared if o.cell == cell and metric in o.versus]
            ends = factor * np.array([[o.versus[metric][end] for end in ENDS] for o in mine])
            mean, low, high = ends.reshape(-1, len(ENDS)).T
            places = np.array([names.index(o.arm) for o in mine])
            places = places + 0.22 * (k - (len(cells) - 1) / 2)
            axis.errorbar(
                mean, places, xerr=[mean - low, high - mean], fmt="o", ms=3, lw=1,
                color=COLORS[k % len(COLORS)], label=_budget(cell),
            )  # fmt: skip
        axis.axvline(0, color=style.MUTED, linewidth=1)
        side = "right" if metric == "accuracy" else "left"
        unit = unit.replace("%", "points")
        axis.set_xlabel(f"{title.lower()} ({unit})\nminus random; {side} is better", fontsize=8)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(study.about, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def _budget(cell):
    share, unit = cell
    return f"{100 * share:g} %" + ("" if unit == "rows" else f" of {unit}")


def _panels(study):
    there = [m for m in PANELS if any(m in found.versus for found in study.compared)]
    return there[:MOST_PANELS]


def _by_mean(compared, metric):
    """Lists the arms by their mean difference over budgets, the best first."""
    gaps: dict[str, list[float]] = {}
    for found in compared:
        gaps.setdefault(found.arm, []).append(found.versus.get(metric, {"mean": 0.0})["mean"])
    sign = -1 if metric == "accuracy" else 1
    return sorted(gaps, key=lambda arm: sign * float(np.mean(gaps[arm])))


def picture(study: Study) -> style.Picture | None:
    """Draws the study with its numbers; None where nothing was compared with random."""
    if not study.compared:
        return None
    lines = [
        {"arm": o.arm, "budget": o.budget, "unit": o.unit, "rows": o.rows, "metric": metric}
        | {end: versus[end] for end in (*ENDS, "p_holm")}
        for o in study.compared
        for metric, versus in sorted(o.versus.items())
    ]
    return style.render({name: [line[name] for line in lines] for name in lines[0]}, draw, study)
