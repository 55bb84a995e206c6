r"""How often the model itself answers each labelled question right: labels for difficulty.source.

    diq pass-rate --config=quickstart --rows=labelled.jsonl --out=rates.jsonl [--samples=8] \
        [--config.evaluate.temperature=0.7]

A row holds question, options {A: ...} and answer_idx. Each is answered --samples times, as
evaluate.protocol=generate does it, with the config's model and evaluate.{max_new_tokens,
temperature, top_p, seed, stop, batch_tokens}. Written: the rows as they came, with p_correct, the
share of right answers, in the place of any difficulty_* columns. An answer that cannot be read is
wrong, and rates.unparsable.jsonl lists it: look there first if the rates are low. A killed run
continues (rates.partial/).
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from diq_jax import config, errors, evaluate_config
from diq_jax.commands import cli

if TYPE_CHECKING:
    from diq_jax.data import example
    from diq_jax.evaluate import generation

CONFIG = cli.define_config()
ROWS = flags.DEFINE_string("rows", None, "The labelled questions, as data.tests.", required=True)
COLUMNS = flags.DEFINE_string("columns", "", "As data.columns.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.", required=True)
SAMPLES = flags.DEFINE_integer("samples", 8, "Answers to each question.", lower_bound=1)
flags.mark_flag_as_required("config")
MADE_FROM = "made_from.json"  # in the folder of finished answers


def partial_of(out: pathlib.Path) -> pathlib.Path:
    """Returns the folder where finished answers are kept."""
    return out.with_suffix(".partial")


def read_settings(cfg: config.Config, out: pathlib.Path) -> evaluate_config.Evaluate:
    """Returns the config's settings, with --samples.

    Raises:
        UserError: --out is there already; or several answers at temperature 0.
    """
    if out.exists() and not partial_of(out).exists():
        raise errors.UserError(f"--out: {out} exists; name another file, or remove it.")
    if SAMPLES.value > 1 and cfg.evaluate.temperature == 0:
        raise errors.UserError(
            f"--samples={SAMPLES.value} draws different answers: set --config.evaluate.temperature "
            "above 0."
        )
    return dataclasses.replace(cfg.evaluate, samples=SAMPLES.value)


def made_from(cfg: config.Config, settings: evaluate_config.Evaluate) -> str:
    """Hashes all that decides the answers, which a run that continues must share."""
    from diq_jax.data import sources
    from diq_jax.evaluate import generation
    from diq_jax.models import checkpoint, tokenizer

    source = checkpoint.open_checkpoint(cfg.model.path, "model.path").fingerprint
    rows = sources.fingerprint(ROWS.value, "--rows", "tests")
    tokens = tokenizer.fingerprints(cfg.model.path, "model.path")
    answered = dataclasses.asdict(settings)
    asking = [generation.INSTRUCTION, cfg.data.date]
    decisive = [source, tokens, rows, cfg.model.dtype, answered, asking]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def begin(partial: pathlib.Path, made: str) -> None:
    """Makes the folder of finished answers, or goes on with it.

    Raises:
        UserError: its answers are of another model, of other rows or settings.
    """
    from diq_jax.run import artifacts, reading

    file = partial / MADE_FROM
    if partial.exists():
        begun = file.is_file() and reading.read_record(file, {"made_from": str})
        if begun and begun["made_from"] == made:
            return
        half = [artifacts.temporary_of(path.name) == MADE_FROM for path in partial.iterdir()]
        if begun or not all(half):
            raise errors.UserError(
                f"{partial} was begun with another model, other rows or settings: remove it to "
                "start anew, or name another --out."
            )
    artifacts.write_json(file, {"made_from": made})


def rate(
    tests: "Sequence[example.Example]", answers: "generation.Answers", columns: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows with p_correct, and the answers that cannot be read."""
    from diq_jax.difficulty import labels
    from diq_jax.evaluate import generation

    rates, unparsable = [], []
    for test, found in zip(tests, generation.predictions(answers, columns), strict=True):
        right = found["votes"].get(test.answer_idx, 0) / answers.samples
        # Levels that a row came with would stand before its rate in difficulty.source.
        kept = {k: v for k, v in test.row.items() if k not in labels.COLUMNS.values()}
        rates.append(kept | {labels.P_CORRECT: right})
        unparsable += [
            {"id": test.example_id, "sample": sample} | answer
            for sample, answer in enumerate(found["answers"])
            if answer["letter"] is None
        ]
    return rates, unparsable


def main() -> None:
    """Asks the model, and writes the rates."""
    cfg, out = cli.read_config(CONFIG), cli.output(OUT, ".jsonl")
    settings = read_settings(cfg, out)

    from diq_jax.data import sources
    from diq_jax.difficulty import labels
    from diq_jax.evaluate import generation, measure
    from diq_jax.models import generate, load
    from diq_jax.run import artifacts, compiled, devices, parts, progress

    tests = sources.load_tests(ROWS.value, 0, 0, "--rows", columns=COLUMNS.value)
    compiled.keep()
    placement = devices.make_placement(cfg.parallel)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    answers = generation.make_answers(tests, model, settings, cfg.data.date, placement)
    partial = partial_of(out)
    begin(partial, made_from(cfg, settings))
    resumed = len(parts.Parts(partial / answers.name).done)
    with (
        devices.matmul_precision(cfg.model.dtype),
        progress.Progress("answers", len(answers.rows), resumed) as bar,
    ):
        found = measure.measure("base", (model.params, None), [answers], partial, bar)
    rates, unparsable = rate(tests, answers, found[answers.name])
    listed = out.with_suffix(".unparsable.jsonl")
    artifacts.write_jsonl(listed, unparsable)
    artifacts.write_jsonl(out, rates)
    artifacts.remove(partial / answers.name)  # before the file that says whose parts these are
    artifacts.remove(partial)
    share = sum(row[labels.P_CORRECT] for row in rates) / len(rates)
    cut = sum(answer["finish"] == generate.LENGTH for answer in unparsable)
    print(
        f"{len(tests):,} questions x {settings.samples} answers: {share:.1%} right, "
        f"{len(unparsable) / len(answers.rows):.1%} unparsable (listed in {listed}; {cut:,} of "
        f"{len(unparsable):,} cut at evaluate.max_new_tokens={settings.max_new_tokens}); "
        f"wrote {out}"
    )
