"""A stage is a folder with a stage.json: skipped when done, continued when killed, or refused.

A stage verifies what it reads against its producer's record, and what it finds done against its
own (records.py). In its folder only the files that it writes are its own: nothing else is deleted,
and a folder of somebody else is refused.
"""

import dataclasses
import fnmatch
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import transformers
from absl import logging

import diq_jax
from diq_jax import config, errors, fields
from diq_jax.run import artifacts, devices, memory, processes, records


@dataclasses.dataclass(frozen=True)
class Context:
    """Holds what every stage gets: the checked config, the run's folder, the devices.

    Attributes:
        verify: whether artifacts are held against the records of the stages that made them.
    """

    config: config.Config
    workdir: pathlib.Path
    placement: devices.Placement
    verify: bool = True

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of an artifact, such as influence/influence.parquet."""
        return self.workdir / name

    def table(self, name: str, *columns: str) -> pa.Table:
        """Reads a table that the stage declares to read, or these columns of it.

        Raises:
            UserError: it is damaged, or a column is not as it must be.
        """
        return records.read_table(self.workdir, name, columns)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes one stage of the pipeline.

    Attributes:
        reads: artifacts of earlier stages, relative to the workdir.
        writes: its files, partial ones too, relative to its folder; * matches any characters.
        fingerprints: further inputs (weights, data files) as {name: hash}.
        run: does the work and returns what goes into stage.json: rows, tokens, resumed_tokens where
            an earlier call did some of them, and more.
        everywhere: all processes take part; otherwise the work is the first one's alone.
        check: raises UserError for what would end the stage later, such as an encoder that cannot
            be read; called before any stage runs, and again when the pool is prepared.
    """

    name: str
    reads: Callable[[Context], tuple[str, ...]]
    writes: tuple[str, ...]
    fingerprints: Callable[[Context], Mapping[str, str]]
    run: Callable[[Context], Mapping[str, Any]]
    everywhere: bool = False
    check: Callable[[Context], None] = lambda context: None


def outlook(stage: Stage, context: Context) -> str:
    """Says what `execute` would do, without writing anything.

    Raises:
        UserError: the stage's folder is somebody else's.
    """
    before = _before(stage, context.path(stage.name))
    if before is None or before["status"] == records.CLEARING:
        return "to do"
    if not all(context.path(name).exists() for name in stage.reads(context)):
        return "to do again: what it reads is missing"
    now = {"config": dataclasses.asdict(context.config)}
    now["inputs"] = {**_inputs(stage, context)[0], **stage.fingerprints(context)}
    if found := _differences(stage, before, now):
        return f"refused without --overwrite: {'; '.join(found)}"
    return "done" if before["status"] == records.DONE else "to continue"


def execute(stage: Stage, context: Context, overwrite: bool) -> bool:
    """Runs a stage unless it is done; every process gets here, and leaves when all have.

    Returns:
        Whether it ran.

    Raises:
        UserError: an input is missing or is not what its stage wrote; the folder is not of this
            stage, or holds a result of another config or other inputs; what differs is named.
    """
    ran = False
    if stage.everywhere:
        ran = _execute(stage, context, overwrite)
    elif processes.is_first():
        with processes.alone():
            ran = _execute(stage, context, overwrite)
    processes.wait(f"{stage.name} ends")
    return ran


def _execute(stage, context, overwrite):
    folder = context.path(stage.name)
    before = _before(stage, folder)
    inputs, unverified = _inputs(stage, context)
    now = {
        "stage": stage.name,
        "status": records.RUNNING,
        "config": dataclasses.asdict(context.config),
        "inputs": {**inputs, **stage.fingerprints(context)},
        **({"unverified_inputs": unverified} if unverified else {}),
        "versions": versions(),
    }
    continued = None if overwrite else before
    if continued and continued["status"] == records.CLEARING:
        continued = None
    if continued:
        _refuse_difference(stage, folder, continued, now)
        if continued["status"] == records.DONE and _is_whole(context, folder, continued):
            return False
    processes.wait(f"{stage.name} begins")  # all know what was there
    if not continued:
        _clear(stage, folder, before, now)
    if not continued or continued["status"] == records.DONE:
        artifacts.write_json(folder / records.NAME, now)
    for name in _files(folder):  # of a killed run, in the middle of a write
        if artifacts.temporary_of(pathlib.Path(name).name) and _is_own(stage, name):
            artifacts.remove(folder / name)
    processes.wait(f"{stage.name} may write")
    memory.forget_peak()
    started = time.time()
    result = dict(stage.run(context))
    # Seconds are this call's: what a killed one spent is not known, nor do its tokens count.
    seconds = time.time() - started
    tokens = result.get("tokens", 0) - result.get("resumed_tokens", 0)
    rate = {"tokens_per_second": round(tokens / seconds, 1)} if tokens else {}
    done = {"status": records.DONE, "seconds": round(seconds, 3), **result, **rate}
    done["peak_memory_mib"] = memory.peak_mib()
    if processes.is_first():
        outputs = {"outputs": _outputs(stage, folder)}
        artifacts.write_json(folder / records.NAME, now | done | outputs)
    return True


