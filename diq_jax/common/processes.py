"""Several processes that work as one (jax.distributed): each computes its part, the first writes.

Until `join` a process is alone: it is the first, and waits for nobody.
"""

import os
import sys
import traceback
from typing import NoReturn

from diq_jax.common import errors

LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000  # a stage of the first process may take days

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
    sys.excepthook = _show_and_leave


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


def _show_and_leave(kind, error, trace) -> None:
    traceback.print_exception(error)
    leave(1)
