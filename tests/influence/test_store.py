"""The gradient store: what goes in comes out, half a record never does, damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
import stores

from diq_jax import errors
from diq_jax.data import gradient_store
from diq_jax.influence import store

ROWS, DIM = 10, 6
MADE_FROM = {"weights": "w", "projection": {"kind": "sparse", "seed": 0}}
TARGETS = np.random.default_rng(1).normal(size=(2, DIM)).astype(np.float32)


def rows():
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def write(folder, order=None, dtype="float32", finish=True):
    """Rows in any order, two at a time."""
    writer = stores.open_writer(folder, ROWS, dtype, shard_rows=4)
    order = list(range(ROWS) if order is None else order)
    for k in range(0, len(order), 2):
        part = order[k : k + 2]
        stores.add(writer, part, rows()[part], np.array(part, np.float32))
    if finish:
        stores.finish(writer, [f"ex-{i}" for i in range(ROWS)], TARGETS, ["a", "b"], MADE_FROM)
    return folder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", store.DTYPES)
def test_rows_come_back_as_the_dtype_keeps_them(tmp_path, dtype):
    opened = store.open_store(write(tmp_path / "store", dtype=dtype), MADE_FROM)
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
    shard = np.load(opened.folder / opened.shards[0])
    assert shard.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
    if dtype == "bfloat16":
        np.testing.assert_array_equal(shard.view(ml_dtypes.bfloat16).astype(np.float32), kept[:4])


def test_what_a_dtype_cannot_hold_is_known_before_it_is_kept():
    # float16 ends at 65,504 and its smallest number is 2^-24 = 6e-8; bfloat16 reaches as far as
    # float32, 3.4e38, but rounds upwards earlier.
    made = np.array([[1, 65504], [1, 65530], [0, 0], [1e-9, 0], [1, 1e-9], [3.4e38, 1]], np.float32)
    assert gradient_store.fits(made, "float16").tolist() == [True, False, True, False, True, False]
    assert gradient_store.fits(made, "bfloat16").tolist() == [True, True, True, True, True, False]
    assert gradient_store.fits(made, "float32").all()


def test_a_kept_row_that_is_not_finite_is_named(tmp_path):
    writer = stores.open_writer(tmp_path / "store", 2, "float16")
    stores.add(writer, [0, 1], [[1, 1], [1, 70000]], [0, 0])
    stores.finish(writer, ["a", "b"], np.ones((1, 2), np.float32), ["mean"])
    opened = store.open_store(tmp_path / "store")
    for read in (lambda: opened.rows(1, 2), lambda: opened.scores(np.ones((1, 2)))):
        with pytest.raises(errors.UserError, match="a gradient of example 'b' that is not finite"):
            read()
    assert opened.rows(0, 1).tolist() == [[1, 1]]


def test_order_of_arrival_changes_no_byte(tmp_path):
    straight = files(write(tmp_path / "a"))
    shuffled = files(write(tmp_path / "b", order=[7, 2, 9, 0, 1, 3, 8, 5, 4, 6]))
    assert straight == shuffled and not list(tmp_path.glob("*.partial"))


def test_shards_are_written_in_any_number_of_passes(tmp_path, monkeypatch):
    expected = files(write(tmp_path / "a"))
    monkeypatch.setattr(store, "OPEN_SHARDS", 1)
    assert files(write(tmp_path / "b")) == expected


def test_a_killed_writer_keeps_whole_parts_only(tmp_path):
    """A part cut short does not count: its rows are written again, to the same bytes."""
    expected = files(write(tmp_path / "whole"))
    folder = write(tmp_path / "cut", order=range(6), finish=False)
    second = sorted((tmp_path / "cut.partial").iterdir())[1]
    second.write_bytes(second.read_bytes()[:-1])
    assert stores.open_writer(folder, ROWS).done == {0, 1, 4, 5}
    assert files(write(folder)) == expected


def test_rows_that_are_missing_are_no_store(tmp_path):
    folder = write(tmp_path / "store", order=range(6), finish=False)
    with pytest.raises(ValueError, match="6 rows for 10 examples"):
        stores.open_writer(folder, ROWS).columns()
    with pytest.raises(errors.UserError, match="not a finished gradient store"):
        store.open_store(folder)


def test_a_flipped_byte_is_named(tmp_path):
    opened = store.open_store(write(tmp_path / "store"))
    path = tmp_path / "store/train-00001-of-00003.npy"
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
    with pytest.raises(errors.UserError, match=r"it has no manifest\.json"):
        store.open_store(folder)
    with pytest.raises(errors.UserError, match="rows of 6 numbers; the targets have shape"):
        store.open_store(tmp_path / "done").scores(np.zeros((1, 5)))


def test_manifest_says_what_made_it(tmp_path):
    manifest = json.loads((write(tmp_path / "store") / "manifest.json").read_text())
    assert manifest["made_from"] == MADE_FROM and manifest["targets"] == ["a", "b"]
    assert set(manifest["sha256"]) == set(files(tmp_path / "store")) - {"manifest.json"}
