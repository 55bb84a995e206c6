"""Judges, annotators and the classifier in the report: as the jobs wrote it, or how to get it."""

import dataclasses
import itertools

import numpy as np
import pytest
from report import test_report as made

from diq_jax import errors
from diq_jax.clients import annotate, judge
from diq_jax.report import inputs, opinions, stage
from diq_jax.run import artifacts, reading

# Levels by [judge][model][question], of all three criteria alike; c2 was not judged by b.
LEVELS = {
    "a": {"selected": [5, 4, 3], "random": [2, 2, 1]},
    "b": {"selected": [5, 1], "random": [2, 3]},
}
DRAWS = {"How?": (1, 5), "Why?": (3, 3), "When?": (2, 3)}


def judgement(level):
    return dict.fromkeys(judge.RUBRIC, level) | {f"{name}_reason": "so" for name in judge.RUBRIC}


def opine(context):
    """Writes what diq judge and diq annotate would, by their own functions; returns the context
    whose difficulty.source the annotator labelled.
    """
    verdicts = [
        {"judge": j, "example_id": f"c{q}", "model": m, "verdict": judgement(level)}
        for j, by_model in LEVELS.items()
        for m, levels in by_model.items()
        for q, level in enumerate(levels)
    ]
    found = np.full((2, 2, 3, len(judge.CRITERIA)), np.nan)
    for row in verdicts:
        at = list(LEVELS).index(row["judge"]), list(LEVELS["a"]).index(row["model"])
        found[(*at, int(row["example_id"][1:]))] = judge.levels(row["verdict"])
    head = {"mode": "single", "answers": ["selected", "random"], "judges": ["a", "b"]}
    summary = judge.single_summary(found, ["a", "b"], ["selected", "random"], 100, 0)
    artifacts.write_json(context.path("judge.json"), head | summary)
    artifacts.write_jsonl(context.path("judge.verdicts.jsonl"), verdicts)
    drawn = [[dict.fromkeys(annotate.SCHEMA["required"], k) for k in ks] for ks in DRAWS.values()]
    artifacts.write_json(context.path("labels.summary.json"), {
        "model": "tiny", "rows": 3, "failed": 1, "draws": 2,
        "levels": annotate.histogram([annotate.levels(mine) for mine in drawn]),
        "kappa": annotate.agreement(drawn), "apart": annotate.apart(list(DRAWS), drawn, 3),
    })  # fmt: skip
    source = str(context.path("labels.jsonl"))
    context.path("labels.jsonl").touch()
    difficulty = dataclasses.replace(context.config.difficulty, source=source)
    return dataclasses.replace(
        context, config=dataclasses.replace(context.config, difficulty=difficulty)
    )


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return opine(made.fabricate(tmp_path_factory.mktemp("judged"), made.sample_rows()[:20]))


def test_the_page_shows_what_the_jobs_found(context):
    page = made.read_page(made.page_of(context)).text
    agreement = reading.read_json(context.path("judge.json"))["agreement"]["safety_check"]
    assert f"{agreement['alpha']:.3f}" in page and "tiny labelled 3 rows, 1 failed" in page
    assert "1, 5 How?" in page and "Why?" not in page.split("Annotator of difficulty")[1]
    worst = page.split("Farthest apart")[1]
    assert worst.index("c1 · selected") < worst.index("c1 · random")
    assert "a 4; b 1" in worst and "c2" not in worst.split("Annotator")[0]
    assert "Left out" not in page.split("Judges of answers")[1].split("Difficulty classifier")[0]


def test_confusion_counts_what_both_judged(context):
    table = opinions.confusion(inputs.load(context).opinions.verdicts)
    counts = np.array([[int(c.text) for c in row[1:]] for row in table.rows])
    both = [
        pair
        for m in ("selected", "random")
        for pair in zip(LEVELS["a"][m], LEVELS["b"][m], strict=False)
    ]
    expected = np.zeros((5, 5), int)
    for first, second in both:  # each stands for three criteria
        expected[first - 1, second - 1] += 3
    np.testing.assert_array_equal(counts, expected)


def test_orders_of_a_pair_are_voices_of_the_same_model():
    said = {f"{c}_reason": "so" for c in judge.CRITERIA}
    for forward, backward in itertools.product(judge.VERDICTS, repeat=2):
        both = [dict.fromkeys(judge.CRITERIA, v) | said for v in (forward, backward)]
        row = {"judge": "a", "example_id": "c0", "verdict": both[0], "swapped": both[1]}
        found = opinions.voices([row])
        for (verdict, lean), (*_, criterion) in zip(judge.verdicts(*both), found, strict=True):
            first, second = found["c0", "", criterion].values()
            assert verdict == (first if first == second else 0) and lean == first - second


def test_what_was_not_asked_says_how_to_ask(tmp_path):
    page = made.read_page(made.page_of(made.fabricate(tmp_path, made.sample_rows()[:20]))).text
    assert "diq judge --answers=" in page and "diq annotate --rows=" in page


def test_a_report_without_a_new_judgement_is_another(context, tmp_path):
    before = stage.fingerprints(context)
    assert set(before) == {"judge.json", "judge.verdicts.jsonl", "labels.summary.json"}
    changed = opine(dataclasses.replace(context, workdir=tmp_path))
    found = reading.read_json(changed.path("judge.json"))
    artifacts.write_json(changed.path("judge.json"), found | {"questions": 4})
    after = stage.fingerprints(changed)
    assert [name for name in before if before[name] != after[name]] == ["judge.json"]
    artifacts.write_json(changed.path("judge.json"), {"mode": "single"})
    with pytest.raises(errors.UserError, match=r"judge.json has no field 'answers'"):
        opinions.load(changed)
