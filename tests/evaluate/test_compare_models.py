"""Exact tests and calibration against scipy and by hand; the comparison as a user calls it."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import scripts

from diq_jax.evaluate import calibration, compare, predictions, significance
from diq_jax.run import artifacts, reading


def rows(model, hits, task=lambda i: "xy"[i % 2]):
    """One row a question; the right answer is A, and a wrong model says B."""
    return [
        {
            "model": model, "example_id": f"q{i}", "task": task(i), "answer": "A",
            "prediction": "A" if hit else "B", "prediction_norm": "A",
            "log_likelihoods": {"A": np.log(3) if hit else 0.0, "B": 0.0 if hit else np.log(3)},
        }
        for i, hit in enumerate(hits)
    ]  # fmt: skip


def run(folder, *arguments):
    return scripts.script("compare-models", *arguments, cwd=folder)


def test_the_exact_test_by_hand_and_against_scipy():
    # 1 against 4: (C(5,0) + C(5,1)) / 2^5 on either side.
    assert significance.sign_test(1, 4) == pytest.approx(2 * 6 / 32)
    assert significance.sign_test(0, 0) == significance.sign_test(3, 3) == 1
    for wins, losses in ((0, 9), (7, 20), (300, 250), (4000, 4100)):
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue
        assert significance.sign_test(wins, losses) == pytest.approx(expected, rel=1e-6)


def test_holm_by_hand():
    # Ordered .01 .02 .04 .9, times 4 3 2 1: .04 .06 .08 .9.
    given = {"c": 0.04, "a": 0.01, "d": 0.9, "b": 0.02}
    assert significance.holm(given) == pytest.approx({"c": 0.08, "a": 0.04, "d": 0.9, "b": 0.06})
    # Never below a smaller p's: .03 * 2 and then .04 * 1. Never above 1.
    assert significance.holm({"a": 0.03, "b": 0.04}) == pytest.approx({"a": 0.06, "b": 0.06})
    assert (
        significance.holm({"a": 0.7, "b": 0.8}) == {"a": 1, "b": 1} and significance.holm({}) == {}
    )


def test_calibration_by_hand():
    assert calibration.confidence([0, np.log(3)]) == pytest.approx(0.75)
    assert calibration.confidence([-1000.0, -1000.0]) == 0.5
    table = calibration.reliability([0.55, 0.5, 0.95, 1.0], [1, 0, 1, 1])
    assert [(row["low"], row["questions"], row["accuracy"]) for row in table] == [
        (0.5, 2, 0.5), (0.9, 2, 1.0),
    ]  # fmt: skip
    # |0.5 - 0.525| and |1 - 0.975|, two questions each.
    assert calibration.error(table) == pytest.approx(0.025)


def test_a_difference_and_its_sentence():
    hits = np.array([[1, 0]] * 9 + [[1, 1]] * 6 + [[0, 1]], float)
    unread = np.zeros(hits.shape, bool)
    unread[-1, 0] = True
    value = compare.paired(hits, unread, 500, 0)
    assert (value["only_first"], value["only_second"], value["questions"]) == (9, 1, 16)
    assert value["difference"]["mean"] == 0.5 and value["unparsable"] == [1, 0]
    assert value["p"] == pytest.approx(2 * 11 / 2**10)
    assert compare.winner(value, ["a", "b"]) == "a"
    assert compare.sentence(value, ["a", "b"]).startswith("a is better by 50.0 points (95 % interv")
    swapped = compare.paired(hits[:, ::-1], unread, 500, 0)
    assert compare.sentence(swapped, ["a", "b"]).startswith("b is better by 50.0 points")
    few = compare.paired(hits[-4:], unread[-4:], 500, 0)
    assert compare.sentence(few, ["a", "b"]).startswith(
        "No difference is shown: b is ahead by 25.0"
    )
    # Over four tasks with p of 0.02, none is left after Holm.
    four = np.tile(hits, (4, 1)), np.tile(unread, (4, 1))
    groups = compare.by_group(*four, np.repeat(list("wxyz"), 16).tolist(), 500, 0)
    assert not any(compare.winner(g, ["a", "b"]) for g in groups.values())
    assert groups["w"]["p_holm"] == pytest.approx(4 * value["p"])


def test_proper_scores_by_hand():
    first, second = ({f"q{i}": {"choice_loss": x, "brier": 0.5} for i, x in enumerate(values)}
                     for values in ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]))  # fmt: skip
    del second["q2"]["brier"]
    found = compare.proper([first, second], ["q0", "q1", "q2"], 200, 0)
    assert list(found) == ["choice_loss"]  # a metric that a row lacks is left out
    assert [mean["mean"] for mean in found["choice_loss"]["means"]] == [2, 3]
    # Each question differs by 1, whatever is drawn.
    assert found["choice_loss"]["difference"] == pytest.approx({"mean": -1, "low": -1, "high": -1})


def test_two_models_of_a_run(tmp_path):
    good, poor = [True] * 40, [False] * 20 + [True] * 20
    both = rows("selected", good) + rows("random", poor[:38])
    both = [row | {"choice_loss": 0.25 if row["model"] == "selected" else 1.0} for row in both]
    artifacts.write_jsonl(tmp_path / "run/evaluate/predictions.jsonl", both)
    tests = [f"q{i}" for i in range(40)]
    artifacts.write_table(
        tmp_path / "run/prepare/tests.parquet",
        {
            "example_id": tests, "question": tests, "subject": ["s" if i < 20 else "" for i in
            range(40)], "choices": [["x", "y"]] * 40, "options": [["A", "B"]] * 40,
            "answer": pa.array([0] * 40, pa.int32()),
        },
    )  # fmt: skip
    ended = run(tmp_path, "run:selected", "run/evaluate:random", "--out=found.json")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "selected has 40 questions, random 38: compared are the 38 that both" in ended.stdout
    found = reading.read_json(tmp_path / "found.json")
    assert found["overall"]["only_first"] == 20 and found["tasks"]["x"]["questions"] == 19
    assert found["subjects"]["x: s"]["questions"] == 10
    assert "selected is better by 52.6 points" in ended.stdout
    # Both are sure by 3/4. selected is always right; random on 18 of 38.
    errors = [value["ece"] for value in found["calibration"]]
    assert errors == pytest.approx([0.25, abs(18 / 38 - 0.75)])
    assert found["proper"]["choice_loss"]["difference"]["mean"] == pytest.approx(-0.75)
    line = next(row for row in ended.stdout.splitlines() if row.startswith("Choice loss"))
    assert "-0.750" in line.replace("−", "-")
    line = next(line for line in ended.stdout.splitlines() if line.startswith("all"))
    assert line.split()[-1] == "selected"
    same = run(tmp_path, "run:selected", "run:random", "--metric=accuracy_norm")
    assert "No difference: both are right on as many of 38 questions." in same.stdout


def test_answers_that_cannot_be_read_are_wrong_and_counted(tmp_path):
    def generated(hits):
        for row, hit in zip(rows("x", hits, task=lambda i: "t"), hits, strict=True):
            yield {k: row[k] for k in ("example_id", "task", "answer")} | {
                "prediction": {1: "A", 0: "B", None: None}[hit]
            }

    artifacts.write_jsonl(tmp_path / "a.jsonl", list(generated([1, 1, 0, None])))
    artifacts.write_jsonl(tmp_path / "b.jsonl", list(generated([None, None, 1, None])))
    ended = run(tmp_path, "a.jsonl", "b.jsonl", "--out=found.json")
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = reading.read_json(tmp_path / "found.json")["overall"]
    assert [value["mean"] for value in found["accuracy"]] == [0.5, 0.25]
    assert found["unparsable"] == [1, 3]
    # Likelihoods beside generated answers say nothing of how sure those are.
    likelihoods = {row["example_id"]: row for row in rows("a", [1])}
    assert compare.calibrated(likelihoods, ["q0"]) is not None
    assert compare.calibrated({"q0": likelihoods["q0"] | {"answers": []}}, ["q0"]) is None
    header, line = ended.stdout.splitlines()[:2]
    assert header.endswith("a unparsable  b unparsable") and line.split()[-2:] == ["1", "3"]


def test_the_text_of_a_row_of_generated_answers(tmp_path):
    def row(name, prediction, *answers):
        written = [{"text": text, "letter": letter} for letter, text in answers]
        return {"example_id": name, "prediction": prediction, "answers": written}

    artifacts.write_jsonl(
        tmp_path / "a.jsonl",
        [
            row("voted", "B", ("A", "one"), ("B", "two"), ("B", "three")),
            row("unread", None, (None, "four"), (None, "five")),
            row("own", "A", ("A", "six")) | {"text": "seven"},
            row("none", "A"),
        ],
    )
    found = predictions.read_all([str(tmp_path / "a.jsonl")], "--answers")["a"]
    texts = {name: row.get("text") for name, row in found.items()}
    assert texts == {"voted": "two", "unread": "four", "own": "seven", "none": None}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.jsonl"], "expected RUN:MODEL RUN:MODEL; got a.jsonl"),
        (["a.jsonl", "b.jsonl", "c"], "'c' is not a flag"),
        (["a.jsonl", "c.jsonl"], "have no example_id in common"),
        (["a.jsonl", "d.jsonl"], "its answer is 'A' and 'C'"),
        (["a.jsonl", "both.jsonl"], "has 2 models; name one: both.jsonl:a, both.jsonl:b"),
        (["a.jsonl", "both.jsonl:bb"], "Did you mean 'b'?"),
        (["a.jsonl", "a.jsonl"], "names 'a.jsonl' and others twice"),
        (["a.jsonl", "twice.jsonl"], "twice.jsonl:3: example_id 'q0' stands twice"),
        (["a.jsonl", "none"], "none is no file and no folder with"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, tmp_path):
    a, other = rows("a", [1, 1]), [row | {"example_id": "z"} for row in rows("c", [1])]
    files = {"a": a, "b": rows("b", [1, 0]), "c": other, "both": [*a, *rows("b", [1, 0])]}
    files |= {"d": [row | {"answer": "C"} for row in rows("d", [1])], "twice": [*a, a[0]]}
    for name, content in files.items():
        artifacts.write_jsonl(tmp_path / f"{name}.jsonl", content)
    ended = run(tmp_path, *arguments)
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") == 1
