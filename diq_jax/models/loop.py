"""The loop of every training: killed, or ended by SIGTERM, it goes on to the same numbers."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from diq_jax import errors, trees
from diq_jax.models import training
from diq_jax.run import processes, progress, states

T = TypeVar("T")
Record = dict[str, float]  # a step's metrics by name
SHOWN = ("loss", "gradient_norm")  # of metrics, in messages
ADVICE = "Try a lower learning_rate, finetune.clip_norm=1 or model.dtype=float32."


@dataclasses.dataclass(frozen=True, eq=False)
class Upkeep:
    """Does what is due beside the steps; by default nothing.

    Attributes:
        folder: where train states go when SIGTERM comes; with `checkpoint_every` also every so many
            steps and after the last one.
        evaluate: (state, frozen, records so far) -> the "target_loss" now, called every
            `eval_every` steps and after the last one; it may keep the state.
        log: (index of the first record, records), called with what each checkpoint adds.
        advice: what to try where numbers are not finite.
    """

    folder: pathlib.Path | None = None
    checkpoint_every: int = 0
    eval_every: int = 0
    evaluate: Callable[[training.TrainState, Any, list[Record]], float] | None = None
    log: Callable[[int, Sequence[Record]], None] | None = None
    advice: str = ADVICE


def train(
    name: str,
    steps: Sequence[Sequence[int]],
    examples: Sequence[tuple[str, int]],
    state: training.TrainState,
    frozen: Any,
    train_step: Callable,
    upkeep: Upkeep,
) -> tuple[training.TrainState, list[Record], int]:
    """Trains from the last state on disk, or from `state`, to the end.

    Args:
        name: as the progress bar and messages have it.
        examples: (id, tokens) of each example, by the indices that each of `steps` holds.
        train_step: (state, number of the step) -> (state, metrics on their way: "loss" and more).

    Returns:
        The last state, the metrics of every step, and the tokens of this call.

    Raises:
        UserError: a loss or a trained parameter is not finite; or all train states are damaged.
    """
    waiting, records, saved = [], [], None  # a loss is fetched when the next step is on its way
    sizes = [len(step) for step in steps]
    with contextlib.ExitStack() as stack:
        stops = stack.enter_context(processes.saving())
        if upkeep.folder:
            saved = stack.enter_context(states.States(upkeep.folder, name))
            state, records = saved.restore(state)
        logged = done = len(records)
        bar = stack.enter_context(progress.Progress(name, sum(sizes), resumed=sum(sizes[:done])))

        def fetch():
            for number, metrics in waiting:
                chosen = [examples[i] for i in steps[number]]
                records.append(_finite(metrics, name, number, chosen, upkeep.advice))
                loss = f"{records[-1]['loss']:.3f}"
                bar.update(len(chosen), sum(n for _, n in chosen), loss=loss)
            waiting.clear()

        for number in range(done, len(steps)):
            state, metrics = train_step(state, number)
            fetch()
            waiting.append((number, metrics))
            last = number + 1 == len(steps)
            evaluate = _if_due(upkeep.evaluate, number, upkeep.eval_every, last)
            stopped = stops(number)
            saves = saved if stopped else _if_due(saved, number, upkeep.checkpoint_every, last)
            if not (evaluate or saves or last or stopped):
                continue
            fetch()
            _check_trained(state, name, number, upkeep.advice)
            if evaluate:
                found = evaluate(state, frozen, records)
                records[-1]["target_loss"] = _checked(found, name, number, upkeep.advice)
            if saves:
                logged = _save(saves, upkeep, name, state, records, logged, stopped)
            if stopped:
                processes.stop()
    return state, records, bar.tokens


def _if_due(what: T | None, number: int, every: int, last: bool) -> T | None:
    return what if what and every and (last or (number + 1) % every == 0) else None


def _finite(metrics, name, number, chosen, advice) -> Record:
    record = {key: float(value) for key, value in metrics.items()}
    if all(map(np.isfinite, record.values())):
        return record
    ids = ", ".join(id_ for id_, _ in chosen)
    said = [f"{key.replace('_', ' ')} {record[key]}" for key in SHOWN if key in record]
    raise errors.UserError(
        f"{name} has {' and '.join(said)} at step {number} (examples {ids}). {advice}"
    )


def _check_trained(state, name, number, advice) -> None:
    """Raises UserError where the update of a step has ruined what it trains."""
    if bad := trees.not_finite(state.factors):
        raise errors.UserError(
            f"{name} has parameters that are not finite after step {number} ({bad[0]}), though "
            f"its loss was. {advice}"
        )


def _save(saves, upkeep, name, state, records, logged, wait) -> int:
    """Keeps a state, and logs the records since the last one; returns how many are logged."""
    saves.save(state, records)
    if wait:
        saves.finish()
    progress.measured(name, logged, records[logged:])
    if upkeep.log:
        upkeep.log(logged, records[logged:])
    return len(records)


def _checked(value, name, number, advice) -> float:
    if not np.isfinite(value):
        raise errors.UserError(f"{name} has the target loss {value} after step {number}. {advice}")
    return value
