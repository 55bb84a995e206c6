"""Kills a command before its n-th file operation, runs it again, and compares what it leaves.

    python tests/crashing.py JOB [--kills=N | --all]         # JOB: one of JOBS, or all

An operation is anything that Python does to a file inside the job's folder: to open it for writing,
sync, rename, remove, make a folder. The kill is SIGKILL, to itself, so that nothing is tidied up.
Then the same command must succeed, and every file must have the bytes that an undisturbed run gives
it (of JSON, the values other than seconds and what was resumed). Each run is a fork of a process
that has imported the package and not started JAX; programs are compiled once, into a cache.
"""

import builtins
import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import forks
import scripts

ROOT = pathlib.Path(__file__).parents[1]
TIMES = (
    "seconds",
    "resumed",
    "tokens_per_second",
    "peak_memory",
)  # in the names of what differs between runs
LOGS = ("run.log", "events.jsonl")  # of what happened, and when
SEAL = "sha256"  # of a study's result, its seconds too (records.py)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Counter:
    """Counts operations inside a folder, and kills this process before the n-th (0 = never)."""

    def __init__(self, folder: pathlib.Path, kill_at: int):
        self.folder, self.kill_at, self.seen = os.path.realpath(folder), kill_at, []
        self._lock = threading.Lock()

    def __call__(self, name: str, file) -> None:
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        path = os.path.abspath(os.fsdecode(file))
        if not path.startswith(self.folder + os.sep):
            return
        with self._lock:
            self.seen.append(f"{name} {path.removeprefix(self.folder)[1:]}")
            if len(self.seen) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Puts itself before the functions by which Python changes files."""
        for name in (
            "replace",
            "rename",
            "fsync",
            "unlink",
            "remove",
            "rmdir",
            "mkdir",
            "truncate",
        ):
            setattr(os, name, self._before(name, getattr(os, name)))
        opened, os_open = io.open, os.open

        def open_(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+") and not isinstance(file, int):
                self("open", file)
            return opened(file, mode, *args, **kwargs)

        def os_open_(path, flags, *args, **kwargs):
            if flags & WRITES:
                self("open", path)
            return os_open(path, flags, *args, **kwargs)

        builtins.open = io.open = open_
        os.open = os_open_

    def _before(self, name, function):
        def counted(file, *args, **kwargs):
            if kwargs.get("dir_fd") is None:
                self(name, file)
            return function(file, *args, **kwargs)

        return counted


def forked(work: Callable[[], None], log: pathlib.Path) -> int:
    """Runs work() in a fork, output to a file, and returns its exit code, negative for a signal."""
    sys.stdout.flush()
    child = forks.fork()
    if child == 0:
        code = 1
        try:
            with open(log, "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            work()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Job:
    """One command on a folder.

    Args:
        commands: (script, flags) with {0} for the folder; the last one is killed, those before
            make what it reads.
    """

    def __init__(self, name: str, base: pathlib.Path, commands: Sequence[tuple[str, list[str]]]):
        self.folder, self.log = base / name, base / f"{name}.log"
        self._start, self._commands = base / f"{name}.start", commands
        self._start.mkdir()
        for command in commands[:-1]:
            self._reset()
            assert self._run(command) == 0, self.log.read_text()[-3000:]
            shutil.rmtree(self._start)
            shutil.copytree(self.folder, self._start, symlinks=True)
        self.operations: list[str] = []
        self._reset()
        assert self.run(0, self._note) == 0, self.log.read_text()[-3000:]
        self.operations = self._noted.read_text().splitlines()
        self.expected = contents(self.folder)

    @property
    def _noted(self) -> pathlib.Path:
        return self.log.with_suffix(".operations")

    def _note(self, counter: Counter) -> None:
        self._noted.write_text("\n".join(counter.seen))

    def _reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._start, self.folder, symlinks=True)

    def _run(self, command, begin=lambda: None, end=lambda: None) -> int:
        name, flags = command

        def work():
            begin()
            try:
                flags_here = [str(flag).format(self.folder) for flag in flags]
                forks.program(scripts.command(name, *flags_here))()
            finally:
                end()

        return forked(work, self.log)

    def run(self, kill_at: int, end: Callable[[Counter], None] = lambda counter: None) -> int:
        """Runs the command, to be killed before the operation `kill_at`, from 1."""
        counter = Counter(self.folder, kill_at)
        return self._run(self._commands[-1], counter.install, lambda: end(counter))

    def kill(self, number: int) -> str:
        """Kills a run before an operation and runs it again.

        Returns:
            What went wrong, or "".
        """
        self._reset()
        code = self.run(number)
        if code != -signal.SIGKILL:
            # Threads may do fewer operations than in the first run.
            return "" if code == 0 else f"exit code {code}: {self.log.read_text()[-2000:]}"
        if (code := self.run(0)) != 0:
            return f"again: exit code {code}: {self.log.read_text()[-2000:]}"
        found = contents(self.folder)
        names = sorted(found.keys() | self.expected.keys())
        differ = [name for name in names if found.get(name) != self.expected.get(name)]
        return f"other bytes in {', '.join(differ)}" if differ else ""


def contents(folder: pathlib.Path) -> dict[str, object]:
    """{file: its bytes, or of JSON the values that do not tell of time}."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in LOGS):
        data = path.read_bytes()
        if path.suffix == ".json":
            data = timeless(json.loads(data))
        found[path.relative_to(folder).as_posix()] = data
    return found


