"""The stages in order: prepare, difficulty, influence, selection, finetune, dpo, evaluate and
report.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from absl import logging

from diq_jax import config, errors
from diq_jax.data import chat, encoded, example, sources
from diq_jax.difficulty import stage as difficulty
from diq_jax.evaluate import generation
from diq_jax.evaluate import stage as evaluate
from diq_jax.finetune import dpo_stage as dpo
from diq_jax.finetune import stage as finetune
from diq_jax.influence import stage as influence
from diq_jax.models import checkpoint, hf, tokenizer
from diq_jax.models import config as model_config
from diq_jax.report import stage as report
from diq_jax.run import artifacts, devices, processes, records, stages
from diq_jax.selection import hygiene_stage, methods
from diq_jax.selection import stage as selection

LOCK = ".lock"
POOL, TARGETS, TESTS = (f"prepare/{name}.parquet" for name in ("pool", "targets", "tests"))


def prepare_fingerprints(context: stages.Context) -> dict[str, str]:
    cfg = context.config
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    tokens = tokenizer.fingerprints(cfg.model.path, "model.path")
    return {"model.path": source.fingerprint, **tokens} | {
        f"data.{name}": sources.fingerprint(getattr(cfg.data, name), f"data.{name}", name)
        for name in ("pool", "targets", "tests")
    }


def check_inputs(context: stages.Context) -> None:
    """Raises UserError where a file that `prepare` reads is missing."""
    data = context.config.data
    for name in ("pool", "targets", "tests"):
        sources.check(getattr(data, name), f"data.{name}", name)
    checkpoint.open_checkpoint(context.config.model.path, "model.path")


def prepare(context: stages.Context) -> dict[str, Any]:
    """Reads, checks and tokenises pool, targets and tests: what all later stages read."""
    cfg, data = context.config, context.config.data
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    shape = model_config.decoder_config(source.config, "model.path")
    hf.check_decoder(source, shape, "model.path")
    if cfg.model.max_tokens > shape.max_positions:
        raise errors.UserError(
            f"model.max_tokens must be at most {shape.max_positions}, the model's positions; got "
            f"{cfg.model.max_tokens}."
        )
    pool = sources.load_examples(data.pool, data.columns, data.pool_limit)
    targets = sources.load_targets(data.targets, data.targets_per_task, data.seed, data.columns)
    tests = sources.load_tests(data.tests, data.tests_per_task, data.seed)
    evaluate.groups(cfg.evaluate, {test.task for test in tests})
    layout = open_layout(cfg)
    if cfg.finetune.dpo.data:  # read again by the stage dpo: a wrong row shows now, not hours later
        dpo.load_pairs(cfg, layout)

    counts = {}

    def encode(name: str, examples: list[example.Example]) -> list[example.Encoded]:
        rows, outcomes, dropped = encoded.encode_all(
            examples, layout, data.template, cfg.model.max_tokens, cfg.model.truncation,
            where=f"data.{name}: example",
        )  # fmt: skip
        counts[name] = {k: outcomes[k] for k in ("whole", "cut", "dropped")}
        if dropped:
            counts[name]["dropped_ids"] = dropped
        if outcomes["cut"] or dropped:
            logging.warning(
                "%s: %d of %d examples are longer than model.max_tokens = %d: %d cut, %d dropped "
                "(model.truncation = %s).",
                name, outcomes["cut"] + outcomes["dropped"], len(examples), cfg.model.max_tokens,
                outcomes["cut"], outcomes["dropped"], cfg.model.truncation,
            )  # fmt: skip
        if not rows:
            raise errors.UserError(
                f"data.{name}: all {len(examples)} examples are longer than model.max_tokens = "
                f"{cfg.model.max_tokens} and model.truncation={cfg.model.truncation} drops them."
            )
        return rows

    pool_rows = encode("pool", pool)
    _write(context, POOL, pool, pool_rows, ("source", "question", "reasoning", "answer", "row"))
    target_rows = encode("targets", targets)
    _write(context, TARGETS, targets, target_rows, ("task", "question", "choices"))
    options = encoded.encode_options(tests, layout, cfg.model.max_tokens)
    if cfg.evaluate.protocol == "generate":  # asked again by the stage evaluate
        generation.ask(tests, layout)
    _write_tests(context, tests, options, layout.end_ids)
    encoded_rows = [*pool_rows, *target_rows, *(row for rows in options for row in rows)]
    return {
        "rows": len(pool_rows) + len(target_rows) + len(tests),
        "tokens": sum(len(row.input_ids) for row in encoded_rows),
        "examples": counts,
        "target_tasks": dict(collections.Counter(t.task for t in targets)),
        "test_tasks": dict(collections.Counter(t.task for t in tests)),
    }


def open_layout(cfg: config.Config) -> chat.Layout:
    """How the model's tokenizer lays out a conversation, with a warning where that may surprise.

    Raises:
        UserError: no tokenizer that can be used, or a chat template (chat.make_layout).
    """
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    vocab_size = model_config.decoder_config(source.config, "model.path").vocab_size
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, vocab_size, cfg.data.date, "model.path")
    if layout.render is None:
        logging.warning(
            "%s has no chat template: prompts are 'Question: ... Answer: ...'.", cfg.model.path
        )
    elif layout.opened and chat.OPEN not in chat.TEMPLATES.get(cfg.data.template, ""):
        logging.warning(
            "%s opens %s at the end of its prompts. data.template=%s closes it at once; "
            "data.template=think puts the reasoning into it.",
            cfg.model.path, chat.OPEN, cfg.data.template,
        )  # fmt: skip
    return layout


def _write(context, name, examples, rows, columns):
    """One table row for each encoded example, in the order of the file."""
    by_id = {e.example_id: e for e in examples}
    kept = [by_id[row.example_id] for row in rows]
    read = {
        "row": lambda e: json.dumps(e.row, ensure_ascii=False, allow_nan=False),
        # Where the options stand apart, the question is the stem.
        "question": lambda e: e.question if "choices" in columns else chat.question_text(e),
        "source": lambda e: str(e.row.get("source") or ""),
        "choices": _choices,
    }
    texts = {c: [read.get(c, lambda e, c=c: getattr(e, c))(e) for e in kept] for c in columns}
    if "choices" in texts:  # which may all be empty
        texts["choices"] = pa.array(texts["choices"], pa.list_(pa.string()))
    table = {"example_id": [e.example_id for e in kept], **texts, **encoded.columns(rows)}
    artifacts.write_table(context.path(name), table)


def _write_tests(context, tests, options, end_ids):
    """One table row for each question: the prompt's tokens once, and each option's after it."""
    prompts, answers = [], []
    for rows in options:
        start = int((rows[0].labels == example.IGNORED).sum())
        prompts.append(rows[0].input_ids[:start])
        answers.append([row.input_ids[start:].tolist() for row in rows])
    letters = [list(test.options) for test in tests]
    right = [names.index(t.answer_idx) for t, names in zip(tests, letters, strict=True)]
    artifacts.write_table(
        context.path(TESTS),
        {
            "example_id": [test.example_id for test in tests],
            "task": [test.task for test in tests],
            "subject": [str(test.row.get("subject") or "") for test in tests],
            "question": [test.question for test in tests],
            "choices": pa.array([_choices(test) for test in tests], pa.list_(pa.string())),
            "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
            "options": pa.array(letters, pa.list_(pa.string())),
            "option_ids": pa.array(answers, pa.list_(pa.list_(pa.int32()))),
            "answer": pa.array(right, pa.int32()),
            "end_ids": pa.array([end_ids] * len(tests), pa.list_(pa.int32())),
        },
    )


def _choices(row: example.Example) -> list[str]:
    """The texts of the options, in order."""
    return list((row.options or {}).values())


def _none(context: stages.Context) -> dict[str, str]:
    return {}


def check_difficulty(context: stages.Context) -> None:
    """Raises UserError as difficulty.check, also where a selection method needs what is missing."""
    difficulty.check(context, methods.perspectives(context.config))


def _existing(*names: str):
    """Those artifacts that are there: a stage that shows or compares what has been made so far."""
    return lambda context: tuple(name for name in names if context.path(name).exists())


SELECTION = ("selection/selection.parquet", "selection/baselines.parquet")
SCORES = ("difficulty/difficulty.parquet", "influence/influence.parquet")
# What some selection methods read too. The manifest holds a checksum of every file of the store.
MORE_SCORES = ("difficulty/model_scores.parquet", "influence/store/manifest.json")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
MODEL = ("config.json", "model*.safetensors*", *TOKENIZER)
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
        "influence.parquet", "partial/*", "warmup/epoch-*.safetensors",
        "store*/train-*.npy", "store*/targets.npy", "store*/examples.parquet",
        "store*/manifest.json",
    ),
    "selection": (
        "selection.parquet", "baselines.parquet", "thresholds.json", "selected.jsonl",
        "hygiene.parquet",
    ),
    "finetune": ("losses.jsonl", *TRAINED, "state/*", "tensorboard/*"),
    "dpo": (
        "losses.jsonl", "reference.parquet", "partial/*",
        *(f"adapter/{name}" for name in ADAPTER), "state/*", "tensorboard/*",
    ),
    "evaluate": ("results.json", "predictions.jsonl", "partial/*"),
    "report": ("report.html", *(f"{name}.png" for name in report.PICTURES)),
}  # fmt: skip

STAGES = {
    stage.name: stage
    for stage in (
        stages.Stage(
            "prepare", lambda context: (), WRITES["prepare"], prepare_fingerprints, prepare,
            check=check_inputs,
        ),
        stages.Stage(
            "difficulty",
            lambda context: (POOL, TARGETS) if context.config.difficulty.model_scores else (POOL,),
            WRITES["difficulty"], difficulty.fingerprints, difficulty.run, check=check_difficulty,
        ),
        stages.Stage(
            "influence", lambda context: (POOL, TARGETS), WRITES["influence"],
            influence.fingerprints, influence.run, everywhere=True, check=influence.check,
        ),
        stages.Stage(
            "selection",
            lambda context: (POOL, TARGETS, TESTS, *SCORES, *_existing(*MORE_SCORES)(context)),
            WRITES["selection"], hygiene_stage.fingerprints, selection.run, check=selection.check,
        ),
        stages.Stage(
            "finetune",
            lambda context: (
                POOL, *SELECTION, *((TARGETS,) if context.config.finetune.eval_every_steps else ()),
            ), WRITES["finetune"], finetune.fingerprints, finetune.run, check=finetune.check,
        ),
        stages.Stage(
            "dpo", dpo.reads, WRITES["dpo"], dpo.fingerprints, dpo.run,
        ),
        stages.Stage(
            "evaluate", evaluate.reads, WRITES["evaluate"], evaluate.fingerprints, evaluate.run,
        ),
        stages.Stage(
            "report",
            lambda context: (
                POOL, *SCORES, SELECTION[0], "selection/thresholds.json",
                *_existing("difficulty/metrics.json", "finetune/losses.jsonl",
                           "dpo/losses.jsonl", "selection/hygiene.parquet",
                           "evaluate/results.json")(context),
            ), WRITES["report"], _none, report.run,
        ),
    )
}  # fmt: skip


def parse_stages(text: str) -> list[str]:
    """The stages named in a comma-separated list, in pipeline order; "" = all.

    Raises:
        UserError: a name that is no stage.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        errors.check_choice("--stages", name, STAGES)
    return [name for name in STAGES if not named or name in named]


