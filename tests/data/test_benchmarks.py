"""Each benchmark's rows as they are published; benchmarks by name, from a stand-in of the hub."""

import json

import pytest

from diq_jax import errors, evaluate_config
from diq_jax.data import benchmarks, sources

ABCD = {"A": "one", "B": "two", "C": "three", "D": "four"}
STRUCT = {
    "id": "x1", "question": "Why?", "answer": "two", "answer_idx": "B", "dataset_name": "any",
    "adversarial_trace_0": "", "reasoning_prob": 0.9, "is_reasoning": True,
}  # fmt: skip
# (a row in the published schema, what it becomes: id, question, options, answer_idx, subject)
PUBLISHED = {
    "medqa": (
        {"question": "Why?", "answer": "two", "options": ABCD, "meta_info": "step1",
         "answer_idx": "B", "metamap_phrases": ["why"]},
        ("medqa-7", "Why?", ABCD, "B", None),
    ),
    "medmcqa": (
        {"id": "45-a", "question": "Why?", "opa": "one", "opb": "two", "opc": "three",
         "opd": "four", "cop": 2, "choice_type": "single", "exp": None,
         "subject_name": "Anatomy", "topic_name": None},
        ("medmcqa-45-a", "Why?", ABCD, "C", "Anatomy"),
    ),
    "mmlu_med": (
        {"question": "Why?", "subject": "anatomy", "choices": list(ABCD.values()), "answer": 3},
        ("mmlu_med-7", "Why?", ABCD, "D", "anatomy"),
    ),
    "pubmedqa": (
        {"pubid": 21645374, "question": "Does it?", "long_answer": "It may.",
         "context": {"contexts": ["First.", "Then."], "labels": ["A", "B"], "meshes": []},
         "final_decision": "maybe"},
        ("pubmedqa-21645374", "First.\n\nThen.\n\nDoes it?",
         {"A": "yes", "B": "no", "C": "maybe"}, "C", None),
    ),
    "mmlu_pro_health": (
        {"question_id": 6196, "question": "Why?", "options": list(ABCD.values()), "answer": "B",
         "answer_index": 1, "cot_content": "", "category": "health", "src": "ori_mmlu"},
        ("mmlu_pro_health-6196", "Why?", ABCD, "B", None),
    ),
    "medbullets_op4": (STRUCT | {"options": json.dumps(ABCD)},
                       ("medbullets_op4-x1", "Why?", ABCD, "B", None)),
    "medbullets_op5": (STRUCT | {"options": str(ABCD | {"E": "it's five"})},
                       ("medbullets_op5-x1", "Why?", ABCD | {"E": "it's five"}, "B", None)),
    "medxpertqa": (
        {"id": "Text-0", "question": "Why?\nAnswer Choices: (A) one (B) two", "options": ABCD,
         "label": "A", "medical_task": "Treatment", "body_system": "Nervous",
         "question_type": "Reasoning"},
        ("medxpertqa-Text-0", "Why?", ABCD, "A", "Treatment"),
    ),
    "hle_biomed": (STRUCT | {"options": str(ABCD)}, ("hle_biomed-x1", "Why?", ABCD, "B", None)),
}  # fmt: skip


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_a_row_as_published(name):
    row, expected = PUBLISHED[name]
    made = next(
        found
        for is_target in (False, True)
        if (found := benchmarks.convert(name, row, "here", 7, is_target))
    )
    fields = (made.get(field) for field in ("id", "question", "options", "answer_idx", "subject"))
    assert tuple(fields) == expected and made["task"] == name
    with pytest.raises(errors.UserError, match=r"here is no row as hub:.*it lacks .*columns are q"):
        benchmarks.convert(name, {"q": 1}, "here", 0, False)


def test_rows_that_do_not_belong_or_hold_no_answer():
    for name, change in (
        ("mmlu_med", {"subject": "law"}),
        ("mmlu_pro_health", {"category": "law"}),
    ):
        row = PUBLISHED[name][0] | change
        assert all(benchmarks.convert(name, row, "here", 0, t) is None for t in (False, True))
    withheld = PUBLISHED["medmcqa"][0] | {"cop": -1}
    with pytest.raises(errors.UserError, match="the answer is number -1 of 4, counted from 0"):
        benchmarks.convert("medmcqa", withheld, "here", 0, False)
    broken = PUBLISHED["hle_biomed"][0] | {"options": "A: one"}
    with pytest.raises(errors.UserError, match="here is no row as hub:zou-lab"):
        benchmarks.convert("hle_biomed", broken, "here", 0, False)


