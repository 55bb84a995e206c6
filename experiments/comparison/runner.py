"""Trains and evaluates the cells of a grid, one after another, each result kept in a file.

The model, the compiled programs and the shapes of microbatches serve all cells: shapes depend on
the pool and finetune's settings alone, so that a cell has the same numbers whichever others run.
Cells of the same examples and seed are one training. A killed run repeats the cell it was in.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comparison import cost, grid
from diq_jax import errors, pipeline, trees
from diq_jax.data import batches, encoded, example
from diq_jax.data import steps as steps_lib
from diq_jax.evaluate import options
from diq_jax.evaluate import stage as evaluate
from diq_jax.finetune import sft
from diq_jax.models import checkpoint, load, lora
from diq_jax.run import artifacts, devices, progress, records, stages

BASE = "base"
FOLDER = "compare/cells"
ADVICE = "Try a lower finetune.learning_rate, finetune.clip_norm=1 or model.dtype=float32."
# What decides a training beside its examples and seed.
SETTINGS = tuple(
    name.removeprefix("finetune.")
    for name in pipeline.TRAINING
    if name not in ("finetune.baselines", "finetune.seed")
)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Names results by what decides them: settings, weights, prepared data, examples and seed."""

    shared: str

    def of(self, ids: Sequence[str] | None, seed: int) -> str:
        """The key of a training on these examples, or of the base model where ids is None."""
        decided = [self.shared, None if ids is None else [sorted(ids), seed]]
        return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:20]


