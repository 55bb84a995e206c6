"""Scores of the whole pool at one checkpoint: batches in, rows of numbers out, nothing lost on the
way.
"""

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches, example, packing
from diq_jax.influence import curvature, direction, engines, per_example, store, warmup
from diq_jax.models import load
from diq_jax.run import artifacts, devices, processes, progress, stages


@dataclasses.dataclass(frozen=True)
class Task:
    """What is scored, and against what."""

    context: stages.Context
    model: load.Model
    pool: Sequence[example.Encoded]
    targets: Sequence[example.Encoded]
    groups: dict[str, list[int]]  # {name: indices of the targets of one direction}
    made_from: dict[str, Any]  # of the gradient store: weights, data, parameters

    @property
    def settings(self) -> influence_config.Influence:
        return self.context.config.influence

    @property
    def weights(self) -> np.ndarray:
        """Each group's share of the targets, (Q,) float32."""
        sizes = np.array([len(group) for group in self.groups.values()], np.float32)
        return sizes / sizes.sum()


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of the pool at one checkpoint, float32.

    Attributes:
        influence, loss: (rows,).
        by_target: (rows, Q).
        tokens: one array (answer tokens,) a row, or None.
        resumed: indices that an earlier call scored.
        record: for stage.json.
        finish: drops what only a killed run needs.
    """

    influence: np.ndarray
    loss: np.ndarray
    by_target: np.ndarray
    tokens: list[np.ndarray] | None
    resumed: set[int]
    record: dict[str, Any]
    finish: Callable[[], None]


def exact_scores(task: Task, space, point: warmup.Checkpoint | None, name: str) -> Scored:
    """By forward mode along the targets' directions; a journal holds what is done."""
    settings = task.settings
    if settings.direction.startswith(influence_config.PEFT_DIRECTION):
        folder = settings.direction.removeprefix(influence_config.PEFT_DIRECTION)
        v, record = direction.from_peft(folder, task.model.cfg, space[0]), {}
    else:
        found = list(directions(task, space, point))
        record = {"directions": {name: about for name, _, about in found}}
        v = direction.stack([tree for _, tree, _ in found], task.weights, settings.direction_rank)
        del found
    step = engines.exact_step(space, v, settings, task.model.cfg, task.context.placement)

    partial = task.context.path(f"influence/scores{name}.partial.jsonl")
    by_id = {row.example_id: i for i, row in enumerate(task.pool)}
    values: dict[int, tuple] = {}
    with artifacts.Journal(partial) as journal:
        for entry in journal.entries:
            values[by_id[entry["id"]]] = _values(entry)
        resumed = set(values)
        for group, out in run_batches("influence", task.pool, step, task.context, resumed):
            influence = out.influence.reshape(-1, out.influence.shape[-1])[group.slots]
            loss = out.loss.reshape(-1)[group.slots]
            spans = _answer_spans(group, task.pool)
            entries = []
            for k, (i, (row, start, stop)) in enumerate(zip(group.indices, spans, strict=True)):
                _check_finite("influence", task, i, influence[k], loss[k])
                shares = None if out.tokens is None else out.tokens[row, start:stop]
                entries.append(_entry(task.pool[i].example_id, influence[k], loss[k], shares))
                values[i] = _values(entries[-1])
            journal.extend(entries)
    ordered = [values[i] for i in range(len(task.pool))]
    by_target = np.array([v[0] for v in ordered], np.float32)
    one = by_target.shape[1] == 1
    return Scored(
        by_target[:, 0] if one else by_target @ task.weights,
        np.array([v[1] for v in ordered], np.float32),
        by_target,
        [v[2] for v in ordered] if settings.per_token else None,
        resumed,
        record,
        functools.partial(artifacts.remove, partial),
    )


