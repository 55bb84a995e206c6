"""Methods compared by training: one reading of both studies, the page, and what is no study."""

import copy
import dataclasses

import numpy as np
import pytest
from report import test_report as made

from comparison import statistics
from diq_jax import config, errors
from diq_jax.report import page, stage, studies
from diq_jax.run import artifacts
from lab import summary, trainings

SEEDS, QUESTIONS = 4, 6


def values(seed, shift=0.0):
    """Draws values of each metric; shifted ones differ from the same seed's by shift ± 0.1."""
    rng, moved = np.random.default_rng(seed), np.random.default_rng(100)
    shape = SEEDS, QUESTIONS
    return {
        m: rng.normal(1, 0.1, shape) + (shift and shift + moved.uniform(-0.1, 0.1, shape))
        for m in trainings.METRICS
    }


def lab_record():
    """A lab in which diq is about 0.5 below random in everything, by the lab's own summary."""
    found = {("random", 0.1): values(0), ("diq", 0.1): values(0, -0.5), ("full", 1.0): values(2)}
    about = {"rows": 3, "answer_tokens": 2.0, "seeds": SEEDS}
    base = {m: x[:1] for m, x in values(3).items()}
    rows = summary.rows(found, base, dict.fromkeys(found, about), 200, 0)
    return {"title": "a lab", "settings": {}, "rows": rows}


def comparison_record():
    """The same as compare_selection.py writes it, without the loss on held-out rows."""
    tasks = {m: ["t"] * QUESTIONS for m in statistics.METRICS}
    found = [{m: v[m] for m in statistics.METRICS} for v in (values(0), values(0, -0.5))]
    base = {m: values(3)[m][:1] for m in statistics.METRICS}
    rows = [
        {"method": "base", "budget": 0.0, "metrics": statistics.compare(base, None, tasks, 200, 0)},
        {"method": "random", "budget": 0.1, "rows": 3,
         "metrics": statistics.compare(found[0], None, tasks, 200, 0, base)},
        {"method": "diq", "budget": 0.1, "rows": 3,
         "metrics": statistics.compare(found[1], found[0], tasks, 200, 0, base)},
    ]  # fmt: skip
    rows = [{"unit": "rows", **row} for row in rows]
    statistics.correct(rows)
    counts = {"seeds": SEEDS, "pool": 20, "targets": 4, "tests": QUESTIONS, "tasks": 1}
    return {"settings": {"model": made.MODEL, **counts}, "rows": rows}


RECORDS = {studies.LAB: lab_record, studies.COMPARISON: comparison_record}


def run_config(**selection):
    c = config.default()
    c.model.path = made.MODEL
    c.selection.update({"method": "diq", "retention_ratio": 0.1} | selection)
    return config.resolve(c)


def write(folder, name, record=None):
    artifacts.write_json(folder / name, record or RECORDS[name]())
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_a_study_is_read_as_it_was_written(tmp_path, name):
    study = studies.load(write(tmp_path / "s", name), "--studies")
    assert (study.name, study.seeds) == ("s", SEEDS)
    [diq] = study.compared
    assert (diq.arm, diq.cell, diq.rows) == ("diq", (0.1, "rows"), 3)
    for metric, cell in diq.versus.items():
        gap = values(0, -0.5)[metric] - values(0)[metric]
        np.testing.assert_allclose(cell["mean"], gap.mean(), err_msg=metric)
        assert -0.6 < cell["low"] < cell["mean"] < cell["high"] < -0.4
    [(budget, table)] = studies.tabled(study)
    levels = {"lab.json": ["base (level)", "random (level)", "full (level)"]}
    expected = levels.get(name, ["base (level)", "random (level)"])
    assert budget == "10 %" and [row[0].text for row in table.rows] == [*expected, "diq"]
    shown = dict(zip(table.headers, table.rows[-1], strict=True))
    cell, numbers = shown["Choice loss (nats)"], diq.versus["choice_loss"]
    mean, low, high = (f"{numbers[end]:.3f}".replace("-", "−") for end in studies.ENDS)
    assert (cell.text, cell.interval, cell.strong) == (mean, f"{low} to {high}", True)
    points = f"{100 * diq.versus['accuracy']['mean']:.1f}".replace("-", "−")
    assert shown["Accuracy (%, points)"].text == points
    assert ("Loss on held-out rows (nats/token)" in shown) == (name == studies.LAB)
    lines = studies.picture(study).csv.decode().splitlines()
    assert len(lines) == 1 + len(diq.versus)


