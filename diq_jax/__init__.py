"""DIQ (Difficulty-Influence Quadrant, arXiv 2508.01450) in JAX.

The public functions are imported when they are first used.
"""

import importlib
import importlib.metadata
import os
from typing import Any

__version__ = "0.2.0"

# jaxlib 0.10.2 and 0.11.0 hand reductions on a CPU to a library that gives wrong sums where a
# product of broadcast arrays is reduced, without a word (github.com/jax-ml/jax/issues/39103).
# devices.make_placement checks that this was in time.
if importlib.metadata.version("jaxlib") in ("0.10.2", "0.11.0"):
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in _FLAGS:
        os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_experimental_ynn_fusion_type=".strip()

_PUBLIC = {
    "load_examples": "data.sources.load_examples",
    "load_model": "models.load.load_model",
    "open_run": "api.open_run",
    "open_store": "data.gradient_store.open_store",
    "score": "api.score",
    "Scores": "influence.score.Scores",
    "select": "selection.select.select",
    "Selection": "selection.select.Selected",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diq_jax' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].rpartition(".")
    return getattr(importlib.import_module(f"diq_jax.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