def versions() -> dict[str, str]:
    """Returns the versions and devices that a record names."""
    device = jax.devices()[0]
    return {
        "diq_jax": diq_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pa.__version__,
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
    }


def _before(stage, folder) -> dict[str, Any] | None:
    """Reads the record of an earlier call, None in a new folder.

    Raises:
        UserError: the folder, or one in it, is a symbolic link; or it holds files of others.
    """
    if folder.is_symlink() or not (folder.is_dir() or not folder.exists()):
        what = "a symbolic link" if folder.is_symlink() else "no folder"
        raise errors.UserError(
            f"{folder} is {what}: a stage writes and deletes only in a folder of its own; move it "
            "away, or name another --workdir."
        )
    record, names = records.read(folder), list(_files(folder))
    for name in names:
        link = folder / name
        if link.is_symlink() and (link.is_dir() or _is_own(stage, name)):
            raise errors.UserError(
                f"{link} is a symbolic link, where the stage {stage.name!r} writes: remove it, or "
                "name another --workdir."
            )
    if record is None and any(artifacts.temporary_of(n) != records.NAME for n in names):
        raise errors.UserError(
            f"{folder} holds files, but no {records.NAME} of the stage {stage.name!r}: it is not "
            "emptied; move it away, or name another --workdir."
        )
    if record is not None and record["stage"] != stage.name:
        raise errors.UserError(
            f"{folder} holds the {records.NAME} of the stage {record['stage']!r}, not of "
            f"{stage.name!r}: move it away, or name another --workdir."
        )
    return record


def _inputs(stage, context) -> tuple[dict[str, str], list[str]]:
    """Returns {artifact: checksum} of what the stage reads, and those no record vouches for."""
    found, unverified = {}, []
    for name in stage.reads(context):
        path = context.path(name)
        if not path.exists():
            earlier = name.split("/")[0]
            raise errors.UserError(
                f"Stage {stage.name!r} needs {path}, which stage {earlier!r} makes: run with "
                f"--stages={earlier},{stage.name}."
            )
        found[name] = artifacts.sha256(path)
        if not context.verify:
            unverified.append(name)
        elif not records.verify(path, found[name]):
            unverified.append(name)
            logging.warning(
                "%s has no %s beside it: it is used as it is, unverified.", path, records.NAME
            )
    return found, unverified


def _is_whole(context, folder, record) -> bool:
    """Tells whether every output is there. Raises UserError where one is not as it was written."""
    if context.verify and processes.is_first():
        records.verify_outputs(folder, record)
    return all((folder / name).is_file() for name in record["outputs"])


def _clear(stage, folder, before, now) -> None:
    """Deletes what the stage has written, and leaves what others put into its folder.

    The record says so beforehand: what a killed call left half deleted is deleted by the next.
    """
    outputs = (before or {}).get("outputs", {})
    own = [n for n in _files(folder) if n != records.NAME and _is_own(stage, n, outputs)]
    if own:
        marked = now | {"status": records.CLEARING, "outputs": outputs}
        artifacts.write_json(folder / records.NAME, marked)
    for name in own:
        artifacts.remove(folder / name)
    if processes.is_first():
        for place, _, _ in os.walk(folder, topdown=False):
            if pathlib.Path(place) != folder and not os.listdir(place):
                artifacts.remove(place)


def _is_own(stage, name: str, outputs: Mapping[str, str] | None = None) -> bool:
    """Tells whether a stage writes a file of this name, relative to its folder, or wrote it."""
    path = pathlib.PurePosixPath(name)
    name = str(path.with_name(artifacts.temporary_of(path.name) or path.name))
    patterns = (records.NAME, *stage.writes)
    return name in (outputs or ()) or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _files(folder) -> Iterator[str]:
    """Lists the files below a folder, relative to it, none that a link leads to."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted([*names, *links]):
            yield pathlib.Path(place, name).relative_to(folder).as_posix()


def _outputs(stage, folder) -> dict[str, str]:
    """Returns {file: checksum} of the stage's own files, all on the disk."""
    artifacts.sync_tree(folder)
    names = sorted(n for n in _files(folder) if n != records.NAME and _is_own(stage, n))
    found = records.checksums(f"checksums {folder.name}", [folder / name for name in names])
    return {path.relative_to(folder).as_posix(): checksum for path, checksum in found}


def _differences(stage, before, now) -> list[str]:
    old, new = (_decisive(stage, record) for record in (before, now))
    return [
        f"{key} was {_short(old.get(key))}, is now {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _refuse_difference(stage, folder, before, now):
    if differences := _differences(stage, before, now):
        raise errors.UserError(
            f"Stage {stage.name!r} in {folder} was made from something else: "
            f"{'; '.join(differences)}. Use --overwrite to redo it, or another --workdir."
        )


def _decisive(stage, record):
    """Returns the inputs and those config fields that decide the result, flat."""
    decisive = config.decided_by(stage.name)

    def flatten(tree, prefix):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" in decisive:
                yield f"{prefix}{name}", value

    # A field that an earlier version did not have stands at its default, which changes nothing.
    known = {
        **dict(flatten(fields.defaults(config.Config), "")),
        **dict(flatten(record["config"], "")),
    }
    return {**known, **record["inputs"]}


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}..."
