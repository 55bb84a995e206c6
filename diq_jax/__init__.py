"""DIQ (Difficulty-Influence Quadrant, arXiv 2508.01450) in JAX."""

import importlib.metadata
import os

__version__ = "0.2.0"

# jaxlib 0.10.2 and 0.11.0 hand reductions on a CPU to a library that gives wrong sums where a
# product of broadcast arrays is reduced, without a word (github.com/jax-ml/jax/issues/39103).
# devices.make_placement checks that this was in time.
if importlib.metadata.version("jaxlib") in ("0.10.2", "0.11.0"):
    _FLAGS = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in _FLAGS:
        os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_cpu_experimental_ynn_fusion_type=".strip()
