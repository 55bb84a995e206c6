"""Labelling a pool by a language model, as a user calls it, over a real local server."""

import json
import os
import pathlib
import signal
import time

import endpoint_server
import numpy as np
import pytest
import scripts
from endpoint_server import Act, Server

from diq_jax.clients import annotate
from diq_jax.difficulty import labels
from diq_jax.run import artifacts, reading

ROOT = pathlib.Path(__file__).parents[2]
# This checkout's package, whichever is installed.
ENVIRONMENT = os.environ | {"OPENAI_API_KEY": "secret", "PYTHONPATH": str(ROOT)}


LEVEL_ROWS = [f"| {level}" for level in range(1, 6)]


def rows(count):
    return [
        {"id": f"r{i}", "question": f"Why {i}?", "answer": "so", "source": {"page": i}}
        for i in range(count)
    ]


def expected(row):
    found = endpoint_server.levels(row["question"])
    return row | {f"difficulty_{name}": level for name, level in found.items()}


def command(server, folder, *flags):
    return (
        "annotate", f"--rows={folder / 'pool.jsonl'}", f"--out={folder / 'labels.jsonl'}",
        f"--base_url={server.url}", "--model=tiny", *flags,
    )  # fmt: skip


def run(server, folder, *flags, environment=ENVIRONMENT):
    return scripts.script(*command(server, folder, *flags), env=environment)


@pytest.fixture(name="folder")
def _folder(tmp_path):
    artifacts.write_jsonl(tmp_path / "pool.jsonl", rows(12))
    return tmp_path


def test_rows_come_back_labelled_and_are_a_difficulty_source(folder):
    with Server() as server:
        ended = run(server, folder, "--yes", "--concurrency=3", "--price_in=1", "--price_out=2")
        assert ended.returncode == 0, ended.stderr[-2000:]
        first = (folder / "labels.jsonl").read_bytes()
        again = run(server, folder)  # nothing to pay for, so nothing to confirm
        assert len(server.bodies) == 12 and server.most_at_once <= 3
    assert reading.read_jsonl(folder / "labels.jsonl") == [expected(row) for row in rows(12)]
    assert (folder / "labels.jsonl").read_bytes() == first
    assert "annotated 12 rows; 0 refused, 0 malformed, 0 unanswered; 0 were" in ended.stdout
    # 12 replies of 100 tokens in at 1 and 10 out at 2 a million: (1200 + 2 * 120) / 1e6.
    assert "1,200 tokens in, 120 out, cost 0.0014" in ended.stdout
    assert "12 were in the cache" in again.stdout and again.returncode == 0
    questions, levels = labels.labelled_rows(str(folder / "labels.jsonl"))
    assert questions == [row["question"] for row in rows(12)] and levels.shape == (12, 3)


