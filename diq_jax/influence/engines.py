"""The interface of engines, and the exact one, which keeps no gradient (features.py has others).

influence/kinds.py has the table of influence.engine.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diq_jax import influence_config
from diq_jax.data import example
from diq_jax.influence import direction, exact, problems
from diq_jax.models import config
from diq_jax.run import devices, sharding


@dataclasses.dataclass(frozen=True)
class Joined:
    """Holds the scores of a whole pool at one checkpoint, float32.

    Attributes:
        influence, loss: (rows,).
        by_target: (rows, Q).
        gram: (Q, Q), the inner products of the directions, of which by_target has those with rows;
            None where one direction needs none.
        token_influence: one array (answer tokens,) a row, or None.
        record: how they were made.
        ends: (directions, dim), the directions in the numbers that a gradient store keeps; empty
            where the engine keeps none.
        made_by: which engine and projection made those numbers.
    """

    influence: np.ndarray
    loss: np.ndarray
    by_target: np.ndarray
    gram: np.ndarray | None
    token_influence: list[np.ndarray] | None
    record: dict[str, Any]
    ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Engine:
    """Scores a pool batch by batch.

    Attributes:
        step: placed batch -> outputs on the devices.
        columns: (group, outputs) -> what is kept of the group's examples, in the order of its
            indices; raises UserError naming the example where a number is not finite or cannot be
            kept.
        join: the columns of the whole pool -> Joined.
    """

    step: Callable[[Any], Any]
    columns: Callable[[Any, Any], dict[str, Any]]
    join: Callable[[dict[str, Any]], Joined]


def exact_engine(
    problem: problems.Problem, space: direction.Space, point: direction.Point | None
) -> Engine:
    """Opens the engine that scores by forward mode along the directions."""
    v, record = direction.make_direction(problem, space, point)
    gram = sharding.whole(direction.gram(v)) if len(v.weights) > 1 else None

    def columns(group, out: exact.BatchScores):
        influence = out.influence.reshape(-1, out.influence.shape[-1])[group.slots]
        loss = out.loss.reshape(-1)[group.slots]
        problems.check_finite(problem, "influence", group.indices, influence, loss)
        found: dict[str, Any] = {"influence": influence, "loss": loss}
        if out.tokens is not None:
            spans = _answer_spans(group, problem.pool)
            found["tokens"] = [out.tokens[row, start:stop] for row, start, stop in spans]
        return found

    def join(columns):
        by_target, tokens = columns["influence"], columns.get("tokens")
        influence = by_target[:, 0] if by_target.shape[1] == 1 else by_target @ problem.weights
        if tokens is not None:
            tokens = [np.asarray(shares, np.float32) for shares in tokens]
        return Joined(influence, columns["loss"], by_target, gram, tokens, record)

    step = exact_step(space, v, problem.settings, problem.model.cfg, problem.placement)
    return Engine(step, columns, join)


def exact_step(
    space: direction.Space,
    v: direction.Direction,
    settings: influence_config.Influence,
    cfg: config.DecoderConfig,
    placement: devices.Placement,
) -> Callable:
    """Compiles placed batch -> exact.BatchScores along v."""
    score = functools.partial(
        exact.scores, cfg=cfg, reduction=settings.loss_reduction, per_token=settings.per_token
    )
    step, v = placement.compile(score, rows=True), placement.argument(v)
    chosen, rest = space
    return lambda batch: step(chosen, v, rest, batch)


def _answer_spans(group, rows: Sequence[example.Encoded]):
    """Yields (row, start, stop) of each example's answers in outputs (B, A)."""
    for r, members in enumerate(group.members):
        start = 0
        for i in members:
            stop = start + rows[i].answer_tokens
            yield r, start, stop
            start = stop
