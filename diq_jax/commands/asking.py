"""What scripts that ask a language model share; importing it defines their flags."""

import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from diq_jax import errors
from diq_jax.clients import answers, endpoint, replies
from diq_jax.run import progress

BASE_URL = flags.DEFINE_string(
    "base_url", None, "The endpoint, such as http://localhost:8000/v1.", required=True
)
SEED = flags.DEFINE_integer("seed", 0, "Of any draw, and sent with each request.", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Unset = the server's own.", lower_bound=0)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "Of a reply; 0 = the server's own limit.", lower_bound=0
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Requests at once.", lower_bound=1)
TIMEOUT_S = flags.DEFINE_float("timeout_s", 120.0, "Of one request.", lower_bound=0)
ANSWER_TRIES = flags.DEFINE_integer(
    "answer_tries", 3, "Replies to ask for until one fits; more ask failed rows again.",
    lower_bound=1,
)  # fmt: skip
API_KEY_ENV = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "The variable with the key.")
PRICE_IN = flags.DEFINE_float("price_in", None, "Money per million tokens in.", lower_bound=0)
PRICE_OUT = flags.DEFINE_float("price_out", None, "Money per million tokens out.", lower_bound=0)
SAMPLE = flags.DEFINE_integer("sample", 0, "Draw so many questions; 0 = all.", lower_bound=0)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the estimate and one prompt.")
YES = flags.DEFINE_bool("yes", False, "Start without asking.")

CHARACTERS_PER_TOKEN = 4
FAILED = ".failed.jsonl"  # what got no answer, beside --out


@dataclasses.dataclass(frozen=True)
class Answered:
    """Holds the results of all rows.

    Attributes:
        outcomes: of each row's requests.
        cached: rows that the cache had answered before.
        usage: replies, tokens in and out of this run, and replies without these counts.
    """

    outcomes: list[list[answers.Outcome]]
    cached: int
    usage: tuple[int, int, int, int]
    seconds: float


def settings() -> endpoint.Settings:
    """Raises UserError for a value, or two together, that cannot be."""
    if (PRICE_IN.value is None) != (PRICE_OUT.value is None):
        raise errors.UserError("--price_in and --price_out belong together; only one is given.")
    return endpoint.Settings(
        base_url=BASE_URL.value,
        api_key_env=API_KEY_ENV.value,
        concurrency=CONCURRENCY.value,
        timeout_s=TIMEOUT_S.value,
        answer_tries=ANSWER_TRIES.value,
    )


def output(path: str, extension: str, beside: Sequence[str] = (FAILED,)) -> pathlib.Path:
    """Returns the file to write. Replies are kept beside it, under `cache_of` it.

    Args:
        beside: the extensions of further files that will be written.

    Raises:
        UserError: another extension, or a file that was not made here.
    """
    if not path.endswith(extension):
        raise errors.UserError(f"--out must end in {extension}; got {path!r}.")
    out = pathlib.Path(path)
    cache = cache_of(out)
    if cache.is_file() and cache.stat().st_size:
        return out  # they were made here, if the cache was: replies.Cache finds out
    for file in (out, *map(out.with_suffix, beside)):
        if file.exists() and file.stat().st_size:
            raise errors.UserError(
                f"--out: {file} exists and was not made here (there is no {cache.name} beside "
                "it): move it, or name another file."
            )
    return out


def cache_of(out: pathlib.Path) -> pathlib.Path:
    """Returns where the replies of an output file are kept."""
    return out.with_suffix(".cache.jsonl")


def draw(rows: Sequence[Any]) -> list[Any]:
    """Draws --sample rows, in their order; a larger draw contains a smaller one."""
    order = np.random.Generator(np.random.PCG64(SEED.value)).permutation(len(rows))
    return [rows[i] for i in sorted(order[: SAMPLE.value or None])]


def request(
    model: str, messages: Sequence[dict[str, str]], schema: Mapping[str, Any], draw: int = 0
) -> answers.Request:
    """Makes the request as the flags have it; another draw has another seed."""
    seed = SEED.value + draw
    return answers.Request(
        model, tuple(messages), schema, seed, TEMPERATURE.value, MAX_TOKENS.value
    )


