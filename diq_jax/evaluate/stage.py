"""The evaluate stage: the base model and every fine-tuned arm, on the targets and on the tests."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax.common import artifacts, devices, errors, progress, stages
from diq_jax.data import batches, encoded, example
from diq_jax.evaluate import intervals, options
from diq_jax.models import checkpoint, load, lora, loss

MAX_SHAPES = 4  # batch shapes of the targets, and of the tests: each is a compilation
PARTIAL = "evaluate/scores.partial.jsonl"
BASE, SELECTED = "base", "selected"


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


def arms(context: stages.Context) -> list[tuple[str, pathlib.Path | None]]:
    """The models by name, each with its PEFT folder: `base` (None), `selected`, and the baselines.

    Only `base` where the finetune stage never ran in this workdir.

    Raises:
        UserError: it ran, and an adapter is missing.
    """
    found: list[tuple[str, pathlib.Path | None]] = [(BASE, None)]
    if not context.path("finetune").is_dir():
        return found
    names = {SELECTED: "finetune/adapter"}
    names |= {m: f"finetune/baselines/{m}" for m in context.config.finetune.baseline_methods}
    for arm, name in names.items():
        folder = context.path(name)
        if not (folder / "adapter_config.json").is_file():
            raise errors.UserError(
                f"Stage 'evaluate' needs {folder}, which stage 'finetune' makes: it has not "
                "finished, or finetune.baselines has changed; run with --stages=finetune,evaluate."
            )
        found.append((arm, folder))
    return found


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Hashes of the base model and of the adapters' files."""
    path = context.config.model.path
    adapters = [folder for _, folder in arms(context) if folder is not None]
    files = sorted(file for folder in adapters for file in folder.iterdir() if file.is_file())
    return {"model.path": checkpoint.open_checkpoint(path, "model.path").fingerprint} | {
        str(file.relative_to(context.workdir)): artifacts.sha256(file) for file in files
    }


def run(context: stages.Context) -> dict[str, Any]:
    """Writes evaluate/results.json and evaluate/predictions.jsonl.

    A killed run continues after the last finished batch and gives identical bytes.

    Raises:
        UserError: no targets or no tests, or a likelihood that is not finite, naming the model and
            the example.
    """
    config = context.config
    tests_path = context.path("prepare/tests.parquet")
    targets = encoded.from_table(artifacts.read_table(context.path("prepare/targets.parquet")))
    questions = options.from_table(artifacts.read_table(tests_path), str(tests_path))
    if not targets or not questions:
        raise errors.UserError(
            f"Stage 'evaluate' needs at least one target and one test question; got {len(targets)} "
            f"and {len(questions)} from data.targets and data.tests."
        )
    model = load.load(config.model.path, config.model.dtype, context.placement)
    parts = make_parts(targets, questions, model.cfg, context.placement)
    models = arms(context)
    names = [name for name, _ in models]
    total = len(models) * (len(targets) + len(questions))
    with artifacts.Journal(context.path(PARTIAL)) as journal:
        done = _done(journal)
        with progress.Progress("evaluate", total, len(done)) as bar:
            for name, adapter in _adapters(models, model, context.placement):
                for part in parts:
                    for rows, values in score(part, name, (model.params, adapter), done, context):
                        entry = {"model": name, "part": part.name, "rows": rows, "values": values}
                        journal.append(entry)
                        new = sum(len(part.rows[i].input_ids) for i in rows)
                        bar.update(len(rows), new, model=name)
        done = _done(journal)
    _write(context, names, questions, *(_table(part, names, done) for part in parts))
    context.path(PARTIAL).unlink()
    tokens = len(names) * sum(len(row.input_ids) for part in parts for row in part.rows)
    return {
        "rows": len(questions) * len(names),
        "tokens": tokens,
        "resumed_tokens": tokens - bar.tokens,
        "models": names,
    }


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


def _adapters(models, model, placement) -> Iterator[tuple[str, dict | None]]:
    """Each model's adapter, placed. The base gets zeros of the same shape, which add exactly 0: so
    one compiled program serves all models.
    """
    folders = [folder for _, folder in models if folder is not None]
    for name, folder in models:
        adapter = None
        if folders:
            adapter = lora.load_peft(folder or folders[0], model.cfg, f"evaluate: model {name!r}")
        if folders and folder is None:
            adapter = jax.tree.map(jnp.zeros_like, adapter)
        yield name, placement.replicate(adapter)


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


def _write(context, names, questions, target_values, option_values) -> None:
    settings = context.config.evaluate
    predictions = [
        [
            options.prediction(name, q, np.array(v[:-1]), v[-1])
            for q, v in zip(questions, option_values[name], strict=True)
        ]
        for name in names
    ]
    measured = [
        [
            [p["loss"], p["prediction"] == p["answer"], p["prediction_norm"] == p["answer"]]
            for p in of
        ]
        for of in predictions
    ]
    losses = [np.concatenate(target_values[name]) for name in names]
    versus = {name: [BASE] if name != BASE else [] for name in names}
    if SELECTED in versus:
        versus[SELECTED] += [name for name in names if name not in (BASE, SELECTED)]
    results = intervals.results(
        names,
        np.stack(losses, axis=1),
        np.swapaxes(np.array(measured, np.float64), 0, 1),
        [question.task for question in questions],
        versus,
        settings.bootstrap_samples,
        settings.seed,
    )
    artifacts.write_jsonl(
        context.path("evaluate/predictions.jsonl"), [row for of in predictions for row in of]
    )
    artifacts.write_json(
        context.path("evaluate/results.json"),
        {"tests": len(questions), "targets": len(losses[0]), "models": results},
    )
