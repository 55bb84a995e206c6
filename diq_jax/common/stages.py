"""A stage is a folder with a stage.json: skipped when done, continued when killed, refused when it
would change.
"""

import dataclasses
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow
import transformers

import diq_jax
from diq_jax.common import artifacts, config, devices, errors, processes


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage gets: the checked config, the run's folder, the devices."""

    config: config.Config
    workdir: pathlib.Path
    placement: devices.Placement

    def path(self, name: str) -> pathlib.Path:
        """An artifact, such as influence/influence.parquet."""
        return self.workdir / name


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        settings: the config fields that decide its result, as dotted names or prefixes of names.
        reads: artifacts of earlier stages, relative to the workdir.
        fingerprints: further inputs (weights, data files) as {name: hash}.
        run: does the work and returns what goes into stage.json: rows, tokens, resumed_tokens where
            an earlier call did some of them, and more.
        everywhere: all processes take part; otherwise the first does the work on its own devices.
    """

    name: str
    settings: tuple[str, ...]
    reads: Callable[[Context], tuple[str, ...]]
    fingerprints: Callable[[Context], Mapping[str, str]]
    run: Callable[[Context], Mapping[str, Any]]
    everywhere: bool = False


def execute(stage: Stage, context: Context, overwrite: bool) -> bool:
    """Runs a stage unless it is done; every process gets here, and leaves when all have.

    Returns:
        Whether it ran.

    Raises:
        UserError: an input is missing, or the folder holds a result of another config or other
            inputs; what differs is named.
    """
    ran = False
    if stage.everywhere or processes.is_first():
        ran = _execute(stage, context, overwrite)
    processes.wait(f"{stage.name} ends")
    return ran


def _execute(stage, context, overwrite):
    folder = context.path(stage.name)
    record = folder / "stage.json"
    now = {
        "stage": stage.name,
        "status": "running",
        "config": dataclasses.asdict(context.config),
        "inputs": {**_artifacts(stage, context), **stage.fingerprints(context)},
        "versions": versions(),
    }
    before = artifacts.read_json(record) if record.exists() and not overwrite else None
    if before is not None:
        _refuse_difference(stage, folder, before, now)
        if before["status"] == "done" and all((folder / f).exists() for f in before["outputs"]):
            return False
    if stage.everywhere:
        processes.wait(f"{stage.name} begins")  # all know what was there
    if before is None:
        artifacts.remove(folder)
        artifacts.write_json(record, now)
    for stale in folder.rglob(".*.tmp"):  # of a killed run, in the middle of a write
        artifacts.remove(stale)
    if stage.everywhere:
        processes.wait(f"{stage.name} may write")
    started = time.time()
    result = dict(stage.run(context))
    # Seconds are this call's: what a killed one spent is not known, nor do its tokens count.
    seconds = time.time() - started
    tokens = result.get("tokens", 0) - result.get("resumed_tokens", 0)
    rate = {"tokens_per_second": round(tokens / seconds, 1)} if tokens else {}
    done = {"status": "done", "seconds": round(seconds, 3), **result, **rate}
    if processes.is_first():
        artifacts.write_json(record, now | done | {"outputs": _outputs(folder)})
    return True


def versions() -> dict[str, str]:
    device = jax.devices()[0]
    return {
        "diq_jax": diq_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pyarrow.__version__,
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
    }


def _artifacts(stage, context):
    out = {}
    for name in stage.reads(context):
        path = context.path(name)
        if not path.exists():
            earlier = name.split("/")[0]
            raise errors.UserError(
                f"Stage {stage.name!r} needs {path}, which stage {earlier!r} makes: run with "
                f"--stages={earlier},{stage.name}."
            )
        out[name] = artifacts.sha256(path)
    return out


def _outputs(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "stage.json")
    return {str(p.relative_to(folder)): artifacts.sha256(p) for p in files}


def _refuse_difference(stage, folder, before, now):
    old, new = (_decisive(stage, record) for record in (before, now))
    differences = [
        f"{key} was {_short(old.get(key))}, is now {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise errors.UserError(
            f"Stage {stage.name!r} in {folder} was made from something else: "
            f"{'; '.join(differences)}. Use --overwrite to redo it, or another --workdir."
        )


def _decisive(stage, record):
    """The inputs and those config fields that decide the result, flat."""

    def flatten(tree, prefix):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            elif f"{prefix}{name}".startswith(stage.settings):
                yield f"{prefix}{name}", value

    return {**dict(flatten(record["config"], "")), **record["inputs"]}


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}..."
