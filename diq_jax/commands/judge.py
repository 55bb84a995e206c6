r"""Judges answers by language models behind any OpenAI-compatible endpoint.

    diq judge --answers=runs/a:selected,runs/a:random --out=judge.json \
        --base_url=http://localhost:8000/v1 --models=NAME[,NAME] [--pairwise] [--dry_run]

Differential diagnosis, safety check and evidence citation, each from 1 to 5 with its reason, of
every answer alone; with --pairwise, of two models' answers side by side, in both orders, where a
verdict counts only if the orders agree. Several --models judge apart, and their agreement is shown.
--answers names a run whose evaluate.protocol is generate, or a JSONL file of rows {example_id,
question, text[, reference]} (diq_jax/evaluate/predictions.py).

Writes judge.json, and beside it judge.verdicts.jsonl (every judgement with its reasons),
judge.failed.jsonl (what got none) and judge.cache.jsonl: a killed run continues, and pays for
nothing twice. The API key comes from the environment (--api_key_env). The report of a run shows
what it finds as RUN/judge.json.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from diq_jax import errors
from diq_jax.clients import answers, judge
from diq_jax.commands import asking, cli
from diq_jax.evaluate import predictions
from diq_jax.report import opinions
from diq_jax.run import artifacts

VERIFY = cli.define_verify()
ANSWERS = flags.DEFINE_list(
    "answers", None, "RUN:MODEL or FILE.jsonl[:MODEL], comma-separated.", required=True
)
MODELS = flags.DEFINE_list("models", None, "The judges' names at the endpoint.", required=True)
OUT = flags.DEFINE_string("out", None, "The .json file to write.", required=True)
PAIRWISE = flags.DEFINE_bool("pairwise", False, "Compare two models' answers side by side.")
BOOTSTRAP_SAMPLES = flags.DEFINE_integer("bootstrap_samples", 2000, "Of each interval.", 100)

REPLY_TOKENS = 200  # a guess for the reasons and levels
VERDICTS = opinions.VERDICTS  # beside --out


def read_answers() -> tuple[dict[str, predictions.ById], list[str]]:
    """Reads the rows by model, and the questions that any model, or with --pairwise both, answered.

    Raises:
        UserError: a row without question or text, questions that differ between the models, or not
            two models for --pairwise.
    """
    specs = [cli.run_folder(spec, "--answers") for spec in ANSWERS.value]
    found = predictions.read_all(specs, "--answers", cli.verify(VERIFY))
    if PAIRWISE.value and len(found) != 2:
        raise errors.UserError(f"--pairwise compares two models; --answers names {len(found)}.")
    for model, rows in found.items():
        for name, row in rows.items():
            asked, text = row.get("question"), row.get("text")
            if not isinstance(asked, str) or not asked.strip() or not isinstance(text, str):
                raise errors.UserError(
                    f"--answers: {model}: {name!r} must have a question and a text; got columns "
                    f"{', '.join(row)} (a run has texts where evaluate.protocol is generate)."
                )
    ids = list(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    for name in ids:
        if len({rows[name]["question"] for rows in found.values() if name in rows}) > 1:
            raise errors.UserError(f"--answers: {name!r} is not the same question in all.")
    if PAIRWISE.value:
        both = [name for name in ids if all(name in rows for rows in found.values())]
        if len(both) < len(ids):
            print(f"{len(both):,} of {len(ids):,} questions are in both; the others are left out")
        ids = both
        if not ids:
            raise errors.UserError("--answers: the two have no example_id in common.")
    return found, asking.draw(ids)


def make_requests(
    found: dict[str, predictions.ById], ids: Sequence[str]
) -> list[tuple[dict[str, str], tuple[answers.Request, ...]]]:
    """Makes pairs (what is judged, by whom; its requests: one, or one for each order)."""

    def reference(row):
        return str(row.get("reference") or "")

    def single(name, model, row):
        asked = judge.single_messages(row["question"], row["text"], reference(row))
        return {"example_id": name, "model": model}, [asked], judge.SINGLE_SCHEMA

    def pair(name, first, second):
        question, right = first["question"], reference(first) or reference(second)
        a, b = first["text"], second["text"]
        orders = [judge.pair_messages(question, *t, right) for t in ((a, b), (b, a))]
        return {"example_id": name}, orders, judge.PAIR_SCHEMA

    if PAIRWISE.value:
        asked = [pair(name, *(rows[name] for rows in found.values())) for name in ids]
    else:
        by_model = itertools.product(ids, found.items())
        asked = [single(n, model, rows[n]) for n, (model, rows) in by_model if n in rows]
    return [
        ({"judge": j} | what, tuple(asking.request(j, messages, schema) for messages in orders))
        for j in MODELS.value
        for what, orders, schema in asked
    ]


def summarise(
    judged: Sequence[tuple[dict[str, str], list]], models: Sequence[str], ids: Sequence[str]
) -> dict[str, Any]:
    """Makes the part of judge.json that says what was found, from (what, checked answers)."""
    judges, place = MODELS.value, {name: i for i, name in enumerate(ids)}
    chosen = BOOTSTRAP_SAMPLES.value, asking.SEED.value
    criteria = len(judge.CRITERIA)
    if PAIRWISE.value:
        found = np.full((len(judges), len(ids), criteria, 2), np.nan)
        for what, given in judged:
            found[judges.index(what["judge"]), place[what["example_id"]]] = judge.verdicts(*given)
        return judge.pair_summary(found, judges, *chosen)
    found = np.full((len(judges), len(models), len(ids), criteria), np.nan)
    for what, [given] in judged:
        at = judges.index(what["judge"]), models.index(what["model"]), place[what["example_id"]]
        found[at] = judge.levels(given)
    return judge.single_summary(found, judges, models, *chosen)


def write(
    out: pathlib.Path,
    results: Sequence[tuple[dict[str, str], tuple[answers.Request, ...]]],
    outcomes: Sequence[Sequence[answers.Outcome]],
) -> tuple[list, list[dict]]:
    """Writes what was judged and what was not.

    Returns:
        ((what, checked answers) of what was judged, the failed rows)
    """
    judged, verdicts, failed = [], [], []
    for (what, _), mine in zip(results, outcomes, strict=True):
        wrong = asking.failure(mine)
        if wrong is not None:
            failed.append(what | wrong)
            continue
        given = [outcome.value for outcome in mine]
        judged.append((what, given))
        swapped = {"swapped": given[1]} if PAIRWISE.value else {}
        verdicts.append(what | {"verdict": given[0]} | swapped)
    listed = out.with_suffix(asking.FAILED)
    artifacts.write_jsonl(listed, failed)
    if not judged:
        raise errors.UserError(f"nothing was judged; {listed} says why.")
    artifacts.write_jsonl(out.with_suffix(VERDICTS), verdicts)
    return judged, failed


def main() -> None:
    """Asks the judges about every answer and writes their verdicts."""
    settings, out = asking.settings(), asking.output(OUT.value, ".json", (asking.FAILED, VERDICTS))
    for flag in (ANSWERS, MODELS):
        if not flag.value or not all(flag.value):
            raise errors.UserError(f"--{flag.name} must be names with commas between them.")
    if len(set(MODELS.value)) < len(MODELS.value):
        raise errors.UserError(f"--models names a judge twice: {', '.join(MODELS.value)}.")
    found, ids = read_answers()
    models = list(found)
    requests = make_requests(found, ids)
    rows = [mine for _, mine in requests]
    answered = asking.answer_all("judge", rows, REPLY_TOKENS, out, settings)
    if answered is None:
        return
    judged, failed = write(out, requests, answered.outcomes)
    results = summarise(judged, models, ids)
    asking.print_done(answered, f"judged {len(judged):,} of {len(requests):,}", failed)
    head = {"mode": "pairwise" if PAIRWISE.value else "single", "answers": models}
    head |= {"judges": MODELS.value, "questions": len(ids), "failed": len(failed)}
    whole = head | results
    artifacts.write_json(out, whole)
    print("\n\n".join(table.plain() for table in opinions.judged(whole)))
    listed = f"; failures are listed in {out.with_suffix(asking.FAILED)}" if failed else ""
    print(f"wrote {out} and {out.with_suffix(VERDICTS)}{listed}")
