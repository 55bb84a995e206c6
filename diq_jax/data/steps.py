"""Which examples form an optimiser step, and its microbatches of few shapes."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import numpy as np

from diq_jax.data import batches, example, packing

# A compile costs about as much as this many microbatches gain from a tighter shape.
MICROBATCHES_PER_SHAPE, FEWEST_SHAPES, MOST_SHAPES = 50, 2, 8


@flax.struct.dataclass
class Microbatch:
    """Holds a batch, and each row's place (B,) int32 in the step, by which its dropout is drawn."""

    batch: batches.Batch
    places: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """Describes an optimizer step: its epoch, from 0, and its microbatches (indices, shapes)."""

    epoch: int
    groups: tuple[batches.Group, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Returns the examples of all microbatches."""
        return tuple(itertools.chain.from_iterable(group.indices for group in self.groups))


def plan(
    encoded: Sequence[example.Encoded],
    arms: Mapping[str, Sequence[int]],
    epochs: int,
    batch_size: int,
    microbatch_size: int,
    seed: int,
    rows_multiple: int,
) -> dict[str, list[Step]]:
    """Plans all steps of each arm, with a few shapes that all arms share.

    An epoch's order is a permutation of the arm's examples, sorted by id, that depends on (seed,
    epoch) and the ids alone. Its last step may hold fewer examples. Inside a step, examples go to
    microbatches by length: that saves padding and leaves the sum as it is.

    Args:
        arms: {arm: indices into `encoded`}.
        rows_multiple: microbatches are padded to a multiple of so many rows.
    """
    lengths = np.array([len(e.input_ids) for e in encoded])
    answers = np.array([e.answer_tokens for e in encoded])
    rows = -(-microbatch_size // rows_multiple) * rows_multiple

    cut = {
        arm: [
            (epoch, _split(sorted(batch, key=lambda i: lengths[i]), microbatch_size))
            for epoch, batch in _batches(encoded, chosen, epochs, batch_size, seed)
        ]
        for arm, chosen in arms.items()
    }
    micro = [m for steps in cut.values() for _, parts in steps for m in parts]
    longest = [lengths[m].max() for m in micro]
    worth = len(micro) // MICROBATCHES_PER_SHAPE
    edges = batches.bucket_edges(longest, int(np.clip(worth, FEWEST_SHAPES, MOST_SHAPES)))
    most_answers = np.zeros(len(edges), int)
    np.maximum.at(most_answers, np.searchsorted(edges, longest), [answers[m].max() for m in micro])

    def group(indices):
        bucket = np.searchsorted(edges, lengths[indices].max())
        scored = -(-int(most_answers[bucket]) // batches.ANSWER_STEP) * batches.ANSWER_STEP
        return batches.Group(
            tuple((i,) for i in indices), rows, edges[bucket], min(scored, edges[bucket])
        )

    return {
        arm: [Step(epoch, tuple(map(group, parts))) for epoch, parts in steps]
        for arm, steps in cut.items()
    }


def plan_packed(
    encoded: Sequence[example.Encoded],
    arms: Mapping[str, Sequence[int]],
    epochs: int,
    batch_size: int,
    accumulation_steps: int,
    seed: int,
    rows_multiple: int,
) -> dict[str, list[Step]]:
    """Plans the steps of `plan` with several examples in a row and one shape.

    A step's examples are packed into rows as long as the longest example of all, and the rows are
    cut into `accumulation_steps` microbatches at most.
    """
    T = batches.bucket_edges([len(e.input_ids) for e in encoded], 1)[-1]
    packed = {
        arm: [
            (epoch, packing.fill(encoded, batch, T))
            for epoch, batch in _batches(encoded, chosen, epochs, batch_size, seed)
        ]
        for arm, chosen in arms.items()
    }
    filled = [rows for steps in packed.values() for _, rows in steps]
    A, S = packing.room(encoded, [row for rows in filled for row in rows], T)
    B = -(-max(map(len, filled)) // accumulation_steps)
    B = -(-B // rows_multiple) * rows_multiple

    def group(rows):
        return batches.Group(tuple(map(tuple, rows)), B, T, A, S)

    return {
        arm: [Step(epoch, tuple(map(group, _split(rows, B)))) for epoch, rows in steps]
        for arm, steps in packed.items()
    }


def microbatches(encoded: Sequence[example.Encoded], step: Step) -> list[Microbatch]:
    """Lays out the rows of a step as numpy arrays."""
    made, start = [], 0
    for group in step.groups:
        places = np.arange(start, start + group.rows, dtype=np.int32)
        made.append(Microbatch(batches.group_batch(encoded, group), places))
        start += len(group.members)
    return made


def _batches(encoded, chosen, epochs, batch_size, seed):
    """Yields (epoch, indices) of each optimiser step."""
    for epoch in range(epochs):
        for batch in _split(_order(encoded, chosen, seed, epoch), batch_size):
            yield epoch, batch


def _order(encoded, chosen, seed, epoch):
    by_id = sorted(chosen, key=lambda i: encoded[i].example_id)
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    return [by_id[i] for i in rng.permutation(len(by_id))]


def _split(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]
