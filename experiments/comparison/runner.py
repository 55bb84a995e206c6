"""Trains and evaluates the cells of a grid, one after another, each result kept in a file.

A cell is `fit.fit` and `measure.measure`, as in the stages. The model, the compiled programs and
the shapes of microbatches serve all cells; shapes depend on the pool alone, so that a cell has the
same numbers whichever others run. Cells of the same examples and seed are one training. A killed
run repeats the cell it was in.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comparison import cost, grid
from diq_jax import config, finetune_config, prepare
from diq_jax.data import encoded, example
from diq_jax.data import steps as steps_lib
from diq_jax.evaluate import generation, intervals, measure, options
from diq_jax.finetune import fit, sft
from diq_jax.models import checkpoint, load
from diq_jax.run import artifacts, processes, records, stages

BASE = "base"
FOLDER = "compare/cells"
# What decides a training beside its examples and seed.
SETTINGS = tuple(
    name.removeprefix("finetune.")
    for name in sorted(config.decided_by("finetune"))
    if name.startswith("finetune.") and name not in ("finetune.baselines", "finetune.seed")
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
        "measures": [*metrics(cfg), *asked_of(cfg)],
        "data": [
            artifacts.sha256(context.path(name))
            for name in (prepare.POOL, prepare.TARGETS, prepare.TESTS)
        ],
    }
    return Keys(json.dumps(shared, sort_keys=True))


def metrics(cfg: config.Config) -> tuple[str, ...]:
    """What is measured of a question."""
    generated = cfg.evaluate.protocol == "generate"
    return intervals.GENERATED_METRICS if generated else intervals.METRICS


def asked_of(cfg: config.Config) -> list[str]:
    """Says how answers are generated, where they are."""
    names = ("max_new_tokens", "temperature", "top_p", "samples", "stop", "seed")
    if cfg.evaluate.protocol != "generate":
        return []
    return [f"{name}={getattr(cfg.evaluate, name)}" for name in names]


@dataclasses.dataclass(frozen=True, eq=False)
class CellData:
    """What all cells read."""

    pool: list[example.Encoded]
    targets: list[example.Encoded]
    target_tasks: list[str]
    questions: list[options.Question]


def read_data(context: stages.Context) -> CellData:
    tests = context.table(prepare.TESTS, *options.COLUMNS)
    targets = context.table(prepare.TARGETS, "task", *encoded.COLUMNS)
    return CellData(
        encoded.from_table(context.table(prepare.POOL, *encoded.COLUMNS)),
        encoded.from_table(targets),
        targets["task"].to_pylist(),
        options.from_table(tests, str(context.path(prepare.TESTS))),
    )


def run(
    context: stages.Context, data: CellData, cells: Sequence[grid.GridCell]
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
    done = processes.agreed(lambda: [key for key, file in files.items() if file.exists()])
    todo: dict[str, grid.GridCell] = {}
    for key, cell in zip(names, cells, strict=True):
        if key not in done:
            todo.setdefault(key, cell)
    if todo or base not in done:
        bench = make_bench(context, data)
        if base not in done:
            # An adapter that adds exactly 0, so that the base model meets the same programs.
            nothing = sft.init_adapter(bench.model.cfg, bench.settings, 0)
            nothing = jax.tree.map(jnp.zeros_like, nothing)
            _keep(files[base], BASE, evaluate(bench, BASE, nothing))
        if todo:
            warm_up(bench)
        for number, (key, cell) in enumerate(todo.items()):
            shown = f"{cell.name}: {len(cell.indices):,} examples"
            if processes.is_first():
                print(f"[{number + 1}/{len(todo)}] {shown}", flush=True)
            adapter, record = train(bench, cell)
            _keep(files[key], cell.name, record | evaluate(bench, cell.name, adapter))
    processes.wait("all trainings are kept")
    found = {key: records.unseal(file, context.verify) for key, file in files.items()}
    return names, {**found, BASE: found[base]}


def _keep(file: pathlib.Path, made_for: str, result: Mapping[str, Any]) -> None:
    artifacts.write_json(file, records.seal({"made_for": made_for, **result}))


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """Holds what cells share: the placed model, the programs, the shapes of microbatches."""

    context: stages.Context
    data: CellData
    model: load.Model
    asked: tuple[Any, ...]  # as measure.measure takes
    train_step: Callable
    shapes: list[tuple[int, int]]

    @property
    def settings(self) -> finetune_config.Finetune:
        return self.context.config.finetune


def make_bench(context: stages.Context, data: CellData) -> Bench:
    cfg, placement = context.config, context.placement
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    tokens = cfg.evaluate.batch_tokens
    asked = measure.ask(data.targets, data.questions, model.cfg, placement, tokens)
    if cfg.evaluate.protocol == "generate":
        tests = generation.from_table(context.table(prepare.TESTS))
        asked += (generation.make_answers(tests, model, cfg.evaluate, cfg.data.date, placement),)
    return Bench(
        context,
        data,
        model,
        asked,
        fit.make_train_step(model, cfg.finetune, placement),
        fit.shapes_of(data.pool),
    )


def plan(bench: Bench, indices: Sequence[int], seed: int) -> list[steps_lib.Step]:
    """Plans the steps of a training, in the bench's shapes."""
    multiple = bench.context.placement.rows_multiple
    cells = {"cell": indices}
    return fit.plan(bench.data.pool, cells, bench.settings, seed, multiple, bench.shapes)["cell"]


