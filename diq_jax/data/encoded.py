"""Token ids to and from parquet tables, so that every stage reads what `prepare` wrote."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from diq_jax.data import example

COLUMNS = ("example_id", "input_ids", "labels")


def columns(rows: Sequence[example.Encoded]) -> dict[str, pa.Array]:
    """The columns input_ids and labels, lists of int32."""
    kind = pa.list_(pa.int32())
    return {
        "input_ids": pa.array([row.input_ids for row in rows], kind),
        "labels": pa.array([row.labels for row in rows], kind),
    }


def from_table(table: pa.Table) -> list[example.Encoded]:
    """Undoes `columns` on a table that also holds example_id."""
    ids, tokens, labels = (table[name].to_pylist() for name in COLUMNS)
    return [
        example.Encoded(i, np.asarray(t, np.int32), np.asarray(y, np.int32))
        for i, t, y in zip(ids, tokens, labels, strict=True)
    ]
