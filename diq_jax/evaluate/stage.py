"""The evaluate stage: the base model and every fine-tuned arm, on the targets and on the tests."""

import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import errors, evaluate_config
from diq_jax.data import benchmarks, encoded
from diq_jax.evaluate import generation, intervals, measure, options
from diq_jax.models import checkpoint, load, lora, tokenizer
from diq_jax.run import artifacts, parts, processes, progress, stages

PARTIAL = "evaluate/partial"
BASE, SELECTED = "base", "selected"
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "config.json", "model*.safetensors*")
TARGETS, TESTS = "prepare/targets.parquet", "prepare/tests.parquet"


def arms(context: stages.Context) -> list[tuple[str, pathlib.Path | None]]:
    """Lists the models by name, `base` (None), `selected`, baselines, `dpo`, each with its folder.

    Only `base` where the finetune stage never ran in this workdir.

    Raises:
        UserError: it ran, and an adapter is missing.
    """
    found: list[tuple[str, pathlib.Path | None]] = [(BASE, None)]
    if not context.path("finetune").is_dir():
        return found
    settings = context.config.finetune
    names = {SELECTED: "finetune/adapter" if settings.trains_adapter else "finetune/model"}
    names |= {m: f"finetune/baselines/{m}" for m in settings.baseline_methods}
    if settings.dpo.data:
        names["dpo"] = "dpo/adapter"
    last_file = "adapter_config.json" if settings.trains_adapter else "config.json"
    for arm, name in names.items():
        folder = context.path(name)
        if not (folder / last_file).is_file():
            stage = "dpo" if arm == "dpo" else "finetune"
            raise errors.UserError(
                f"Stage 'evaluate' needs {folder}, which stage {stage!r} makes: it has not "
                f"finished, or finetune.* has changed; run with --stages={stage},evaluate."
            )
        found.append((arm, folder))
    return found


def reads(context: stages.Context) -> tuple[str, ...]:
    """Lists the targets, the tests and the files of the adapters, or of the models."""
    folders = [folder for _, folder in arms(context) if folder is not None]
    files = sorted(file for folder in folders for name in WEIGHTS for file in folder.glob(name))
    return (TARGETS, TESTS, *(str(file.relative_to(context.workdir)) for file in files))


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Hashes the base model, and its tokenizer where text is generated."""
    path = context.config.model.path
    writes = context.config.evaluate.protocol == "generate"  # options were tokenised by prepare
    tokens = tokenizer.fingerprints(path, "model.path") if writes else {}
    return {"model.path": checkpoint.open_checkpoint(path, "model.path").fingerprint, **tokens}


def run(context: stages.Context) -> dict[str, Any]:
    """Writes evaluate/results.json and evaluate/predictions.jsonl.

    A killed run continues after the last finished batch and gives identical bytes.

    Raises:
        UserError: no targets or no tests, or a likelihood that is not finite, naming the model and
            the example.
    """
    config = context.config
    targets = encoded.from_table(context.table(TARGETS, *encoded.COLUMNS))
    table = context.table(TESTS, *options.COLUMNS)
    questions = options.from_table(table, str(context.path(TESTS)))
    if not targets or not questions:
        raise errors.UserError(
            f"Stage 'evaluate' needs at least one target and one test question; got {len(targets)} "
            f"and {len(questions)} from data.targets and data.tests."
        )
    groups(config.evaluate, {question.task for question in questions})  # refused before hours
    model = load.load(config.model.path, config.model.dtype, context.placement)
    settings, placement = config.evaluate, context.placement
    asked = measure.ask(targets, questions, model.cfg, placement, settings.batch_tokens)
    if settings.protocol == "generate":
        tests = generation.from_table(context.table(TESTS))
        asked += (generation.make_answers(tests, model, settings, config.data.date, placement),)
    models = arms(context)
    folders = {name: context.path(PARTIAL) / name for name, _ in models}
    done = sum(
        len(parts.Parts(folder / part.name).done) for folder in folders.values() for part in asked
    )
    total = len(models) * sum(len(part.rows) for part in asked)
    with progress.Progress("evaluate", total, done) as bar:
        found = {
            name: measure.measure(name, weights, asked, folders[name], bar)
            for name, weights in _weights(models, model, context)
        }
    if processes.is_first():
        _write(context, questions, found, asked[2:])
    parts.drop(context.path(PARTIAL))
    tokens = sum(
        part.tokens(range(len(part.rows)), of[part.name]) for of in found.values() for part in asked
    )
    return {
        "rows": len(questions) * len(found),
        "tokens": tokens,
        "resumed_tokens": tokens - bar.tokens,
        "models": list(found),
    }


def groups(settings: evaluate_config.Evaluate, tasks: Collection[str]) -> dict[str, list[str]]:
    """Returns {group of evaluate.groups: those of its tasks that are tested}, without empty ones.

    Raises:
        UserError: a task is neither tested nor a benchmark.
    """
    found = {}
    for name, members in settings.group_tasks.items():
        for task in members:
            if task not in tasks and task not in benchmarks.BENCHMARKS:
                raise errors.UserError(
                    f"evaluate.groups: {name} names {task!r}, which is no task of data.tests "
                    f"({', '.join(sorted(tasks))}).{errors.nearest(task, tasks)}"
                )
        found[name] = [task for task in members if task in tasks]
    return {name: members for name, members in found.items() if members}


def _weights(models, model, context) -> Iterator[tuple[str, tuple[dict, dict | None]]]:
    """Yields each model's (parameters, adapter), placed; the base gets zeros, for one program."""
    placement, settings = context.placement, context.config
    folders = [folder for _, folder in models if folder is not None]
    for name, folder in models:
        field, params, adapter = f"evaluate: model {name!r}", model.params, None
        if folders and settings.finetune.trains_adapter:
            adapter = lora.load_peft(folder or folders[0], model.cfg, field)
            if folder is None:
                adapter = jax.tree.map(jnp.zeros_like, adapter)
        elif folder is not None:
            params = load.load(str(folder), settings.model.dtype, placement, field).params
        yield name, (params, placement.replicate(adapter))


