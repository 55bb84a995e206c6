"""Train states on disk: two are kept, with checksums, and the newest whole one is taken.

    finetune/state/selected/120/{state, records}/..     by orbax
    finetune/state/selected/120/checksums.json          written last: a state without it is no state

The steps go on while a state is written. Where processes do not see each other's files, the first
one gathers the whole state, keeps it and gives it back to all.
"""

import copy
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from diq_jax import errors
from diq_jax.run import artifacts, processes, reading, sharding

KEPT = 2
CHECKSUMS = "checksums.json"
RECORDS = "records/metadata"  # where orbax puts them


class States:
    """Keeps the train states of one training; a context manager.

    Args:
        name: of the training, for messages.

    Raises:
        UserError: there are states and each is damaged.
    """

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        self._folder = folder
        artifacts.make_folder(folder)
        self._last = processes.agreed(lambda: _newest(folder, name))
        self._gathers = not processes.see_each_other()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=True, create=False
        )
        if self._gathers:
            options.multiprocessing_options.active_processes = {0}
        self._manager: Any = None  # where this process keeps nothing
        if processes.is_first() or not self._gathers:
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._writing: pathlib.Path | None = None

    def save(self, state: Any, records: list[dict[str, float]]) -> None:
        """Begins to keep the state after len(records) steps, once the one before is on the disk.

        It may be changed and donated when this returns. Arrays spread over processes are written by
        each in part.
        """
        self.finish()
        if self._gathers:
            state = jax.tree.map(_gathered, state)
        if self._manager is None:
            return
        steps: Any = copy.deepcopy(records)  # orbax writes them while the caller adds to them
        items = {"state": ocp.args.StandardSave(state), "records": ocp.args.JsonSave(steps)}
        self._manager.save(len(records), args=ocp.args.Composite(**items))
        self._writing = self._folder / str(len(records))

    def finish(self) -> None:
        """Waits until the last state is on the disk, in the first process with its checksums."""
        folder, self._writing = self._writing, None
        if folder is None:
            return
        self._manager.wait_until_finished()
        if processes.is_first():
            artifacts.sync_tree(self._folder)  # orbax has removed older ones
            artifacts.write_json(folder / CHECKSUMS, _checksums(folder))

    def restore(self, state: Any) -> tuple[Any, list[dict[str, float]]]:
        """Returns the last state and the records of its steps; without one `state` and no record.

        Args:
            state: nested and shaped like the ones that were saved. An array that is spread over
                devices is read as it lies there.
        """
        if self._last is None:
            return state, []
        if not self._gathers:
            found = self._read(jax.tree.map(_as_it_lies, state))
            return jax.tree.map(jnp.asarray, found["state"]), found["records"]
        whole = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
        found = self._read(whole) if self._manager else {"state": whole}
        records = processes.agreed(lambda: found["records"])
        return jax.tree.map(_given, state, found["state"]), records

    def _read(self, template) -> Any:
        items = {"state": ocp.args.StandardRestore(template), "records": ocp.args.JsonRestore()}
        return self._manager.restore(self._last, args=ocp.args.Composite(**items))

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        if self._manager:
            self._manager.close()


def _gathered(leaf) -> np.ndarray | None:
    """Fetches a leaf from all processes, for the first of them."""
    whole = sharding.whole(leaf)
    return whole if processes.is_first() else None


def _given(leaf, kept) -> jax.Array:
    """Gives a leaf of the first process to all, each the part that it has of `leaf`."""
    whole = multihost_utils.broadcast_one_to_all(kept)
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return sharding.put(whole, leaf.sharding)
    return jnp.asarray(whole)


def _as_it_lies(leaf):
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.asarray(leaf)


def _newest(folder, name) -> int | None:
    """Finds the step of the newest state that is whole, and removes newer ones with a warning."""
    steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
    wrong: dict[int, str] = {}
    whole = None
    for step in steps:
        if not (problem := _problem(folder / str(step))):
            whole = step
            break
        wrong[step] = problem
    found = "; ".join(f"{folder / str(step)}: {problem}" for step, problem in wrong.items())
    if whole is None and any((folder / str(step) / CHECKSUMS).exists() for step in wrong):
        raise errors.UserError(
            f"{name}: every checkpoint is damaged ({found}). Remove {folder}, and the same command "
            "trains from the start."
        )
    if wrong:
        begin = "the start" if whole is None else f"the older one, after step {whole}"
        logging.warning("%s: a checkpoint is left out (%s): going on from %s.", name, found, begin)
    for step in wrong:
        artifacts.remove(folder / str(step))
    return whole


def _problem(folder) -> str:
    """Says what makes a state unfit to continue from; "" where nothing does."""
    if not (folder / CHECKSUMS).exists():
        return "it was not finished"
    try:
        expected = reading.read_json(folder / CHECKSUMS)
    except errors.UserError:
        return f"{CHECKSUMS} is damaged"
    found = _checksums(folder)
    if not isinstance(expected, dict) or found.keys() != expected.keys():
        return "files are missing or too many"
    if changed := [file for file in found if found[file] != expected[file]]:
        return f"{changed[0]} is not as it was written"
    steps = len(reading.read_json(folder / RECORDS))
    return "" if steps == int(folder.name) else f"it has {steps} records"


def _checksums(folder) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / CHECKSUMS)
    return {p.relative_to(folder).as_posix(): artifacts.sha256(p) for p in files}
