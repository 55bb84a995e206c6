"""Several labs side by side: what holds in all of them, by hand."""

import csv
import json

import pytest
import scripts


def write(folder, split, changed=(), **arms):
    """A lab.json; {arm: (choice loss and its Holm p, test loss and its)}, intervals of +-0.1."""

    def cell(mean, p):
        return {"versus_random": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "p_holm": p}}

    rows = [{"arm": "random", "budget": 0.01, "metrics": {"choice_loss_letters": {"mean": 2.0}}}]
    rows += [
        {"arm": arm, "budget": 0.01, "metrics": {
            "choice_loss_letters": cell(*choice), "test_loss_without_end": cell(*test)}}
        for arm, (choice, test) in arms.items()
    ]  # fmt: skip
    folder.mkdir()
    changed = dict(changed)
    made = {"settings": {"split": split, "width": 64, "layers": 2, **changed}, "rows": rows}
    (folder / "lab.json").write_text(json.dumps(made))
    return folder


def test_an_arm_holds_where_it_is_below_random_in_every_lab(tmp_path):
    sure, not_sure = 0.01, 0.2
    first = write(
        tmp_path / "a", 0,
        both=((-0.3, sure), (-0.2, sure)), one=((-0.5, sure), (-0.4, sure)),
        chance=((-0.3, sure), (-0.3, sure)), alone=((-1.0, sure), (-1.0, sure)),
    )  # fmt: skip
    second = write(
        tmp_path / "b", 1,
        both=((-0.2, sure), (-0.2, sure)), one=((+0.3, sure), (-0.2, sure)),
        chance=((-0.05, sure), (-0.2, not_sure)),
    )  # fmt: skip
    ended = scripts.script(
        "compare_labs", f"--labs={first},{second}", f"--workdir={tmp_path / 'out'}"
    )
    assert ended.returncode == 0, ended.stderr
    with open(tmp_path / "out/labs.csv") as f:
        found = list(csv.DictReader(f))
    # The second lab has no `alone`; there `chance` has an interval with 0, and fails Holm.
    assert [(row["arm"], row["holds"]) for row in found] == [
        ("both", '["choice_loss_letters", "test_loss_without_end"]'),
        ("one", '["test_loss_without_end"]'),
        ("chance", "[]"),
    ]
    assert "+0.30 (+0.20 to +0.40)*" in (tmp_path / "out/labs.md").read_text()
    assert all((tmp_path / "out" / f"labs.{kind}").stat().st_size for kind in ("png", "svg"))


@pytest.mark.parametrize(
    ("labs", "message"),
    [(["a"], "at least two folders"), (["a", "a"], "each split and size once"),
     (["a", "c"], "lab.json does not exist"), (["a", "b"], "no arm and budget is in every lab"),
     (["a", "d"], "differ in candidates")],
)  # fmt: skip
def test_labs_that_cannot_be_compared_are_one_sentence(labs, message, tmp_path):
    write(tmp_path / "a", 0, one=((0.1, 0.1), (0.1, 0.1)))
    write(tmp_path / "b", 1, other=((0.1, 0.1), (0.1, 0.1)))
    write(tmp_path / "d", 2, {"candidates": 9}, one=((0.1, 0.1), (0.1, 0.1)))
    folders = ",".join(str(tmp_path / lab) for lab in labs)
    ended = scripts.script("compare_labs", f"--labs={folders}", f"--workdir={tmp_path / 'out'}")
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
