"""A workdir at a URL: the work is done in a copy here, which is kept equal to what is there.

The URL is the truth. At first the copy is made equal to it. Then each file goes there as soon as it
is whole here, and is deleted there once it is deleted here, in this order (artifacts.watched): what
is there is at any time what some moment of the run has left, from which any machine continues. An
object store needs neither rename nor append for that, but an object must appear as a whole.

Of several processes the first one sends. Each of the others has a copy of its own, which it makes
equal to the URL wherever it waits for the first one (processes.wait).
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import fsspec

from diq_jax import errors
from diq_jax.run import artifacts, compiled, processes, progress, reading, records, remote

FIELD, LOCK, INDEX = "--workdir", ".writer", "index.json"
FETCHED = ".fetched"  # what a file is called until all of it is here
LOGS = (progress.LOG, progress.EVENTS, "tensorboard")  # what grows while a run goes on
BEAT, SETTLED = 20.0, 1.0  # seconds between two signs of life, and until one is seen by others
DEAD = 120.0  # seconds without a sign of life after which another run takes over
TRANSFERS = 8  # at the same time
# What changes with an object, by the first of these names that a file system has for it.
VERSIONS = ("etag", "ETag", "md5Hash", "generation", "mtime", "created", "LastModified")


@contextlib.contextmanager
def opened(url: str, writes: bool = True, field: str = FIELD) -> Iterator[pathlib.Path]:
    """Yields the copy of a workdir, in the user's cache, as the URL is now.

    Args:
        writes: whether what changes inside goes to the URL, which nobody else may write then. Every
            process that has joined must call it so.
        field: the flag that names the URL, for messages.

    Raises:
        UserError: the URL cannot be reached, holds no run, or another run is at work there.
    """
    url = url.strip().rstrip("/")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    if not processes.is_first():
        name = f"{name}-{processes.index()}"  # they may share a disk
    home = compiled.cache() / "workdirs" / name
    with remote.reached(url, field):
        system, place = fsspec.core.url_to_fs(url)
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "ab") as lock:
        alone = _holds(lock, fcntl.LOCK_EX)
        if not alone and (writes or not _holds(lock, fcntl.LOCK_SH)):
            raise errors.UserError(
                f"Another run is at work in {url}, or a command on this machine reads it."
            )
        mirror = _Mirror(url, field, system, place.rstrip("/"), home)
        mirror.check()
        with contextlib.ExitStack() as stack:
            if writes and processes.is_first():
                stack.enter_context(mirror.holding())
                mirror.fetch()
                stack.enter_context(artifacts.watched(mirror.send))
                stack.enter_context(processes.following(lambda: None))
            elif writes:
                stack.enter_context(processes.following(mirror.follow))
            elif alone:
                mirror.fetch()
                fcntl.flock(lock, fcntl.LOCK_SH)  # others may read what nobody changes now
            elif not mirror.is_equal():
                raise errors.UserError(
                    f"{field}: {url} has changed since another command on this machine began to "
                    "read it: end that one first."
                )
            if writes:
                processes.wait("the workdir is open")
            yield mirror.folder


def _holds(lock: IO[bytes], how: int) -> bool:
    """Tells whether no other process of this machine is in the way."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Mirror:
    """Makes a folder equal to a URL, and the URL to the folder.

    Attributes:
        folder: the copy.
    """

    def __init__(self, url: str, field: str, system: Any, place: str, home: pathlib.Path) -> None:
        self._url, self._field, self._system, self._place = url, field, system, place
        self._index = home / INDEX
        self.folder = home / (place.rpartition("/")[2] or "run")
        artifacts.make_folder(self.folder)
        kept = reading.read_json(self._index) if self._index.exists() else {}
        # {file: its version at the URL, and its size and time here, when both were the same}
        self._known: dict[str, list] = kept.get("files", {})
        self._mine: list[str] = kept.get("runs", [])[-4:]  # runs that held the URL from here
        self._lost = False

    def _reached(self) -> contextlib.AbstractContextManager[None]:
        return remote.reached(self._url, self._field, "read or written")

    def _at(self, name: str) -> str:
        return f"{self._place}/{name}"

    def _there(self) -> dict[str, dict[str, Any]]:
        """Lists what is at the URL: {file: what the file system says of it}."""
        with self._reached():
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._place, detail=True)
            except FileNotFoundError:
                found = {}
        begin = len(self._place) + 1
        names = {path[begin:]: info for path, info in found.items() if not path.endswith("/")}
        for name in names:
            if not name or {"..", ""} & set(name.split("/")):
                raise errors.UserError(
                    f"{self._field}: {self._url} holds {name!r}, no name of a file."
                )
        return names

    def check(self) -> None:
        """Raises UserError where the URL holds something else than a run."""
        names = self._there()
        ours = {LOCK, *LOGS}
        if names and not any(n in ours or n.endswith(f"/{records.NAME}") for n in names):
            raise errors.UserError(
                f"{self._field}: {self._url} holds {len(names):,} files, such as {min(names)!r}, "
                "but no run; name a place of its own."
            )

    def fetch(self) -> None:
        """Makes the copy equal to the URL."""
        there, new = self._new()
        size = sum(there[name]["size"] for name in new)
        progress.say(
            f"{self._url} is worked on in {self.folder}: {len(there):,} files, {len(new):,} of "
            f"them ({size / 2**20:,.1f} MiB) are fetched"
        )
        self._each(lambda name: self._get(name, there[name]), new)
        self._keep()

    def is_equal(self) -> bool:
        """Tells whether the copy is as the URL is now; changes nothing."""
        there = {name: info for name, info in self._there().items() if name != LOCK}
        same = all(self._known.get(n) == self._both(n, info) for n, info in there.items())
        return same and there.keys() == self._here(self.folder)

    def follow(self) -> None:
        """Makes the copy equal to the URL, where the first process may be writing.

        What changes meanwhile is had as it was before, or after, or as the next call finds it.
        """
        there, new = self._new()

        def get(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                self._get(name, there[name], settled=False)

        self._each(get, [name for name in new if name.split("/")[0] not in LOGS])

    def _new(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Removes what the URL lacks; returns what is there, and the names that are to be had."""
        there = {name: info for name, info in self._there().items() if name != LOCK}
        for name in self._here(self.folder) - there.keys():
            (self.folder / name).unlink()
        self._known = {name: kept for name, kept in self._known.items() if name in there}
        return there, [n for n, info in there.items() if self._known.get(n) != self._both(n, info)]

    def _both(self, name: str, info: dict[str, Any]) -> list:
        """Returns what `_known` has of a file that is the same here and there."""
        return [_version(info), *self._state(name)]

    def _get(self, name: str, info: dict[str, Any], settled: bool = True) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}{FETCHED}")
        self._system.get_file(self._at(name), str(temporary))
        artifacts.sync(temporary)
        os.replace(temporary, path)
        if settled or path.stat().st_size == info["size"]:
            self._note(name, info)

    def send(self, path: pathlib.Path) -> None:
        """Makes the URL equal to the copy, where `path`, a file or a folder, has changed."""
        path = path.absolute()
        if self.folder not in (path, *path.parents):
            return
        if self._lost:
            raise errors.UserError(f"Another run has taken over {self._url}: this one ends.")
        here, name = self._here(path), path.relative_to(self.folder).as_posix()
        self._each(self._put, [n for n in here if self._known.get(n, [""])[1:] != self._state(n)])
        if not path.is_file():
            gone = self._known.keys() - here
            self._each(self._delete, [n for n in gone if f"{n}/".startswith(f"{name}/")])

    def _put(self, name: str) -> None:
        self._system.put_file(str(self.folder / name), self._at(name))
        self._note(name, self._system.info(self._at(name)))

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._at(name))
        del self._known[name]

    def _note(self, name, info) -> None:
        """Notes that a file is the same here and there."""
        size, changed = self._state(name)
        if info["size"] != size:
            raise errors.UserError(
                f"{self._field}: {self._url}/{name} has {info['size']:,} bytes there, {size:,} "
                "here: the transfer failed, or another run is at work."
            )
        self._known[name] = [_version(info), size, changed]

    def _each(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        names = sorted(names)
        with self._reached(), concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
            for _ in pool.map(work, names) if len(names) > 1 else map(work, names):
                pass

    def _state(self, name: str) -> list[int]:
        """Returns the size and the time of a file here."""
        path = self.folder / name
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []

    def _here(self, path: pathlib.Path) -> set[str]:
        """Lists the files at or below a path, relative to the copy."""
        found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        names = {p.relative_to(self.folder).as_posix() for p in found if not p.is_symlink()}
        return {n for n in names if not artifacts.temporary_of(n.rpartition("/")[2])}

    def _keep(self) -> None:
        """Writes the index, from which another run here knows what it need not fetch."""
        artifacts.write_json(self._index, {"runs": self._mine, "files": dict(self._known)})

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Holds the URL against other runs: an object says at every BEAT that this run lives.

        That is as much as a store without locks allows.
        """
        self._acquire()
        ended = threading.Event()
        alive = threading.Thread(target=self._live, args=(ended,), daemon=True)
        alive.start()
        try:
            yield
        finally:
            ended.set()
            alive.join()
            if not self._is_taken():
                with self._reached():
                    self._flush()
                    self._system.rm_file(self._at(LOCK))

    def _acquire(self) -> None:
        said = self._lock()
        if said and said["run"] not in self._mine:  # one of mine was killed: its flock is gone
            who = f"process {said['process']} of {said['host']}"
            progress.say(f"{self._url} is held by {who}: waiting {DEAD:g} s for a sign of life")
            end = time.monotonic() + DEAD
            while time.monotonic() < end and (now := self._lock()):
                if now != said:
                    raise errors.UserError(f"Another run is at work in {self._url} ({who}).")
                time.sleep(SETTLED)
            progress.say(f"{self._url} is taken over: there was no sign of life")
        self._mine.append(uuid.uuid4().hex)
        self._keep()
        self._beat(0)
        time.sleep(SETTLED)
        if self._is_taken():
            raise errors.UserError(f"Another run is at work in {self._url}: it began as this one.")

    def _lock(self) -> dict[str, Any] | None:
        with self._reached():
            try:
                said = json.loads(self._system.cat_file(self._at(LOCK)))
            except FileNotFoundError:
                return None
        if not isinstance(said, dict) or not {"run", "host", "process"} <= said.keys():
            raise errors.UserError(f"{self._field}: {self._url}/{LOCK} is damaged: remove it.")
        return said

    def _is_taken(self) -> bool:
        said = self._lock()
        return bool(said) and said["run"] != self._mine[-1]

    def _beat(self, number: int) -> None:
        said = {"run": self._mine[-1], "host": socket.gethostname(), "process": os.getpid()}
        with self._reached():
            self._system.pipe_file(self._at(LOCK), json.dumps(said | {"beat": number}).encode())

    def _live(self, ended: threading.Event) -> None:
        number = 0
        while not ended.wait(BEAT):
            # Where the URL is out of reach the work fails by itself, when it has something to send.
            with contextlib.suppress(errors.UserError):
                if self._is_taken():
                    self._lost = True
                    return
                number += 1
                self._beat(number)
                with self._reached():
                    self._flush()

    def _flush(self) -> None:
        """Sends the logs as they are now."""
        for log in LOGS:
            for name in self._here(self.folder / log):
                self._system.put_file(str(self.folder / name), self._at(name))
        self._keep()


def _version(info: dict[str, Any]) -> str:
    return str(next((info[name] for name in VERSIONS if info.get(name)), ""))
