"""The stages in order."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator, Sequence

from diq_jax import config, errors, prepare
from diq_jax.difficulty import stage as difficulty
from diq_jax.evaluate import stage as evaluate
from diq_jax.finetune import dpo_stage as dpo
from diq_jax.finetune import stage as finetune
from diq_jax.influence import stage as influence
from diq_jax.report import stage as report
from diq_jax.run import artifacts, compiled, devices, processes, progress, records, stages, tracking
from diq_jax.selection import methods
from diq_jax.selection import stage as selection

LOCK = ".lock"


def _prepared(targets: bool = True) -> tuple[str, ...]:
    return (prepare.POOL, prepare.TARGETS) if targets else (prepare.POOL,)


def check_difficulty(context: stages.Context) -> None:
    """Raises UserError as difficulty.check, also where a selection method needs what is missing."""
    difficulty.check(context, methods.perspectives(context.config))


def _existing(*names: str):
    """Returns what lists those artifacts that exist, for stages that show what is made so far."""
    return lambda context: tuple(name for name in names if context.path(name).exists())


SELECTION = ("selection/selection.parquet", "selection/baselines.parquet")
SCORES = ("difficulty/difficulty.parquet", "influence/influence.parquet")
# What some selection methods read too. The manifest holds a checksum of every file of the store.
MORE_SCORES = (
    "difficulty/model_scores.parquet", "influence/tuned.parquet", "influence/store/manifest.json",
)  # fmt: skip
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
MODEL = ("config.json", "generation_config.json", "model*.safetensors*", *TOKENIZER)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRAINED = tuple(
    f"{folder}/{name}"
    for folder in ("adapter", "best_adapter", "model", "best_model", "baselines/*")
    for name in (*ADAPTER, *MODEL)
)
# What each stage has in its folder (stages.Stage.writes).
WRITES = {
    "prepare": ("pool.parquet", "targets.parquet", "tests.parquet"),
    "difficulty": (
        "difficulty.parquet", "metrics.json", "model_scores.parquet", "partial/*",
    ),
    "influence": (
        "influence.parquet", "tuned.parquet", "partial/*",
        "warmup/epoch-*.safetensors", "warmup/state-*",
        "store*/train-*.npy", "store*/targets.npy", "store*/examples.parquet",
        "store*/manifest.json",
    ),
    "selection": (
        "selection.parquet", "baselines.parquet", "thresholds.json", "selected.jsonl",
        "selected.messages.jsonl", "examples.parquet", "hygiene.parquet",
    ),
    "finetune": ("losses.jsonl", *TRAINED, "state/*", "tensorboard/*"),
    "dpo": (
        "losses.jsonl", "reference.parquet", "partial/*",
        *(f"adapter/{name}" for name in ADAPTER), "state/*", "tensorboard/*",
    ),
    "evaluate": ("results.json", "predictions.jsonl", "partial/*"),
    "report": (
        "report.html", "rows/*.gz", *report.FILES,
    ),
}  # fmt: skip

STAGES = {
    stage.name: stage
    for stage in (
        stages.Stage(
            "prepare", lambda context: (), WRITES["prepare"], prepare.fingerprints, prepare.run,
            check=prepare.check,
        ),
        stages.Stage(
            "difficulty",
            lambda context: _prepared(targets=context.config.difficulty.model_scores),
            WRITES["difficulty"], difficulty.fingerprints, difficulty.run, everywhere=True,
            check=check_difficulty,
        ),
        stages.Stage(
            "influence", lambda context: _prepared(), WRITES["influence"],
            influence.fingerprints, influence.run, everywhere=True, check=influence.check,
        ),
        stages.Stage(
            "selection",
            lambda context: (
                *_prepared(), prepare.TESTS, *SCORES, *_existing(*MORE_SCORES)(context),
            ),
            WRITES["selection"], selection.fingerprints, selection.run, check=selection.check,
        ),
        stages.Stage(
            "finetune",
            lambda context: (
                *_prepared(targets=context.config.finetune.eval_every_steps > 0), *SELECTION,
            ), WRITES["finetune"], finetune.fingerprints, finetune.run, everywhere=True,
            check=finetune.check,
        ),
        stages.Stage(
            "dpo", dpo.reads, WRITES["dpo"], dpo.fingerprints, dpo.run, everywhere=True,
        ),
        stages.Stage(
            "evaluate", evaluate.reads, WRITES["evaluate"], evaluate.fingerprints, evaluate.run,
            everywhere=True,
        ),
        stages.Stage(
            "report",
            lambda context: (
                prepare.POOL, prepare.TARGETS, *SCORES, SELECTION[0], "selection/thresholds.json",
                *_existing("difficulty/metrics.json", "finetune/losses.jsonl",
                           "dpo/losses.jsonl", "selection/hygiene.parquet",
                           "selection/baselines.parquet", "evaluate/results.json",
                           *MORE_SCORES)(context),
            ), WRITES["report"], report.fingerprints, report.run,
        ),
    )
}  # fmt: skip


def parse_stages(text: str) -> list[str]:
    """Parses a comma-separated list of stages, and puts them in pipeline order; "" = all.

    Raises:
        UserError: a name that is no stage.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        errors.check_choice("--stages", name, STAGES)
    return [name for name in STAGES if not named or name in named]


