"""Runs Python programs in forks of a process that has imported the package.

A fresh interpreter takes seconds to import what every command imports; a fork takes none. The
process (`python tests/forks.py SOCKET`) has not started JAX: devices, flags and the cache of
compiled programs are those of each fork's environment. That commands start in an interpreter of
their own, too, is tested where that is the point (tests/commands/test_cli.py, test_api.py).
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]
JAX_SETTINGS = {  # that JAX reads when it is imported
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_ENABLE_COMPILATION_CACHE": lambda text: text.lower() not in ("0", "false", "off"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
}


class Running:
    """A program in a fork, with what tests use of subprocess.Popen.

    Args:
        arguments: as python takes them: a file, "-m" and a module, or "-c" and code; then its own.
        env: the whole environment; None = this process's.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        env: Mapping[str, str] | None = None,
        cwd: os.PathLike | str | None = None,
    ):
        self.args, self.returncode = [str(a) for a in arguments], None
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = {
            "arguments": self.args, "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
        }  # fmt: skip
        socket.send_fds(self._connection, [b"+"], [out.fileno() for out in self._outputs])
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._said = self._connection.makefile()
        self.pid = int(self._said.readline())

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._said.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code once there is one. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.poll()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end, and returns what it printed and what it said on standard error."""
        self.wait(timeout)
        out, err = (os.pread(file.fileno(), 2**28, 0).decode() for file in self._outputs)
        return out, err

    def __del__(self):
        for file in (*self._outputs, self._said, self._connection):
            file.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(
    arguments: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: os.PathLike | str | None = None,
) -> subprocess.CompletedProcess:
    """Runs a program to its end; arguments as for Running."""
    running = Running(arguments, env, cwd)
    out, err = running.communicate()
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


@functools.cache
def _server() -> str:
    """Starts the process that forks, once in a test process; returns its socket."""
    path = os.path.join(tempfile.mkdtemp(prefix="forks-"), "socket")
    process = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(PATHS)},
    )  # fmt: skip

    def end():
        process.stdin.close()
        process.stdout.close()
        process.wait()
        os.unlink(path)
        os.rmdir(os.path.dirname(path))

    atexit.register(end)
    assert process.stdout.readline() == b"ready\n"
    return path


def preload() -> None:
    """Imports what all commands need, and starts nothing."""
    import orbax.checkpoint  # noqa: F401
    import transformers.models.auto  # noqa: F401

    from comparison import experiment  # noqa: F401
    from diq_jax import pipeline  # noqa: F401


def fork() -> int:
    """os.fork, without the warning that JAX, which has not been started, may have threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return os.fork()


def program(arguments: Sequence[str]) -> Callable[[], object]:
    """Returns what runs a program as python would, in this process."""
    first, *rest = arguments
    sys.argv = [first, *rest] if not first.startswith("-") else ["", *rest[1:]]
    if first == "-m":
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        return lambda: exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
    return lambda: runpy.run_path(first, run_name="__main__")


def _serve(path: str) -> Callable[[], object]:
    """Forks for every connection, until standard input ends; returns only in the forks."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
        while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
            assert ready == [listener]
            connection, _ = listener.accept()
            if fork() == 0:
                break
            connection.close()
        else:
            sys.exit()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile().readline())
    child = fork()
    if child:
        connection.sendall(f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    return _prepare(request, outputs)


def _prepare(request: dict, outputs: Sequence[int]) -> Callable[[], object]:
    """Makes this process look like a new one."""
    for fd, file in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(file, fd)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    time.tzset()
    import jax

    import diq_jax

    importlib.reload(diq_jax)  # it completes XLA_FLAGS
    for name, parse in JAX_SETTINGS.items():
        if name in os.environ:
            jax.config.update(name.lower(), parse(os.environ[name]))
        elif parse is str:
            jax.config.update(name.lower(), None)
    return program(request["arguments"])


if __name__ == "__main__":
    preload()
    _serve(sys.argv[1])()
