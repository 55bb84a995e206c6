r"""Labels the difficulty of a pool by a language model behind any OpenAI-compatible endpoint.

    diq annotate --rows=pool.jsonl --sample=500 --out=labels.jsonl \
        --base_url=http://localhost:8000/v1 --model=NAME [--price_in=0.5 --price_out=2] [--dry_run]

Prints an estimate, asks whether to start (--yes: do not ask), and writes the rows as they came with
difficulty_knowledge, difficulty_reasoning and difficulty_overall, in the place of any that they
had: a file for difficulty.source, and a pool for difficulty.source=columns.
Levels and, with --repeat, the agreement of the draws are in labels.summary.json, which the report
of a run with difficulty.source=labels.jsonl shows. Rows without an answer are listed in
labels.failed.jsonl. Replies are kept in labels.cache.jsonl: a
killed run continues, and pays for nothing twice. The API key comes from the environment
(--api_key_env).
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from diq_jax import errors, stats
from diq_jax.clients import annotate, answers
from diq_jax.commands import asking
from diq_jax.data import example as example_lib
from diq_jax.report import opinions
from diq_jax.run import artifacts

ROWS = flags.DEFINE_string("rows", None, "The pool: path, glob, hub:NAME or sample.", required=True)
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.", required=True)
MODEL = flags.DEFINE_string("model", None, "The model's name at the endpoint.", required=True)
COLUMNS = flags.DEFINE_string("columns", "", "As data.columns.")
LIMIT = flags.DEFINE_integer("limit", 0, "The first so many rows; 0 = all.", lower_bound=0)
REPEAT = flags.DEFINE_integer(
    "repeat", 1, "Ask so many times, for the median and the agreement.", lower_bound=1
)

REPLY_TOKENS = 120  # a guess for three reasons and levels
APART = 10  # questions that the summary lists


def read_examples() -> list[example_lib.Example]:
    """Reads the rows to label, in the order of the file; a larger draw contains a smaller one.

    Raises:
        UserError: a row is no pool row, or has no question.
    """
    from diq_jax.data import sources

    found = sources.load_examples(ROWS.value, COLUMNS.value, LIMIT.value, field="--rows")
    for example in found:
        if not example.question.strip():
            raise errors.UserError(
                f"--rows: {example.example_id!r} has no question: a pre-tokenised row cannot be "
                "labelled."
            )
    return asking.draw(found)


def make_requests(examples: Sequence[example_lib.Example]) -> list[list[answers.Request]]:
    """Returns for each row --repeat requests, which differ in the seed."""
    from diq_jax.data import wording

    return [
        [
            asking.request(
                MODEL.value, annotate.messages(wording.question_text(e)), annotate.SCHEMA, draw
            )
            for draw in range(REPEAT.value)
        ]
        for e in examples
    ]


def write(
    examples: Sequence[example_lib.Example],
    outcomes: Sequence[Sequence[answers.Outcome]],
    out: pathlib.Path,
) -> tuple[list[str], list[list[dict]], list[dict]]:
    """Writes the labelled rows and, beside them, the failed ones.

    Returns:
        (the question of each labelled row, the answers to it, the failed rows)
    """
    rows, questions, found, failed = [], [], [], []
    for example, mine in zip(examples, outcomes, strict=True):
        wrong = asking.failure(mine)
        if wrong is None:
            questions.append(example.question)
            found.append([outcome.value for outcome in mine])
            levels = annotate.levels(found[-1])
            rows.append(annotate.labelled(example.row, example.question, levels))
        else:
            failed.append({"id": example.example_id} | wrong)
    listed = out.with_suffix(asking.FAILED)
    artifacts.write_jsonl(listed, failed)
    if not rows:
        raise errors.UserError(f"no row was labelled; {listed} says why.")
    artifacts.write_jsonl(out, rows)
    return questions, found, failed


def summarise(
    questions: Sequence[str], found: Sequence[Sequence[dict]], failed: int
) -> dict[str, Any]:
    """Makes labels.summary.json: levels and, with --repeat, the agreement of the draws."""
    return {
        "model": MODEL.value,
        "rows": len(found),
        "failed": failed,
        "draws": REPEAT.value,
        "levels": annotate.histogram([annotate.levels(mine) for mine in found]),
        "kappa": {p: stats.finite(kappa) for p, kappa in annotate.agreement(found).items()},
        "apart": annotate.apart(questions, found, APART),
    }


def main() -> None:
    """Asks for every question's levels and writes them."""
    if REPEAT.value > 1 and asking.TEMPERATURE.value == 0:
        raise errors.UserError("--repeat asks for different answers: --temperature must not be 0.")
    beside = (asking.FAILED, opinions.SUMMARY)
    settings, out = asking.settings(), asking.output(OUT.value, ".jsonl", beside)
    examples = read_examples()
    requests = make_requests(examples)
    answered = asking.answer_all("annotate", requests, REPLY_TOKENS, out, settings)
    if answered is None:
        return
    questions, found, failed = write(examples, answered.outcomes, out)
    asking.print_done(answered, f"annotated {len(found):,} rows", failed)
    summary = summarise(questions, found, len(failed))
    artifacts.write_json(out.with_suffix(opinions.SUMMARY), summary)
    print(opinions.annotated(summary).plain())
    listed = f"; the others are listed in {out.with_suffix(asking.FAILED)}" if failed else ""
    print(f"wrote {out}{listed}")
