"""What is scored, against what, and the loop over its batches."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches, example
from diq_jax.models import config as model_config
from diq_jax.models import decoder, load
from diq_jax.run import devices, progress

MICROBATCH_TOKENS = 16_384  # the most by default


@dataclasses.dataclass(frozen=True)
class Problem:
    """Holds a pool to score, and the targets to score it against.

    Attributes:
        groups: {name: indices of the targets that share a direction}.
    """

    model: load.Model
    pool: Sequence[example.Encoded]
    targets: Sequence[example.Encoded]
    groups: Mapping[str, Sequence[int]]
    settings: influence_config.Influence
    placement: devices.Placement

    @property
    def weights(self) -> np.ndarray:
        """Returns each group's share of the targets, (Q,) float32."""
        sizes = np.array([len(group) for group in self.groups.values()], np.float32)
        return sizes / sizes.sum()

    @property
    def dtype(self) -> str:
        """Returns the dtype of the model's parameters."""
        return str(self.model.params["embed"]["embedding"].dtype)


def group_targets(
    kind: str, targets: Sequence[example.Encoded], tasks: Sequence[str]
) -> dict[str, list[int]]:
    """Returns {name: indices} of the targets that share a direction (influence.targets).

    Raises:
        UserError: kind is task, and the task of a target is not known.
    """
    if kind == "example":
        return {row.example_id: [i] for i, row in enumerate(targets)}
    if kind == "task" and (len(tasks) != len(targets) or not all(tasks)):
        raise errors.UserError("influence.targets=task needs the task of every target.")
    if kind == "task":
        return {t: [i for i, u in enumerate(tasks) if t == u] for t in sorted(set(tasks))}
    return {"mean": list(range(len(targets)))}


def run_batches(
    name: str,
    problem: Problem,
    rows: Sequence[example.Encoded],
    step: Callable,
    done: Iterable[int] = (),
) -> Iterator[tuple[Any, Any]]:
    """Runs step(placed batch) on all batches that hold a row which is not done, with a bar.

    The next batch is dispatched before the last is fetched.

    Yields:
        (group, outputs as numpy arrays).
    """
    done = set(done)
    settings, placement = problem.settings, problem.placement
    planned = plan(settings, rows, placement.rows_multiple)
    groups = [group for group in planned if not done.issuperset(group.indices)]

    def started():
        for group in groups:
            yield group, step(placement.batch(batches.group_batch(rows, group)))

    left = {i for group in groups for i in group.indices}
    with progress.Progress(name, len(rows), resumed=len(rows) - len(left)) as bar:
        for group, outputs in devices.one_behind(started()):
            yield group, jax.device_get(outputs)
            bar.update(len(group.indices), sum(len(rows[i].input_ids) for i in group.indices))


def plan(
    settings: influence_config.Influence, rows: Sequence[example.Encoded], multiple: int
) -> list[batches.Group]:
    """Assigns rows to batches, packed where the settings ask for it."""
    if not settings.packing:
        return batches.plan(rows, settings.batch_tokens, multiple)
    from diq_jax.data import packing

    return packing.plan(rows, settings.batch_tokens, multiple)


def placed(
    problem: Problem,
    rows: Sequence[example.Encoded],
    tokens: int,
    bar: progress.Progress | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields (number of examples, placed batch) of bucketed rows, `tokens` a batch."""
    groups = batches.plan(rows, tokens, problem.placement.rows_multiple)
    for indices, batch in batches.iterate(groups, rows):
        yield len(indices), problem.placement.batch(batch)
        if bar:
            bar.update(len(indices), sum(len(rows[i].input_ids) for i in indices))


def microbatch_tokens(settings: influence_config.Influence) -> int:
    """Returns a device's tokens in one backward pass, the setting's or by backend.

    A CPU gains nothing from more, a GPU or TPU is fastest while its products are large.
    """
    few = jax.default_backend() == "cpu"
    return settings.microbatch_tokens or (1024 if few else MICROBATCH_TOKENS)


def fit_microbatches(
    settings: influence_config.Influence,
    cfg: model_config.DecoderConfig,
    placement: devices.Placement,
) -> influence_config.Influence:
    """Returns settings with microbatch_tokens that fill half of a device's memory, if left open."""
    if settings.microbatch_tokens or not placement.memory:
        return settings
    room = placement.memory // 2 * placement.mesh.shape["model"]
    tokens = room // decoder.activation_bytes(cfg, settings.remat)
    return dataclasses.replace(
        settings, microbatch_tokens=int(np.clip(tokens, 1, MICROBATCH_TOKENS))
    )


def check_finite(
    problem: Problem, what: str, indices: Sequence[int], values: trees.Array, losses: trees.Array
) -> None:
    """Raises UserError naming the first example whose values (B, ..) or loss are not finite."""
    for i, row, loss in zip(indices, values, losses, strict=True):
        if not (np.isfinite(loss) and np.isfinite(row).all()):
            raise errors.UserError(
                f"The {what if np.isfinite(loss) else 'loss'} of example "
                f"{problem.pool[i].example_id!r} is not finite; check the example and the weights; "
                f"model.dtype is {problem.dtype}."
            )
