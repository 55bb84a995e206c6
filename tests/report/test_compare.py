"""Two runs over one pool: what both select, what one alone does, and what is no pair of runs."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from report.test_report import fabricate, read_page, sample_rows

from diq_jax import errors
from diq_jax.report import compare
from diq_jax.run import artifacts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs over the sample, of which the second scored it otherwise."""
    folder, rows = tmp_path_factory.mktemp("runs"), sample_rows()
    fabricate(folder / "first", rows)
    other = np.random.default_rng(1).normal(size=len(rows))
    fabricate(folder / "second", rows, influence=other, percentile=60.0)
    return folder


def load(runs, *names):
    return compare.load(*(str(runs / name) for name in names), "--compare")


def selected(side):
    return set(np.array(side.examples["example_id"])[side.examples["selected"]])


def test_who_selects_what_is_what_the_files_say(runs):
    a, b = load(runs, "first", "second")
    ids, who = np.array(a.examples["example_id"]), compare.picked(a, b)
    assert set(ids[who == 1]) == selected(a) - selected(b)
    assert set(ids[who == 2]) == selected(b) - selected(a)
    assert set(ids[who == 3]) == selected(a) & selected(b)
    orders = [ids[np.argsort(side.examples["rank"])] for side in (a, b)]
    common = [len(set(orders[0][:k]) & set(orders[1][:k])) for k in range(1, len(ids) + 1)]
    np.testing.assert_array_equal(compare.shared(a, b), common)


def test_the_other_way_round_and_in_another_order_nothing_changes(runs, tmp_path):
    a, b = load(runs, "first", "second")
    c, d = load(runs, "second", "first")
    np.testing.assert_array_equal(
        compare.picked(c, d), np.array([0, 2, 1, 3])[compare.picked(a, b)]
    )
    rows = sample_rows()
    back = fabricate(tmp_path / "second", rows, influence=b.examples["influence"])
    order = np.random.default_rng(2).permutation(len(rows))
    for name in compare.READS:
        table = back.table(name)
        artifacts.write_table(
            back.path(name), {c: table[c].take(order) for c in table.column_names}
        )
    _, e = compare.load(str(runs / "first"), str(back.workdir), "--compare", verified=False)
    assert list(e.rows) == list(a.rows)
    for name, values in b.examples.items():
        np.testing.assert_array_equal(e.examples[name], values)


def test_the_page_says_what_differs(runs, tmp_path):
    a, b = load(runs, "first", "second")
    compare.write(tmp_path, (a, b))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = read_page(text)
    both, rows = len(selected(a) & selected(b)), len(a.rows)
    assert f"first selects 16 of {rows} rows, second 16; {both} are the same" in found.text
    assert f"Only first selects {16 - both} rows" in found.text
    settings = found.text.split("Settings that differ")[-1]
    assert (
        "difficulty.percentile" in settings and "60.0" in settings and "model.path" not in settings
    )
    assert all(address.startswith("#") for address in found.addresses)
    again = tmp_path / "again"
    compare.write(again, load(runs, "first", "second"))
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_what_is_no_pair_of_runs_is_said(runs, tmp_path):
    fabricate(tmp_path / "shorter", sample_rows()[:150])
    with pytest.raises(errors.UserError, match=r"has 160 rows, .* 150, and 150 are the same; name"):
        compare.load(str(runs / "first"), str(tmp_path / "shorter"), "--compare")
    with pytest.raises(errors.UserError, match="twice"):
        load(runs, "first", "first/../first")
    shutil.copytree(runs / "second", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/selection")
    with pytest.raises(errors.UserError, match="half holds no finished selection stage: run first"):
        compare.load(str(runs / "first"), str(tmp_path / "half"), "--compare")
    shutil.copytree(runs / "second", tmp_path / "damaged")
    (tmp_path / "damaged/influence/influence.parquet").write_bytes(b"PAR1")
    with pytest.raises(errors.UserError, match="its checksum is not the one"):
        compare.load(str(runs / "first"), str(tmp_path / "damaged"), "--compare")


def test_the_commands_answer_a_mistake_with_one_sentence(runs, tmp_path):
    for arguments in (("view", ""), ("view", f"{runs}/first", f"{tmp_path}/none"),
                      ("report", f"--compare={runs}/first", f"--out={tmp_path}/o")):  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-m", "diq_jax", *arguments], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(compare.__file__).parents[2])},
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert not (tmp_path / "o").exists()
