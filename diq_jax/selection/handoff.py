"""What other tools take: the chosen rows as they came, as chats, all examples in one table.

The pool is read a row group at a time, so that its texts need not fit into memory.
"""

import collections
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diq_jax.data import example, wording
from diq_jax.run import artifacts, progress, records, stages

POOL, HYGIENE = "prepare/pool.parquet", "selection/hygiene.parquet"
ROWS, MESSAGES, EXAMPLES = (
    f"selection/{name}"
    for name in ("selected.jsonl", "selected.messages.jsonl", "examples.parquet")
)
TEXTS = ("example_id", "source", "question", "reasoning", "answer", "row")
TURNS = ("letter", "context")  # of the pools of earlier versions nothing is known


class Spool:
    """Lines in a temporary file, read back in another order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._places = file, {}

    def add(self, key: int, value: Any) -> None:
        """Keeps a value that JSON can hold."""
        line = json.dumps(value, ensure_ascii=False).encode()
        self._places[key] = (self._file.tell(), len(line))
        self._file.write(line)

    def read(self, keys: Sequence[int]) -> Iterator[Any]:
        """Yields the values of those keys that were added, in the order of `keys`."""
        for key in keys:
            if key in self._places:
                start, length = self._places[key]
                self._file.seek(start)
                yield json.loads(self._file.read(length))

    def __len__(self) -> int:
        return len(self._places)


def write(context: stages.Context, order: np.ndarray, columns: Mapping[str, pa.Array]) -> None:
    """Writes selected.jsonl, selected.messages.jsonl and examples.parquet.

    selected.messages.jsonl holds each chosen row as {id, messages}, with the completion that
    data.template makes, and a row of texts only: token ids cannot be written so. Of a pool that
    an earlier version prepared it is left out, since that does not say what it takes.

    Args:
        order: the indices of the chosen rows in the pool, first the first.
        columns: of the whole pool, joined to its texts in examples.parquet.
    """
    known = set(pq.read_schema(context.path(POOL)).names)
    names = [*TEXTS, *(TURNS if known.issuperset(TURNS) else ())]
    chosen = set(order.tolist())
    with tempfile.TemporaryFile() as rows_file, tempfile.TemporaryFile() as chats_file:
        rows, chats = Spool(rows_file), Spool(chats_file)

        def tables():
            start = 0
            for part in records.read_batches(context.workdir, POOL, names):
                for i in chosen.intersection(range(start, start + len(part))):
                    _spool(i, part.slice(i - start, 1).to_pylist()[0], rows, chats, context)
                joined = {name: column.slice(start, len(part)) for name, column in columns.items()}
                start += len(part)
                yield pa.table({name: part[name] for name in TEXTS} | joined)

        artifacts.write_tables(context.path(EXAMPLES), tables(), unknown=columns)
        artifacts.write_jsonl(context.path(ROWS), rows.read(order.tolist()))
        if len(chats) < len(chosen):
            progress.say(
                f"{MESSAGES}: {len(chosen) - len(chats):,} of {len(chosen):,} rows are left out: "
                "they are token ids, or of a pool that an earlier version prepared."
            )
        if len(chats):
            artifacts.write_jsonl(context.path(MESSAGES), chats.read(order.tolist()))


def _spool(index: int, row: dict, rows: Spool, chats: Spool, context: stages.Context) -> None:
    rows.add(index, json.loads(row["row"]))
    if "letter" not in row or not row["answer"]:
        return
    data, letter = context.config.data, row["letter"]
    *before, asked = (
        json.loads(row["context"]) if row["context"] else [{"content": row["question"]}]
    )
    said = example.Example(
        row["example_id"],
        asked["content"],  # with its options
        row["reasoning"],
        f"{letter}. {row['answer']}" if letter else row["answer"],
        {},
        context=tuple(before),
        every_turn=data.turns == "all",
    )
    messages = wording.conversation(said, data.template)
    chats.add(index, {"id": said.example_id, "messages": messages})


def repeats(context: stages.Context, ids: Sequence[str]) -> pa.Array:
    """Counts in how many pairs of hygiene.parquet each row stands; null without that file."""
    path = context.path(HYGIENE)
    if not path.exists():
        return pa.nulls(len(ids), pa.int32())
    found = pq.read_table(path, columns=["example_id"])["example_id"].to_pylist()
    counts = collections.Counter(found)
    return pa.array([counts[id_] for id_ in ids], pa.int32())