def make_keys(context: stages.Context) -> Keys:
    cfg = context.config
    tree = dataclasses.asdict(cfg.finetune)
    shared = {
        "finetune": {name: tree[name] for name in SETTINGS},
        "seed": cfg.finetune.seed,
        "model": checkpoint.open_checkpoint(cfg.model.path, "model.path").fingerprint,
        "dtype": cfg.model.dtype,
        "data": [
            artifacts.sha256(context.path(name))
            for name in (pipeline.POOL, pipeline.TARGETS, pipeline.TESTS)
        ],
    }
    return Keys(json.dumps(shared, sort_keys=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What all cells read."""

    pool: list[example.Encoded]
    targets: list[example.Encoded]
    target_tasks: list[str]
    questions: list[options.Question]


def read_data(context: stages.Context) -> Data:
    tests = context.table(pipeline.TESTS, *options.COLUMNS)
    targets = context.table(pipeline.TARGETS, "task", *encoded.COLUMNS)
    return Data(
        encoded.from_table(context.table(pipeline.POOL, *encoded.COLUMNS)),
        encoded.from_table(targets),
        targets["task"].to_pylist(),
        options.from_table(tests, str(context.path(pipeline.TESTS))),
    )


def run(
    context: stages.Context, data: Data, cells: Sequence[grid.Cell]
) -> tuple[list[str], dict[str, Any]]:
    """Trains and evaluates what is not done yet.

    Returns:
        The key of each cell, and {key: result}, the base model's under BASE.
    """
    keys = make_keys(context)
    ids = np.array([row.example_id for row in data.pool])
    names = [keys.of(ids[list(cell.indices)].tolist(), cell.seed) for cell in cells]
    base = keys.of(None, 0)
    files = {key: context.path(f"{FOLDER}/{key}.json") for key in (base, *names)}
    todo: dict[str, grid.Cell] = {}
    for key, cell in zip(names, cells, strict=True):
        if not files[key].exists():
            todo.setdefault(key, cell)
    if todo or not files[base].exists():
        bench = make_bench(context, data)
        if not files[base].exists():
            _keep(files[base], BASE, evaluate_weights(bench, BASE, bench.base_weights()))
        if todo:
            warm_up(bench, todo.values())
        for number, (key, cell) in enumerate(todo.items()):
            shown = f"{cell.name}: {len(cell.indices):,} examples"
            print(f"[{number + 1}/{len(todo)}] {shown}", flush=True)
            weights, record = train(bench, cell)
            _keep(files[key], cell.name, record | evaluate_weights(bench, cell.name, weights))
    found = {key: records.unseal(file, context.verify) for key, file in files.items()}
    return names, {**found, BASE: found[base]}


def _keep(file: pathlib.Path, made_for: str, result: Mapping[str, Any]) -> None:
    artifacts.write_json(file, records.seal({"made_for": made_for, **result}))


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The model on its devices with every program that cells share.

    Attributes:
        shapes: (tokens, answers) of a microbatch, ascending.
        start: seed -> a fresh adapter.
        train_step: (seed, steps in all) -> an optimiser and a train step.
    """

    context: stages.Context
    data: Data
    model: load.Model
    parts: tuple[evaluate.Part, evaluate.Part]
    shapes: list[tuple[int, int]]
    start: Callable[[int], dict]
    train_step: Callable[[int, int], tuple[Any, Callable]]

    def weights(self, adapter) -> tuple[dict, dict]:
        """(parameters, adapter), placed."""
        return self.model.params, self.context.placement.replicate(adapter)

    def base_weights(self) -> tuple[dict, dict]:
        """An adapter that adds exactly 0, so that the base model is scored by the same programs."""
        return self.weights(jax.tree.map(jnp.zeros_like, self.start(0)))


def make_bench(context: stages.Context, data: Data) -> Bench:
    settings, cfg = context.config.finetune, context.config.model
    model = load.load(cfg.path, cfg.dtype, context.placement)

    @jax.jit
    def init(key):
        return lora.init(
            key, model.cfg, settings.targets, settings.rank, settings.alpha,
            zero_b=True, field="finetune.targets",
        )  # fmt: skip

    @functools.cache
    def sums(seed):
        return sft.example_sums(model.cfg, dataclasses.replace(settings, seed=seed))

    @functools.cache
    def train_step(seed, total):
        optimizer = sft.make_optimizer(settings, total)
        # The gradient's program, the large one, is compiled once for all schedules.
        return optimizer, sft.train_step_of(sums(seed), optimizer, context.placement)

    return Bench(
        context,
        data,
        model,
        evaluate.make_parts(data.targets, data.questions, model.cfg, context.placement),
        microbatch_shapes(context, data.pool),
        lambda seed: init(sft.split_key(seed)[0]),
        # Only dropout reads the seed.
        lambda seed, total: train_step(seed if settings.dropout > 0 else 0, total),
    )


def microbatch_shapes(
    context: stages.Context, pool: Sequence[example.Encoded]
) -> list[tuple[int, int]]:
    """The token edges that training on the whole pool has; answers of the longest that fit each."""
    everyone = {"all": range(len(pool))}
    planned = sft.plan(pool, everyone, context.config.finetune, context.placement.rows_multiple)
    edges = sorted({group.tokens for step in planned["all"] for group in step.groups})
    step = batches.ANSWER_STEP
    shapes = []
    for edge in edges:
        most = max((r.answer_tokens for r in pool if len(r.input_ids) <= edge), default=1)
        shapes.append((edge, min(-(-most // step) * step, edge)))
    return shapes


def plan(bench: Bench, indices: Sequence[int], seed: int) -> list[steps_lib.Step]:
    """The steps of a training, in the bench's shapes."""
    settings = dataclasses.replace(bench.context.config.finetune, seed=seed)
    multiple = bench.context.placement.rows_multiple
    [steps] = sft.plan(bench.data.pool, {"cell": indices}, settings, multiple).values()

    def fit(group):
        if not isinstance(group, batches.Group):
            return group
        longest = max(len(bench.data.pool[i].input_ids) for i in group.indices)
        tokens, answers = next(shape for shape in bench.shapes if shape[0] >= longest)
        return dataclasses.replace(group, tokens=tokens, answers=answers)

    return [dataclasses.replace(s, groups=tuple(map(fit, s.groups))) for s in steps]


def warm_up(bench: Bench, cells: Iterable[grid.Cell]) -> None:
    """Compiles the gradient of every shape and the update of every schedule beforehand, so that the
    seconds of cells can be compared.
    """
    pool, settings = bench.data.pool, bench.context.config.finetune
    totals = {len(plan(bench, cell.indices, settings.seed)) for cell in cells}
    shortest = min(range(len(pool)), key=lambda i: len(pool[i].input_ids))
    [group, *_] = plan(bench, [shortest], settings.seed)[0].groups
    groups = [group]
    if isinstance(group, batches.Group):
        groups = [dataclasses.replace(group, tokens=t, answers=a) for t, a in bench.shapes]
    longest = [(group, min(totals)) for group in groups[1:]]
    for group, total in [*longest, *((groups[0], total) for total in totals)]:
        _train(bench, [steps_lib.Step(0, (group,))], total, settings.seed, "compiling")


def train(bench: Bench, cell: grid.Cell) -> tuple[tuple[dict, dict], dict[str, Any]]:
    """One training from its start. Returns the weights, and what is worth keeping of it.

    Raises:
        UserError: a loss, or parameters in the end, that are not finite.
    """
    settings, pool = bench.context.config.finetune, bench.data.pool
    seed = settings.seed + cell.seed
    steps = plan(bench, cell.indices, seed)
    started = time.perf_counter()
    weights, losses = _train(bench, steps, len(steps), seed, cell.name)
    seconds = time.perf_counter() - started
    if bad := trees.not_finite(weights[1]):
        raise errors.UserError(
            f"compare: {cell.name} has parameters that are not finite after its last step "
            f"({bad[0]}), though its loss was. {ADVICE}"
        )
    seen = [pool[i] for step in steps for i in step.indices]
    return weights, {
        "rows": len(cell.indices),
        "steps": len(steps),
        "tokens": sum(len(row.input_ids) for row in seen),
        "answer_tokens": sum(pool[i].answer_tokens for i in cell.indices),
        "flops": cost.total_flops(bench.model.cfg, seen, "thin_gradient", settings.remat),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_seconds": round(seconds, 3),
    }


def _train(bench: Bench, steps: Sequence[steps_lib.Step], total: int, seed: int, name: str):
    """(the weights after `steps` on the schedule of `total`, losses of each)."""
    pool = bench.data.pool
    optimizer, train_step = bench.train_step(seed, total)
    state, frozen = sft.init_state(bench.start(seed), optimizer)

    def dispatched() -> Iterable:
        nonlocal state
        for step in steps:
            rows = steps_lib.microbatches(pool, step)
            state, metrics = train_step(bench.model.params, frozen, state, rows)
            yield step, metrics

    losses = []
    with progress.Progress(name, sum(len(step.indices) for step in steps)) as bar:
        for step, metrics in devices.one_behind(dispatched()):
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            if not np.isfinite([loss, norm]).all():
                raise errors.UserError(
                    f"compare: {name} has loss {loss} and gradient norm {norm} at step "
                    f"{len(losses)}. {ADVICE}"
                )
            losses.append(loss)
            tokens = sum(len(pool[i].input_ids) for i in step.indices)
            bar.update(len(step.indices), tokens, loss=f"{loss:.3f}")
    return bench.weights(trees.combine(state.factors, frozen)), losses


def evaluate_weights(bench: Bench, name: str, weights: tuple[dict, dict]) -> dict[str, Any]:
    """A model's values of every target and question, in order, and the seconds they took."""
    started = time.perf_counter()
    found = {}
    for part in bench.parts:
        values: dict[int, list[float]] = {}
        for rows, of in evaluate.score(part, name, weights, (), bench.context):
            values |= zip(rows, of, strict=True)
        found[part.name] = [values[i] for i in range(len(part.rows))]
    rows = [
        options.prediction(name, question, np.array(of[:-1]), of[-1])
        for question, of in zip(bench.data.questions, found["question"], strict=True)
    ]
    return {
        "target_loss": [value for [value] in found["target"]],
        "test_loss": [row["loss"] for row in rows],
        "test_loss_without_end": [
            -row["log_likelihoods"][row["answer"]] / row["tokens"][row["answer"]] for row in rows
        ],
        "accuracy": [int(row["prediction"] == row["answer"]) for row in rows],
        "accuracy_norm": [int(row["prediction_norm"] == row["answer"]) for row in rows],
        "evaluate_seconds": round(time.perf_counter() - started, 3),
    }
