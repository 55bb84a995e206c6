"""Several processes that work as one (jax.distributed): each computes its part, the first writes.

Until `join` a process is alone: it is the first, and waits for nobody.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from diq_jax.common import errors

TERMINATED = 128 + signal.SIGTERM  # the exit code that shells know
LONGEST_STOP = 5  # seconds that the words of a stopped process may take
LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000  # a stage of the first process may take days

STOPPED = "diq_jax/stopped"
_index, _joined = 0, False


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
        )
    except (ValueError, RuntimeError) as e:
        raise errors.UserError(
            "parallel.distributed=True: this process could not join others "
            f"({str(e).rstrip('.')}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID."
        ) from None
    _index, _joined = jax.process_index(), True
    threading.Thread(target=_wait_for_others, daemon=True).start()


def joined() -> bool:
    return _joined


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return _index == 0


def wait(what: str) -> None:
    """Until every process is here; what the first one wrote before is then there for all."""
    if _joined:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=what, timeout_ms=LONGEST_WAIT_MS)


def leave(code: int) -> NoReturn:
    """Exits. Not by way of jax's own farewell, which waits for others that wait for this one: they
    end when they miss it.
    """
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
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(received, 1) != bytes([signal.SIGTERM]):
            pass
        _stop(tell=_joined)

    threading.Thread(target=wait, daemon=True).start()


def _stop(tell: bool) -> NoReturn:
    threading.Timer(LONGEST_STOP, os._exit, (TERMINATED,)).start()
    print("\nStopped by SIGTERM: the same command continues from here.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if tell:
        _client().key_value_set(STOPPED, "", allow_overwrite=True)
        time.sleep(1)  # the first process answers the others' questions
    os._exit(TERMINATED)


def _wait_for_others() -> None:
    """Asks every second: a thread that blocks in the client would break the process's exit."""
    from jax import errors as jax_errors

    while True:
        time.sleep(1)
        with contextlib.suppress(jax_errors.JaxRuntimeError):  # nobody has stopped
            _client().key_value_try_get(STOPPED)
            _stop(tell=False)


def _client():
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
