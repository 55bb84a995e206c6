"""Which quadrant is worth training on? Equal budgets from each of the four, and from all by chance.

    python experiments/quadrant_pilot.py --config=configs/quickstart.py --workdir=runs/quadrants \\
        [--budgets=0.1] [--seeds=3]

The comparison of compare_selection.py with the methods quadrant_1 ... quadrant_4 and random, and
with its results, under --workdir/compare. A quadrant of fewer examples than the budget is filled up
from the others, in selection.quadrant_order.
"""

from absl import flags
from ml_collections import config_flags

from comparison import experiment, grid
from diq_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
BUDGETS = flags.DEFINE_list("budgets", ["0.1"], "Shares of the pool to keep.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each quadrant and budget.")


def main() -> None:
    cfg = cli.read_config(CONFIG)
    methods = [f"quadrant_{q}" for q in (1, 2, 3, 4)]
    request = grid.parse(methods, BUDGETS.value, SEEDS.value, [])
    experiment.run(cfg, cli.folder(WORKDIR), request, cli.verify(VERIFY))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
