"""Scores of a pool against targets, in memory.

    found = score.score(model, pool, targets, influence_config.Influence(engine="exact"), placement)
    found.influence                                     # (rows,), in the order of the pool

influence/stage.py adds the disk.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from diq_jax import errors, influence_config
from diq_jax.data import example
from diq_jax.influence import direction, engines, kinds, problems
from diq_jax.models import load
from diq_jax.run import devices, parts, processes

if TYPE_CHECKING:
    from diq_jax.influence import warmup


class Kept(Protocol):
    """Keeps the columns of finished rows: parts.Memory, parts.Parts, store.Writer."""

    @property
    def done(self) -> set[int]:
        """Returns the rows that have been scored."""
        ...

    def add(self, rows: Sequence[int], columns: Mapping[str, Any]) -> None:
        """Keeps the scores of a batch of rows."""
        ...

    def columns(self) -> dict[str, Any]:
        """Returns all scores, in the order of the rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """Holds the scores of a pool, in its order.

    Attributes:
        example_ids: (rows,).
        influence: (rows,) float32; larger is better. After a warm-up the sum over its epochs, by
            mean learning rate.
        loss: (rows,) float32, in nats.
        tokens: (rows,) int32, answer tokens.
        groups: the names of the Q groups of targets (influence.targets).
        by_target: (rows, Q) float32, the influence on each group.
        alignment: of several groups (rows,) float32, the mean cosine with them inside the leading
            directions of their span (influence/span.py), else None.
        token_influence: with per_token one array (answer tokens,) a row, else None.
        target_losses: (targets,) float32 at the base model.
        parameters: how many numbers were differentiated.
        span: how many directions the alignment has, and their share of the groups' squared norms.
        checkpoints: (scores, share) of each epoch of the warm-up, or of the base model alone.
    """

    example_ids: list[str]
    influence: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    groups: list[str]
    by_target: np.ndarray
    alignment: np.ndarray | None
    token_influence: list[np.ndarray] | None
    target_losses: np.ndarray
    parameters: int
    span: dict[str, Any]
    checkpoints: list[tuple[engines.Joined, float]]


def score(
    model: load.Model,
    pool: Sequence[example.Encoded],
    targets: Sequence[example.Encoded],
    settings: influence_config.Influence,
    placement: devices.Placement,
    tasks: Sequence[str] = (),
    keep: Callable[[str], Kept] = lambda name: parts.Memory(),
    epochs: "warmup.Epochs | None" = None,
) -> Scores:
    """Scores each example of a pool by what a step on it does to the targets' loss.

    Args:
        model: with its parameters placed by `placement`.
        tasks: the task of each target, for settings.targets=task.
        keep: gives a place for the finished rows of a checkpoint ("" or "-epoch-1", ..); what is
            done there already is not computed again. Which examples share a batch depends on the
            pool alone, so that a continued call gives identical bits.
        epochs: those of the warm-up that are done; new ones are added.

    Raises:
        UserError: a loss, a direction or a score is not finite; the example is named. Or the
            settings do not fit the model.
    """
    groups = problems.group_targets(settings.targets, targets, tasks)
    problem = problems.Problem(model, pool, targets, groups, settings, placement)
    with devices.matmul_precision(problem.dtype):
        space = direction.make_space(model, settings, placement)
        target_losses = _target_losses(problem, space)
        found = [
            (_at_checkpoint(problem, at, point, keep(name)), share)
            for name, at, point, share in _checkpoints(problem, space, epochs)
        ]
    shapes = direction.shapes(space, placement)
    influence, by_target, tokens = _summed(found)
    alignment, spanned = None, {}
    if len(groups) > 1:
        from diq_jax.influence import span

        grams = [share * joined.gram for joined, share in found if joined.gram is not None]
        gram = np.sum(grams, axis=0)
        alignment, spanned = span.align(by_target, gram, problem.weights, settings.span)
    return Scores(
        [row.example_id for row in pool],
        influence,
        found[-1][0].loss,
        np.array([row.answer_tokens for row in pool], np.int32),
        list(groups),
        by_target,
        alignment,
        tokens,
        target_losses,
        sum(int(np.prod(shape)) for shape in shapes.values()),
        spanned,
        found,
    )


def _checkpoints(problem, space, epochs):
    """Yields (name, space, checkpoint, share) of each point at which gradients are taken."""
    if problem.settings.warmup.epochs == 0:
        yield "", space, None, 1.0
        return
    from diq_jax.influence import warmup

    points = warmup.run(problem, space, warmup.EpochMemory() if epochs is None else epochs)
    for k, (point, share) in enumerate(points):
        chosen = jax.tree.map(lambda p, x: x.astype(p.dtype), space[0], point.chosen)
        at = problem.placement.like(space[0], chosen), space[1]
        yield f"-epoch-{k + 1}", at, point, share


def _at_checkpoint(problem, space, point, kept: Kept) -> engines.Joined:
    engine = kinds.ENGINES[problem.settings.engine].open(problem, space, point)
    done = frozenset(kept.done)
    for group, outputs in problems.run_batches(
        "influence", problem, problem.pool, engine.step, done
    ):
        columns = engine.columns(group, outputs)
        new = [k for k, i in enumerate(group.indices) if i not in done]
        rows = [group.indices[k] for k in new]
        kept.add(rows, {name: _take(values, new) for name, values in columns.items()})
    processes.wait("rows")  # the first process has written them
    return engine.join(kept.columns())


def _take(values, places: list[int]):
    return values[places] if isinstance(values, np.ndarray) else [values[k] for k in places]


def _summed(
    found: list[tuple[engines.Joined, float]],
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray] | None]:
    """Returns influence, by_target and token_influence, summed over checkpoints by their shares."""
    if len(found) == 1 and found[0][1] == 1.0:
        [(only, _)] = found
        return only.influence, only.by_target, only.token_influence

    def total(values: list[Any]) -> Any:
        return sum(w * x for x, (_, w) in zip(values, found, strict=True))

    tokens = None
    if found[0][0].token_influence is not None:
        rows = zip(*(joined.token_influence for joined, _ in found), strict=True)
        tokens = [total(list(row)) for row in rows]
    influence, by_target = (
        total([getattr(joined, name) for joined, _ in found]).astype(np.float32)
        for name in ("influence", "by_target")
    )
    return influence, by_target, tokens


def _target_losses(problem, space) -> np.ndarray:
    """Returns the losses of the targets, (targets,) float32, each of them finite."""
    settings, targets = problem.settings, problem.targets
    losses = functools.partial(
        direction.losses, cfg=problem.model.cfg, reduction=settings.loss_reduction
    )
    step = problem.placement.compile(losses, rows=True)
    found = np.zeros(len(targets), np.float32)
    for group, values in problems.run_batches(
        "target losses", problem, targets, lambda batch: step(*space, batch)
    ):
        found[list(group.indices)] = values.reshape(-1)[group.slots]
    for row, value in zip(targets, found, strict=True):
        if not np.isfinite(value):
            raise errors.UserError(
                f"The loss of target {row.example_id!r} is not finite; check the example and the "
                f"weights; model.dtype is {problem.dtype}."
            )
    return found
