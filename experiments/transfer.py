"""Do one model's scores select for another? Its order against the trained model's own and random.

    python experiments/transfer.py --config=configs/quickstart.py --workdir=runs/large \\
        --scores=runs/small [--methods=diq] [--budgets=0.05,0.1] [--seeds=3]

--scores is the workdir of a finished run (stages up to selection) of the other model on the same
pool. The comparison of compare_selection.py, with its results, under --workdir/compare; the rows
METHOD_transferred have the other model's order, and its cost.
"""

from absl import flags
from ml_collections import config_flags

from comparison import experiment, grid
from diq_jax.commands import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
SCORES = flags.DEFINE_string("scores", None, "The workdir of the model whose scores select.")
METHODS = flags.DEFINE_list("methods", ["diq"], "Selection methods.")
BUDGETS = flags.DEFINE_list("budgets", ["0.05", "0.1"], "Shares of the pool to keep.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each method and budget.")


def main() -> None:
    cfg = cli.read_config(CONFIG)
    rankings = [f"{method}_transferred={SCORES.value}:{method}" for method in METHODS.value]
    request = grid.parse(METHODS.value, BUDGETS.value, SEEDS.value, rankings)
    experiment.run(cfg, cli.folder(WORKDIR), request, cli.verify(VERIFY))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "scores"])
    cli.run(main)