def test_an_interval_that_chance_gives_is_not_marked(tmp_path):
    record = comparison_record()
    cell = record["rows"][2]["metrics"]["test_loss"]["versus"]
    # Outside 0, and not after the correction.
    cell |= {"mean": -0.5, "low": -0.9, "high": -0.1, "p_holm": 0.06}
    study = studies.load(write(tmp_path, studies.COMPARISON, record), "--studies")
    [(_, table)] = studies.tabled(study)
    row = dict(zip(table.headers, table.rows[-1], strict=True))
    assert not row["Test loss (nats/token)"].strong and row["Choice loss (nats)"].strong
    said = studies.claim(study, run_config(), 20)
    assert said.startswith("Over 4 seeds, diq − random at 10 %: test loss −0.5")
    assert "(−0.900 to −0.100; not shown)" in said
    for name, other in (("method", "ifd"), ("retention_ratio", 0.05)):
        assert studies.claim(study, run_config(**{name: other}), 20) == ""
    assert studies.claim(study, run_config(), 21) == ""  # of another pool
    assert studies.claim(dataclasses.replace(study, model="other"), run_config(), 20) == ""


def test_the_report_shows_the_study_in_its_folder(tmp_path):
    context = made.fabricate(tmp_path, made.sample_rows()[:20])
    assert "no compare/results.json" in made.read_page(made.page_of(context)).text
    before = stage.fingerprints(context)
    write(tmp_path, studies.COMPARISON)
    assert stage.fingerprints(context) != before  # so that the report is made anew
    text = made.read_page(made.page_of(context)).text
    assert f"{made.MODEL}, pool of 20, 4 targets, 6 questions of 1 tasks, 4 seeds" in text
    assert "Over 4 seeds, diq − random at 10 %" in text.split("All rows")[0]  # the headline
    assert "Another seed may differ" not in text
    assert "Over 4 seeds" in stage.summary(context)


def test_a_page_of_several_studies(tmp_path):
    found = [studies.load(write(tmp_path / n[:3], n), "--studies") for n in RECORDS]
    page.write_studies(tmp_path / "page", found)
    names = {path.name for path in (tmp_path / "page").iterdir()}
    pictures = {f"study-{i}.{suffix}" for i in (1, 2) for suffix in ("png", "svg", "csv")}
    assert names == {"report.html", *pictures}
    read = made.read_page((tmp_path / "page/report.html").read_text(encoding="utf-8"))
    assert "a lab." in read.text and all(a.startswith("#") for a in read.addresses)


def test_what_is_no_study_is_one_sentence(tmp_path):
    with pytest.raises(errors.UserError, match=r"--studies: .* has neither compare/results.json"):
        studies.load(tmp_path, "--studies")
    record = comparison_record()
    damaged = {
        r"rows\[0\] has no field 'metrics'": lambda r: r["rows"][0].pop("metrics"),
        r"rows\[2\].metrics.test_loss: mean must be a number": lambda r: r["rows"][2]["metrics"][
            "test_loss"
        ].update(mean="low"),
        r"versus has no field 'p_holm'": lambda r: r["rows"][2]["metrics"]["brier"]["versus"].pop(
            "p_holm"
        ),
        r"settings has no field 'seeds'": lambda r: r["settings"].pop("seeds"),
    }
    for sentence, damage in damaged.items():
        changed = copy.deepcopy(record)
        damage(changed)
        with pytest.raises(errors.UserError, match=sentence):
            studies.load(write(tmp_path, studies.COMPARISON, changed), "--studies")


def test_hostile_names_are_text(tmp_path):
    record = lab_record()
    record["title"] = record["rows"][2]["arm"] = "<img src=x onerror=alert(1)>$x$"
    page.write_studies(tmp_path / "page", [studies.load(write(tmp_path, "lab.json", record), "--")])
    text = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert "<img" not in text and "onerror=alert(1)&gt;" in text