def wanted(cfg: config.Config, names: Sequence[str]) -> list[str]:
    """Returns the stages to run of those that are named: no dpo without preferences."""
    skipped = ["dpo"] if not cfg.finetune.dpo.data and list(names) == list(STAGES) else []
    return [name for name in names if name not in skipped]


def check(context: stages.Context, names: Sequence[str]) -> None:
    """Raises UserError for what would end one of the stages after hours of others."""
    if processes.is_first():
        _check_named(context.config, names)
        for name in names:
            STAGES[name].check(context)


def _check_named(cfg, names):
    """Refuses the shipped rows in the place of the user's own unless the user asks for them."""
    fields = {"prepare": ("data.targets", "data.tests"), "difficulty": ("difficulty.source",)}
    read = [field for name, found in fields.items() if name in names for field in found]
    blank = [f for f in read if not getattr(getattr(cfg, f.split(".")[0]), f.split(".")[1]).strip()]
    if blank:
        raise errors.UserError(
            f"{' and '.join(blank)} must be named, since data.pool is not the shipped sample: your "
            "own rows, or the word sample for the shipped ones."
        )


def run(
    cfg: config.Config,
    workdir: pathlib.Path,
    names: Sequence[str],
    overwrite: bool,
    verify: bool = True,
    track: Sequence[str] = (),
) -> None:
    """Runs the named stages in `workdir`, one run at a time.

    With parallel.distributed every process calls this after processes.join(); the workdir is on a
    file system that all see, or a copy that `mirror` keeps.

    Args:
        verify: whether artifacts are held against the records of the stages that made them.
        track: of tracking.PACKAGES, those that are told all numbers.

    Raises:
        UserError: bad input, or another run holds the workdir.
    """
    methods.check(cfg)
    names = wanted(cfg, names)
    with (
        at_work(cfg, workdir, verify) as context,
        progress.logged(workdir),
        tracking.opened(track, workdir, dataclasses.asdict(cfg)),
    ):
        progress.note(f"stages {', '.join(names)}")
        spread = context
        if cfg.parallel.distributed:
            everywhere = devices.make_placement(cfg.parallel, everywhere=True)
            spread = dataclasses.replace(context, placement=everywhere)
        check(context, names)
        for name in names:
            stage = STAGES[name]
            ran = stages.execute(stage, spread if stage.everywhere else context, overwrite)
            if not processes.is_first():
                continue
            record = records.finished(workdir, name)
            rate = record.get("tokens_per_second")
            done = f"{record['rows']:,} rows, {record['seconds']:.1f} s"
            done += f", {rate:,.0f} tokens/s" if rate else ""
            line = f"{name:<10}  {done if ran else f'done before ({done})'}"
            print(line, flush=True)
            progress.note(line)
            told = ("rows", "seconds", "tokens", "tokens_per_second", "peak_memory_mib")
            known = {key: record[key] for key in told if key in record}
            progress.event("stage", name=name, ran=ran, **known)
            numbers = {key: value for key, value in known.items() if key != "peak_memory_mib"}
            numbers |= known.get("peak_memory_mib", {})
            progress.measured(f"stage {name}", 0, [numbers] if ran else [])
            if ran and name == "prepare":
                check(context, names)
    if "report" in names and processes.is_first():
        print(report.summary(context))


@contextlib.contextmanager
def at_work(
    cfg: config.Config, workdir: pathlib.Path, verify: bool = True
) -> Iterator[stages.Context]:
    """Holds the workdir, and the matrix products at the precision that the model's dtype asks for.

    Compiled programs are kept for later runs, except with parallel.distributed: hosts that share
    the work of compiling on GPUs would wait for one that need not compile.

    Raises:
        UserError: another run holds the workdir.
    """
    if not cfg.parallel.distributed and (folder := compiled.keep()):
        print(f"compiled programs are kept in {folder} (JAX_ENABLE_COMPILATION_CACHE=false: not)")
    context = stages.Context(cfg, workdir, devices.make_placement(cfg.parallel), verify)
    with locked(workdir), devices.matmul_precision(cfg.model.dtype):
        yield context


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the folder, made if need be. Raises UserError where another run does."""
    if not processes.is_first():
        yield  # the first process holds it for all
        return
    lock = _lock(workdir)
    try:
        yield
    finally:
        os.close(lock)


def _lock(workdir) -> int:
    """Opens a file whose lock ends with the process; nothing is ever written into it."""
    try:
        artifacts.make_folder(workdir)
        lock = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise errors.UserError(f"Another run is at work in {workdir}.") from None
    except OSError as e:
        if e.errno == errno.ELOOP and (workdir / LOCK).is_symlink():
            raise errors.UserError(
                f"--workdir: {workdir / LOCK} is a symbolic link, not the lock of a run: remove "
                "it, or name another --workdir."
            ) from None
        raise errors.UserError(f"--workdir: {workdir} cannot be written: {e.strerror}.") from None
    return lock
