"""The generate protocol as a whole: votes, counts, a killed run, devices, bad input."""

import dataclasses
import os
import pathlib
import signal
import sys

import folders
import forks
import pytest
import tiny

from diq_jax import config, errors, evaluate_config, pipeline
from diq_jax.data import example
from diq_jax.evaluate import generation, stage
from diq_jax.models import generate, load
from diq_jax.run import parts, reading

RESULTS, PREDICTIONS = "evaluate/results.json", "evaluate/predictions.jsonl"


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(2))
    folders.write(base / "targets.jsonl", folders.choice_rows(2, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(6, "test"))
    return base


def run(made, workdir, **changes):
    c = config.default()
    c.model.path, c.model.max_tokens = str(made / "decoder"), 400
    c.data.pool, c.data.targets, c.data.tests = (
        str(made / f"{name}.jsonl") for name in ("pool", "targets", "tests")
    )
    c.difficulty.source = "columns"
    c.evaluate.bootstrap_samples, c.evaluate.batch_tokens = 100, 800
    c.evaluate.protocol, c.evaluate.max_new_tokens = "generate", 20
    c.evaluate.temperature, c.evaluate.samples = 1.0, 2
    for name, value in changes.items():
        c.evaluate[name] = value
    pipeline.run(config.resolve(c), pathlib.Path(workdir), ["prepare", "evaluate"], False)


@pytest.fixture(scope="module", name="finished")
def _finished(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    run(made, workdir)
    return workdir


def test_schema(finished):
    results = reading.read_json(finished / RESULTS)["models"]["base"]
    rows = reading.read_jsonl(finished / PREDICTIONS)
    assert len(rows) == 6
    for row in rows:
        assert len(row["answers"]) == 2
        for answer in row["answers"]:
            assert list(answer) == ["text", "letter", "tokens", "finish"]
            assert 1 <= answer["tokens"] <= 20
        assert sum(row["votes"].values()) <= 2 and "prediction_norm" not in row
    right = sum(row["prediction"] == row["answer"] for row in rows) / 6
    assert results["accuracy"]["mean"] == pytest.approx(right)
    assert results["unparsable"] == sum(row["prediction"] is None for row in rows)
    assert "accuracy_norm" not in results and results["test_loss"]["mean"] > 0
    record = reading.read_json(finished / "evaluate/stage.json")
    assert record["tokens"] > sum(a["tokens"] for row in rows for a in row["answers"])


def test_the_prompt_asks_to_think_and_names_the_letter(made):
    row = {"question": "what is it", "options": {"A": "one", "B": "two"}, "answer_idx": "B"}
    tests = [example.from_choices(row, "test", "q", "t")]
    model = load.load(str(made / "decoder"), "float32", tiny.placement())
    settings = evaluate_config.Evaluate(protocol="generate", max_new_tokens=8)
    part = generation.make_answers(tests, model, settings, config.Data().date, tiny.placement())
    text = part.generator.text(part.rows[0].ids)
    assert text == f"what is it\n\nA. one\nB. two\n\n{generation.INSTRUCTION}"
    assert part.generator.ends == (2, 256)  # of config.json, and <|end|>
    with pytest.raises(errors.UserError, match=r"evaluate\.max_new_tokens=500 does not fit .*'q'"):
        settings = dataclasses.replace(settings, max_new_tokens=500)
        generation.make_answers(tests, model, settings, config.Data().date, tiny.placement())


def test_votes():
    part = generation.Answers("answer", [], [{"A": "one", "B": "two"}], 4, [], None)

    def vote(*texts):
        found = generation.prediction(part, 0, [(text, 3, generate.END) for text in texts])
        return found["prediction"], found["votes"]

    assert vote("A", "The answer is B.", "B", "?") == ("B", {"A": 1, "B": 2})
    assert vote("B", "A") == ("B", {"B": 1, "A": 1})  # of equals the first
    assert vote("?", "A or B") == (None, {})
    # The last line of a text that was cut is no conclusion.
    assert generation.prediction(part, 0, [("A", 3, generate.LENGTH)])["prediction"] is None


@pytest.mark.slow
def test_killed_and_resumed_is_identical(made, finished, tmp_path):
    killed = forks.run([__file__, made, tmp_path, 7])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [*(tmp_path / stage.PARTIAL).glob("base/answer/*.arrow")]
    run(made, tmp_path)
    for name in (RESULTS, PREDICTIONS):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -0.5}, "evaluate.temperature must be at least 0; got -0.5."),
        ({"top_p": 0.0}, "evaluate.top_p must be in (0, 1]; got 0.0."),
        ({"top_p": 1.5}, "evaluate.top_p must be in (0, 1]; got 1.5."),
        ({"samples": 3}, "evaluate.samples=3 draws different answers: evaluate.temperature must"),
        ({"samples": 0}, "evaluate.samples must be at least 1; got 0."),
        ({"max_new_tokens": 0}, "evaluate.max_new_tokens must be at least 1; got 0."),
        ({"protocol": "generated"}, "Did you mean 'generate'?"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(errors.UserError) as caught:
        evaluate_config.Evaluate(**changes)
    assert message in str(caught.value)


def main(made, workdir, kill_after):
    add, added = parts.Parts.add, []

    def add_and_die(self, rows, columns):
        add(self, rows, columns)
        added.append(rows)
        if len(added) == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

    parts.Parts.add = add_and_die
    run(pathlib.Path(made), workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
