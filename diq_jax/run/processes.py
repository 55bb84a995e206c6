"""Several processes that work as one (jax.distributed): each computes its part, the first writes.

Until `join` a process is alone: it is the first, and waits for nobody.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from diq_jax import errors

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells know
LONGEST_STOP = 5  # seconds that the words of a stopped process may take
ANSWERING = 2  # seconds in which all others have asked the first process
LONGEST_SAVE = 20  # seconds that a training has to save; clouds give 30 from SIGTERM to the end
LOST = 40  # seconds without a sign of life after which a process counts as dead, and all end
LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000  # a stage of the first process may take days

STOPPED = "diq_jax/stopped"
_index, _joined, _alone = 0, False, False
_follow: Callable[[], None] | None = None
_questions = itertools.count()
_trainings = itertools.count()
_stopping, _asked, _saved = threading.Lock(), threading.Event(), threading.Event()
_saved.set()  # while nothing is there to save


def join() -> None:
    """Joins the processes of this run, before jax has looked for devices.

    TPU pods, Slurm and Open MPI say themselves who takes part; elsewhere the environment does:
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: nothing says who takes part, or the others cannot be reached.
    """
    global _index, _joined
    import jax

    # It would take SIGTERM for itself, and tell only those who ask it at every step.
    jax.config.update("jax_enable_preemption_service", False)
    number, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(number) if number else None,
            process_id=int(index) if index else None,
            heartbeat_timeout_seconds=LOST,
        )
    except (ValueError, RuntimeError) as e:
        raise errors.UserError(
            "parallel.distributed=True: this process could not join others "
            f"({str(e).rstrip('.')}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID."
        ) from None
    _index, _joined = jax.process_index(), True
    threading.Thread(target=_listen, daemon=True).start()


def joined() -> bool:
    """Tells whether `join` has connected this process to others."""
    return _joined


def index() -> int:
    """Returns the number of this process, from 0."""
    return _index


def is_first() -> bool:
    """Tells whether this process writes files and prints."""
    return _index == 0


def wait(what: str) -> None:
    """Waits until every process is here; what the first one wrote before is then there for all."""
    if _joined and not _alone:
        _meet(what)
        if _follow:
            _follow()


def _meet(what) -> None:
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=what, timeout_ms=LONGEST_WAIT_MS)


def agreed(find: Callable[[], Any]) -> Any:
    """Waits, and returns to every process what `find` gives in the first one: a JSON value."""
    if not _joined or _alone:
        return find()
    from orbax.checkpoint import multihost

    client, key = multihost.get_jax_distributed_client(), f"diq_jax/agreed/{next(_questions)}"
    if is_first():
        client.key_value_set(key, json.dumps(find()))
    found = json.loads(client.blocking_key_value_get(key, LONGEST_WAIT_MS))
    if _follow:
        _follow()
    return found


@contextlib.contextmanager
def following(follow: Callable[[], None]) -> Iterator[None]:
    """Marks that no process sees the files of another, unless `follow` has fetched them."""
    global _follow
    _follow = follow
    try:
        yield
    finally:
        _follow = None


def see_each_other() -> bool:
    """Tells whether a file of one process is there for all."""
    return not (_joined and _follow)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Marks work in which this process takes no other into account."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def leave(code: int) -> NoReturn:
    """Exits past jax's own farewell, which waits for processes that wait for this one."""
    wait_if_stopping()
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def stop_on_sigterm() -> None:
    """Lets SIGTERM end this process, and those that joined it, whatever it is at: exit code 143.

    A thread does it, since Python's own handlers wait until the main thread is back in Python, and
    that may be compiling, or waiting for another process. What is on the disk is as after a kill:
    whole, and the same command continues.
    """
    received, write = os.pipe()
    os.set_blocking(write, False)

    def wait() -> None:
        while os.read(received, 1) != bytes([signal.SIGTERM]):
            pass
        _stop()

    threading.Thread(target=wait, daemon=True).start()
    # An event loop of asyncio takes the pipe for itself; it is always back in Python soon.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_stop, daemon=True).start())
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)


@contextlib.contextmanager
def saving() -> Iterator[Callable[[int], bool]]:
    """Lets SIGTERM wait until what is trained inside is on the disk, LONGEST_SAVE seconds at most.

    Yields:
        A function (number of the step that is under way) -> whether to save after it and call
        `stop`; of all processes, which must ask at every step, it stops each after the same one.
    """
    key, last = f"diq_jax/last_step/{next(_trainings)}", None

    def stops(number: int) -> bool:
        nonlocal last
        if last is None and _joined:
            if is_first() and _asked.is_set():
                # No process is more than one step ahead, or will miss it.
                last = number + 2
                _others(lambda client: client.key_value_set(key, str(last)))
            elif not is_first():
                found = _others(lambda client: client.key_value_try_get(key))
                last = int(found) if found else None
        elif last is None and _asked.is_set():
            last = number
        return last is not None and number >= last

    _saved.clear()
    try:
        yield stops
    finally:
        _saved.set()


def stop() -> NoReturn:
    """Ends this process, which SIGTERM has asked to, once all are here."""
    if _joined:
        _meet("stopped")
    _saved.set()
    while True:
        time.sleep(1)


def wait_if_stopping() -> None:
    """Returns unless SIGTERM has come, to any process: then this one ends, without news."""
    if _joined and _is_told():
        _stop(told=True)
    if _stopping.locked():
        time.sleep(2 * LONGEST_STOP)


def _stop(told: bool = False) -> None:
    if not _stopping.acquire(blocking=False):
        return  # another thread is at it
    _asked.set()
    if _joined and not told:
        _others(lambda client: client.key_value_set(STOPPED, "by SIGTERM", allow_overwrite=True))
    _saved.wait(LONGEST_SAVE)
    threading.Timer(LONGEST_STOP, _end).start()
    sys.stdout.flush()
    if _joined:
        if is_first():
            time.sleep(ANSWERING)
    _end()


def _end() -> NoReturn:
    os.write(2, b"\nStopped by SIGTERM: the same command continues from here.\n")
    os._exit(TERMINATED)


def _listen() -> None:
    """Stops this process when another was stopped; it asks every second, as a wait blocks exits."""
    while not _is_told():
        time.sleep(1)
    _stop(told=True)


def _is_told() -> bool:
    return bool(_others(lambda client: client.key_value_try_get(STOPPED)))


def _others(ask: Callable[[Any], Any]) -> Any:
    """Asks the service by which processes know of each other; None without an answer."""
    from orbax.checkpoint import multihost

    try:
        return ask(multihost.get_jax_distributed_client())
    except (RuntimeError, ValueError):
        return None