def kept_scores(task: Task, space, point: warmup.Checkpoint | None, name: str) -> Scored:
    """By the projected or factored engine; the gradient store holds every example's row."""
    settings, placement = task.settings, task.context.placement
    engine = engines.open_rows(space, settings, task.model.cfg, placement, point)
    about: dict[str, dict[str, Any]] = {}
    targets = project_directions(task, space, point, engine, about)
    writer = store.Writer(
        task.context.path(f"influence/store{name}"),
        engine.dim,
        settings.store.dtype,
        task.made_from | engine.record | ({"checkpoint": name[1:]} if name else {}),
    )
    resumed = writer.done
    for group, (rows, losses) in run_batches(
        "influence", task.pool, engine.features, task.context, resumed
    ):
        rows, losses = rows[: len(group.indices)], losses[: len(group.indices)]
        for i, row, loss in zip(group.indices, rows, losses, strict=True):
            _check_finite("gradient", task, i, row, loss)
        _check_stored(task, group.indices, rows)
        writer.append(group.indices, rows, losses)
    processes.wait("rows")

    cosine = settings.normalize == "cosine"
    groups, mean = _combined(task, targets, cosine)
    scores = store.products(
        writer.row_blocks(), len(task.pool), np.concatenate([groups, mean[None]]), cosine
    )
    by_target, influence = scores[:, :-1], scores[:, -1]
    if settings.direction == "less":
        influence = by_target.max(axis=1)
    ids = [row.example_id for row in task.pool]
    writer.finish(ids, targets, settings.store.shard_rows, list(about))
    return Scored(
        influence,
        writer.losses(),
        by_target,
        None,
        resumed,
        {"directions": about, "bytes_per_example": writer.row_bytes, **engine.record},
        writer.discard,
    )


def run_batches(
    name: str,
    rows: Sequence[example.Encoded],
    step: Callable,
    context: stages.Context,
    done: Iterable[int] = (),
) -> Iterator[tuple[Any, Any]]:
    """step(placed batch) on all batches that hold a row which is not done, with a bar.

    The next batch is dispatched before the last is fetched.

    Yields:
        (group, outputs as numpy arrays).
    """
    done = set(done)
    settings, placement = context.config.influence, context.placement
    multiple = placement.rows_multiple
    pack = settings.packing
    planner = packing.plan if pack else batches.plan
    groups = [
        g for g in planner(rows, settings.batch_tokens, multiple) if not done.issuperset(g.indices)
    ]

    def started():
        for group in groups:
            if pack:
                batch = packing.make_batch(rows, group)
            else:
                members = [rows[i] for i in group.indices]
                batch = batches.make_batch(members, group.rows, group.tokens, group.answers)
            yield group, step(placement.batch(batch))

    left = {i for group in groups for i in group.indices}
    with progress.Progress(name, len(rows), resumed=len(rows) - len(left)) as bar:
        for group, outputs in devices.one_behind(started()):
            yield group, jax.device_get(outputs)
            bar.update(len(group.indices), sum(len(rows[i].input_ids) for i in group.indices))


