"""Hygiene: planted repetitions are found, different rows left alone, and no pair is left."""

import itertools
import json
import random
import string

import folders
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pyarrow as pa
import pytest

from diq_jax import config, errors, selection_config
from diq_jax.data import sources
from diq_jax.run import artifacts, devices, reading, stages
from diq_jax.selection import hygiene, hygiene_stage, select, stage, texts

SETTINGS = selection_config.Selection()
VIGNETTE = (
    "A 54-year-old baker with asthma since childhood has had a dry cough and low fevers for three "
    "weeks after moving into a house with an old aviary. Both lung bases crackle, and the film "
    "shows small shadows that come and go. Which of the following explains them best?"
)
CHOICES = ["An allergy to flour", "Pneumonitis from bird proteins", "Heart failure", "Sarcoidosis"]
ASKED = hygiene.ask(VIGNETTE, CHOICES)


def row(example_id, question, completion="", place="pool"):
    return hygiene.ComparedRow(example_id, place, question, completion)


def find(pool, against=(), settings=SETTINGS, embed=None):
    return hygiene.find(pool, against, settings, embed)


def kinds(pool, against=(), **fields):
    settings = selection_config.Selection(**fields)
    return {(p.example_id, p.other): p.kind for p in find(pool, against, settings)}


@pytest.fixture(scope="module", name="sample")
def _sample():
    """The shipped pool, targets and tests."""
    pool = sources.load_examples("sample", "", 0)
    against = [
        row(e.example_id, hygiene.ask(e.question, list(e.options.values())), place=place)
        for place, rows in (
            ("targets", sources.load_targets("sample", 0, 0, "")),
            ("tests", sources.load_tests("sample", 0, 0)),
        )
        for e in rows
    ]
    return [row(e.example_id, e.question, f"{e.reasoning}\n{e.answer}") for e in pool], against


def test_words_forget_case_punctuation_white_space_and_unicode_variants():
    assert texts.words("  The ﬁrst\tH₂O—(pH 7.4)! ") == ("the", "first", "h2o", "ph", "7", "4")
    assert texts.words("Ｂ１２ café") == texts.words("b12 cafe\u0301")
    assert texts.words("高血压 mmHg") == ("高", "血", "压", "mmhg")


def test_similarities_by_hand():
    a, b = (texts.shingles(texts.words(t), 3) for t in ("a b c d", "a b c e f"))
    assert texts.jaccard(a, b) == 1 / 4  # abc of abc bcd bce cef
    assert texts.containment(a, b) == 1 / 2  # abc of abc bcd
    assert texts.shingles(("a", "b"), 3) == {("a", "b")}