def test_nine_names_in_two_groups_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(hub, config, split):
        asked.append((hub, config, split))
        name = next(n for n, b in benchmarks.BENCHMARKS.items() if f":{hub}:" in b.tests)
        row = PUBLISHED[name][0]
        return [row | {"id": f"{config}{i}", "question": f"{i}?"} for i in range(40)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    # One pubid and one question_id for all: their ids would stand twice.
    keyed = {"pubmedqa", "mmlu_pro_health"}
    names = [n for n in benchmarks.BENCHMARKS if n not in keyed]
    spec = ",".join(f"benchmark:{name}" for name in names)
    tests, targets = sources.load_tests(spec, 0, 0), sources.load_targets(spec, 3, 0, "")
    assert {e.task for e in tests} == {e.task for e in targets} == set(names)
    assert ("openlifescienceai/medmcqa", None, "validation") in asked
    assert ("openlifescienceai/medmcqa", None, "train") in asked
    assert ("cais/mmlu", "all", "test") in asked and ("cais/mmlu", "all", "validation") in asked
    # Where there is one split, no question is on both sides, and each question is on one.
    every = sources.load_targets(spec, 0, 0, "")
    for name in ("medxpertqa", "hle_biomed"):
        sides = [{e.question for e in of if e.task == name} for of in (tests, every)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    against = sources.load_targets(spec, 0, 0, "", "--against", "tests")  # as check_pool asks
    assert [e.example_id for e in against] == [e.example_id for e in tests]
    expanded = benchmarks.expand("benchmark:all", "data.tests")
    groups = [benchmarks.expand(f"benchmark:{g}", "x") for g in ("standard", "challenging")]
    assert expanded == [(name, "") for name in benchmarks.BENCHMARKS]
    assert sorted([*groups[0], *groups[1]]) == sorted(expanded)


def test_a_local_copy(tmp_path):
    rows = [PUBLISHED["medmcqa"][0] | {"id": f"r{i}", "cop": 2 * (i < 2)} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"benchmark:medmcqa:{path}"
    found = sources.load_tests(spec, 0, 0)
    assert [e.example_id for e in found] == [f"medmcqa-r{i}" for i in range(3)]
    assert found[0].row["subject"] == "Anatomy" and found[0].answer == "three"
    prints = {
        sources.fingerprint(s, "data.tests", "tests")
        for s in (spec, f"benchmark:medqa:{path}", str(path))
    }
    assert len(prints) == 3
    path.write_text(json.dumps(rows[0] | {"cop": "c"}) + "\n")
    with pytest.raises(
        errors.UserError, match=r"data\.tests: .*rows\.jsonl:1 is no row as hub:open"
    ):
        sources.load_tests(spec, 0, 0)


def test_a_name_that_is_none():
    for spec, message in (
        ("benchmark:medqua", "Did you mean 'medqa'"),
        ("benchmark:all:rows.jsonl", "is several benchmarks"),
        ("benchmark:medqa:none.jsonl", "there is no file none.jsonl"),
    ):
        with pytest.raises(errors.UserError, match=rf"^data\.tests.*{message}"):
            sources.load_tests(spec, 0, 0)


def load(tmp_path, name, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.load_tests(f"benchmark:{name}:{path}", 0, 0)


def medmcqa(*numbers, told=()):
    """Rows with these cops, whose explanations begin with these letters."""
    row, told = PUBLISHED["medmcqa"][0], [*told, *[None] * len(numbers)]
    return [
        row | {"id": f"r{i}", "cop": cop, "exp": told[i] and f"Ans. is '{told[i]}' i.e. so"}
        for i, cop in enumerate(numbers)
    ]


@pytest.mark.parametrize(
    ("numbers", "told", "message"),
    [
        ((1, 3), "ac", "cop counts the options from 1, .* subtract 1"),
        ((1, 4), "", "cop is never 0, as if counted from 1, .* subtract 1"),
        ((1, 3), "", "cop is never 0"),
        ((0, 4), "", r"2 is no row as .* the answer is number 4 of 4, counted from 0"),
        ((-1, -1), "", r"2 of 2 withhold their answer \(cop is -1\)"),
    ],
)
def test_answers_that_count_from_one_or_are_withheld_are_refused(tmp_path, numbers, told, message):
    with pytest.raises(errors.UserError, match=rf"^data\.tests: .*rows\.jsonl:.*{message}"):
        load(tmp_path, "medmcqa", medmcqa(*numbers, told=told))


def test_answers_that_count_from_zero_are_taken(tmp_path, caplog):
    assert [e.answer for e in load(tmp_path, "medmcqa", medmcqa(0, 2))] == ["one", "three"]
    told = load(tmp_path, "medmcqa", medmcqa(1, 2, 3, told="bca"))  # two of three explanations
    assert [e.answer_idx for e in told] == ["B", "C", "D"] and not caplog.records
    kept = load(tmp_path, "medmcqa", medmcqa(1, -1, 2))
    assert [(e.example_id, e.answer_idx) for e in kept] == [
        ("medmcqa-r0", "B"),
        ("medmcqa-r2", "C"),
    ]
    assert "1 of 3 withhold their answer" in caplog.text and "cop is -1" in caplog.text


def test_a_letter_holds_the_number(tmp_path):
    row = next(
        PUBLISHED["mmlu_pro_health"][0] | {"question": f"{i}?"}
        for i in range(99)
        if not benchmarks._held_out(f"{i}?")
    )
    padded = row | {"options": ["a", "b", "N/A", "N/A"]}
    assert load(tmp_path, "mmlu_pro_health", [padded])[0].options == {"A": "a", "B": "b"}
    for change in ({"answer": "C"}, {"answer_index": 2}):
        with pytest.raises(errors.UserError, match=r"answer_index (is never|counts the)"):
            load(tmp_path, "mmlu_pro_health", [row | change])
    with pytest.raises(errors.UserError, match="options must be two to 26, a letter each; got 30"):
        load(tmp_path, "mmlu_pro_health", [row | {"options": [f"o{i}" for i in range(30)]}])


def test_the_default_groups_are_three_and_six():
    groups = evaluate_config.Evaluate().group_tasks
    assert {name: len(tasks) for name, tasks in groups.items()} == {"AvgS": 3, "AvgC": 6, "AvgA": 9}
    for name, group in (("AvgS", "standard"), ("AvgC", "challenging")):
        assert {benchmarks.BENCHMARKS[task].group for task in groups[name]} == {group}