def _write(context, questions, found, written) -> None:
    """Args: found: {model: what was measured}; written: what was generated, or nothing."""
    settings, names = context.config.evaluate, list(found)
    predictions = {
        name: options.predictions(name, questions, of["question"]) for name, of in found.items()
    }
    for answers in written:
        for name, rows in predictions.items():
            generation.add_answers(answers, rows, found[name][answers.name])
    metrics, counts = intervals.METRICS, {name: {} for name in names}
    if all(len(q.letters) == 1 for q in questions):  # texts: there is nothing to choose
        metrics = intervals.TEXT_METRICS
    if written:
        metrics = intervals.GENERATED_METRICS
        counts = {name: generation.unparsable(rows) for name, rows in predictions.items()}
    measured = [options.outcomes(rows, metrics) for rows in predictions.values()]
    losses = [of["target"]["loss"] for of in found.values()]
    versus = {name: [BASE] if name != BASE else [] for name in names}
    if SELECTED in versus:
        versus[SELECTED] += [name for name in names if name not in (BASE, SELECTED)]
    tasks = {question.task for question in questions}
    of_groups = {} if metrics is intervals.TEXT_METRICS else groups(settings, tasks)
    results = intervals.results(
        names, np.stack(losses, axis=1), np.stack(measured, axis=1), [q.task for q in questions],
        versus, settings.bootstrap_samples, settings.seed, metrics, of_groups,
    )  # fmt: skip
    rows = [row for of in predictions.values() for row in of]
    artifacts.write_jsonl(context.path("evaluate/predictions.jsonl"), rows)
    artifacts.write_json(
        context.path("evaluate/results.json"),
        {
            "tests": len(questions),
            "targets": len(losses[0]),
            "group_sizes": {name: len(settings.group_tasks[name]) for name in of_groups},
            "models": {name: counts[name] | results[name] for name in names},
        },
    )