@pytest.mark.parametrize(
    "kind, question",
    [
        ("exact", ASKED),
        ("exact", ASKED.upper().replace(" ", "\n ").replace(".", " ;")),
        ("options", hygiene.ask(VIGNETTE, CHOICES[::-1])),
        ("options", "\n".join([VIGNETTE, "(B) " + CHOICES[1], "(A) " + CHOICES[0], "D) Sarcoidosis",
                               "C: heart failure"])),
        ("near", ASKED.replace("three weeks", "21 days")),
        ("near", hygiene.ask(VIGNETTE, [*CHOICES[:3], "Tuberculosis"])),
        ("excerpt", ASKED[: len(ASKED) // 2]),
        ("excerpt", VIGNETTE[len(VIGNETTE) // 2 :]),
        ("ngram", "Name a cause of " + " ".join(VIGNETTE.split()[8:24]) + " and how it is found "
                  "where neither films nor blood are to be had, in a village far from any road."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["pool", "tests"])
def test_every_planted_kind_is_found_among_different_rows(sample, kind, question, place):
    pool, against = sample
    source = row("z-source", ASKED, place=place)
    planted = row("z-zplant", question, "Quite another way to reason.")
    rows = [*pool, source] if place == "pool" else pool
    others = against if place == "pool" else [*against, source]
    found = find([*rows, planted], others)
    if kind == "ngram" and place == "pool":  # a test of contamination only
        assert found == []
    else:
        assert [p[:4] for p in found] == [("z-zplant", "z-source", place, kind)]
        assert 0 < found[0].similarity <= 1 and (found[0].similarity == 1) >= (kind == "exact")


def test_half_of_every_sample_row_is_an_excerpt_of_it(sample):
    pool, _ = sample
    halves = [
        row(f"z{r.example_id}", " ".join(r.question.split()[: len(r.question.split()) // 2]))
        for r in pool
    ]
    halves = [h for h in halves if len(texts.words(h.question)) >= hygiene.EXCERPT_WORDS]
    found = {(p.example_id, p.other) for p in find([*pool, *halves]) if p.kind == "excerpt"}
    assert len(halves) > 100
    assert {(h.example_id, h.example_id[1:]) for h in halves} <= found


def test_different_rows_are_left_alone(sample):
    assert find(*sample) == []


def test_whole_rows_are_compared_inside_the_pool():
    reasoning = " ".join(f"step{i}" for i in range(60))
    pool = [row("a", "Why is the sky blue?", reasoning), row("b", "What colours air?", reasoning)]
    assert kinds(pool) == {("b", "a"): "near"}
    apart = [row("a", "Why is the sky blue?", reasoning), row("b", "What colours air?", "dust")]
    assert kinds(apart) == {}


def test_rows_without_text_are_not_compared():
    assert find([row("a", ""), row("b", ""), row("c", " ")], [row("t", "", place="tests")]) == []


def test_a_run_in_many_texts_is_boilerplate_whatever_its_numbers():
    def vital(i):
        return (
            f"Case {string.ascii_letters[i] * 3}: the pulse is {60 + i % 2} per minute and the "
            f"blood pressure is 120 over {70 + i} mm Hg in the left arm, {'xyz'[i % 3]} word{i}."
        )

    few, many = ([row(f"p{i:02d}", vital(i)) for i in range(n)] for n in (3, 12))
    test = row("t", "Of a gardener the pulse is 60 per minute and the blood pressure is 120 over "
               "70 mm Hg in the left arm; what next?", place="tests")  # fmt: skip
    near = {"near_similarity": 1.0, "excerpt_containment": 1.0}
    assert "ngram" in kinds(few, [test], **near).values()
    assert kinds(many, [test], **near) == {}
    assert "ngram" in kinds(many, [test], boilerplate_texts=13, **near).values()


def test_copies_are_paired_with_each_other_and_with_every_test():
    pool = [row(i, ASKED) for i in "cab"]
    against = [row("t", ASKED, place="tests"), row("u", ASKED, place="targets")]
    assert [p[:2] for p in find(pool)] == [("b", "a"), ("c", "a"), ("c", "b")]
    outside = {p[:3] for p in find(pool, against) if p.other_in != "pool"}
    assert outside == set(itertools.product("abc", "t", ["tests"])) | set(
        itertools.product("abc", "u", ["targets"])
    )


def test_the_order_of_rows_changes_nothing_and_removal_leaves_no_pair(sample):
    pool, against = sample
    rng = random.Random(0)
    pool = [*pool, *(row(f"z{r.example_id}", f"{r.question} indeed") for r in pool[:40])]
    found = find(pool, against)
    assert {p.kind for p in found} >= {"near"}
    shuffled = find(rng.sample(pool, len(pool)), rng.sample(against, len(against)))
    assert shuffled == found
    out = hygiene.dropped(found)
    assert len(out) == 40 and find([r for r in pool if r.example_id not in out], against) == []


def test_no_candidate_is_missed_by_hashing():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(40)])
    rows = []
    for i in range(60):
        base = rng.choice(vocabulary, 30)
        changed = np.where(rng.random(30) < 0.05, rng.choice(vocabulary, 30), base)
        rows += [row(f"{i:02d}a", " ".join(base)), row(f"{i:02d}b", " ".join(changed))]
    cut = {r.example_id: texts.shingles(texts.words(r.question), 3) for r in rows}
    pairs, least = itertools.combinations(sorted(cut), 2), SETTINGS.near_similarity
    expected = {(b, a) for a, b in pairs if least <= texts.jaccard(cut[a], cut[b]) < 1}
    found = {(p.example_id, p.other) for p in find(rows) if p.kind == "near"}
    assert len(expected) > 10 and found == expected


@hypothesis.given(
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda p: p[0] > p[1])),
    st.sets(st.integers(0, 9)),
)
def test_removal_leaves_no_pair_and_keeps_one_of_every_group(inside, contaminated):
    pairs = [hygiene.Repeat(str(a), str(b), "pool", "near", 0.9) for a, b in inside]
    pairs += [hygiene.Repeat(str(a), "t", "tests", "exact", 1.0) for a in contaminated]
    out = set(hygiene.dropped(pairs))
    assert {str(a) for a in contaminated} <= out
    assert all(str(a) in out or str(b) in out for a, b in inside)
    for a in out - {str(a) for a in contaminated}:
        assert any(p.example_id == a and p.other not in out for p in pairs if p.other_in == "pool")


def test_demoted_rows_rank_last_in_their_order():
    last = np.array([False, True, False, True, False])
    np.testing.assert_array_equal(
        select.demote(np.array([3, 1, 2, 4, 5], np.int32), last), [2, 4, 1, 5, 3]
    )
    ranks = np.array([3, 1, 2], np.int32)
    np.testing.assert_array_equal(select.demote(ranks, np.zeros(3, bool)), ranks)


def test_paraphrases_are_pairs_above_the_cosine():
    # Angles of 0, 10, 90 and 100 degrees: cos 10 = 0.985 twice; the two tests are not compared.
    angles = {"one": 0, "two": 10, "three": 90, "four": 100}

    def embed(found):
        turn = np.radians([angles[text] for text in found])
        return 3 * np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)

    pool = [row("a", "one"), row("b", "two"), row("c", "three")]
    settings = selection_config.Selection(paraphrase_similarity=0.98)
    found = find(pool, [row("t", "four", place="tests")], settings, embed)
    assert [p[:4] for p in found] == [
        ("b", "a", "pool", "paraphrase"),
        ("c", "t", "tests", "paraphrase"),
    ]
    np.testing.assert_allclose([p.similarity for p in found], np.cos(np.radians(10)), rtol=1e-6)


@pytest.fixture(name="made")
def _made(tmp_path):
    """A run's folder of 20 rows up to selection: row-03 and row-07 repeat row-01, row-05 a test."""
    questions = [
        f"What does organ {c} {c * 2} do {c * 3} at {c * 4}?" for c in "abcdefghijklmnopqrst"
    ]
    questions[3], questions[7] = questions[1], questions[1].upper()
    ids, n = [f"row-{i:02d}" for i in range(20)], 20
    values = pa.array(np.arange(n, dtype=np.float32))
    tables = {
        "prepare/pool": {
            "question": questions, "reasoning": [""] * n, "answer": [f"so {i}" for i in range(n)],
            "row": [json.dumps({"id": i}) for i in ids], "source": ["one"] * n,
        },
        "difficulty/difficulty": {p: values for p in config.PERSPECTIVES},
        "influence/influence": {"influence": values, "loss": values, "tokens": pa.array([5] * n)},
    }  # fmt: skip
    for name, columns in tables.items():
        artifacts.write_table(tmp_path / f"{name}.parquet", {"example_id": ids} | columns)
    for place, question in (("targets", "Unlike?"), ("tests", questions[5])):
        columns = {"example_id": [f"{place}-0"], "question": [question], "choices": [[]]}
        artifacts.write_table(tmp_path / f"prepare/{place}.parquet", columns)
    return tmp_path


def run_stage(folder, hygiene_mode, ratio=0.5, **difficulty):
    values = config.default()
    values.model.path = "none"
    values.selection.hygiene, values.selection.retention_ratio = hygiene_mode, ratio
    values.difficulty.update(difficulty)
    if difficulty:
        values.selection.paraphrase_similarity = 0.999
    cfg = config.resolve(values)
    record = stage.run(stages.Context(cfg, folder, devices.make_placement(cfg.parallel)))
    return record, reading.read_table(folder / "selection/selection.parquet")


def test_the_stage_writes_pairs_and_remove_demotes(made):
    off, before = run_stage(made, "off")
    assert "hygiene" not in off and not (made / "selection/hygiene.parquet").exists()
    report, same = run_stage(made, "report")
    assert same == before
    table = reading.read_table(made / "selection/hygiene.parquet")
    assert table.column_names == ["example_id", "other", "other_in", "kind", "similarity"]
    assert [tuple(r.values())[:4] for r in table.to_pylist()] == [
        ("row-03", "row-01", "pool", "exact"),
        ("row-05", "tests-0", "tests", "exact"),
        ("row-07", "row-01", "pool", "exact"),
        ("row-07", "row-03", "pool", "exact"),
    ]
    assert report["hygiene"]["pairs"]["exact"] == 4 and report["hygiene"]["removed"] == 0

    removed, after = run_stage(made, "remove")
    assert removed["hygiene"]["removed"] == 3 and removed["selected"] == 10
    assert after.column_names == before.column_names
    by_rank = [r["example_id"] for r in sorted(after.to_pylist(), key=lambda r: r["rank"])]
    gone = {"row-03", "row-05", "row-07"}
    ranked = [r["example_id"] for r in sorted(before.to_pylist(), key=lambda r: r["rank"])]
    assert by_rank == [i for i in ranked if i not in gone] + [i for i in ranked if i in gone]
    assert not gone & {r["example_id"] for r in after.to_pylist() if r["selected"]}
    why = dict(zip(after["example_id"].to_pylist(), after["why"].to_pylist(), strict=True))
    assert why["row-03"].endswith("; removed: exact overlap with row-01")
    assert why["row-05"].endswith("; removed: exact overlap with tests-0 of the tests")
    assert {i for i, reason in why.items() if "removed" in reason} == gone
    baselines = reading.read_table(made / "selection/baselines.parquet").to_pylist()
    assert all(r["random"] > 17 for r in baselines if r["example_id"] in gone)


def test_a_budget_above_what_is_left_is_one_sentence(made):
    with pytest.raises(errors.UserError, match="leaves 17 of 20 rows, fewer than the 18 that"):
        run_stage(made, "remove", ratio=0.9)
    run_stage(made, "remove", ratio=0.85)


def test_paraphrases_need_an_encoder_and_use_it(made, tmp_path_factory):
    values = config.default()
    values.model.path, values.selection.paraphrase_similarity = "none", 0.9
    with pytest.raises(errors.UserError, match=r"set difficulty\.encoder"):
        config.resolve(values)
    encoder = folders.encoder(tmp_path_factory.mktemp("encoder"))
    with jax.default_matmul_precision("highest"):
        record, _ = run_stage(made, "report", encoder=str(encoder), max_tokens=64)
    pairs = reading.read_table(made / "selection/hygiene.parquet").to_pylist()
    assert record["hygiene"]["pairs"]["exact"] == 4
    assert all(p["similarity"] >= 0.999 for p in pairs)


def test_old_artifacts_are_named(made):
    columns = {"example_id": ["t"], "question": ["q"]}
    artifacts.write_table(made / "prepare/tests.parquet", columns)
    with pytest.raises(
        errors.UserError,
        match=r"no column 'choices'.* Redo the stage with --stages=prepare --overwrite",
    ):
        run_stage(made, "report")


def test_a_wrong_threshold_is_named():
    for field, value in (("near_similarity", 0.0), ("ngram_words", 0), ("hygiene", "rmove")):
        with pytest.raises(errors.UserError, match=f"selection.{field} must be"):
            selection_config.Selection(**{field: value})
    assert hygiene_stage.FIELD in config.field_names()
