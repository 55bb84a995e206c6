"""The main job: score a pool, select, fine-tune, evaluate, report.

    python experiments/run_diq.py --config=configs/quickstart.py --workdir=runs/quickstart
    python experiments/run_diq.py --config=configs/quickstart.py --workdir=runs/one_percent \\
        --stages=prepare,influence --config.data.pool=my_pool.jsonl

A finished stage is skipped; a killed run continues; a changed config is refused, naming the change,
and so is a file that is not what its stage wrote. --overwrite deletes what a stage wrote, and
nothing that others put into its folder.
"""

from absl import flags
from ml_collections import config_flags

from diq_jax import pipeline, preflight
from diq_jax.commands import cli
from diq_jax.run import processes

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
STAGES = flags.DEFINE_string(
    "stages",
    "",
    f"Which stages to run, comma-separated: {', '.join(pipeline.STAGES)}. Empty = all.",
)
VERIFY = cli.define_verify()
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check all inputs, print them and what each stage would do, and stop."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Redo the stages even where they are done.")


def main() -> None:
    names = pipeline.parse_stages(STAGES.value)
    cfg = cli.read_config(CONFIG)
    if DRY_RUN.value:
        print(preflight.dry_run(cfg, cli.folder(WORKDIR), names))
        return
    if cfg.parallel.distributed:
        processes.join()
    pipeline.run(cfg, cli.folder(WORKDIR), names, OVERWRITE.value, cli.verify(VERIFY))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