def test_a_killed_run_asks_only_for_what_is_missing_and_gives_the_same_bytes(folder, tmp_path):
    with Server() as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        (whole / "pool.jsonl").write_bytes((folder / "pool.jsonl").read_bytes())
        assert run(server, whole, "--yes").returncode == 0
    with Server(lambda number, body: Act(hang=True) if number >= 5 else None) as server:
        process = scripts.start(
            *command(server, folder, "--yes", "--concurrency=2"), env=ENVIRONMENT
        )
        deadline = time.monotonic() + 60
        while len(server.bodies) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(server.bodies) == 7 and not (folder / "labels.jsonl").exists()
        kept = folder / "labels.cache.jsonl"
        kept.write_bytes(kept.read_bytes() + b'{"key": "half')
        server.plan = lambda number, body: None
        ended = run(server, folder, "--yes")
        assert ended.returncode == 0, ended.stderr[-2000:]
        asked = [endpoint_server.question(body) for body in server.bodies]
    # Five were paid for; the two under way when the process died are asked again.
    assert len(asked) == 5 + 2 + 7 and sorted(set(asked[7:]) | set(asked[:5])) == sorted(
        row["question"] for row in rows(12)
    )
    assert (folder / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()


def test_what_failed_is_listed_and_left_out(folder):
    bad = {
        "Why 1?": Act(refusal="I cannot"),
        "Why 4?": Act(endpoint_server.answer({"knowledge": 1, "reasoning": 2, "overall": 6})),
        "Why 5?": Act(endpoint_server.answer({"knowledge": 1, "reasoning": 2, "overall": "3"})),
        "Why 6?": Act(endpoint_server.answer({"knowledge": 1, "reasoning": 2})),
        "Why 9?": Act(status=400),
    }
    with Server(lambda number, body: bad.get(endpoint_server.question(body))) as server:
        ended = run(server, folder, "--yes")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "annotated 7 rows; 1 refused, 3 malformed, 1 unanswered" in ended.stdout
    good = [expected(row) for row in rows(12) if row["question"] not in bad]
    assert reading.read_jsonl(folder / "labels.jsonl") == good
    failed = reading.read_jsonl(folder / "labels.failed.jsonl")
    assert [(row["id"], row["status"]) for row in failed] == [
        ("r1", "refused"), ("r4", "malformed"), ("r5", "malformed"), ("r6", "malformed"),
        ("r9", "unanswered"),
    ]  # fmt: skip
    assert failed[1]["detail"] == "overall must be one of 1, 2, 3, 4, 5, got 6"


def test_repeats_differ_in_the_seed_and_their_median_is_written(folder):
    def plan(number, body):
        # Draws of seeds 7, 8, 9: knowledge 1, 2, 5; reasoning alike; overall by the question.
        draw = body["seed"] - 7
        found = endpoint_server.levels(endpoint_server.question(body))
        return Act(endpoint_server.answer(found | {"knowledge": (1, 2, 5)[draw], "reasoning": 4}))

    with Server(plan) as server:
        ended = run(server, folder, "--yes", "--repeat=3", "--seed=7", "--sample=4")
    assert ended.returncode == 0, ended.stderr[-2000:]
    written = reading.read_jsonl(folder / "labels.jsonl")
    assert len(written) == 4 and len(server.bodies) == 12
    ids = [row["id"] for row in written]
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    for row in written:
        assert row["difficulty_knowledge"] == 2 and row["difficulty_reasoning"] == 4
        assert row["difficulty_overall"] == expected(row)["difficulty_overall"]
    lines = {line.split()[0]: line.split() for line in ended.stdout.splitlines() if line}
    assert lines["overall"][-1] == "1.000" and lines["reasoning"][-1] == "–"
    summary = reading.read_json(folder / "labels.summary.json")
    assert summary["kappa"]["overall"] == 1 and summary["kappa"]["reasoning"] is None
    assert summary["levels"]["knowledge"] == [0, 4, 0, 0, 0] and summary["draws"] == 3
    asked = {row["question"] for row in summary["apart"]}
    assert asked == {row["question"] for row in written}
    assert all(sorted(row["levels"]) == [1, 2, 5] for row in summary["apart"])


def test_a_dry_run_needs_no_key_and_sends_nothing(folder):
    with Server() as server:
        keyless = {name: value for name, value in ENVIRONMENT.items() if name != "OPENAI_API_KEY"}
        ended = run(server, folder, "--dry_run", "--limit=2", environment=keyless)
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert server.bodies == [] and not (folder / "labels.jsonl").exists()
    assert "requests              2   and 0 answered by the cache" in ended.stdout
    assert "[system]" in ended.stdout and "<question>\nWhy 0?\n</question>" in ended.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out=labels.csv"], "--out must end in .jsonl"),
        (["--price_in=3"], "--price_in and --price_out belong together"),
        (["--repeat=2", "--temperature=0"], "--temperature must not be 0"),
        (["--api_key_env=NO_SUCH_KEY", "--yes"], "set the environment variable NO_SUCH_KEY"),
        ([], "pass --yes"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, folder):
    with Server() as server:
        ended = run(server, folder, *flags)
        assert server.bodies == []
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") == 1


def test_a_file_of_the_users_is_not_overwritten(folder):
    (folder / "labels.jsonl").write_text("mine\n")
    with Server() as server:
        ended = run(server, folder, "--yes")
    assert ended.returncode == 2 and "exists and was not made here" in ended.stderr
    assert (folder / "labels.jsonl").read_text() == "mine\n"


def test_a_damaged_line_of_the_cache_is_paid_for_again_and_no_other(folder):
    with Server() as server:
        assert run(server, folder, "--yes").returncode == 0
        first = (folder / "labels.jsonl").read_bytes()
        kept = folder / "labels.cache.jsonl"
        lines = kept.read_bytes().splitlines(keepends=True)
        kept.write_bytes(b"".join([*lines[:2], b"x" + lines[2][1:], *lines[3:]]))
        ended = run(server, folder, "--yes")
        assert len(server.bodies) == 12 + 1
    assert f"1 damaged lines of {kept} are skipped" in ended.stdout
    assert (folder / "labels.jsonl").read_bytes() == first


@pytest.mark.parametrize("name", ["labels.cache.jsonl", "labels.failed.jsonl"])
def test_files_of_the_users_beside_it_stay(name, folder):
    (folder / name).write_text("my own notes\n")
    with Server() as server:
        ended = run(server, folder, "--yes")
        assert server.bodies == []
    assert ended.returncode == 2 and name in ended.stderr and ended.stderr.count("\n") == 1
    assert (folder / name).read_text() == "my own notes\n"


def test_two_runs_at_once_pay_once(folder):
    slow = Server(
        lambda number, body: Act(
            endpoint_server.answer(endpoint_server.levels(endpoint_server.question(body))),
            delay_s=0.2,
        )
    )
    with slow as server:
        both = [
            scripts.start(*command(server, folder, "--yes", "--concurrency=2"), env=ENVIRONMENT)
            for _ in range(2)
        ]
        said = [process.communicate()[1] for process in both]
        assert len(server.bodies) == 12
    refused, ended = sorted(both, key=lambda process: -process.returncode)
    assert (refused.returncode, ended.returncode) == (2, 0)
    assert "is in use by another run" in said[both.index(refused)]


def test_odd_counts_are_said_and_cost_nothing_else(folder):
    def plan(number, body):
        found = endpoint_server.levels(endpoint_server.question(body))
        message = {"role": "assistant", "content": endpoint_server.answer(found)}
        usage = '"many"' if number % 2 else '{"prompt_tokens": NaN}'
        choices = json.dumps([{"index": 0, "message": message, "finish_reason": "stop"}])
        return Act(raw=f'{{"choices": {choices}, "usage": {usage}}}'.encode())

    with Server(plan) as server:
        ended = run(server, folder, "--yes")
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert run(server, folder).returncode == 0 and len(server.bodies) == 12
    assert "no usable token counts for 12 of them" in ended.stdout
    assert reading.read_jsonl(folder / "labels.jsonl") == [expected(row) for row in rows(12)]


def test_the_rubric_is_that_of_the_sample():
    readme = (ROOT / "diq_jax/data/sample/README.md").read_text()
    system, user = annotate.messages("Why?  ")
    rows = [line.strip("|").split("|") for line in readme.splitlines() if line[:3] in LEVEL_ROWS]
    assert len(rows) == 5 and user["content"].endswith("<question>\nWhy?\n</question>")
    for level, *cells in rows:
        for cell in cells:
            assert f"\n{level.strip()} {cell.strip()}\n" in system["content"]


def test_levels_agreement_and_histogram_by_hand():
    answers = [dict.fromkeys(("knowledge", "reasoning", "overall"), level) for level in (5, 1, 2)]
    assert annotate.levels(answers) == {"knowledge": 2, "reasoning": 2, "overall": 2}
    assert annotate.levels(answers[:2])["overall"] == 1  # the lower of two
    assert annotate.histogram(answers)["overall"] == [1, 1, 0, 0, 1]
    first, second, third = answers
    # Draws 5 1 2 and 5 1 2 agree wholly: kappa 1. Of one draw there is no pair.
    assert annotate.agreement([[first] * 2, [second] * 2, [third] * 2])["overall"] == 1
    assert np.isnan(annotate.agreement([[first], [second]])["overall"])


def test_a_row_keeps_its_names_and_gets_a_question():
    found = {"knowledge": 1, "reasoning": 2, "overall": 3}
    row = annotate.labelled({"Question": "Why?", "difficulty_overall": 5}, "Why?", found)
    assert row == {
        "Question": "Why?", "question": "Why?", "difficulty_knowledge": 1,
        "difficulty_reasoning": 2, "difficulty_overall": 3,
    }  # fmt: skip
