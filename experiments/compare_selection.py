r"""Does selection help? Methods x budgets x seeds: fine-tune, evaluate, one table and one picture.

    python experiments/compare_selection.py --preset=mini --workdir=runs/mini
    python experiments/compare_selection.py --config=configs/quickstart.py --workdir=runs/compare \
        --methods=diq,influence --budgets=0.01,0.05,0.1,1 --seeds=3 [--rankings=less=runs/less] \
        [--directions=adam,less] [--units=rows,tokens] [--dry_run]

The stages up to selection run first in --workdir, so that scores are made once. `random` is always
there, drawn anew for each seed; the budget 1 is the whole pool, trained once for all methods. A
preset is a line of flags (PRESETS), which your own flags override: `mini` is SmolLM2-135M on the
sample (or on your --config.data.*), 39 minutes on two CPU cores (132 rows of 256 tokens: 2.1e14
FLOPs by the formula, docs/results.md); `paper` the paper's grid; `quadrants` compares
equal budgets from each of the four. --rankings=NAME=WORKDIR[:METHOD] takes the order of another
finished workdir as one more method, such as another model's. --directions=less scores along another
direction in compare/directions, and adds the methods that read influence as diq@less and so on.
--units=tokens takes as many of a method's first rows as have the share of all tokens. Written:
compare/table.md, results.json, figure.png and a file for each training; a killed run continues with
the training it was in.
"""

import pathlib
import re
import sys

from absl import flags
from ml_collections import config_flags

from comparison import experiment, grid
from diq_jax.commands import cli
from diq_jax.run import processes

ROOT = pathlib.Path(__file__).parents[1]
PRESETS = {
    "mini": [
        f"--config={ROOT / 'configs/quickstart.py'}",
        "--methods=diq,influence,short_answers",
        "--budgets=0.01,0.05,0.1,1",
        "--seeds=2",
        "--config.finetune.accumulation_steps=2",  # two rows at once: less memory, less padding
    ],
    "quadrants": [
        "--methods=quadrant_1,quadrant_2,quadrant_3,quadrant_4",
        "--budgets=0.1",
        "--seeds=3",
    ],
    "paper": [
        f"--config={ROOT / 'configs/huatuo_llama31_8b.py'}",
        "--methods=diq,influence,difficulty_knowledge,difficulty_reasoning,difficulty_overall,"
        "short_answers,long_answers,similarity,perplexity,middle_perplexity,ifd,long_reasoning,"
        "k_center,facility_location",
        "--budgets=0.01,0.05,0.1,1",
        "--seeds=3",
        "--config.difficulty.model_scores=True",
    ],
}

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
METHODS = flags.DEFINE_list("methods", ["diq", "influence"], "Selection methods.")
BUDGETS = flags.DEFINE_list("budgets", ["0.01", "0.05", "0.1", "1"], "Shares of the pool to keep.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each method and budget.")
RANKINGS = flags.DEFINE_list("rankings", [], "More methods: NAME=WORKDIR[:METHOD].")
DIRECTIONS = flags.DEFINE_list(
    "directions", [], "Of influence: the methods also along these, as METHOD@DIRECTION."
)
UNITS = flags.DEFINE_list("units", ["rows"], "What budgets are shares of: rows, tokens, or both.")
PRESET = flags.DEFINE_enum("preset", None, list(PRESETS), "A line of flags to start from.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the cells and their predicted FLOPs.")


def with_preset(arguments: list[str]) -> list[str]:
    """Returns the user's flags, and the preset's that they do not name; configs come first."""
    found = re.search(r"(?:^| )--?preset[= ](\w+)", " ".join(arguments))
    given = {argument.split("=")[0].lstrip("-") for argument in arguments}
    extra = PRESETS.get(found[1], []) if found else []
    extra = [flag for flag in extra if flag.split("=")[0].lstrip("-") not in given]
    file = [flag for flag in extra if flag.startswith("--config=")]
    return [*file, *arguments, *(flag for flag in extra if flag not in file)]


def main() -> None:
    cfg = cli.read_config(CONFIG)
    request = grid.parse(
        METHODS.value, BUDGETS.value, SEEDS.value, RANKINGS.value, UNITS.value, DIRECTIONS.value
    )
    run = experiment.dry_run if DRY_RUN.value else experiment.run
    if cfg.parallel.distributed and not DRY_RUN.value:
        processes.join()
    run(cfg, cli.folder(WORKDIR), request, cli.verify(VERIFY))


if __name__ == "__main__":
    sys.argv[1:] = with_preset(sys.argv[1:])
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
