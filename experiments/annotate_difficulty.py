"""Labels the difficulty of a pool by a language model behind any OpenAI-compatible endpoint.

    python experiments/annotate_difficulty.py --rows=pool.jsonl --sample=500 --out=labels.jsonl \\
        --base_url=http://localhost:8000/v1 --model=NAME [--price_in=0.5 --price_out=2] [--dry_run]

Prints an estimate, asks whether to start (--yes: do not ask), and writes the rows as they came with
difficulty_knowledge, difficulty_reasoning and difficulty_overall, in the place of any that they
had: a file for difficulty.source, and a pool for difficulty.source=columns.
Rows without an answer are listed in labels.failed.jsonl. Replies are kept in labels.cache.jsonl: a
killed run continues, and pays for nothing twice. The API key comes from the environment
(--api_key_env).
"""

import collections
import itertools
import pathlib
import sys
import time

import numpy as np
import tqdm
from absl import flags

from diq_jax.common import answers, artifacts, cli, config, endpoint, errors, progress
from diq_jax.data import sources
from diq_jax.difficulty import annotate, labels

ROWS = flags.DEFINE_string("rows", None, "The pool: path, glob, hub:NAME or sample.")
OUT = flags.DEFINE_string("out", None, "The .jsonl file to write.")
BASE_URL = flags.DEFINE_string("base_url", None, "The endpoint, such as http://localhost:8000/v1.")
MODEL = flags.DEFINE_string("model", None, "The model's name at the endpoint.")
COLUMNS = flags.DEFINE_string("columns", "", "As data.columns.")
LIMIT = flags.DEFINE_integer("limit", 0, "The first so many rows; 0 = all.", lower_bound=0)
SAMPLE = flags.DEFINE_integer("sample", 0, "Draw so many of them; 0 = all.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of the draw, and sent with each request.", lower_bound=0)
REPEAT = flags.DEFINE_integer(
    "repeat", 1, "Ask so many times, for the median and the agreement.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Unset = the server's own.", lower_bound=0)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "Of a reply; 0 = the server's own limit.", lower_bound=0
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Requests at once.", lower_bound=1)
TIMEOUT_S = flags.DEFINE_float("timeout_s", 120.0, "Of one request.", lower_bound=0)
ANSWER_TRIES = flags.DEFINE_integer(
    "answer_tries",
    3,
    "Replies to ask for until one fits; more ask failed rows again.",
    lower_bound=1,
)
API_KEY_ENV = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "The variable with the key.")
PRICE_IN = flags.DEFINE_float("price_in", None, "Money per million tokens in.", lower_bound=0)
PRICE_OUT = flags.DEFINE_float("price_out", None, "Money per million tokens out.", lower_bound=0)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the estimate and one prompt.")
YES = flags.DEFINE_bool("yes", False, "Start without asking.")

# A guess for three reasons and levels, until the cache knows better; thinking comes on top.
REPLY_TOKENS = 120
CHARACTERS_PER_TOKEN = 4


def check_flags() -> endpoint.Settings:
    """Raises UserError for a value, or two together, that cannot be."""
    if not OUT.value.endswith(".jsonl"):
        raise errors.UserError(f"--out must end in .jsonl; got {OUT.value!r}.")
    if (PRICE_IN.value is None) != (PRICE_OUT.value is None):
        raise errors.UserError("--price_in and --price_out belong together; only one is given.")
    if REPEAT.value > 1 and TEMPERATURE.value == 0:
        raise errors.UserError("--repeat asks for different answers: --temperature must not be 0.")
    return endpoint.Settings(
        base_url=BASE_URL.value,
        api_key_env=API_KEY_ENV.value,
        concurrency=CONCURRENCY.value,
        timeout_s=TIMEOUT_S.value,
        answer_tries=ANSWER_TRIES.value,
    )


def read_examples():
    """The rows to label, in the order of the file; a larger draw contains a smaller one.

    Raises:
        UserError: a row is no pool row, or has no question.
    """
    found = sources.load_pool(ROWS.value, COLUMNS.value, LIMIT.value, field="--rows")
    for example in found:
        if not example.question.strip():
            raise errors.UserError(
                f"--rows: {example.example_id!r} has no question: a pre-tokenised row cannot be "
                "labelled."
            )
    if SAMPLE.value:
        order = np.random.Generator(np.random.PCG64(SEED.value)).permutation(len(found))
        found = [found[i] for i in sorted(order[: SAMPLE.value])]
    return found


def make_requests(examples) -> list[list[answers.Request]]:
    """For each row --repeat requests, which differ in the seed."""
    return [
        [
            answers.Request(
                MODEL.value,
                annotate.messages(example.question),
                annotate.SCHEMA,
                SEED.value + draw,
                TEMPERATURE.value,
                MAX_TOKENS.value,
            )
            for draw in range(REPEAT.value)
        ]
        for example in examples
    ]


def money(tokens_in: float, tokens_out: float) -> str:
    if PRICE_IN.value is None:
        return "unknown without --price_in and --price_out"
    return f"{(tokens_in * PRICE_IN.value + tokens_out * PRICE_OUT.value) / 1e6:,.4f}"