def wanted(cfg: config.Config, names: Sequence[str]) -> list[str]:
    """The stages to run of those that are named: all but dpo where it has no preferences."""
    skipped = ["dpo"] if not cfg.finetune.dpo.data and list(names) == list(STAGES) else []
    return [name for name in names if name not in skipped]


def check(context: stages.Context, names: Sequence[str]) -> None:
    """Raises UserError for what would end one of the stages after hours of others."""
    if processes.is_first():
        _check_named(context.config, names)
        for name in names:
            STAGES[name].check(context)


def _check_named(cfg, names):
    """The shipped rows stand in for the user's own only where the user says so."""
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
) -> None:
    """Runs the named stages in `workdir`, one run at a time. With parallel.distributed every
    process calls this after processes.join(); the workdir is on a file system that all see.

    Args:
        verify: whether artifacts are held against the records of the stages that made them.

    Raises:
        UserError: bad input, or another run holds the workdir.
    """
    methods.check(cfg)
    names = wanted(cfg, names)
    with at_work(cfg, workdir, verify) as context:
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
            record = records.read(context.path(name))
            rate = record.get("tokens_per_second")
            done = f"{record['rows']:,} rows, {record['seconds']:.1f} s"
            done += f", {rate:,.0f} tokens/s" if rate else ""
            print(f"{name:<10}  {done if ran else f'done before ({done})'}", flush=True)
            if ran and name == "prepare":
                check(context, names)
    if "report" in names and processes.is_first():
        print(report.summary(context))


@contextlib.contextmanager
def at_work(
    cfg: config.Config, workdir: pathlib.Path, verify: bool = True
) -> Iterator[stages.Context]:
    """Holds the workdir, and the matrix products at the precision that the model's dtype asks for.

    Raises:
        UserError: another run holds the workdir.
    """
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
    """An open file, whose lock ends with the process; nothing is ever written into it."""
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