def timeless(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(time in k for time in TIMES)}
        if isinstance(kept.get(SEAL), str):
            del kept[SEAL]
        return {key: timeless(inner) for key, inner in kept.items()}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def make_data(base: pathlib.Path) -> None:
    """Tiny models and rows that all jobs read."""
    import folders

    folders.decoder(base / "decoder")
    folders.encoder(base / "encoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(16))
    folders.write(base / "targets.jsonl", folders.choice_rows(4, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(4, "test"))
    folders.write(base / "pairs.jsonl", folders.preference_rows(8))


JOBS = ("compare_selection", "pass-rate", "score", "train-classifier", "factored",
        "adam", "finetune", "dpo", "generate")  # fmt: skip


def commands(data: pathlib.Path) -> dict[str, list[tuple[str, list[str]]]]:
    """Returns {job: its commands on the folder {0}}."""
    fields = {
        "model.path": data / "decoder", "model.max_tokens": 128, "data.pool": data / "pool.jsonl",
        "data.targets": data / "targets.jsonl", "data.tests": data / "tests.jsonl",
        "difficulty.source": "columns", "selection.hygiene": "off",
        "selection.retention_ratio": 0.25, "finetune.epochs": 2, "evaluate.bootstrap_samples": 100,
        "influence.batch_tokens": 256, "evaluate.batch_tokens": 256,
    }  # fmt: skip
    file = f"--config={ROOT / 'configs/quickstart.py'}"

    def config(**changes):
        chosen = fields | {name.replace("__", "."): value for name, value in changes.items()}
        return [file, *(f"--config.{name}={value}" for name, value in chosen.items())]

    def diq(stages, **changes):
        return "run_diq", [*config(**changes), "--workdir={0}", f"--stages={stages}"]

    factored = {"influence__engine": "factored", "influence__store__shard_rows": 8,
                "influence__projection__dim": 64}  # fmt: skip
    adam = {"influence__direction": "adam", "influence__warmup__epochs": 2,
            "influence__warmup__batch_size": 4}  # fmt: skip
    generate = {"evaluate__protocol": "generate", "evaluate__max_new_tokens": 4}
    rates = {"evaluate__temperature": 0.7, "evaluate__max_new_tokens": 4}
    often = {"finetune__checkpoint_every_steps": 1}
    preferences = {"finetune__dpo__data": data / "pairs.jsonl", "finetune__dpo__epochs": 2,
                   "finetune__dpo__batch_size": 4}  # fmt: skip
    classifier = {"difficulty__encoder": data / "encoder", "difficulty__max_tokens": 32,
                  "difficulty__source": data / "pool.jsonl", "difficulty__epochs": 1,
                  "difficulty__folds": 2}  # fmt: skip
    before = "prepare,difficulty,influence,selection"
    return {
        "compare_selection": [
            diq(before),
            ("compare_selection", [*config(), "--workdir={0}", "--methods=diq", "--seeds=1",
                                   "--budgets=0.25"]),
        ],
        "pass-rate": [
            ("pass-rate", [*config(**rates), f"--rows={data / 'tests.jsonl'}",
                                   "--out={0}/rates.jsonl", "--samples=2"]),
        ],
        "score": [
            diq("prepare,influence", **factored),
            ("score", ["--workdir={0}", f"--targets={data / 'tests.jsonl'}",
                               "--output={0}/scores.parquet"]),
        ],
        "train-classifier": [("train-classifier", [*config(**classifier), "--workdir={0}"])],
        "factored": [diq("prepare"), diq("prepare,influence", **factored)],
        "adam": [diq("prepare"), diq("prepare,influence", **adam)],
        "finetune": [diq(before), diq("finetune", **often)],
        "dpo": [diq(before), diq("finetune"), diq("dpo", **often, **preferences)],
        "generate": [diq(before), diq("finetune"), diq("evaluate", **generate)],
    }  # fmt: skip


class Campaign:
    """Tiny data, a compilation cache and an imported package, for any number of jobs."""

    def __init__(self, base: pathlib.Path):
        self._base, self._data = base, base / "data"
        self._jobs: dict[str, Job] = {}
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "cache"))
        self._data.mkdir()
        assert forked(lambda: make_data(self._data), base / "data.log") == 0
        forks.preload()

    def run(self, name: str, kills: int) -> dict[str, object]:
        """Kills a job before `kills` operations spread over all (0 = before every one).

        Returns:
            {"operations": how many there are, "kills": [number], "wrong": {number: what}}.
        """
        if name not in self._jobs:
            self._jobs[name] = Job(name, self._base, commands(self._data)[name])
        job = self._jobs[name]
        total = len(job.operations)
        numbers = range(1, total + 1)
        if kills:
            numbers = sorted({1 + round((k + 0.5) / kills * (total - 1)) for k in range(kills)})
        problems = {number: job.kill(number) for number in numbers}
        wrong = {n: f"{job.operations[n - 1]}: {said}" for n, said in problems.items() if said}
        return {"operations": total, "kills": list(numbers), "wrong": wrong}


def main(arguments: Sequence[str]) -> int:
    """Runs the jobs named, or those of the lines "JOB KILLS" of standard input; prints JSON."""
    wrong = False
    with tempfile.TemporaryDirectory() as scratch:
        campaign = Campaign(pathlib.Path(scratch))
        for name, kills in asked(arguments):
            started = time.perf_counter()
            found = campaign.run(name, kills)
            seconds = round(time.perf_counter() - started, 1)
            print(json.dumps({"job": name, "seconds": seconds, **found}), flush=True)
            wrong |= bool(found["wrong"])
    return int(wrong)


def asked(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    if not arguments:
        yield from ((name, int(kills)) for name, kills in map(str.split, sys.stdin))
        return
    kills = next((int(a.split("=")[1]) for a in arguments if a.startswith("--kills=")), 4)
    names = [a for a in arguments if not a.startswith("--")]
    for name in JOBS if names == ["all"] else names:
        yield name, 0 if "--all" in arguments else kills


if __name__ == "__main__":
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0"),
    }  # fmt: skip
    sys.exit(main(sys.argv[1:]))
