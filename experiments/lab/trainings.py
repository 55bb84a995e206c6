"""Trains one arm with many seeds at once, and measures all of them: one program, vmapped.

What a seed gives is what fit.fit and measure.measure give it alone, up to float error: the same
steps, loss, optimizer and rates. Dims: S seeds, Q questions.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from comparison import statistics
from diq_jax import config, errors, finetune_config
from diq_jax.data import batches, example, steps
from diq_jax.evaluate import intervals, measure, options
from diq_jax.finetune import fit, sft
from diq_jax.models import checkpoint, load, training
from diq_jax.run import devices, parts

LENGTHS = 64  # rows of an arm are cut to the longest of it, rounded up to a multiple of this
METRICS = (*statistics.METRICS, "held_out_loss")
# What decides a training beside its rows and seed.
DECISIVE = (
    "parameters", "rank", "alpha", "targets", "learning_rate", "warmup_ratio", "weight_decay",
    "clip_norm", "epochs", "batch_size", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """What all trainings share.

    Attributes:
        pool: the candidates, and after them the targets, which are an arm as well.
        batch: the whole pool on the device.
        asked: of targets and held-out rows in one list, and of questions; for S models at once.
        targets: how many of that list are targets.
        shared: a hash of all that decides a result beside rows and seed.
    """

    model: load.Model
    settings: finetune_config.Finetune
    pool: list[example.Encoded]
    batch: batches.Batch
    asked: tuple[measure.Likelihoods, ...]
    questions: list[options.Question]
    targets: int
    shared: str

    @property
    def candidates(self) -> list[example.Encoded]:
        return self.pool[: len(self.pool) - self.targets]

    @property
    def tasks(self) -> list[str]:
        return [question.task for question in self.questions]


def make_lab(
    cfg: config.Config,
    candidates: Sequence[example.Encoded],
    targets: Sequence[example.Encoded],
    held_out: Sequence[example.Encoded],
    questions: Sequence[options.Question],
) -> Lab:
    """Loads the model of cfg.model.path, and lays out what is trained on and measured.

    Raises:
        UserError: a setting that a vmapped training does not have.
    """
    for name, wanted in (("dropout", 0.0), ("packing", False), ("max_steps", 0)):
        found = getattr(cfg.finetune, name)
        errors.check(f"finetune.{name}", found == wanted, f"{wanted} in the lab", found)
    placement = devices.make_placement(cfg.parallel)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    pool, rows = [*candidates, *targets], [*targets, *held_out]
    asked = measure.ask(rows, questions, model.cfg, placement, cfg.evaluate.batch_tokens)
    decided = [
        {name: getattr(cfg.finetune, name) for name in DECISIVE}, len(targets), METRICS,
        checkpoint.open_checkpoint(cfg.model.path, "model.path").fingerprint,
        [[row.example_id, row.input_ids.tolist()] for row in rows],
        [[question.example_id, question.row.input_ids.tolist()] for question in questions],
    ]  # fmt: skip
    return Lab(
        model, cfg.finetune, pool, lay_out(pool),
        tuple(for_seeds(part, cfg.finetune.trains_adapter) for part in asked),
        list(questions), len(targets), hashlib.sha256(json.dumps(decided).encode()).hexdigest(),
    )  # fmt: skip


def lay_out(pool: Sequence[example.Encoded]) -> batches.Batch:
    """Returns rows as one batch on the device."""
    tokens = max(len(row.input_ids) for row in pool)
    answers = max(row.answer_tokens for row in pool)
    return jax.tree.map(jnp.asarray, batches.make_batch(pool, len(pool), tokens, answers))


def for_seeds(asked: measure.Likelihoods, adapters: bool) -> measure.Likelihoods:
    """Turns what is asked of one model into what is asked of S: values in their lists."""
    axes = (None, 0, None) if adapters else (0, None, None)

    def values(i: int, output: np.ndarray) -> dict[str, Any]:
        found = [asked.values(i, row) for row in output]
        return {name: np.hstack([of[name] for of in found]).tolist() for name in found[0]}

    score = jax.jit(jax.vmap(asked.score, axes, out_axes=1))
    return dataclasses.replace(asked, score=score, values=values)


@flax.struct.dataclass
class Start:
    """Where S trainings begin: the trained leaves (S, ...), and the rest of the adapter."""

    factors: Any
    frozen: Any


def make_start(lab: Lab, seeds: Sequence[int]) -> Start:
    """Makes the start of each seed, as fit.fit does."""
    optimizer = training.adamw()  # its state is made again in `train`
    if lab.settings.trains_adapter:
        made = [
            sft.init_state(sft.init_adapter(lab.model.cfg, lab.settings, seed), optimizer)
            for seed in seeds
        ]
        factors, frozen = [state.factors for state, _ in made], made[0][1]
    else:
        state = sft.init_weights(lab.model.params, lab.settings.parameters, optimizer)
        factors, frozen = [state.factors] * len(seeds), None
    return Start(jax.tree.map(lambda *x: jnp.stack(x), *factors), frozen)


def plan(lab: Lab, arms: Sequence[Sequence[int]], seeds: Sequence[int]) -> np.ndarray:
    """Returns the rows of each step of each seed, (S, steps, B) int32; -1 is none."""
    found = []
    for rows, seed in zip(arms, seeds, strict=True):
        cut = fit.plan(lab.pool, {"arm": rows}, lab.settings, seed, 1)["arm"]
        order = np.full((len(cut), lab.settings.batch_size), -1, np.int32)
        for number, step in enumerate(cut):
            order[number, : len(step.indices)] = step.indices
        found.append(order)
    return np.stack(found)


def train(lab: Lab, arms: Sequence[Sequence[int]], seeds: Sequence[int]) -> tuple[Any, np.ndarray]:
    """Trains S models, each on its own rows (as many in each arm) with its own seed.

    Returns:
        (the trained leaves (S, ...) joined with the adapter's rest, the mean loss of each step
        (S, steps)).
    """
    order = plan(lab, arms, seeds)
    used = [lab.pool[i] for i in np.unique(order[order >= 0])]
    shape = lab.batch.tokens.shape[1], lab.batch.loss_mask.shape[1]
    longest = max(len(row.input_ids) for row in used), max(row.answer_tokens for row in used)
    T, A = (min(-(-n // LENGTHS) * LENGTHS, most) for n, most in zip(longest, shape, strict=True))
    cut = {
        name: getattr(lab.batch, name)[:, :size]
        for size, names in ((T, ("tokens", "positions", "segment_ids")),
                            (A, ("loss_positions", "loss_labels", "loss_mask")))
        for name in names
    }  # fmt: skip
    rates = fit.learning_rates(lab.settings, order.shape[1])
    start, batch = make_start(lab, seeds), dataclasses.replace(lab.batch, **cut)
    return _train(
        lab.model.params, start.factors, start.frozen, batch, order, rates,
        cfg=lab.model.cfg, settings=lab.settings,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "settings"))
def _train(params, starts, frozen, pool, order, rates, cfg, settings):
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    sums = sft.example_sums(cfg, settings)
    places = jnp.arange(order.shape[-1])

    def step(state, inputs):
        rows, rate = inputs
        present = rows >= 0
        batch = jax.tree.map(lambda x: x[jnp.maximum(rows, 0)], pool)
        batch = batch.replace(loss_mask=batch.loss_mask * present[:, None], is_padding=~present)
        found = sums(params, state.factors, frozen, None, steps.Microbatch(batch, places))
        means = jax.tree.map(lambda x: x / found["examples"], found)
        return training.apply(optimizer, state, means["gradient"], rate), means["loss"]

    def one(factors, order):
        state = training.TrainState(factors, optimizer.init(factors))
        state, losses = jax.lax.scan(step, state, (order, rates))
        return sft.merge(params, state.factors, frozen), losses

    axes = (0 if frozen is None else None, None if frozen is None else 0)
    return jax.vmap(one, out_axes=(axes, 0))(starts, order)


def evaluate(lab: Lab, weights: Any, count: int) -> dict[str, np.ndarray]:
    """Measures S models: {metric: (S, Q)} of METRICS."""
    found = measure.measure("lab", weights, lab.asked)
    rows = np.array(found["target"]["loss"], np.float64).T
    metrics = []
    for seed in range(count):
        columns: dict[str, Any] = {
            name: [np.reshape(values, (count, -1))[seed] for values in column]
            for name, column in found["question"].items()
        }
        columns["loss"] = np.concatenate(columns["loss"])
        made = options.predictions("lab", lab.questions, columns)
        metrics.append(options.outcomes(made, intervals.METRICS))
    by_metric = np.moveaxis(np.stack(metrics), -1, 0)  # (metrics, S, Q)
    out = dict(zip(intervals.METRICS, by_metric, strict=True))
    return out | {
        "target_loss": rows[:, : lab.targets], "held_out_loss": rows[:, lab.targets :]
    }  # fmt: skip


def run(
    lab: Lab, folder: pathlib.Path, arms: Sequence[Sequence[int]], at_once: int
) -> dict[str, np.ndarray]:
    """Trains and measures the seeds 0, 1, .. of an arm that are not done yet, some at once.

    Args:
        folder: of all trainings; those of the same rows are one folder in it.
        arms: the rows of each seed.

    Returns:
        {metric: (S, Q)} and seconds (S,), which are those of a training and its measurement.
    """
    ids = sorted(lab.pool[i].example_id for i in arms[0])
    decided = [lab.shared, ids, len(set(map(tuple, arms))) > 1]
    key = hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:20]
    kept = parts.Parts(folder / key)
    left = kept.remaining(len(arms))
    for seeds in (left[i : i + at_once] for i in range(0, len(left), at_once)):
        # The program is one for all: the last seeds are padded by the first of them.
        padded = [*seeds, *[seeds[0]] * (min(at_once, len(arms)) - len(seeds))]
        started, used = time.perf_counter(), time.process_time()
        weights, losses = train(lab, [arms[seed] for seed in padded], padded)
        found = evaluate(lab, weights, len(padded))
        if not np.isfinite(losses).all():
            raise errors.UserError("A training's loss is not finite: lower learning_rate.")
        spent = time.perf_counter() - started, time.process_time() - used
        clock = [np.full(len(seeds), s / len(seeds)) for s in spent]
        columns = {name: found[name][: len(seeds)] for name in METRICS}
        kept.add(seeds, columns | {"seconds": clock[0], "cpu_seconds": clock[1]})
    return {name: x[: len(arms)] for name, x in kept.columns().items()}


def measure_base(lab: Lab, at_once: int) -> dict[str, np.ndarray]:
    """Measures the base model: {metric: (1, Q)}."""
    start = make_start(lab, range(at_once))
    none = jax.tree.map(jnp.zeros_like, start.factors)
    factors = none if lab.settings.trains_adapter else start.factors
    axes = (None, 0) if lab.settings.trains_adapter else (0, None)
    merge = functools.partial(sft.merge, lab.model.params, frozen=start.frozen)
    weights = jax.vmap(lambda f: merge(factors=f), out_axes=axes)(factors)
    return {name: x[:1] for name, x in evaluate(lab, weights, at_once).items()}