def warm_up(bench: Bench) -> None:
    """Compiles the step for every shape, so that the seconds of cells can be compared."""
    pool = bench.data.pool
    for tokens, _ in bench.shapes:
        fits = [i for i, row in enumerate(pool) if len(row.input_ids) <= tokens]
        longest = max(fits, key=lambda i: len(pool[i].input_ids))
        _fit(bench, plan(bench, [longest], bench.settings.seed)[:1], 0, "compiling")


def train(bench: Bench, cell: grid.GridCell) -> tuple[dict, dict[str, Any]]:
    """Trains a cell from its start. Returns the adapter, and what is worth keeping of it.

    Raises:
        UserError: a loss, or parameters in the end, that are not finite.
    """
    pool = bench.data.pool
    steps = plan(bench, cell.indices, bench.settings.seed + cell.seed)
    started = time.perf_counter()
    fitted = _fit(bench, steps, cell.seed, f"compare: {cell.name}")
    seconds = time.perf_counter() - started
    seen = [pool[i] for step in steps for i in step.indices]
    remat = bench.settings.remat
    return fitted.adapter, {
        "rows": len(cell.indices),
        "steps": len(steps),
        "tokens": sum(len(row.input_ids) for row in seen),
        "answer_tokens": sum(pool[i].answer_tokens for i in cell.indices),
        "flops": cost.total_flops(bench.model.cfg, seen, "thin_gradient", remat),
        "first_loss": fitted.records[0]["loss"],
        "last_loss": fitted.records[-1]["loss"],
        "train_seconds": round(seconds, 3),
    }


def _fit(bench: Bench, steps: Sequence[steps_lib.Step], seed: int, name: str) -> fit.Fitted:
    return fit.fit(
        bench.model, bench.data.pool, bench.settings, bench.settings.seed + seed,
        bench.context.placement, name, steps, bench.train_step,
    )  # fmt: skip


def evaluate(bench: Bench, name: str, adapter: dict) -> dict[str, Any]:
    """Returns a model's value of every target and question, in order, and the seconds they took."""
    started = time.perf_counter()
    weights = bench.model.params, bench.context.placement.replicate(adapter)
    found = measure.measure(name, weights, bench.asked)
    rows = options.predictions(name, bench.data.questions, found["question"])
    for answers in bench.asked[2:]:
        generation.add_answers(answers, rows, found[answers.name])
    names = metrics(bench.context.config)
    measured = options.outcomes(rows, names).T.tolist()
    return {
        "target_loss": list(found["target"]["loss"]),
        **dict(zip(names, measured, strict=True)),
        "evaluate_seconds": round(time.perf_counter() - started, 3),
    }
