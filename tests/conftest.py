"""Tests run at the highest matmul precision, and an accidental rank promotion is an error."""

import atexit
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
import threading

# Programs of tiny models take longer to compile than to run; set before jax starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
# What one test has compiled, in whatever process, the others take up.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diq-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_DATA = pathlib.Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The real data beside the checkout; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture
def sigterm(monkeypatch):
    """A context in which SIGTERM has come: a training keeps its next step, and all ends."""
    from diq_jax.run import processes

    asked = threading.Event()
    asked.set()

    @contextlib.contextmanager
    def sent():
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(processes, "_asked", asked)
            patch.setattr(processes, "stop", sys.exit)
            yield

    return sent
