"""A training run that a kill does not hurt: its state on disk every few steps, exact resume."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diq_jax.common import errors, progress
from diq_jax.data import steps as steps_lib

Record = dict[str, float]  # a step's metrics by name


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
        UserError: a loss that is not finite, naming the step and its examples.
    """
    # The next step is on its way before a loss is fetched; `waiting` is the step to fetch.
    waiting: list[tuple[int, Any]] = []
    total = len(run.steps)
    with _checkpoints(run.folder) as saved:
        state, records = _restore(saved, state)
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
                    before = [r["target_loss"] for r in records if "target_loss" in r]
                    records[-1]["target_loss"] = run.evaluate(state, before)
                if _is_due(number, run.checkpoint_every, total):
                    fetch()
                    _save(saved, state, records)
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
        f"{number} (examples {ids}). Try a lower learning_rate, finetune.clip_norm=1 or "
        "model.dtype=float32."
    )


def _checkpoints(folder) -> ocp.CheckpointManager:
    folder.mkdir(parents=True, exist_ok=True)
    # Training is the first process's work: it waits for no other.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        enable_async_checkpointing=False,
        create=False,
        multiprocessing_options=alone,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _save(saved, state, records) -> None:
    state = jax.tree.map(np.asarray, state)
    items = {"state": ocp.args.StandardSave(state), "records": ocp.args.JsonSave(records)}
    saved.save(len(records), args=ocp.args.Composite(**items))


def _restore(saved, state):
    """The last checkpoint, or the state given and no records."""
    last = saved.latest_step()
    if last is None:
        return state, []
    template = jax.tree.map(np.asarray, state)
    items = {"state": ocp.args.StandardRestore(template), "records": ocp.args.JsonRestore()}
    found = saved.restore(last, args=ocp.args.Composite(**items))
    return jax.tree.map(jnp.asarray, found["state"]), found["records"]