def directions(task, space, point) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, tree, {norm, ..}) for each group of targets, one at a time; LESS keeps all targets
    apart.
    """
    settings = task.settings
    groups = task.groups
    if settings.direction == "less":
        groups = {task.targets[i].example_id: [i] for group in groups.values() for i in group}
    total = sum(len(group) for group in groups.values())
    with progress.Progress("target gradient", total) as bar:
        for name, group in groups.items():
            tree, about = _mean_gradient(task, space, group, bar), {}
            if settings.direction == "adam":
                tree = jax.jit(warmup.adam_direction)(tree, point)
            elif settings.direction == "gauss_newton":
                tree, about = _gauss_newton(task, space, tree)
            norm = float(np.sqrt(trees.vdot(tree, tree)))
            if not np.isfinite(norm):
                _name_bad_target(task, space, group, name)
            yield name, tree, {"norm": norm, **about}


def project_directions(
    task, space, point, engine: engines.Rows, about: dict[str, dict[str, Any]] | None = None
) -> np.ndarray:
    """The directions as rows of the store, (Q, dim); what is known of each goes into `about`."""
    projected = []
    for name, tree, known in directions(task, space, point):
        projected.append(np.asarray(engine.project(jax.tree.map(lambda x: x[None], tree)))[0])
        if about is not None:
            about[name] = known
    return np.stack(projected)


def _gauss_newton(task, space, gbar):
    """The direction, and how the solution went; the sample is the same for every group."""
    settings, placement = task.settings, task.context.placement
    sample = example.draw(task.pool, settings.gauss_newton.examples, settings.gauss_newton.seed)
    rows = [task.pool[i] for i in sample]
    tokens = per_example.microbatch_tokens(settings) * placement.rows_multiple
    groups = batches.plan(rows, tokens, placement.rows_multiple)

    def placed():
        for indices, batch in batches.iterate(groups, rows):
            yield len(indices), placement.batch(batch)

    multiply = curvature.make_product(
        space, placed, task.model.cfg, settings.loss_reduction, placement
    )
    solver = settings.gauss_newton
    v, [about] = curvature.solve(
        multiply,
        jax.tree.map(lambda x: x[None], gbar),
        solver.damping,
        solver.iterations,
        solver.tolerance,
    )
    return jax.tree.map(lambda x: x[0], v), about


def _mean_gradient(task, space, group, bar=None):
    rows = [task.targets[i] for i in group]
    placement, settings = task.context.placement, task.settings
    groups = batches.plan(rows, settings.batch_tokens, placement.rows_multiple)

    def placed():
        for indices, batch in batches.iterate(groups, rows):
            yield len(indices), placement.batch(batch)
            if bar:
                bar.update(len(indices), sum(len(rows[i].input_ids) for i in indices))

    return direction.mean_gradient(
        space, placed(), task.model.cfg, settings.loss_reduction, placement
    )


def _name_bad_target(task, space, group, name):
    """Raises UserError naming the target whose gradient is not finite."""
    for i in group:
        tree = _mean_gradient(task, space, [i])
        if not np.isfinite(float(trees.vdot(tree, tree))):
            raise errors.UserError(
                f"The gradient of target {task.targets[i].example_id!r} is not finite though its "
                f"loss is; model.dtype is {task.context.config.model.dtype}: try float32, or drop "
                "the target."
            )
    raise errors.UserError(
        f"The direction of {name!r} is not finite though each target's gradient is; "
        f"influence.direction is {task.settings.direction}."
    )


def _combined(task, targets, cosine):
    """Each group's direction (Q, dim) and their mean (dim,), of unit length where asked.

    LESS averages cosines over the targets of a group, which is the product with the mean of their
    unit rows.
    """
    if task.settings.direction == "less":
        ends = np.cumsum([len(group) for group in task.groups.values()])[:-1]
        groups = np.stack([part.mean(axis=0) for part in np.split(store.unit(targets), ends)])
        return groups, task.weights @ groups
    mean = task.weights @ targets
    return (store.unit(targets), store.unit(mean[None])[0]) if cosine else (targets, mean)


def _entry(example_id, influence, loss, shares):
    """A line of the journal; shares (answer tokens,) float32 go in as their bytes."""
    entry = {"id": example_id, "influence": influence.tolist(), "loss": float(loss)}
    if shares is not None:
        entry["tokens"] = base64.b64encode(np.ascontiguousarray(shares)).decode()
    return entry


def _values(entry):
    tokens = entry.get("tokens")
    shares = np.frombuffer(base64.b64decode(tokens), np.float32) if tokens is not None else None
    return entry["influence"], entry["loss"], shares


def _answer_spans(group, rows):
    """(row, start, stop) of each example's answers in outputs (B, A)."""
    for r, members in enumerate(group.members):
        start = 0
        for i in members:
            stop = start + rows[i].answer_tokens
            yield r, start, stop
            start = stop


def _check_finite(what, task, i, values, loss):
    if not (np.isfinite(loss) and np.isfinite(values).all()):
        what = what if np.isfinite(loss) else "loss"
        raise errors.UserError(
            f"The {what} of example {task.pool[i].example_id!r} is not finite; check the example "
            f"and the weights; model.dtype is {task.context.config.model.dtype}."
        )


def _check_stored(task, indices, rows):
    """Raises UserError naming the first example whose row the store's dtype cannot hold."""
    dtype = task.settings.store.dtype
    fits = store.fits(rows, dtype)
    if not fits.all():
        k = int(np.argmin(fits))
        able = [name for name in store.DTYPES if store.fits(rows[k : k + 1], name).all()]
        raise errors.UserError(
            f"The gradient of example {task.pool[indices[k]].example_id!r} does not fit "
            f"influence.store.dtype={dtype}: its largest number is {np.abs(rows[k]).max():.3g}. "
            f"Set influence.store.dtype={' or '.join(able)}."
        )
