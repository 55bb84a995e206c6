"""How long work shows itself: a bar on a terminal, plain lines elsewhere, and a log in the workdir.

Examples/s, tokens/s and time left, in the first process. Where standard error is no terminal, a
line with the time of day takes the place of the bar every `EVERY_SECONDS`. Inside of `logged` all
lines go to run.log too, and what happens to events.jsonl: one JSON object a line.
"""

import contextlib
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import tqdm

from diq_jax import errors
from diq_jax.run import processes

EVERY_SECONDS = 30.0  # between two lines of one piece of work
LOG, EVENTS = "run.log", "events.jsonl"
_open_logs: list[tuple[IO[str], IO[str]]] = []
Tracker = Callable[[str, int, Mapping[str, float]], None]  # what is measured, its step, its numbers
_trackers: list[Tracker] = []


class Progress:
    """Counts examples and real tokens; `resumed` examples do not count in the rate.

    Args:
        total: the examples in all; None where that is not known.
    """

    def __init__(self, name: str, total: int | None, resumed: int = 0) -> None:
        self.tokens, self.examples, self._start = 0, 0, time.perf_counter()
        self._name, self._total, self._resumed, self._said = name, total, resumed, self._start
        self._bar = tqdm.tqdm(
            total=total,
            initial=resumed,
            desc=name,
            unit="ex",
            disable=not processes.is_first() or not sys.stderr.isatty(),
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, examples: int, tokens: int, **shown: str) -> None:
        """Counts finished examples; `shown` is said beside the rate."""
        self.examples += examples
        self.tokens += tokens
        rate = self.tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix({"tok/s": f"{rate:,.0f}", **shown}, refresh=False)
        self._bar.update(examples)
        if time.perf_counter() - self._said >= EVERY_SECONDS:
            self._said = time.perf_counter()
            self._line(shown)

    def _line(self, shown: dict[str, str]) -> None:
        """Writes where the work stands as one line and one event."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        done, rate = self._resumed + self.examples, self.examples / seconds
        text = f"{self._name}: {done:,}"
        left = None
        if self._total:
            left = (self._total - done) / rate if rate else None
            text += f" of {self._total:,} ({done / self._total:.0%})"
        text += f", {rate:,.1f} ex/s, {self.tokens / seconds:,.0f} tok/s"
        text += "" if left is None else f", left {datetime.timedelta(seconds=round(left))}"
        text += "".join(f", {name} {value}" for name, value in shown.items())
        say(text, on_terminal=False)
        speed = {"examples_per_second": rate, "tokens_per_second": self.tokens / seconds}
        measured(self._name, done, [speed])
        event(
            "progress", name=self._name, done=done, total=self._total,
            examples_per_second=round(rate, 3), tokens_per_second=round(self.tokens / seconds, 1),
            seconds_left=None if left is None else round(left), **shown,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.examples and time.perf_counter() - self._start >= EVERY_SECONDS:
            self._line({})


def byte_bar(title: str, total: int) -> tqdm.tqdm:
    """Makes a bar over bytes, on the first process's terminal after a few seconds."""
    return tqdm.tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        delay=3,
        leave=False,
        disable=not processes.is_first() or not sys.stderr.isatty(),
        dynamic_ncols=True,
    )


def say(line: str, on_terminal: bool = True) -> None:
    """Writes a line with its time to standard error and run.log; in the first process.

    Args:
        on_terminal: whether a terminal shows it too, which has bars.
    """
    if not processes.is_first():
        return
    stamped = f"{_now()} {line}"
    if on_terminal and sys.stderr.isatty():
        tqdm.tqdm.write(line, file=sys.stderr)
    elif not sys.stderr.isatty():
        print(stamped, file=sys.stderr, flush=True)
    note(line)


def note(line: str) -> None:
    """Writes a line to run.log alone."""
    for log, _ in _open_logs:
        print(f"{_now()} {line}", file=log, flush=True)


def event(kind: str, **values: Any) -> None:
    """Adds a line to events.jsonl."""
    for _, events in _open_logs:
        print(json.dumps({"time": _now(), "event": kind, **values}), file=events, flush=True)


def measured(name: str, first: int, records: Sequence[Mapping[str, float]]) -> None:
    """Hands the numbers of consecutive steps, from `first` on, to all trackers."""
    for tracker in _trackers:
        for step, record in enumerate(records, start=first):
            tracker(name, step, record)


@contextlib.contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Has `tracker` told what is measured."""
    _trackers.append(tracker)
    try:
        yield
    finally:
        _trackers.remove(tracker)


@contextlib.contextmanager
def logged(workdir: pathlib.Path) -> Iterator[None]:
    """Appends what is said to run.log and events.jsonl in `workdir`, in the first process.

    Raises:
        UserError: one of the two is a symbolic link, which might lead to a file of somebody else.
    """
    if not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_appending(workdir / name)) for name in (LOG, EVENTS)]
        _open_logs.append((files[0], files[1]))
        stack.callback(_open_logs.pop)
        yield


def _appending(path: pathlib.Path) -> IO[str]:
    if path.is_symlink():
        raise errors.UserError(f"{path} is a symbolic link, where a run logs: remove it.")
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    return open(opened, "a", encoding="utf-8")


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
