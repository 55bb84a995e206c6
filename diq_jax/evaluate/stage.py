"""The evaluate stage: the base model and every fine-tuned arm, on the targets and on the tests."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config as config_lib
from diq_jax import errors
from diq_jax.data import batches, benchmarks, encoded, example
from diq_jax.evaluate import generation, intervals, options
from diq_jax.models import checkpoint, load, lora, loss, tokenizer
from diq_jax.run import artifacts, devices, progress, stages

MAX_SHAPES = 4  # batch shapes of the targets, and of the tests: each is a compilation
PARTIAL = "evaluate/scores.partial.jsonl"
BASE, SELECTED = "base", "selected"
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "config.json", "model*.safetensors*")
TARGETS, TESTS = "prepare/targets.parquet", "prepare/tests.parquet"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What every model is scored on: the targets or the tests.

    Attributes:
        name: target or question, as messages and the journal have it.
        score: compiled (params, adapter, batch) -> an output for each row (B, ...).
        pack: (indices, rows, tokens, answers) -> a numpy batch.
        values: (index of a row, its output) -> the numbers to keep.
    """

    name: str
    rows: list[example.Encoded]
    score: Callable[..., jax.Array]
    pack: Callable[..., batches.Batch]
    values: Callable[[int, np.ndarray], list[float]]

    def tokens(self, row: int, _) -> int:
        return len(self.rows[row].input_ids)


def arms(context: stages.Context) -> list[tuple[str, pathlib.Path | None]]:
    """The models by name: `base` (None), `selected`, the baselines, and `dpo` where asked for; each
    with its PEFT folder, or its own model folder where finetune trained parameters.

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
    """The targets, the tests and the files of the adapters, or of the models."""
    folders = [folder for _, folder in arms(context) if folder is not None]
    files = sorted(file for folder in folders for name in WEIGHTS for file in folder.glob(name))
    return (TARGETS, TESTS, *(str(file.relative_to(context.workdir)) for file in files))


def fingerprints(context: stages.Context) -> dict[str, str]:
    """The hash of the base model; of its tokenizer, where it is asked."""
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
    parts = make_parts(targets, questions, model.cfg, context.placement)
    scored = [(part, score) for part in parts]
    if config.evaluate.protocol == "generate":
        tests = generation.from_table(context.table(TESTS))
        answers = generation.make_part(
            tests, model, config.evaluate, config.data.date, context.placement
        )
        scored.append((answers, generation.answers))
    models = arms(context)
    names = [name for name, _ in models]
    total = len(models) * sum(len(part.rows) for part, _ in scored)
    with artifacts.Journal(context.path(PARTIAL)) as journal:
        done = _done(journal)
        with progress.Progress("evaluate", total, len(done)) as bar:
            for name, weights in _weights(models, model, context):
                for part, values_of in scored:
                    for rows, values in values_of(part, name, weights, done, context):
                        entry = {"model": name, "part": part.name, "rows": rows, "values": values}
                        journal.append(entry)
                        new = sum(map(part.tokens, rows, values))
                        bar.update(len(rows), new, model=name)
        done = _done(journal)
    _write(context, names, questions, [(part, _table(part, names, done)) for part, _ in scored])
    artifacts.remove(context.path(PARTIAL))
    tokens = sum(
        part.tokens(i, done[name, part.name, i])
        for part, _ in scored
        for name in names
        for i in range(len(part.rows))
    )
    return {
        "rows": len(questions) * len(names),
        "tokens": tokens,
        "resumed_tokens": tokens - bar.tokens,
        "models": names,
    }


def groups(settings: config_lib.Evaluate, tasks: Collection[str]) -> dict[str, list[str]]:
    """{group of evaluate.groups: those of its tasks that are tested}, without empty ones.

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


def _done(journal) -> dict[tuple[str, str, int], list[float]]:
    """{(model, part, index of a row): its values}."""
    return {
        (entry["model"], entry["part"], index): values
        for entry in journal.entries
        for index, values in zip(entry["rows"], entry["values"], strict=True)
    }


def make_parts(targets, questions, cfg, placement) -> tuple[Part, Part]:
    """The targets and the tests, each with its compiled program."""

    # A target's loss is the very function that the influence direction differentiates.
    def target_losses(params, adapter, batch):
        return loss.example_losses(params, cfg, batch, "mean", adapter)

    def option_losses(params, adapter, batch):
        return loss.token_losses(params, cfg, batch, adapter)

    def question_values(question, output):
        sums, right = options.scores(question, output)
        return [*sums.tolist(), right]

    return (
        Part(
            "target",
            targets,
            placement.compile(target_losses, rows=True),
            lambda indices, *shape: batches.make_batch([targets[i] for i in indices], *shape),
            lambda _, output: [float(output)],
        ),
        Part(
            "question",
            [question.row for question in questions],
            placement.compile(option_losses, rows=True),
            lambda indices, *shape: options.pack([questions[i] for i in indices], *shape),
            lambda i, output: question_values(questions[i], output),
        ),
    )


