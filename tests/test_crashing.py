"""A command that is killed before any of its file operations ends as if it had not been."""

import json
import os
import pathlib
import subprocess
import sys

import crashing
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", name="campaign")
def _campaign():
    """A function (job, kills) -> what crashing.py found, by one process for all jobs."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests/crashing.py")], text=True, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}"},
    ) as process:  # fmt: skip

        def ask(job, kills):
            process.stdin.write(f"{job} {kills}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask


# So many operations each job has at least: fewer would mean that they are not counted.
@pytest.mark.parametrize(
    "job, least",
    [
        ("pass-rate", 15), ("score", 4), ("train-classifier", 60), ("factored", 60),
        ("adam", 40), ("finetune", 150), ("generate", 40),
    ],
)  # fmt: skip
def test_killed_and_run_again_is_identical(job, least, campaign):
    found = campaign(job, 2)
    assert found["wrong"] == {} and found["operations"] >= least and len(found["kills"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("job", crashing.JOBS)
def test_killed_at_many_places_and_run_again_is_identical(job, campaign):
    assert campaign(job, 12)["wrong"] == {}
