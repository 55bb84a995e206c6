"""How fast a large pool is prepared, selected from and reported on, and in how much memory.

    python experiments/benchmark_large_pool.py --workdir=runs/large [--rows=1000000]

Writes so many chats (words of the shipped sample in random order, difficulty in columns) and runs
the stages of configs/quickstart.py on them, each in a process of its own. Random numbers stand in
the place of influence, so that no model is run; selection.hygiene, which compares texts in memory,
is off. Printed is what each stage.json says. A stage that is done is not done again.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags

from diq_jax.commands import cli
from diq_jax.data import sources
from diq_jax.run import artifacts, reading, records

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is made.")
ROWS = flags.DEFINE_integer("rows", 1_000_000, "Of the pool.", lower_bound=100)
WORDS = flags.DEFINE_integer("words", 20, "Of an answer.", lower_bound=1)
ASKED_WORDS, BLOCK_ROWS = 12, 1000  # of a question, and of what is drawn at once
STAGES = ("prepare", "difficulty", "selection", "report")
INFLUENCE = "influence/influence.parquet"


def write_pool(path: pathlib.Path) -> None:
    """Writes the chats, a line each."""
    rng = np.random.default_rng(0)
    sample = sources.load_examples("sample")
    words = np.array(sorted({w for e in sample for w in f"{e.question} {e.reasoning}".split()}))

    perspectives = ("knowledge", "reasoning", "overall")

    def rows():
        for start in range(0, ROWS.value, BLOCK_ROWS):
            n = min(BLOCK_ROWS, ROWS.value - start)
            said = words[rng.integers(len(words), size=(n, ASKED_WORDS + WORDS.value))].tolist()
            levels = rng.integers(1, 6, (n, len(perspectives))).tolist()
            for i in range(n):
                yield {
                    "id": f"row-{start + i:07}",
                    "messages": [
                        {"role": "user", "content": " ".join(said[i][:ASKED_WORDS])},
                        {"role": "assistant", "content": " ".join(said[i][ASKED_WORDS:])},
                    ],
                    **{f"difficulty_{p}": k for p, k in zip(perspectives, levels[i], strict=True)},
                }

    artifacts.write_jsonl(path, rows())


def write_influence(workdir: pathlib.Path) -> None:
    """Writes scores that have no meaning, for the rows of the prepared pool."""
    ids = records.read_table(workdir, "prepare/pool.parquet", ("example_id",))["example_id"]
    rng, n = np.random.default_rng(1), len(ids)
    columns = {
        "influence": rng.standard_t(4, n).astype(np.float32),
        "loss": rng.gamma(9, 0.3, n).astype(np.float32),
        "tokens": rng.integers(60, 900, n).astype(np.int32),
    }
    artifacts.write_table(workdir / INFLUENCE, {"example_id": ids} | columns)


def main() -> None:
    """Runs the stages and prints a line for each."""
    cli.require(WORKDIR)
    workdir = cli.folder(WORKDIR)
    pool = workdir / "pool.jsonl"
    if not pool.exists():
        write_pool(pool)
    print(f"pool of {ROWS.value:,} rows: {pool.stat().st_size / 2**20:,.0f} MiB", flush=True)
    run = [sys.executable, "-m", "diq_jax", "run", "--config=quickstart", f"--workdir={workdir}"]
    settings = {
        "data.pool": pool, "data.targets": "sample", "data.tests": "sample",
        "difficulty.source": "columns", "selection.hygiene": "off",
        "selection.retention_ratio": 0.01,
    }  # fmt: skip
    run += [f"--config.{name}={value}" for name, value in settings.items()]
    for stage in STAGES:
        if stage == "selection" and not (workdir / INFLUENCE).exists():
            write_influence(workdir)
        subprocess.run([*run, f"--stages={stage}"], check=True)
        record = reading.read_record(workdir / stage / records.NAME, {})
        told = {name: record[name] for name in ("rows", "seconds", "peak_memory_mib")}
        print(json.dumps({"stage": stage} | told), flush=True)


if __name__ == "__main__":
    cli.run(main)
