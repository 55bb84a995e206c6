r"""The main job: score a pool, select, fine-tune, evaluate, report.

    diq run --config=quickstart --workdir=runs/quickstart
    diq run --config=configs/quickstart.py --workdir=runs/one_percent \
        --stages=prepare,influence --config.data.pool=my_pool.jsonl
    diq run --from=runs/one_percent --stages=selection --workdir=runs/again

--config is a file, or the name of a shipped one. A finished stage is skipped; a killed run
continues; a changed config is refused, naming the change, and so is a file that is not what its
stage wrote. --overwrite deletes what a stage wrote, and nothing that others put into its folder.
Compiled programs are kept in ~/.cache/diq_jax (or $XDG_CACHE_HOME) for later runs, except with
parallel.distributed; set JAX_ENABLE_COMPILATION_CACHE=false to compile anew.

--from repeats the selection of a finished run in a new --workdir, from its record and its artifacts
alone, and compares the files byte by byte. Exit code 0: all are identical; 1: one is different.
"""

import contextlib
import pathlib

from absl import flags

from diq_jax import errors
from diq_jax.commands import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of this run; a URL, such as gs://bucket/run, is a folder there."
)
STAGES = flags.DEFINE_string(
    "stages",
    "",
    "Which stages to run, comma-separated: prepare, difficulty, influence, selection, finetune, "
    "dpo, evaluate, report. Empty = all.",
)
FROM = flags.DEFINE_string("from", None, "A finished run, whose selection is repeated.")
VERIFY = cli.define_verify()
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check all inputs, print them and what each stage would do, and stop."
)
TRACK = flags.DEFINE_list(
    "track", [], "Where curves, rates and each stage's numbers go too: tensorboard, wandb, trackio."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Redo the stages even where they are done.")


def main() -> None:
    """Runs the stages that the flags name."""
    cli.require(*(() if FROM.value else (CONFIG,)), WORKDIR)
    if FROM.value:
        from diq_jax.commands import repeat

        if CONFIG.value or DRY_RUN.value or OVERWRITE.value:
            raise errors.UserError("--from goes without --config, --dry_run and --overwrite.")
        repeat.selection(cli.folder(FROM), cli.folder(WORKDIR), STAGES.value, cli.verify(VERIFY))
        return
    cfg = cli.read_config(CONFIG)

    from diq_jax import pipeline, preflight  # seconds to import: mistakes in flags show before
    from diq_jax.run import processes

    names = pipeline.parse_stages(STAGES.value)
    opened = _workdir(WORKDIR.value or "")
    if cfg.parallel.distributed and not DRY_RUN.value:
        processes.join()
    with opened as workdir:
        if DRY_RUN.value:
            print(preflight.dry_run(cfg, workdir, names))
            return
        pipeline.run(cfg, workdir, names, OVERWRITE.value, cli.verify(VERIFY), TRACK.value)


def _workdir(url: str) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Opens the folder that --workdir names, a copy where it names a URL."""
    if not errors.is_url(url):
        return contextlib.nullcontext(cli.folder(WORKDIR))
    from diq_jax.run import mirror

    return mirror.opened(url, writes=not DRY_RUN.value)
