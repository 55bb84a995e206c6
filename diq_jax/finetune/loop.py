"""A training run that a kill does not hurt: its state on disk every few steps, exact resume."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diq_jax import errors, trees
from diq_jax.data import steps as steps_lib
from diq_jax.finetune import states
from diq_jax.run import progress

Record = dict[str, float]  # a step's metrics by name
ADVICE = "Try a lower learning_rate, finetune.clip_norm=1 or model.dtype=float32."


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training run.

    Attributes:
        name: as the progress bar and messages have it.
        folder: of its checkpoints.
        ids, tokens: of each example, by the indices that `steps` hold.
        eval_every: steps between two calls of `evaluate`, which also follows the last; 0 = none.
        evaluate: (state, earlier values of "target_loss") -> the loss now; it may keep the state.
        log: (index of the first record, records), called with what each checkpoint adds.
    """

    name: str
    folder: pathlib.Path
    steps: Sequence[steps_lib.Step]
    ids: Sequence[str]
    tokens: Sequence[int]
    checkpoint_every: int
    eval_every: int = 0
    evaluate: Callable[[Any, list[float]], float] | None = None
    log: Callable[[int, Sequence[Record]], None] | None = None


def train(run: Run, state, train_step: Callable) -> tuple[Any, list[Record], int]:
    """From the last checkpoint, or `state`, to the end.

    Args:
        train_step: (state, step) -> (state, metrics on their way).

    Returns:
        The last state, the metrics of every step, the tokens of this call.

    Raises:
        UserError: a loss that is not finite, naming the step and its examples, or trained
            parameters that are not; or all checkpoints are damaged.
    """
    # The next step is on its way before a loss is fetched; `waiting` is the step to fetch.
    waiting: list[tuple[int, Any]] = []
    total = len(run.steps)
    with states.States(run.folder, run.name) as saved:
        state, records = saved.restore(state)
        logged = done = len(records)
        sizes = [len(step.indices) for step in run.steps]
        with progress.Progress(run.name, sum(sizes), resumed=sum(sizes[:done])) as bar:

            def fetch():
                for number, metrics in waiting:
                    indices = run.steps[number].indices
                    records.append(_finite(metrics, run, number))
                    tokens = sum(run.tokens[i] for i in indices)
                    bar.update(len(indices), tokens, loss=f"{records[-1]['loss']:.3f}")
                waiting.clear()

            for number in range(done, total):
                state, metrics = train_step(state, run.steps[number])
                fetch()
                waiting.append((number, metrics))
                if run.eval_every and _is_due(number, run.eval_every, total):
                    fetch()
                    _check_trained(state, run, number)
                    before = [r["target_loss"] for r in records if "target_loss" in r]
                    records[-1]["target_loss"] = _check_target_loss(
                        run.evaluate(state, before), run, number
                    )
                if _is_due(number, run.checkpoint_every, total):
                    fetch()
                    _check_trained(state, run, number)
                    saved.save(state, records)
                    if run.log is not None:
                        run.log(logged, records[logged:])
                    logged = len(records)
    return state, records, bar.tokens


def _is_due(number, every, total):
    return (number + 1) % every == 0 or number + 1 == total


def _finite(metrics, run, number) -> Record:
    record = {name: float(value) for name, value in metrics.items()}
    if all(map(np.isfinite, record.values())):
        return record
    ids = ", ".join(run.ids[i] for i in run.steps[number].indices)
    raise errors.UserError(
        f"{run.name} has loss {record['loss']} and gradient norm {record['gradient_norm']} at step "
        f"{number} (examples {ids}). {ADVICE}"
    )


def _check_trained(state, run, number) -> None:
    """Raises UserError where the update of a step has ruined what it trains."""
    if bad := trees.not_finite(state.factors):
        raise errors.UserError(
            f"{run.name} has parameters that are not finite after step {number} ({bad[0]}), though "
            f"its loss was. {ADVICE}"
        )


def _check_target_loss(value, run, number) -> float:
    if not np.isfinite(value):
        raise errors.UserError(
            f"{run.name} has the target loss {value} after step {number}. {ADVICE}"
        )
    return value
