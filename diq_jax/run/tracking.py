"""Experiment trackers: progress.measured tells them curves, rates, what each stage took."""

import contextlib
import importlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diq_jax import errors
from diq_jax.run import processes, progress

PROJECT = "diq_jax"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


@contextlib.contextmanager
def opened(
    names: Sequence[str], workdir: pathlib.Path, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Opens a run in each tracker, in the first process, and ends it.

    Args:
        names: of PACKAGES.
        workdir: whose name the runs have; TensorBoard's files go to tensorboard/ in it.
        settings: the config, for trackers that keep one.

    Raises:
        UserError: no such tracker, its package is not installed, or it refuses.
    """
    with contextlib.ExitStack() as stack:
        for name in names if processes.is_first() else ():
            errors.check_choice("--track", name, PACKAGES)
            try:
                module = importlib.import_module(PACKAGES[name])
            except ImportError:
                raise errors.UserError(
                    f"--track={name} needs pip install 'diq_jax[{name}]'."
                ) from None
            open_one = _tensorboard if name == "tensorboard" else _hosted
            stack.enter_context(progress.tracked(open_one(stack, name, module, workdir, settings)))
        yield


def _tensorboard(stack, name, module, workdir, settings) -> progress.Tracker:
    writer = stack.enter_context(module.SummaryWriter(str(workdir / "tensorboard")))

    def track(what, step, numbers):
        for key, value in numbers.items():
            writer.add_scalar(f"{what}/{key}", value, step)

    return track


def _hosted(stack, name, module, workdir, settings) -> progress.Tracker:
    """Opens a run of wandb or trackio, which share their interface."""
    try:
        module.init(project=PROJECT, name=workdir.name, config=dict(settings))
    except getattr(module, "Error", OSError) as e:
        raise errors.UserError(f"--track={name}: {' '.join(str(e).split())[:200]}") from None
    stack.callback(module.finish)

    def track(what, step, numbers):
        module.log({f"{what}/{key}": value for key, value in {**numbers, "step": step}.items()})

    return track
