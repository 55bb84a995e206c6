"""Batches of few shapes and little padding: examples of like length share a batch.

A compiled program serves one shape (B, T, A), so lengths are rounded up to a few edges, chosen for
the data at hand. Which examples share a batch depends on their lengths and ids only.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import flax.struct
import numpy as np
from numpy.typing import ArrayLike

from diq_jax.data import example as example_lib
from diq_jax.trees import Array

SHORTEST_EDGE = 32  # tokens
EDGE_STEP = 16  # edges are multiples of this, which suits the tiles of a TPU and of tensor cores
ANSWER_STEP = 32  # answer positions are rounded up to a multiple of this
SHAPE_TOKENS = 2048  # a further shape must save so many tokens: about what its compilation costs


@flax.struct.dataclass
class Batch:
    """Holds B rows of T tokens, of which at most A positions are scored; padding is 0."""

    tokens: Array  # (B, T) int32
    positions: Array  # (B, T) int32, from 0 at an example's first token
    segment_ids: Array  # (B, T) int32: 1 example (2, 3, ... further ones in a row), 0 padding
    loss_positions: Array  # (B, A) int32: the index along T whose next token is scored
    loss_labels: Array  # (B, A) int32: that next token
    loss_mask: Array  # (B, A) float32: 1 scored, 0 padding
    is_padding: Array  # (B,) bool: the row holds no example; (B, S) the place, where packed
    parent_ids: Array | None = None  # (B, T) int32: a second segment that a token sees, -1 for none
    # (B, A) int32: which of the S examples of its row an answer position belongs to, where packed
    loss_examples: Array | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Lists the examples of a batch, as indices into the list that was planned, and its shape."""

    members: tuple[tuple[int, ...], ...]
    rows: int  # B, at least the number of member rows
    tokens: int  # T
    answers: int  # A, of a row
    examples: int = 0  # S, of a row at most; 0: a row is one example, not packed

    @property
    def indices(self) -> tuple[int, ...]:
        """Returns the examples of all rows."""
        return tuple(itertools.chain.from_iterable(self.members))

    @property
    def slots(self) -> list[int]:
        """Returns where each index stands in outputs (B,), or in outputs (B, S) flattened."""
        return [
            r * max(self.examples, 1) + s
            for r, row in enumerate(self.members)
            for s in range(len(row))
        ]


def bucket_edges(lengths: Sequence[int], max_shapes: int = 8) -> list[int]:
    """Chooses at most `max_shapes` lengths to pad to, ascending, with the fewest padding tokens.

    Edges are 32 or more, multiples of 16 and of a sixteenth of the power of two below them. (Eight
    edges leave 14.3 % padding on a pool of 3,151 medical examples; of quarters, 14.9 %.)
    """
    return _edges_by_count(lengths, max_shapes)[-1]


def plan(
    encoded: Sequence[example_lib.Encoded],
    batch_tokens: int,
    rows_multiple: int = 1,
    max_shapes: int = 8,
) -> list[Group]:
    """Assigns every example to one batch, shortest first, ties by example_id.

    A bucket of T tokens has batches of at most batch_tokens / T rows for each of `rows_multiple`
    shards (the devices that share a batch), as many for each and never less than one. What does not
    fill its last batch moves up to the next bucket, so that only the very last batch may have
    padding rows.

    Returns:
        Groups of at most `max_shapes` distinct (rows, tokens, answers).
    """
    if not encoded:
        return []
    lengths = np.array([len(e.input_ids) for e in encoded])
    answers = np.array([e.answer_tokens for e in encoded])
    order = sorted(range(len(encoded)), key=lambda i: (lengths[i], encoded[i].example_id))
    plans = [
        _fill(edges, order, lengths, answers, batch_tokens, rows_multiple)
        for edges in _edges_by_count(lengths, max_shapes)
    ]

    def cost(groups):
        shapes = {(group.rows, group.tokens, group.answers) for group in groups}
        return sum(group.rows * group.tokens for group in groups) + SHAPE_TOKENS * len(shapes)

    return min(plans, key=cost)


def make_batch(
    encoded: Sequence[example_lib.Encoded], rows: int, tokens: int, answers: int
) -> Batch:
    """Lays examples out as numpy arrays of shape (rows, tokens) and (rows, answers).

    Raises:
        ValueError: there are more examples than rows, or one is too long or has too many answers.
    """
    members = tuple((i,) for i in range(len(encoded)))
    return group_batch(encoded, Group(members, rows, tokens, answers))


