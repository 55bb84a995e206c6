"""Which order of the methods survives another split of the pool, and another size of the model?

    python experiments/compare_labs.py --labs=runs/lab0,runs/lab1,runs/wide --workdir=runs/labs

Reads lab.json of each folder of selection_lab.py. An interval of one lab is over seeds and
questions, for the pool and the base model that it has; what it says is true of that split alone.
Here every arm stands with its difference to random in each lab, and `holds` says in which measures
it is below random in all of them, each by Holm's correction in its own lab.
Written: labs.md, and labs.png, .svg, .csv.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
import pictures
from absl import flags

from diq_jax import errors
from diq_jax.commands import cli
from diq_jax.report import studies, style
from diq_jax.run import artifacts, reading
from lab import summary

LABS = flags.DEFINE_list("labs", None, "Folders of selection_lab.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the table and the figure go.")
MEASURES = ("choice_loss_letters", "test_loss_without_end")
APART = ("split", "width", "layers")  # the settings in which labs may differ
Cell = Mapping[str, float]  # mean, low, high, p_holm of a difference to random


def read(folders: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Returns {what a lab is: its rows}.

    Raises:
        UserError: there are fewer than two labs, one is not finished or is there twice, or they
            differ in a setting that is not of APART.
    """
    errors.check("--labs", len(folders) > 1, "at least two folders", ",".join(folders))
    found: dict[str, list[dict[str, Any]]] = {}
    common: dict[str, Any] | None = None
    for folder in folders:
        file = pathlib.Path(folder) / studies.LAB
        if not file.is_file():
            raise errors.UserError(f"--labs: {file} does not exist; selection_lab.py writes it.")
        made = reading.read_record(file, {"settings": dict, "rows": list})
        settings = made["settings"]
        reading.check_record(settings, f"{file}: settings", dict.fromkeys(APART, int))
        others = {key: value for key, value in settings.items() if key not in APART}
        common = others if common is None else common
        if wrong := [key for key in common | others if common.get(key) != others.get(key)]:
            raise errors.UserError(f"--labs: {folders[0]} and {folder} differ in {wrong[0]}.")
        name = f"split {settings['split']}, {settings['layers']} layers of {settings['width']}"
        errors.check("--labs", name not in found, "each split and size once", folder)
        found[name] = made["rows"]
    return found


def table(labs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a row for each arm and budget that every lab has, the arms that hold most first."""
    by_lab = {
        lab: {
            (row["arm"], row["budget"]): {m: row["metrics"][m]["versus_random"] for m in MEASURES}
            for row in rows
            if "versus_random" in row["metrics"][MEASURES[0]]
        }
        for lab, rows in labs.items()
    }
    shared = set.intersection(*(set(cells) for cells in by_lab.values()))
    made = []
    for arm, budget in shared:
        cells = {m: {lab: by_lab[lab][arm, budget][m] for lab in labs} for m in MEASURES}
        holds = [m for m in MEASURES if all(better(cell) for cell in cells[m].values())]
        made.append({"arm": arm, "budget": budget, "holds": holds, **cells})
    return sorted(made, key=lambda row: (row["budget"], -len(row["holds"]), mean_of(row)))


def better(cell: Cell) -> bool:
    """Tells whether an arm is below random in one lab."""
    return cell["high"] < 0 and cell["p_holm"] < studies.SURE


def mean_of(row: Mapping[str, Any]) -> float:
    """Returns the mean difference over measures and labs, which sorts the arms."""
    return float(np.mean([cell["mean"] for m in MEASURES for cell in row[m].values()]))


def as_markdown(rows: Sequence[Mapping[str, Any]], labs: Sequence[str]) -> str:
    """Writes a table for each budget; * where Holm's p is below 0.05."""
    lines = ["Differences to random; less is better.", ""]
    for budget in sorted({row["budget"] for row in rows}):
        heads = ["arm"]
        heads += [f"{summary.PANELS[m].split(' (')[0]}: {lab}" for m in MEASURES for lab in labs]
        lines += [f"**{100 * budget:g} %**", "", f"| {' | '.join([*heads, 'below in all'])} |"]
        lines.append("|---" * (len(heads) + 1) + "|")
        for row in (row for row in rows if row["budget"] == budget):
            cells = [summary.difference(row[m][lab], 2) for m in MEASURES for lab in labs]
            holds = ", ".join(summary.PANELS[m].split(" (")[0] for m in row["holds"])
            lines.append(f"| {' | '.join([row['arm'], *cells, holds])} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], labs: Sequence[str]) -> matplotlib.figure.Figure:
    """Draws a row of panels for each budget, a panel for each measure, a color for each lab."""
    budgets = sorted({row["budget"] for row in rows})
    most = max(sum(row["budget"] == budget for row in rows) for budget in budgets)
    figure = matplotlib.figure.Figure((10, (0.34 * most + 1.2) * len(budgets)))
    axes = figure.subplots(len(budgets), len(MEASURES), squeeze=False)
    for line, budget in zip(axes, budgets, strict=True):
        mine = [row for row in rows if row["budget"] == budget]
        for axis, measure in zip(line, MEASURES, strict=True):
            for k, lab in enumerate(labs):
                cells = [row[measure][lab] for row in mine]
                mean, low, high = (np.array([c[x] for c in cells]) for x in ("mean", "low", "high"))
                axis.errorbar(
                    mean, np.arange(len(mine)) + 0.2 * (k - (len(labs) - 1) / 2),
                    xerr=[mean - low, high - mean], fmt="o", ms=3, lw=1,
                    color=studies.COLORS[k % len(studies.COLORS)], label=lab,
                )  # fmt: skip
            axis.axvline(0, color=style.MUTED, linewidth=1)
            axis.grid(axis="y", visible=False)
            names = [row["arm"] for row in mine] if measure == MEASURES[0] else []
            axis.set_yticks(range(len(mine)), names or [""] * len(mine), fontsize=8)
            axis.invert_yaxis()
            axis.set_xlabel(f"{summary.PANELS[measure]}, {100 * budget:g} %, minus random",
                            fontsize=8)  # fmt: skip
    axes[0][0].legend(fontsize=8)
    pictures.title(figure, "The same methods in several labs; left is better")
    return figure


def main() -> None:
    """Reads, compares and writes."""
    labs = read(LABS.value or [])
    rows = table(labs)
    if not rows:
        raise errors.UserError("--labs: no arm and budget is in every lab.")
    workdir, names = cli.folder(WORKDIR), list(labs)
    text = as_markdown(rows, names)
    artifacts.write_text(workdir / "labs.md", text)
    pictures.write(workdir, "labs", rows, draw, rows, names)
    print(text)


if __name__ == "__main__":
    flags.mark_flags_as_required(["labs", "workdir"])
    cli.run(main)
