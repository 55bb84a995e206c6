"""What a run would read, do and take, and every input that it would miss: `diq run --dry_run`."""

import collections
import itertools
import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diq_jax import config, pipeline, prepare
from diq_jax.data import batches, encoded, preferences, sources
from diq_jax.difficulty import labels, trained
from diq_jax.influence import direction, engines, features, kinds, problems
from diq_jax.models import decoder, load
from diq_jax.pods import programs
from diq_jax.run import devices, stages
from diq_jax.selection import methods

SAMPLE_ROWS = 512  # the first of the pool, which tell how long its rows are
TIMED = 3  # batches
GIB = 2**30


def dry_run(cfg: config.Config, workdir: pathlib.Path, names: Sequence[str]) -> str:
    """Reads and checks all rows, opens the models, tries the chat template. Writes nothing.

    Where influence is to do, times three of its batches on these devices, after the one that
    compiles; with parallel.distributed there is no such estimate, as no other process has joined.

    Returns:
        Lines to print: each input with its rows, each stage with what would become of it, and of
        influence the tokens, batches, memory, FLOPs and hours.

    Raises:
        UserError: what the run itself would raise in its first second, and for any row.
    """
    methods.check(cfg)
    names = pipeline.wanted(cfg, names)
    alone = config.Parallel() if cfg.parallel.distributed else cfg.parallel  # none has joined
    context = stages.Context(cfg, workdir, devices.make_placement(alone))
    pipeline.check(context, names)
    lines = [f"{'model.path':<20} {cfg.model.path}"]
    counts = {}
    for field, spec, rows in _inputs(cfg, names):
        lines.append(f"{field:<20} {rows:>9,} rows  {spec}")
        counts[field] = rows
    lines.append("")
    outlooks = {name: stages.outlook(pipeline.STAGES[name], context) for name in names}
    lines += [f"{name:<20} {outlook}" for name, outlook in outlooks.items()]
    if cfg.parallel.distributed:
        lines += ["", "What several hosts need and take: `diq plan`."]
    elif "data.pool" in counts and outlooks.get("influence", "").startswith("to "):
        with devices.matmul_precision(cfg.model.dtype):
            lines += ["", *_cost(context, counts["data.pool"])]
    return "\n".join(lines)


def _cost(context: stages.Context, count: int) -> list[str]:
    """Says what the influence of a pool of `count` rows takes, from its first rows."""
    cfg, placement, settings = context.config, context.placement, context.config.influence
    pool = sources.stream_examples(
        cfg.data.pool, cfg.data.columns, cfg.data.pool_limit, turns=cfg.data.turns
    )
    rows, _, _ = encoded.encode_all(
        list(itertools.islice(pool, SAMPLE_ROWS)), prepare.open_layout(cfg), cfg.data.template,
        cfg.model.max_tokens, cfg.model.truncation,
    )  # fmt: skip
    if not rows:
        return [f"influence: none of the first {SAMPLE_ROWS} rows of data.pool fits the model."]
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    tokens = sum(len(row.input_ids) for row in rows) / len(rows)
    answers = sum(row.answer_tokens for row in rows) / len(rows)
    groups = problems.plan(settings, rows, placement.rows_multiple)
    shapes = collections.Counter((g.rows, g.tokens) for g in groups)
    size = decoder.size(model.cfg)
    kept = settings.batch_tokens * decoder.activation_bytes(model.cfg, settings.remat)
    gib = size * jnp.dtype(cfg.model.dtype).itemsize / GIB / placement.mesh.shape["model"]
    [name, *_] = programs.of_run(cfg)
    flops = programs.ideal_flops(name, model.cfg, count, tokens, answers)
    of = f"of the first {len(rows):,} rows"
    return [
        f"influence tokens     about {count * tokens:,.0f}: {tokens:.1f} {of}, {answers:.1f} "
        "scored",
        f"influence batches    about {len(groups) * count / len(rows):,.0f}: {of} rows x tokens "
        + ", ".join(f"{n} of {B} x {T}" for (B, T), n in sorted(shapes.items())),
        f"influence memory     {size:,} parameters, {gib:.3g} GiB on each device if not split "
        f"further; activations {kept / GIB:.3g} GiB of a batch's backward pass",
        f"influence FLOPs      at least {flops:.2g}",
        f"influence hours      {_hours(context, model, rows, groups, count * tokens)}",
    ]


def _hours(context, model, rows, groups, total) -> str:
    """Times a few batches of the most frequent shape, along one direction."""
    settings, placement = context.config.influence, context.placement
    if kinds.of_direction(settings).features:
        return f"not timed: influence.direction={settings.direction} follows a warm-up"
    space = direction.make_space(model, settings, placement)
    if settings.engine == "exact":
        v = direction.stack([space[0]], [1.0], settings.direction_rank)
        step = engines.exact_step(space, v, settings, model.cfg, placement)
    else:
        step = features.open_features(space, settings, model.cfg, placement, None).step
    shape = collections.Counter((g.rows, g.tokens, g.answers) for g in groups).most_common(1)[0][0]
    alike = [g for g in groups if (g.rows, g.tokens, g.answers) == shape]
    timed = list(itertools.islice(itertools.cycle(alike), TIMED))

    def run(group):
        jax.block_until_ready(step(placement.batch(batches.group_batch(rows, group))))

    run(timed[0])  # compiles
    start = time.perf_counter()
    for group in timed:
        run(group)
    seconds = time.perf_counter() - start
    speed = sum(len(rows[i].input_ids) for g in timed for i in g.indices) / seconds
    return (
        f"{total / speed / 3600:.2g}: {TIMED} batches of {shape[0]} x {shape[1]} timed, "
        f"{speed:,.0f} tokens/s on these {placement.mesh.size} devices"
    )


def _inputs(cfg, names):
    """Lists (field, what it names, rows) of what the stages read."""
    data, source, dpo = cfg.data, cfg.difficulty.source, cfg.finetune.dpo
    if "prepare" in names:
        prepare.open_layout(cfg)
        pool = sources.stream_examples(data.pool, data.columns, data.pool_limit, turns=data.turns)
        yield "data.pool", data.pool, sum(1 for _ in pool)
        targets = sources.load_targets(
            data.targets, data.targets_per_task, data.seed, data.columns, turns=data.turns
        )
        tests = sources.load_tests(
            data.tests, data.tests_per_task, data.seed, texts=True, columns=data.columns
        )
        prepare.check_tests(tests, cfg.evaluate.protocol)
        yield "data.targets", data.targets, len(targets)
        yield "data.tests", data.tests, len(tests)
    if "difficulty" in names and not labels.is_columns(source) and not trained.is_folder(source):
        yield labels.FIELD, source, len(labels.labelled_rows(source)[0])
    if "dpo" in names:
        pairs = preferences.load_preferences(dpo.data, dpo.limit, "finetune.dpo.data")
        yield "finetune.dpo.data", dpo.data, len(pairs)
