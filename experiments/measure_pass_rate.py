"""How often the model itself answers each labelled question right: labels for difficulty.source.

    python experiments/measure_pass_rate.py --config=configs/quickstart.py --rows=labelled.jsonl \\
        --out=rates.jsonl [--samples=8] [--config.evaluate.temperature=0.7]

A row holds question, options {A: ...} and answer_idx. Each is answered --samples times, as
evaluate.protocol=generate does it, with the config's model and evaluate.{max_new_tokens,
temperature, top_p, seed, stop, batch_tokens}. Written: the rows as they came, with p_correct, the
share of right answers, in the place of any difficulty_* columns. An answer that cannot be read is
wrong, and rates.unparsable.jsonl lists it: look there first if the rates are low. A killed run
continues (rates.partial.jsonl).
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
from absl import flags
from ml_collections import config_flags

from diq_jax import config, errors
from diq_jax.commands import cli
from diq_jax.data import sources
from diq_jax.difficulty import labels
from diq_jax.evaluate import generation
from diq_jax.models import checkpoint, generate, load, tokenizer
from diq_jax.run import artifacts, devices, progress

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
ROWS = flags.DEFINE_string("rows", None, "The labelled questions, as data.tests.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.")
SAMPLES = flags.DEFINE_integer("samples", 8, "Answers to each question.", lower_bound=1)
NAME = "base"  # of the one model, in messages


def partial_of(out: pathlib.Path) -> pathlib.Path:
    return out.with_suffix(".partial.jsonl")


def read_settings(cfg: config.Config) -> config.Evaluate:
    """The config's, with --samples.

    Raises:
        UserError: --out is no .jsonl, or is there already; or several answers at temperature 0.
    """
    if not OUT.value.endswith(".jsonl"):
        raise errors.UserError(f"--out must end in .jsonl; got {OUT.value!r}.")
    out = pathlib.Path(OUT.value)
    if out.exists() and not partial_of(out).exists():
        raise errors.UserError(f"--out: {out} exists; name another file, or remove it.")
    if SAMPLES.value > 1 and cfg.evaluate.temperature == 0:
        raise errors.UserError(
            f"--samples={SAMPLES.value} draws different answers: set --config.evaluate.temperature "
            "above 0."
        )
    return dataclasses.replace(cfg.evaluate, samples=SAMPLES.value)


def made_from(cfg: config.Config, settings: config.Evaluate) -> str:
    """A hash of all that decides the answers: what a run that continues must share."""
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path").fingerprint
    rows = sources.fingerprint(ROWS.value, "--rows", "tests")
    tokens = tokenizer.fingerprints(cfg.model.path, "model.path")
    settings = dataclasses.asdict(settings)
    asking = [generation.INSTRUCTION, cfg.data.date]
    decisive = [source, tokens, rows, cfg.model.dtype, settings, asking]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def write_answers(part, model, made: str, partial: pathlib.Path) -> dict:
    """{index: (text, tokens, finish)} of all answers; those in the journal are not written again.

    Raises:
        UserError: the journal is of another model, of other rows or settings.
    """
    with artifacts.Journal(partial) as journal:
        if not journal.entries:
            journal.append({"made_from": made})
        if journal.entries[0] != {"made_from": made}:
            raise errors.UserError(
                f"{partial} was begun with another model, other rows or settings: remove it to "
                "start anew, or name another --out."
            )
        done = {entry["row"]: entry["values"] for entry in journal.entries[1:]}
        with progress.Progress("answers", len(part.rows), len(done)) as bar:
            weights = model.params, None
            for (i,), columns in part.run(NAME, weights, done):
                done[i] = [columns[name][0] for name in ("text", "tokens", "finish")]
                journal.append({"row": i, "values": done[i]})
                bar.update(1, part.tokens([i], columns))
    return done


def main() -> None:
    cfg = cli.read_config(CONFIG)
    settings = read_settings(cfg)
    tests = sources.load_tests(ROWS.value, 0, 0, "--rows")
    placement = devices.make_placement(cfg.parallel)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    part = generation.make_answers(tests, model, settings, cfg.data.date, placement)
    out = pathlib.Path(OUT.value)
    partial = partial_of(out)
    with devices.matmul_precision(cfg.model.dtype):
        done = write_answers(part, model, made_from(cfg, settings), partial)

    rates, unparsable = [], []
    for q, test in enumerate(tests):
        rows = range(q * settings.samples, (q + 1) * settings.samples)
        found = generation.prediction(part, q, [done[i] for i in rows])
        right = found["votes"].get(test.answer_idx, 0) / settings.samples
        # Levels that a row came with would stand before its rate in difficulty.source.
        kept = {k: v for k, v in test.row.items() if k not in labels.COLUMNS.values()}
        rates.append(kept | {labels.P_CORRECT: right})
        unparsable += [
            {"id": test.example_id, "sample": sample} | answer
            for sample, answer in enumerate(found["answers"])
            if answer["letter"] is None
        ]
    listed = out.with_suffix(".unparsable.jsonl")
    artifacts.write_jsonl(listed, unparsable)
    artifacts.write_jsonl(out, rates)
    partial.unlink()
    share = np.mean([row[labels.P_CORRECT] for row in rates])
    cut = sum(answer["finish"] == generate.LENGTH for answer in unparsable)
    print(
        f"{len(tests):,} questions x {settings.samples} answers: {share:.1%} right, "
        f"{len(unparsable) / len(part.rows):.1%} unparsable (listed in {listed}; {cut:,} of "
        f"{len(unparsable):,} cut at evaluate.max_new_tokens={settings.max_new_tokens}); "
        f"wrote {out}"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "rows", "out"])
    cli.run(main)
