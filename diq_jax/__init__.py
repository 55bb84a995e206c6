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
    "load_examples": "diq_jax.data.sources",
    "load_model": "diq_jax.models.load",
    "open_run": "diq_jax.api",
    "open_store": "diq_jax.data.gradient_store",
    "score": "diq_jax.api",
    "Scores": "diq_jax.influence.score",
    "select": "diq_jax.selection.select",
    "Selection": "diq_jax.selection.select",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'diq_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
