"""Gradient stores that several tests share."""

import pathlib

import numpy as np

from diq_jax.data import gradient_store
from diq_jax.influence import store
from diq_jax.run import artifacts, parts


def open_writer(folder: pathlib.Path, count, dtype="float32", shard_rows=1024) -> store.Writer:
    """The writer of a store whose rows are kept beside it."""
    kept = parts.Parts(folder.parent / f"{folder.name}.partial")
    return store.Writer(folder, kept, count, dtype, shard_rows)


def add(writer: store.Writer, places, rows, losses) -> None:
    """A batch, without the rows that are there."""
    new = [k for k, place in enumerate(places) if place not in writer.done]
    if new:
        stored = gradient_store.to_stored(np.asarray(rows, np.float32)[new], writer.dtype)
        columns = {"gradient": stored, "loss": np.asarray(losses, np.float32)[new]}
        writer.add([places[k] for k in new], columns)


def finish(writer: store.Writer, ids, ends, names, made_from=None) -> None:
    writer.columns()
    writer.finish(ids, ends, names, made_from or {})
    artifacts.remove(writer.rows.folder)
