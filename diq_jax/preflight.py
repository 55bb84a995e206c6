"""What a run would read and do, and every input that it would miss: `diq run --dry_run`."""

import pathlib
from collections.abc import Sequence

from diq_jax import config, pipeline, prepare
from diq_jax.data import preferences, sources
from diq_jax.difficulty import labels, trained
from diq_jax.run import devices, stages
from diq_jax.selection import methods


def dry_run(cfg: config.Config, workdir: pathlib.Path, names: Sequence[str]) -> str:
    """Reads and checks all rows, opens the models, tries the chat template, and looks at the
    workdir. Writes nothing.

    Returns:
        Lines to print: each input with its rows, each stage with what would become of it.

    Raises:
        UserError: what the run itself would raise in its first second, and for any row.
    """
    methods.check(cfg)
    names = pipeline.wanted(cfg, names)
    context = stages.Context(cfg, workdir, devices.make_placement(cfg.parallel))
    pipeline.check(context, names)
    lines = [f"{'model.path':<20} {cfg.model.path}"]
    for field, spec, rows in _inputs(cfg, names):
        lines.append(f"{field:<20} {rows:>9,} rows  {spec}")
    lines.append("")
    for name in names:
        lines.append(f"{name:<20} {stages.outlook(pipeline.STAGES[name], context)}")
    return "\n".join(lines)


def _inputs(cfg, names):
    """Lists (field, what it names, rows) of what the stages read."""
    data, source, dpo = cfg.data, cfg.difficulty.source, cfg.finetune.dpo
    if "prepare" in names:
        prepare.open_layout(cfg)
        pool = sources.stream_examples(data.pool, data.columns, data.pool_limit)
        yield "data.pool", data.pool, sum(1 for _ in pool)
        targets = sources.load_targets(data.targets, data.targets_per_task, data.seed, data.columns)
        tests = sources.load_tests(data.tests, data.tests_per_task, data.seed, texts=True)
        prepare.check_tests(tests, cfg.evaluate.protocol)
        yield "data.targets", data.targets, len(targets)
        yield "data.tests", data.tests, len(tests)
    if "difficulty" in names and not labels.is_columns(source) and not trained.is_folder(source):
        yield labels.FIELD, source, len(labels.labelled_rows(source)[0])
    if "dpo" in names:
        pairs = preferences.load_preferences(dpo.data, dpo.limit, "finetune.dpo.data")
        yield "finetune.dpo.data", dpo.data, len(pairs)
