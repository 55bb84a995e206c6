r"""How many targets does a ranking need? Ranks and the chosen 1 % from few targets against many.

    python experiments/run_diq.py --config=.. --workdir=runs/targets --stages=prepare,influence \
        --config.influence.engine=projected --config.influence.targets=example \
        --config.data.targets_per_task=75
    python experiments/measure_targets.py --workdir=runs/targets [--sizes=20,45,90,180,225,360] \
        [--draws=200] [--budget=0.01]

Reads the influence of every row on every target, which one gradient store gave. Of each size, sets
of targets are drawn without replacement, as evenly over tasks as can be. A set is compared with all
targets, and, up to half of them, with a second set that shares none: how far the Spearman
correlation of the two rankings is from 1, and which share of the chosen rows both choose. (A set
agrees with all targets also because it is a part of them; two apart say what new targets would.)
Written: targets.json, targets.png, .svg, .csv in WORKDIR/targets_study.
"""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import pictures
from absl import flags

from diq_jax import errors
from diq_jax.commands import cli
from diq_jax.report import style
from diq_jax.run import artifacts, records
from diq_jax.selection import select
from lab import settling

WORKDIR = flags.DEFINE_string("workdir", None, "A run with influence.targets=example.")
SIZES = flags.DEFINE_list("sizes", ["20", "45", "90", "180", "225", "360"], "Targets of a set.")
DRAWS = flags.DEFINE_integer("draws", 200, "Sets of each size.", lower_bound=2)
BUDGET = flags.DEFINE_float("budget", 0.01, "The share of the pool that is chosen.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
FOLDER = "targets_study"


def read(workdir) -> tuple[np.ndarray, list[str]]:
    """Reads the influence of each row on each target, (n, Q), and the targets' tasks.

    Raises:
        UserError: the run has no influence for each target.
    """
    table = records.table(workdir, "influence/influence.parquet")
    targets = records.table(workdir, "prepare/targets.parquet")
    if "influence_by_target" not in table.column_names:
        raise errors.UserError(f"{workdir} was not scored with influence.targets=example.")
    by_target = np.stack(table["influence_by_target"].combine_chunks().to_numpy(False))
    tasks = targets["task"].to_pylist()
    if by_target.shape[1] != len(tasks):
        raise errors.UserError(
            f"{workdir} has {by_target.shape[1]} groups of {len(tasks)} targets: score it with "
            "influence.targets=example."
        )
    return by_target.astype(np.float64), tasks


def plot(rows: Sequence[dict], title: str) -> matplotlib.figure.Figure:
    """Draws a panel for each measure, a line for each kind."""
    figure = matplotlib.figure.Figure((8, 3.4))
    for axis, (name, label) in zip(figure.subplots(1, 2), settling.MEASURES.items(), strict=True):
        for kind, color in (("all", style.ARMS[0]), ("apart", style.SELECTED)):
            mine = [row for row in rows if row["kind"] == kind]
            sizes = [row["size"] for row in mine]
            mean, low, high = ([row[name][k] for row in mine] for k in ("mean", "low", "high"))
            against = "against all" if kind == "all" else "against as many others"
            axis.plot(sizes, mean, "o-", ms=3, color=color, label=against)
            axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_xlabel("targets")
        axis.set_ylabel(label)
    axis.legend(fontsize=8)
    pictures.title(figure, title)
    return figure


def main() -> None:
    """Reads the run, compares, writes and prints."""
    workdir = cli.folder(WORKDIR)
    errors.check("--budget", 0 < BUDGET.value <= 1, "a share of the pool", BUDGET.value)
    by_target, tasks = read(workdir)
    if not all(s.isdigit() and 0 < int(s) <= len(tasks) for s in SIZES.value):
        raise errors.UserError(
            f"--sizes must be whole numbers of at most {len(tasks)} targets; got {SIZES.value}."
        )
    keep = select.budget(BUDGET.value, len(by_target))
    sizes = sorted(int(s) for s in SIZES.value)
    rows = settling.study(by_target, tasks, sizes, DRAWS.value, keep, SEED.value)
    title = (
        f"{len(by_target):,} rows, {keep} chosen, {len(tasks)} targets of {len(set(tasks))} tasks"
    )
    folder = workdir / FOLDER
    artifacts.write_json(folder / "targets.json", {"title": title, "rows": rows})
    pictures.write(folder, "targets", rows, plot, rows, title)
    print(title)
    print(f"{'targets':>8}  {'against':<8}{'Spearman':<26}{'chosen in both':<26}")
    for row in rows:
        cells = [f"{c['mean']:.3f} ({c['low']:.3f} to {c['high']:.3f})"
                 for c in (row[name] for name in settling.MEASURES)]  # fmt: skip
        print(f"{row['size']:>8}  {row['kind']:<8}{cells[0]:<26}{cells[1]:<26}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