def group_batch(encoded: Sequence[example_lib.Encoded], group: Group) -> Batch:
    """Lays a group out as numpy arrays; segment s + 1 of a row is its example s.

    Raises:
        ValueError: as `make_batch`.
    """
    B, T, A, S = group.rows, group.tokens, group.answers, group.examples
    if len(group.members) > B:
        raise ValueError(f"{len(group.members)} examples do not fit {B} rows.")
    batch = Batch(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        segment_ids=np.zeros((B, T), np.int32),
        loss_positions=np.zeros((B, A), np.int32),
        loss_labels=np.zeros((B, A), np.int32),
        loss_mask=np.zeros((B, A), np.float32),
        is_padding=np.ones((B, S) if S else B, bool),
        loss_examples=np.zeros((B, A), np.int32) if S else None,
    )
    for r, row in enumerate(group.members):
        start = answer = 0
        for s, example in enumerate(encoded[i] for i in row):
            length = len(example.input_ids)
            scored = np.flatnonzero(example.labels[1:] != example_lib.IGNORED)
            at, answers = slice(start, start + length), slice(answer, answer + len(scored))
            if at.stop > T or answers.stop > A:
                raise ValueError(
                    f"Example {example.example_id!r}, {length} tokens and {len(scored)} answer "
                    f"tokens, does not fit a batch of {T} and {A}."
                )
            batch.tokens[r, at] = example.input_ids
            batch.positions[r, at] = np.arange(length)
            batch.segment_ids[r, at] = s + 1
            batch.loss_positions[r, answers] = start + scored
            batch.loss_labels[r, answers] = example.labels[scored + 1]
            batch.loss_mask[r, answers] = 1
            batch.is_padding[(r, s) if S else r] = False
            if batch.loss_examples is not None:
                batch.loss_examples[r, answers] = s
            start, answer = at.stop, answers.stop
    return batch


def iterate(
    groups: Sequence[Group], encoded: Sequence[example_lib.Encoded]
) -> Iterator[tuple[tuple[int, ...], Batch]]:
    """Yields each group's indices with its batch."""
    for group in groups:
        yield group.indices, group_batch(encoded, group)


def _edges_by_count(lengths: ArrayLike, max_shapes: int) -> list[list[int]]:
    """Finds the best edges, if there may be 1, 2, ... `max_shapes` of them.

    By dynamic programming: cost[j] is the least number of padded tokens that the examples up to
    grid[j] take.
    """
    if max_shapes < 1:
        raise ValueError(f"max_shapes must be at least 1, got {max_shapes}.")
    ordered = np.sort(np.asarray(lengths))
    grid = [0, SHORTEST_EDGE]
    while grid[-1] < ordered[-1]:
        octave = 1 << (grid[-1].bit_length() - 1)
        grid.append(grid[-1] + max(octave // 16, EDGE_STEP))
    count = np.searchsorted(ordered, grid, side="right")
    cost = np.full(len(grid), np.inf)
    cost[0] = 0
    edges: list[list[int]] = [[] for _ in grid]
    by_count = []
    for _ in range(max_shapes):
        shorter, shorter_edges = cost.copy(), list(edges)
        for j in range(1, len(grid)):
            padded = shorter[:j] + (count[j] - count[:j]) * grid[j]
            i = int(np.argmin(padded))
            if padded[i] < cost[j]:
                cost[j], edges[j] = padded[i], [*shorter_edges[i], grid[j]]
        by_count.append(edges[-1])
    return by_count


def _fill(
    edges: Sequence[int],
    order: Sequence[int],
    lengths: np.ndarray,
    answers: np.ndarray,
    batch_tokens: int,
    rows_multiple: int,
) -> list[Group]:
    """Cuts `order`, which is by length, into batches; what a bucket leaves over begins the next."""
    groups: list[Group] = []
    ends = np.searchsorted(lengths[order], edges, side="right").tolist()
    start = 0
    for edge, end in zip(edges, ends, strict=True):
        is_last = edge == edges[-1]
        rows = _batch_rows(end - start, batch_tokens // edge, rows_multiple, is_last)
        if rows == 0:
            continue
        bucket = order[start : end if is_last else end - (end - start) % rows]
        positions = -(-int(answers[bucket].max()) // ANSWER_STEP) * ANSWER_STEP
        groups += [
            Group(tuple((k,) for k in bucket[i : i + rows]), rows, edge, min(positions, edge))
            for i in range(0, len(bucket), rows)
        ]
        start += len(bucket)
    return groups


def _batch_rows(count: int, most: int, multiple: int, is_last: bool) -> int:
    """Returns the rows of a bucket's batches, at most `most` for each of `multiple` shards.

    The last bucket spreads its examples evenly, for few padding rows. The others take one batch
    where all fit, or else the size from 3/4 of `most` up that leaves the fewest.
    """
    most = max(most, 1) * multiple
    if is_last:
        even = -(-count // -(-count // most))
        return -(-even // multiple) * multiple
    if count <= most:
        return count // multiple * multiple
    sizes = [rows for rows in range(most, 0, -multiple) if 4 * rows >= 3 * most]
    return min(sizes, key=lambda rows: count % rows)
