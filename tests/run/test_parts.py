"""Parts: what was finished is read back bit for bit, whatever the batches were, and only whole."""

import numpy as np
import pytest

from diq_jax.run import parts


def test_parts_are_read_back_in_the_order_of_their_rows(tmp_path):
    rng = np.random.default_rng(0)
    x, wide = rng.normal(size=7).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float16)
    texts = [f"answer {i} \u00e9" for i in range(7)]
    told = [{"a": i, "b": [0.1 * i]} for i in range(7)]
    for rows in ([5, 1], [0], [2, 6, 3]):  # three calls, three sizes of a batch
        mine = parts.Parts(tmp_path / "parts")
        columns = {"x": x[rows], "wide": wide[rows]}
        mine.add(rows, columns | {k: [v[i] for i in rows] for k, v in (("t", texts), ("d", told))})
    again = parts.Parts(tmp_path / "parts")
    assert again.done == {0, 1, 2, 3, 5, 6} and again.remaining(7) == [4]
    got, kept = again.columns(), [0, 1, 2, 3, 5, 6]
    np.testing.assert_array_equal(got["x"], x[kept])
    np.testing.assert_array_equal(got["wide"], wide[kept])
    assert (got["x"].dtype, got["wide"].dtype) == (np.float32, np.float16)
    assert got["t"] == [texts[i] for i in kept] and got["d"] == [told[i] for i in kept]
    assert parts.Parts(tmp_path / "none").columns() == {}


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_part_is_computed_again(tmp_path, harm):
    mine = parts.Parts(tmp_path)
    for row in range(3):
        mine.add([row], {"x": np.array([row + 0.5])})
    file = sorted(tmp_path.iterdir())[1]
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes({"flip": data, "cut": data[:-5], "empty": b""}[harm])
    (tmp_path / "part-notes.arrow").write_text("somebody's")
    again = parts.Parts(tmp_path)
    assert again.done == {0, 2} and not file.exists()
    again.add([1], {"x": np.array([9.0])})
    np.testing.assert_array_equal(parts.Parts(tmp_path).columns()["x"], [0.5, 9.0, 2.5])
    assert (tmp_path / "part-notes.arrow").read_text() == "somebody's"