def _weights(models, model, context) -> Iterator[tuple[str, tuple[dict, dict | None]]]:
    """Each model's (parameters, adapter), placed. With adapters the base gets zeros of the same
    shape, which add exactly 0: so one compiled program serves all models.
    """
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


def score(part: Part, name: str, weights, done, context) -> Iterator[tuple[list[int], list]]:
    """Scores what is not done yet; yields the indices of a batch and the values of each row.

    Args:
        weights: (parameters, adapter or None), placed.
        done: holds (name, part's name, index) of each row that needs no score.
    """
    placement = context.placement
    groups = batches.plan(
        part.rows, context.config.evaluate.batch_tokens, placement.rows_multiple, MAX_SHAPES
    )

    def dispatched():
        for group in groups:
            if all((name, part.name, i) in done for i in group.indices):
                continue
            batch = part.pack(group.indices, group.rows, group.tokens, group.answers)
            yield group, part.score(*weights, placement.batch(batch))

    for group, output in devices.one_behind(dispatched()):
        rows = list(group.indices)
        outputs = np.asarray(output)[: len(rows)]
        values = [part.values(i, row) for i, row in zip(rows, outputs, strict=True)]
        for i, row in zip(rows, values, strict=True):
            if not np.all(np.isfinite(row)):
                raise errors.UserError(
                    f"evaluate: model {name!r} gives {part.name} {part.rows[i].example_id!r} a "
                    f"likelihood that is not finite ({row}); check the weights, the fine-tuning "
                    "(finetune/losses.jsonl) and model.dtype."
                )
        yield rows, values


def _table(part, names, done) -> dict[str, list[list[float]]]:
    """{model: the values of every row, in order}."""
    return {name: [done[name, part.name, i] for i in range(len(part.rows))] for name in names}


def _predictions(names, questions, option_values, written) -> list[list[dict]]:
    """The rows of predictions.jsonl for each model; `written`: the answers' part and values."""
    predictions = [
        [
            options.prediction(name, q, np.array(v[:-1]), v[-1])
            for q, v in zip(questions, option_values[name], strict=True)
        ]
        for name in names
    ]
    for part, answers in written:
        for name, rows in zip(names, predictions, strict=True):
            generation.add_answers(part, rows, answers[name])
    return predictions


def _write(context, names, questions, tables) -> None:
    """Args: tables: (part, {model: the values of every row}) of targets, questions and answers."""
    settings = context.config.evaluate
    (_, target_values), (_, option_values), *written = tables
    predictions = _predictions(names, questions, option_values, written)
    metrics, counts = intervals.METRICS, [{} for _ in names]
    if written:
        metrics = intervals.GENERATED_METRICS
        counts = [generation.unparsable(rows) for rows in predictions]
    chosen = {"accuracy": "prediction", "accuracy_norm": "prediction_norm"}
    measured = [
        [
            [p["loss"] if m == "test_loss" else p[chosen[m]] == p["answer"] for m in metrics]
            for p in of
        ]
        for of in predictions
    ]
    losses = [np.concatenate(target_values[name]) for name in names]
    versus = {name: [BASE] if name != BASE else [] for name in names}
    if SELECTED in versus:
        versus[SELECTED] += [name for name in names if name not in (BASE, SELECTED)]
    found = groups(settings, {question.task for question in questions})
    results = intervals.results(
        names,
        np.stack(losses, axis=1),
        np.swapaxes(np.array(measured, np.float64), 0, 1),
        [question.task for question in questions],
        versus,
        settings.bootstrap_samples,
        settings.seed,
        metrics,
        found,
    )
    artifacts.write_jsonl(
        context.path("evaluate/predictions.jsonl"), [row for of in predictions for row in of]
    )
    models = {name: count | results[name] for name, count in zip(names, counts, strict=True)}
    artifacts.write_json(
        context.path("evaluate/results.json"),
        {
            "tests": len(questions),
            "targets": len(losses[0]),
            "group_sizes": {name: len(settings.group_tasks[name]) for name in found},
            "models": models,
        },
    )
