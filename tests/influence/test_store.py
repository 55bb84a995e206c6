"""The gradient store: what goes in comes out, half a record never does, damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest

from diq_jax import errors
from diq_jax.influence import store

ROWS, DIM = 10, 6
MADE_FROM = {"weights": "w", "projection": {"kind": "sparse", "seed": 0}}
TARGETS = np.random.default_rng(1).normal(size=(2, DIM)).astype(np.float32)


def rows():
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def write(folder, order=None, dtype="float32", finish=True):
    """Rows in any order, two at a time."""
    writer = store.Writer(folder, DIM, dtype, MADE_FROM)
    order = list(range(ROWS) if order is None else order)
    for k in range(0, len(order), 2):
        part = order[k : k + 2]
        writer.append(part, rows()[part], np.array(part, np.float32))
    if finish:
        names = [f"ex-{i}" for i in range(ROWS)]
        writer.finish(names, TARGETS, 4, ["a", "b"])
        writer.discard()
    else:
        writer.close()
    return folder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", store.DTYPES)
def test_rows_come_back_as_the_dtype_keeps_them(tmp_path, dtype):
    opened = store.open_store(write(tmp_path, dtype=dtype), MADE_FROM)
    kept = rows().astype(store.DTYPES[dtype]).astype(np.float32)
    assert len(opened) == ROWS and opened.shards[-1] == "train-00002-of-00003.npy"
    np.testing.assert_array_equal(opened.rows(0, ROWS), kept)
    np.testing.assert_array_equal(opened.rows(3, 9), kept[3:9])
    assert opened.rows(4, 4).shape == (0, DIM)
    np.testing.assert_array_equal(np.concatenate([b for _, b in opened.blocks()]), kept)
    np.testing.assert_array_equal(opened.losses, np.arange(ROWS))
    assert opened.example_ids[3] == "ex-3"
    np.testing.assert_allclose(opened.scores(TARGETS), kept @ TARGETS.T, rtol=1e-5, atol=1e-6)
    cosines = (kept / np.linalg.norm(kept, axis=1)[:, None]) @ (
        TARGETS / np.linalg.norm(TARGETS, axis=1)[:, None]
    ).T
    np.testing.assert_allclose(opened.scores(TARGETS, "cosine"), cosines, rtol=1e-5, atol=1e-6)
    opened.verify()
    shard = np.load(tmp_path / opened.shards[0])
    assert shard.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
    if dtype == "bfloat16":
        np.testing.assert_array_equal(shard.view(ml_dtypes.bfloat16).astype(np.float32), kept[:4])


def test_what_a_dtype_cannot_hold_is_known_before_it_is_kept():
    # float16 ends at 65,504 and its smallest number is 2^-24 = 6e-8; bfloat16 reaches as far as
    # float32, 3.4e38, but rounds upwards earlier.
    made = np.array([[1, 65504], [1, 65530], [0, 0], [1e-9, 0], [1, 1e-9], [3.4e38, 1]], np.float32)
    assert store.fits(made, "float16").tolist() == [True, False, True, False, True, False]
    assert store.fits(made, "bfloat16").tolist() == [True, True, True, True, True, False]
    assert store.fits(made, "float32").all()


def test_a_kept_row_that_is_not_finite_is_named(tmp_path):
    writer = store.Writer(tmp_path, 2, "float16", {})
    writer.append([0, 1], np.array([[1, 1], [1, 70000]], np.float32), np.zeros(2, np.float32))
    writer.finish(["a", "b"], np.ones((1, 2), np.float32), 4, ["mean"])
    writer.discard()
    opened = store.open_store(tmp_path)
    for read in (lambda: opened.rows(1, 2), lambda: opened.scores(np.ones((1, 2)))):
        with pytest.raises(errors.UserError, match="a gradient of example 'b' that is not finite"):
            read()
    assert opened.rows(0, 1).tolist() == [[1, 1]]


def test_order_of_arrival_changes_no_byte(tmp_path):
    straight = files(write(tmp_path / "a"))
    shuffled = files(write(tmp_path / "b", order=[7, 2, 9, 0, 1, 3, 8, 5, 4, 6]))
    assert straight == shuffled and "rows.log" not in straight


@pytest.mark.parametrize("cut", [1, 13, 35, 36, 37, 100])
def test_a_killed_writer_keeps_whole_rows_only(tmp_path, cut):
    """The log cut at any byte: whole records count, the torn one is written again."""
    expected = files(write(tmp_path / "whole"))
    folder = write(tmp_path / "cut", order=range(6), finish=False)
    log = folder / "rows.log"
    data = log.read_bytes()
    log.write_bytes(data[:-cut])
    writer = store.Writer(folder, DIM, "float32", MADE_FROM)
    record = len(data) // 6
    assert writer.done == set(range((len(data) - cut) // record))
    writer.close()
    assert files(write(folder)) == expected


def test_a_torn_record_in_the_middle_is_not_believed(tmp_path):
    folder = write(tmp_path, order=range(6), finish=False)
    log = folder / "rows.log"
    data = bytearray(log.read_bytes())
    data[3 * len(data) // 6 + 20] ^= 1
    log.write_bytes(data)
    writer = store.Writer(folder, DIM, "float32", MADE_FROM)
    assert writer.done == {0, 1, 2}
    writer.close()


def test_rows_that_are_there_stay(tmp_path):
    folder = write(tmp_path, order=range(6), finish=False)
    writer = store.Writer(folder, DIM, "float32", MADE_FROM)
    writer.append([5, 6], np.zeros((2, DIM)), np.zeros(2, np.float32))
    kept = np.concatenate([part for _, part in writer.row_blocks()])
    np.testing.assert_array_equal(kept[5], rows()[5])
    np.testing.assert_array_equal(kept[6], 0)
    writer.close()


def test_a_flipped_byte_is_named(tmp_path):
    opened = store.open_store(write(tmp_path))
    path = tmp_path / "train-00001-of-00003.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match=r"train-00001-of-00003\.npy is damaged"):
        opened.verify()
    path.unlink()
    with pytest.raises(errors.UserError, match=r"train-00001-of-00003\.npy is missing"):
        opened.verify()


def test_another_projection_and_an_unfinished_store_are_refused(tmp_path):
    write(tmp_path / "done")
    other = {"weights": "w", "projection": {"kind": "sparse", "seed": 1}}
    with pytest.raises(errors.UserError, match=r"projection\.seed was 0, is now 1"):
        store.open_store(tmp_path / "done", other)
    folder = write(tmp_path / "half", order=range(4), finish=False)
    with pytest.raises(errors.UserError, match="its run has not finished"):
        store.open_store(folder)
    with pytest.raises(errors.UserError, match=r"projection\.seed was 0, is now 1"):
        store.Writer(folder, DIM, "float32", other)
    with pytest.raises(errors.UserError, match="rows of 6 numbers; the targets have shape"):
        store.open_store(tmp_path / "done").scores(np.zeros((1, 5)))


def test_manifest_says_what_made_it(tmp_path):
    manifest = json.loads((write(tmp_path) / "manifest.json").read_text())
    assert manifest["made_from"] == MADE_FROM and manifest["targets"] == ["a", "b"]
    assert set(manifest["sha256"]) == set(files(tmp_path)) - {"manifest.json"}
