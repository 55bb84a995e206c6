"""Several examples in one row, told apart by segment ids: one shape for all, almost no padding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from diq_jax.data import batches
from diq_jax.data import example as example_lib


@dataclasses.dataclass(frozen=True)
class PackedGroup:
    """The examples of one batch, row by row, as indices into the list that was planned."""

    members: tuple[tuple[int, ...], ...]
    rows: int  # B, at least the number of member rows
    tokens: int  # T
    answers: int  # A, of a row
    examples: int  # S, of a row at most

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(i for row in self.members for i in row)

    @property
    def slots(self) -> list[int]:
        """Where each index stands in outputs (B, S), flattened."""
        rows = enumerate(self.members)
        return [r * self.examples + s for r, row in rows for s in range(len(row))]


def plan(
    encoded: Sequence[example_lib.Encoded],
    batch_tokens: int,
    rows_multiple: int = 1,
) -> list[PackedGroup]:
    """Packs examples into rows as long as the longest, longest first, each into the fullest row
    that still has room (ties by example_id).

    Returns:
        Groups of one shape: at most batch_tokens / T rows, a multiple of `rows_multiple`.
    """
    if not encoded:
        return []
    T = batches.bucket_edges([len(e.input_ids) for e in encoded], 1)[-1]
    rows = fill(encoded, range(len(encoded)), T)
    A, S = room(encoded, rows, T)
    B = max(min(batch_tokens // T, len(rows)) // rows_multiple, 1) * rows_multiple
    return [
        PackedGroup(tuple(map(tuple, rows[i : i + B])), B, T, A, S) for i in range(0, len(rows), B)
    ]


def fill(
    encoded: Sequence[example_lib.Encoded], indices: Sequence[int], tokens: int
) -> list[list[int]]:
    """Rows of at most so many tokens, as indices: longest first, each into the fullest row that
    still has room (ties by example_id).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # {tokens left: rows}
    for i in sorted(indices, key=lambda i: (-len(encoded[i].input_ids), encoded[i].example_id)):
        length = len(encoded[i].input_ids)
        left = min((left for left in with_room if left >= length and with_room[left]), default=None)
        if left is None:
            left, row = tokens, len(rows)
            rows.append([])
        else:
            row = with_room[left].pop(0)
        rows[row].append(i)
        with_room.setdefault(left - length, []).append(row)
    return rows


def room(
    encoded: Sequence[example_lib.Encoded], rows: Sequence[Sequence[int]], tokens: int
) -> tuple[int, int]:
    """The answer positions A and the examples S of a row that every one of `rows` fits."""
    answers = max(sum(encoded[i].answer_tokens for i in row) for row in rows)
    answers = -(-answers // batches.ANSWER_STEP) * batches.ANSWER_STEP
    return min(answers, tokens), max(map(len, rows))


def make_batch(encoded: Sequence[example_lib.Encoded], group: PackedGroup) -> batches.Batch:
    """Lays the group out as numpy arrays; segment s + 1 of a row is its example s."""
    B, T, A, S = group.rows, group.tokens, group.answers, group.examples
    batch = batches.Batch(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        segment_ids=np.zeros((B, T), np.int32),
        loss_positions=np.zeros((B, A), np.int32),
        loss_labels=np.zeros((B, A), np.int32),
        loss_mask=np.zeros((B, A), np.float32),
        is_padding=np.ones((B, S), bool),
        loss_examples=np.zeros((B, A), np.int32),
    )
    for r, row in enumerate(group.members):
        start = answer = 0
        for s, example in enumerate(encoded[i] for i in row):
            length = len(example.input_ids)
            scored = np.flatnonzero(example.labels[1:] != example_lib.IGNORED)
            at = slice(start, start + length)
            batch.tokens[r, at] = example.input_ids
            batch.positions[r, at] = np.arange(length)
            batch.segment_ids[r, at] = s + 1
            answers = slice(answer, answer + len(scored))
            batch.loss_positions[r, answers] = start + scored
            batch.loss_labels[r, answers] = example.labels[scored + 1]
            batch.loss_mask[r, answers] = 1
            batch.loss_examples[r, answers] = s
            batch.is_padding[r, s] = False
            start, answer = start + length, answer + len(scored)
    return batch
