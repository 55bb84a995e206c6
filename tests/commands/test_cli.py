"""How a script ends: done, a mistake of the user, a fault of ours, Ctrl-C, SIGTERM."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diq_jax import pipeline
from diq_jax.commands import cli

ROOT = pathlib.Path(__file__).parents[2]

HEAD = """
    import os, signal, sys, time
    from absl import flags
    from diq_jax.commands import cli
    from diq_jax import errors
    WORKDIR = flags.DEFINE_string("workdir", "nowhere", "A folder.")
"""


def start(tmp_path, main, *arguments) -> subprocess.Popen:
    """A script with the body of main()."""
    script = tmp_path / "script.py"
    body = textwrap.dedent(HEAD) + "def main():\n" + textwrap.indent(textwrap.dedent(main), "    ")
    script.write_text(body + "\ncli.run(main)\n")
    return subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip


def finish(tmp_path, main, *arguments):
    """(exit code, lines of stdout, lines of stderr)."""
    process = start(tmp_path, main, *arguments)
    out, err = process.communicate()
    return process.returncode, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("workdir", ["run", "nowhere"])
def test_a_fault_is_one_sentence_and_its_traceback_is_kept(workdir, tmp_path):
    (tmp_path / "run").mkdir()
    main = "{}['a\\nkey that nobody expected']"
    code, _, [said] = finish(tmp_path, main, f"--workdir={tmp_path / workdir}")
    assert code == 1 and said.startswith(r"error: unexpected KeyError: 'a\nkey that nobody")
    [log] = (tmp_path / "run" if workdir == "run" else tmp_path).glob("error-*.log")
    assert str(log) in said
    assert "Traceback" in log.read_text() and "script.py" in log.read_text()


def test_a_fault_where_nothing_can_be_written_is_still_one_sentence(tmp_path):
    main = "flags.FLAGS.workdir = '/proc'; import tempfile; tempfile.tempdir = '/proc'; 1 / 0"
    code, _, [said] = finish(tmp_path, main)
    assert code == 1 and "unexpected ZeroDivisionError: division by zero" in said
    assert "none can be written" in said


def test_a_mistake_leaves_no_log(tmp_path):
    main = "raise errors.UserError('the pool is empty.')"
    assert finish(tmp_path, main) == (2, [], ["error: the pool is empty."])
    assert not list(tmp_path.glob("error-*"))


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_workdir_is_refused(empty, tmp_path):
    code, _, [said] = finish(tmp_path, "cli.folder(WORKDIR)", f"--workdir={empty}")
    assert code == 2 and said == f"error: --workdir must name a folder; got {empty!r}."


STOPPED = "Stopped by SIGTERM: the same command continues from here."
BUSY = {
    "python": "while True: pass",
    # Like a compilation, or the wait for another process: never back in Python.
    "elsewhere": """
        import ctypes
        lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
        lock(mutex), lock(mutex)
    """,
    "asleep": "time.sleep(600)",
    "asyncio": """
        import asyncio
        async def work():
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print)
            await asyncio.sleep(600)
        asyncio.run(work())
    """,
    "after asyncio": """
        import asyncio
        async def work():
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print)
        asyncio.run(work())
        while True: time.sleep(0.1)
    """,
}


@pytest.mark.parametrize("busy", BUSY)
def test_sigterm_ends_a_process_whatever_it_is_at(busy, tmp_path):
    process = start(tmp_path, 'print("ready", flush=True)\n' + textwrap.dedent(BUSY[busy]))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err.split("\n")) == (143, ["", STOPPED, ""])


def test_other_signals_do_not_stop_it(tmp_path):
    main = """
        signal.signal(signal.SIGUSR1, lambda *_: print("seen"))
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        print("done")
    """
    assert finish(tmp_path, main) == (0, ["seen", "done"], [])


def test_the_log_of_a_fault_is_nobody_elses_file(tmp_path):
    (tmp_path / "run").mkdir()
    for _ in range(2):
        finish(tmp_path, "1 / 0", f"--workdir={tmp_path / 'run'}")
    assert len(list(pathlib.Path(tmp_path / "run").glob("error-*.log"))) == 2


def diq(*arguments):
    """(exit code, stdout, stderr, seconds) of a command."""
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "diq_jax", *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr, time.perf_counter() - started


@pytest.mark.parametrize("job", cli.JOBS)
def test_every_job_says_what_it_does_and_loads_no_jax(job):
    code = "import sys; from diq_jax.commands import cli; cli.main(); "
    code += "assert not {'jax', 'transformers', 'datasets', 'sklearn'} & sys.modules.keys()"
    ended = subprocess.run(
        [sys.executable, "-c", code, job, "--help"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"diq {job}" in ended.stdout and "--" in ended.stdout


def test_help_lists_the_jobs_and_a_wrong_one_is_named():
    code, said, _, _ = diq("--help")
    assert code == 0 and all(f"  {job} " in said for job in cli.JOBS)
    code, said, _, _ = diq()
    assert code == 2 and "diq NAME" in said
    code, _, said, _ = diq("scoer")
    assert code == 2 and said.endswith("Did you mean 'score'?\n") and said.count("\n") == 1
    assert diq("--version")[1].startswith("diq_jax ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=quikstart"], "Did you mean 'quickstart'?"),
        (["--config=quickstart", "--config.infuence.engine=exact"], "Did you mean 'influence.eng"),
        (["--config=quickstart", "--config.influence.engine=exct"], "Did you mean 'exact'?"),
        (["--config=quickstart", "--stage=prepare"], "Did you mean: stages"),
    ],
)
def test_a_mistyped_word_is_answered_before_jax_is_loaded(flags, message, tmp_path):
    code, _, said, seconds = diq("run", f"--workdir={tmp_path}", *flags)
    assert code == 2 and message in said and said.count("\n") == 1
    assert seconds < 2 or os.getloadavg()[0] > os.cpu_count()


def test_the_help_names_the_stages():
    assert ", ".join(pipeline.STAGES) in " ".join(diq("run", "--help")[1].split())


def test_the_help_explains_the_fields_of_a_section():
    code, said, _, _ = diq("run", "--help=influence")
    assert code == 0 and said.startswith("influence:") and "\ndifficulty:" not in said
    assert "--config.influence.engine=exact" in said
    code, _, said, _ = diq("run", "--help=influense")
    assert code == 2 and "Did you mean 'influence'?" in said