def answer_all(
    name: str,
    rows: Sequence[Sequence[answers.Request]],
    reply_tokens: int,
    out: pathlib.Path,
    chosen: endpoint.Settings,
) -> Answered | None:
    """Prints the estimate, asks whether to start, and asks what the cache beside `out` has not.

    Models are asked one after another: each shows on its own whether it takes a schema.

    Args:
        name: of the progress bar.
        rows: the requests of each.
        reply_tokens: a guess, until the cache knows better; thinking comes on top.

    Returns:
        None after --dry_run, which prints the estimate and the first prompt.

    Raises:
        UserError: as endpoint.ask_all; or the user does not start.
    """
    requests = [request for mine in rows for request in mine]
    with replies.Cache(cache_of(out)) as cache:
        outcomes, missing = answers.split(requests, cache, chosen.answer_tries)
        known, before, started = set(outcomes), cache.usage, time.perf_counter()
        models = dict.fromkeys(r.model for r in requests)
        if cache.damaged:
            print(f"{cache.damaged:,} damaged lines of {cache.path} are skipped, and left there")
        _print_estimate(
            ", ".join(models), len(rows), len(known), missing, cache.usage, reply_tokens
        )
        if DRY_RUN.value:
            for message in requests[0].messages:
                print(f"\n[{message['role']}]\n{message['content']}")
            return None
        if missing:
            # A missing key shows before anybody is asked.
            clients = {m: endpoint.connect(chosen) for m in dict.fromkeys(r.model for r in missing)}
            _confirm()
            outcomes |= _ask(name, missing, clients, chosen, cache, len(known))
        usage = tuple(np.subtract(cache.usage, before).tolist())
    cached = sum(all(r.key in known for r in mine) for mine in rows)
    found = [[outcomes[r.key] for r in mine] for mine in rows]
    return Answered(found, cached, usage, time.perf_counter() - started)


def _print_estimate(models, rows, cached, missing, usage, reply_tokens) -> None:
    characters = sum(len(m["content"]) for r in missing for m in r.messages)
    replies, _, completion, _ = usage
    each, source = (
        (completion / replies, "as so far")
        if completion
        else (reply_tokens, "a guess, plus any thinking")
    )
    tokens_in, tokens_out = characters / CHARACTERS_PER_TOKEN, each * len(missing)
    temperature = "the server's" if TEMPERATURE.value is None else f"{TEMPERATURE.value:g}"
    print(f"{models} at {BASE_URL.value}, temperature {temperature}, seed {SEED.value}")
    print(f"rows       {rows:>12,}")
    print(f"requests   {len(missing):>12,}   and {cached:,} answered by the cache")
    print(f"tokens in  {tokens_in:>12,.0f}   about: {CHARACTERS_PER_TOKEN} characters a token")
    print(f"tokens out {tokens_out:>12,.0f}   about: {each:.0f} a reply, {source}")
    print(f"cost       {_money(tokens_in, tokens_out):>12}", flush=True)


def _money(tokens_in: float, tokens_out: float) -> str:
    if PRICE_IN.value is None or PRICE_OUT.value is None:
        return "unknown without --price_in and --price_out"
    return f"{(tokens_in * PRICE_IN.value + tokens_out * PRICE_OUT.value) / 1e6:,.4f}"


def _confirm() -> None:
    if YES.value:
        return
    if not sys.stdin.isatty():
        raise errors.UserError("there is no terminal to ask whether to start: pass --yes.")
    if input("Start? [y/N] ").strip().lower() not in ("y", "yes"):
        raise errors.UserError("not started, as you said.")


def _ask(name, missing, clients, chosen, cache, cached) -> dict[str, answers.Outcome]:
    outcomes = {}
    with progress.Progress(name, cached + len(missing), resumed=cached) as bar:
        tokens, failed = sum(cache.usage[1:3]), 0

        def done(outcome: answers.Outcome) -> None:
            nonlocal tokens, failed
            before, tokens = tokens, sum(cache.usage[1:3])
            failed += outcome.status != "answered"
            bar.update(1, tokens - before, failed=str(failed))

        def say(sentence: str) -> None:
            tqdm.tqdm.write(sentence, file=sys.stderr)

        for model, client in clients.items():
            mine = [r for r in missing if r.model == model]
            found = endpoint.ask_all(client, mine, chosen, cache, done, say)
            outcomes |= {r.key: outcome for r, outcome in zip(mine, found, strict=True)}
    return outcomes


def failure(outcomes: Iterable[answers.Outcome]) -> dict[str, str] | None:
    """Status and detail of the first outcome that is no answer."""
    wrong = next((outcome for outcome in outcomes if outcome.status != "answered"), None)
    return wrong and {"status": wrong.status, "detail": wrong.detail}


def print_done(answered: Answered, done: str, failed: Sequence[Mapping[str, Any]]) -> None:
    """Prints what was done, the rows that failed by status, and the tokens, seconds and cost."""
    statuses = collections.Counter(row["status"] for row in failed)
    counts = ", ".join(f"{statuses[s]} {s}" for s in ("refused", "malformed", "unanswered"))
    replies, tokens_in, tokens_out, uncounted = answered.usage
    print(
        f"{done}; {counts}; {answered.cached:,} were in the cache\n"
        f"{replies:,} replies in {answered.seconds:.1f} s: {tokens_in:,} tokens in, "
        f"{tokens_out:,} out, cost {_money(tokens_in, tokens_out)}"
    )
    if uncounted:
        print(f"the server gave no usable token counts for {uncounted:,} of them: add theirs")