def print_estimate(rows: int, cached: int, missing, usage) -> None:
    """For different requests: how many the cache answers, and those to ask."""
    characters = sum(len(m["content"]) for request in missing for m in request.messages)
    replies, _, completion = usage
    each, source = (
        (completion / replies, "as so far")
        if completion
        else (REPLY_TOKENS, "a guess, plus any thinking")
    )
    tokens_in, tokens_out = characters / CHARACTERS_PER_TOKEN, each * len(missing)
    temperature = "the server's" if TEMPERATURE.value is None else f"{TEMPERATURE.value:g}"
    print(f"{MODEL.value} at {BASE_URL.value}, temperature {temperature}, seed {SEED.value}")
    print(f"rows       {rows:>12,}")
    print(f"requests   {len(missing):>12,}   and {cached:,} answered by the cache")
    print(f"tokens in  {tokens_in:>12,.0f}   about: {CHARACTERS_PER_TOKEN} characters a token")
    print(f"tokens out {tokens_out:>12,.0f}   about: {each:.0f} a reply, {source}")
    print(f"cost       {money(tokens_in, tokens_out):>12}", flush=True)


def confirm() -> None:
    """Raises UserError unless the user wants to start."""
    if YES.value:
        return
    if not sys.stdin.isatty():
        raise errors.UserError("nobody is there to be asked whether to start: pass --yes.")
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise errors.UserError("not started, as you said.")


def ask(settings, cache, missing, cached: int) -> list[answers.Outcome]:
    client = endpoint.connect(settings)  # a missing key shows before anybody is asked
    confirm()
    with progress.Progress("annotate", cached + len(missing), resumed=cached) as bar:
        tokens, failed = sum(cache.usage[1:]), 0

        def done(outcome: answers.Outcome) -> None:
            nonlocal tokens, failed
            before, tokens = tokens, sum(cache.usage[1:])
            failed += outcome.status != "answered"
            bar.update(1, tokens - before, failed=str(failed))

        def say(sentence: str) -> None:
            tqdm.tqdm.write(sentence, file=sys.stderr)

        return endpoint.ask_all(client, missing, settings, cache, done, say)


def write(examples, outcomes, out: pathlib.Path) -> tuple[list[list[dict]], list[dict]]:
    """Writes the labelled rows and, beside them, the failed ones.

    Returns:
        (the answers to each labelled row, the failed rows)
    """
    rows, found, failed = [], [], []
    for example, mine in zip(examples, outcomes, strict=True):
        wrong = next((outcome for outcome in mine if outcome.status != "answered"), None)
        if wrong is None:
            found.append([outcome.value for outcome in mine])
            levels = annotate.levels(found[-1])
            rows.append(annotate.labelled(example.row, example.question, levels))
        else:
            problem = {"status": wrong.status, "detail": wrong.detail}
            failed.append({"id": example.example_id} | problem)
    listed = out.with_suffix(".failed.jsonl")
    artifacts.write_jsonl(listed, failed)
    if not rows:
        raise errors.UserError(f"no row was labelled; {listed} says why.")
    artifacts.write_jsonl(out, rows)
    return found, failed


def print_levels(found) -> None:
    """The histogram of levels; with --repeat, the agreement of the draws."""
    steps = range(1, labels.LEVELS + 1)
    print("level     " + "".join(f"{level:>7}" for level in steps), end="")
    print("   kappa between draws" if REPEAT.value > 1 else "")
    counts = annotate.histogram([annotate.levels(mine) for mine in found])
    kappas = annotate.agreement(found)
    for p in config.PERSPECTIVES:
        shown = f"   {kappas[p]:.3f}" if REPEAT.value > 1 else ""
        print(f"{p:<10}" + "".join(f"{n:>7,}" for n in counts[p]) + shown)


def print_summary(found, failed, cached: int, usage, seconds: float) -> None:
    """usage: replies, tokens in and tokens out of this run."""
    statuses = collections.Counter(row["status"] for row in failed)
    counts = ", ".join(
        f"{statuses[name]} {name}" for name in ("refused", "malformed", "unanswered")
    )
    print(f"annotated {len(found):,} rows; {counts}; {cached:,} were in the cache")
    replies, tokens_in, tokens_out = usage
    print(
        f"{replies:,} replies in {seconds:.1f} s: {tokens_in:,} tokens in, {tokens_out:,} out, "
        f"cost {money(tokens_in, tokens_out)}"
    )
    print_levels(found)


def main() -> None:
    settings = check_flags()
    examples = read_examples()
    requests = make_requests(examples)
    out = pathlib.Path(OUT.value)
    kept = out.with_suffix(".cache.jsonl")
    if out.exists() and not kept.exists():
        raise errors.UserError(f"--out: {out} exists and was not made here; name another file.")
    with answers.Cache(kept) as cache:
        every = itertools.chain.from_iterable(requests)
        outcomes, missing = answers.split(every, cache, settings.answer_tries)
        print_estimate(len(examples), len(outcomes), missing, cache.usage)
        if DRY_RUN.value:
            for message in requests[0][0].messages:
                print(f"\n[{message['role']}]\n{message['content']}")
            return
        known, before, started = set(outcomes), cache.usage, time.perf_counter()
        if missing:
            asked = ask(settings, cache, missing, len(known))
            outcomes |= {r.key: outcome for r, outcome in zip(missing, asked, strict=True)}
        usage = np.subtract(cache.usage, before).tolist()
    found, failed = write(examples, [[outcomes[r.key] for r in mine] for mine in requests], out)
    cached = sum(all(r.key in known for r in mine) for mine in requests)
    print_summary(found, failed, cached, usage, time.perf_counter() - started)
    listed = f"; the others are listed in {out.with_suffix('.failed.jsonl')}" if failed else ""
    print(f"wrote {out}{listed}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["rows", "out", "base_url", "model"])
    cli.run(main)
