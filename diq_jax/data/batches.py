"""Batches of few shapes and little padding: examples of like length share a batch.

A compiled program serves one shape (B, T, A), so lengths are rounded up to a few edges, chosen for
the data at hand. Which examples share a batch depends on their lengths and ids only.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import numpy as np

from diq_jax.data import example as example_lib

Array = np.ndarray | jax.Array
SHORTEST_EDGE = 32  # tokens
EDGE_STEP = 16  # edges are multiples of this, which suits the tiles of a TPU and of tensor cores
ANSWER_STEP = 32  # answer positions are rounded up to a multiple of this
SHAPE_TOKENS = 2048  # a further shape must save so many tokens: about what its compilation costs


@flax.struct.dataclass
class Batch:
    """B rows of T tokens, of which A positions at most are scored. Padding is 0 everywhere."""

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
    """The examples of one batch, as indices into the list that was planned, and its shape."""

    indices: tuple[int, ...]
    rows: int  # B, at least the number of indices
    tokens: int  # T
    answers: int  # A

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The indices of each row."""
        return tuple((i,) for i in self.indices)

    @property
    def slots(self) -> list[int]:
        """Where each index stands in outputs (B,)."""
        return list(range(len(self.indices)))


def bucket_edges(lengths: Sequence[int], max_shapes: int = 8) -> list[int]:
    """At most `max_shapes` lengths to pad to, ascending, with the fewest padding tokens in all.

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

    A bucket of T tokens has batches of at most batch_tokens / T rows, a multiple of `rows_multiple`
    (the devices that share a batch) and never less than that. What does not fill its last batch
    moves up to the next bucket, so that only the very last batch may have padding rows.

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
    return min(plans, key=lambda p: _padded_tokens(p) + SHAPE_TOKENS * _shapes(p))


def padding_share(groups: Sequence[Group], encoded: Sequence[example_lib.Encoded]) -> float:
    """The share of padding among all tokens of the batches, padding rows included."""
    real = sum(len(encoded[i].input_ids) for group in groups for i in group.indices)
    return 1 - real / _padded_tokens(groups)


def make_batch(
    encoded: Sequence[example_lib.Encoded],
    rows: int,
    tokens: int,
    answers: int,
    pad_side: str = "right",
) -> Batch:
    """Lays examples out as numpy arrays of shape (rows, tokens) and (rows, answers).

    Raises:
        ValueError: there are more examples than rows, or one is too long or has too many answers.
    """
    if len(encoded) > rows:
        raise ValueError(f"{len(encoded)} examples do not fit {rows} rows.")
    if pad_side not in ("left", "right"):
        raise ValueError(f"pad_side must be left or right, got {pad_side!r}.")
    batch = Batch(
        tokens=np.zeros((rows, tokens), np.int32),
        positions=np.zeros((rows, tokens), np.int32),
        segment_ids=np.zeros((rows, tokens), np.int32),
        loss_positions=np.zeros((rows, answers), np.int32),
        loss_labels=np.zeros((rows, answers), np.int32),
        loss_mask=np.zeros((rows, answers), np.float32),
        is_padding=np.arange(rows) >= len(encoded),
    )
    for row, example in enumerate(encoded):
        length = len(example.input_ids)
        scored = np.flatnonzero(example.labels[1:] != example_lib.IGNORED)
        if length > tokens or len(scored) > answers:
            raise ValueError(
                f"Example {example.example_id!r}, {length} tokens and {len(scored)} answer tokens, "
                f"does not fit a batch of {tokens} and {answers}."
            )
        start = tokens - length if pad_side == "left" else 0
        batch.tokens[row, start : start + length] = example.input_ids
        batch.positions[row, start : start + length] = np.arange(length)
        batch.segment_ids[row, start : start + length] = 1
        batch.loss_positions[row, : len(scored)] = start + scored
        batch.loss_labels[row, : len(scored)] = example.labels[scored + 1]
        batch.loss_mask[row, : len(scored)] = 1
    return batch


def iterate(
    groups: Sequence[Group], encoded: Sequence[example_lib.Encoded], pad_side: str = "right"
) -> Iterator[tuple[tuple[int, ...], Batch]]:
    """Yields each group's indices with its batch; row k of the batch is example indices[k]."""
    for group in groups:
        examples = [encoded[i] for i in group.indices]
        yield (
            group.indices,
            make_batch(examples, group.rows, group.tokens, group.answers, pad_side),
        )


def _edges_by_count(lengths: Sequence[int], max_shapes: int) -> list[list[int]]:
    """The best edges, if there may be 1, 2, ... `max_shapes` of them, by dynamic programming.

    cost[j] is the least number of padded tokens that the examples up to grid[j] take.
    """
    if max_shapes < 1:
        raise ValueError(f"max_shapes must be at least 1, got {max_shapes}.")
    lengths = np.sort(np.asarray(lengths))
    grid = [0, SHORTEST_EDGE]
    while grid[-1] < lengths[-1]:
        octave = 1 << (grid[-1].bit_length() - 1)
        grid.append(grid[-1] + max(octave // 16, EDGE_STEP))
    count = np.searchsorted(lengths, grid, side="right")
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
            Group(tuple(bucket[i : i + rows]), rows, edge, min(positions, edge))
            for i in range(0, len(bucket), rows)
        ]
        start += len(bucket)
    return groups


def _batch_rows(count: int, most: int, multiple: int, is_last: bool) -> int:
    """Rows of each batch in a bucket of `count` examples, `most` at most; 0 passes all of them on.

    The last bucket spreads its examples evenly, for few padding rows. The others take one batch
    where all fit, or else the size from 3/4 of `most` up that leaves the fewest.
    """
    most = max(most // multiple, 1) * multiple
    if is_last:
        even = -(-count // -(-count // most))
        return -(-even // multiple) * multiple
    if count <= most:
        return count // multiple * multiple
    sizes = [rows for rows in range(most, 0, -multiple) if 4 * rows >= 3 * most]
    return min(sizes, key=lambda rows: count % rows)


def _padded_tokens(groups: Sequence[Group]) -> int:
    return sum(group.rows * group.tokens for group in groups)


def _shapes(groups: Sequence[Group]) -> int:
    return len({(group.rows, group.tokens, group.answers) for group in groups})
