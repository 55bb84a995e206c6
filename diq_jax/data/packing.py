"""Several examples in one row, told apart by segment ids: one shape for all, almost no padding."""

from collections.abc import Sequence

from diq_jax.data import batches
from diq_jax.data import example as example_lib


def plan(
    encoded: Sequence[example_lib.Encoded],
    batch_tokens: int,
    rows_multiple: int = 1,
) -> list[batches.Group]:
    """Packs examples into rows as long as the longest (`fill`).

    Returns:
        Groups of one shape: at most batch_tokens / T rows for each of `rows_multiple` shards, as
        many for each.
    """
    if not encoded:
        return []
    T = batches.bucket_edges([len(e.input_ids) for e in encoded], 1)[-1]
    rows = fill(encoded, range(len(encoded)), T)
    A, S = room(encoded, rows, T)
    B = max(min(batch_tokens // T, -(-len(rows) // rows_multiple)), 1) * rows_multiple
    return [
        batches.Group(tuple(map(tuple, rows[i : i + B])), B, T, A, S)
        for i in range(0, len(rows), B)
    ]


def fill(
    encoded: Sequence[example_lib.Encoded], indices: Sequence[int], tokens: int
) -> list[list[int]]:
    """Packs examples into rows of at most so many tokens, as indices.

    The longest goes first, each into the fullest row that still has room (ties by example_id).
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
    """Returns the answer positions A and the examples S of a row that every one of `rows` fits."""
    answers = max(sum(encoded[i].answer_tokens for i in row) for row in rows)
    answers = -(-answers // batches.ANSWER_STEP) * batches.ANSWER_STEP
    return min(answers, tokens), max(map(len, rows))
