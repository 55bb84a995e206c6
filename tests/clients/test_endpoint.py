"""Answers over a real server that fails in every way a server does."""

import signal
import sys
import threading
import time

import openai
import pytest
from endpoint_server import Act, Server

from diq_jax import errors
from diq_jax.clients import answers, endpoint, replies

SCHEMA = {
    "type": "object",
    "properties": {"level": {"type": "integer", "enum": [1, 2, 3]}, "why": {"type": "string"}},
}
GOOD = Act('{"level": 2, "why": "so"}')


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "BACKOFF_S", 0.001)


def requests(count, **changes):
    fields = {"model": "m", "schema": SCHEMA, "seed": 0, "temperature": 0.0, "max_tokens": 9}
    return [
        answers.Request(messages=({"role": "user", "content": f"q{i}"},), **fields | changes)
        for i in range(count)
    ]


def settings(url, **changes):
    fields = {
        "api_key_env": "TEST_KEY", "concurrency": 2, "timeout_s": 20, "answer_tries": 3,
    }  # fmt: skip
    return endpoint.Settings(base_url=url, **fields | changes)


def ask(server, path, count=1, said=None, **changes):
    """The outcomes of `count` requests, through a cache file."""
    chosen = settings(server.url, **changes)
    with replies.Cache(path / "cache.jsonl") as cache:
        asked = requests(count)
        outcomes, missing = answers.split(asked, cache, chosen.answer_tries)
        if missing:
            client = endpoint.connect(chosen)
            say = (said if said is not None else []).append
            found = endpoint.ask_all(client, missing, chosen, cache, lambda outcome: None, say)
            outcomes |= {r.key: outcome for r, outcome in zip(missing, found, strict=True)}
        return [outcomes[request.key] for request in asked]


def first(acts, then=GOOD):
    """A plan: these acts, and afterwards another."""
    return lambda number, body: acts[number] if number < len(acts) else then


def test_each_is_asked_once_in_order_and_never_more_than_the_bound_at_once(tmp_path):
    def plan(number, body):
        # The earlier, the slower: replies come in another order than requests.
        time.sleep(0.2 / (1 + number))
        return Act(f'{{"level": 1, "why": "{body["messages"][0]["content"]}"}}')

    with Server(plan) as server:
        found = ask(server, tmp_path, 12, concurrency=3)
        assert [outcome.value["why"] for outcome in found] == [f"q{i}" for i in range(12)]
        assert len(server.bodies) == 12 and server.most_at_once == 3
        assert ask(server, tmp_path, 12) == found and len(server.bodies) == 12
        [body] = [b for b in server.bodies if b["messages"][0]["content"] == "q7"]
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_completion_tokens"] == 9
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize(
    "fault",
    [
        Act(status=429),
        Act(status=500),
        Act(status=503),
        Act(close=True),
        Act(hang=True),
        Act(raw=b"{"),
        Act(raw=b"[]"),
        Act(raw=b'{"choices": []}'),
        Act(raw=b'{"choices": [{"message": null}]}'),
        Act(raw=b"[" * 101),
        Act(raw=b"\xff"),
    ],
    ids=str,
)
def test_a_passing_fault_is_waited_out(fault, tmp_path):
    said = []
    with Server(first([fault, fault])) as server:
        [outcome] = ask(server, tmp_path, 1, said, timeout_s=0.3 if fault.hang else 20)
    assert outcome.status == "answered" and outcome.value["level"] == 2
    assert len(server.bodies) == 3 and len(said) == 1 and "trying again" in said[0]


def test_a_reply_without_end_is_given_up_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1000)
    with Server(first([Act("x" * 1000)])) as server:
        found = ask(server, tmp_path, 3, concurrency=1)
    assert [outcome.status for outcome in found] == ["unanswered", "answered", "answered"]
    assert found[0].detail == "the reply is longer than 1,000 bytes" and len(server.bodies) == 3


def test_a_server_is_waited_for_as_long_as_it_asks(tmp_path):
    busy = Act(status=429, headers=(("Retry-After", "0.3"),))
    with Server(first([busy])) as server:
        started = time.perf_counter()
        assert ask(server, tmp_path)[0].status == "answered"
    assert 0.3 <= time.perf_counter() - started < 3


def test_a_reply_that_breaks_off_is_asked_for_again(tmp_path):
    cut = Act(raw=b'{"choices": ', headers=(("Content-Length", "900"),), close_after=True)
    with Server(first([cut])) as server:
        [outcome] = ask(server, tmp_path)
    assert outcome.status == "answered" and len(server.bodies) == 2


@pytest.mark.parametrize(
    "plan, message, sent",
    [
        (Act(status=401), "status 401: told 401", 1),
        (Act(status=404), "status 404", 1),
        (Act(status=429, headers=(("Retry-After", "9999"),)), "status 429: told 429", 2),
        (Act(status=500), "status 500: told 500; replies so far are kept", 6),
        (Act(hang=True), "no reply within 0.2 s", 6),
        (Act(close=True), "no connection", 6),
    ],
    ids=str,
)
def test_an_endpoint_that_takes_nobody_is_one_sentence(plan, message, sent, tmp_path):
    with Server(lambda number, body: plan) as server:
        with pytest.raises(errors.UserError, match=message) as raised:
            ask(server, tmp_path, 20, tries=3, timeout_s=0.2 if plan.hang else 20, concurrency=1)
    assert len(server.bodies) == sent and "\n" not in str(raised.value)


def test_an_endpoint_that_stops_is_given_up_and_what_was_paid_for_is_kept(tmp_path):
    with Server(first([GOOD] * 4, then=Act(status=500))) as server:
        with pytest.raises(errors.UserError, match="status 500"):
            ask(server, tmp_path, 30, tries=2, concurrency=1)
        assert len(server.bodies) == 4 + 2 * endpoint.GIVE_UP_AFTER
        server.plan = lambda number, body: GOOD
        assert {outcome.status for outcome in ask(server, tmp_path, 30)} == {"answered"}
        assert len(server.bodies) == 30 + 2 * endpoint.GIVE_UP_AFTER


def test_one_request_that_the_server_cannot_take_is_listed(tmp_path):
    def plan(number, body):
        bad = {"q0": 500, "q2": 400}.get(body["messages"][0]["content"])
        return Act(status=bad) if bad else GOOD

    with Server(plan) as server:
        found = ask(server, tmp_path, 4, tries=2)
    assert [o.status for o in found] == ["unanswered", "answered", "unanswered", "answered"]
    assert found[0].detail == "status 500: told 500" and found[2].detail == "status 400: told 400"


def test_requests_that_fail_among_others_that_do_not_stop_nothing(tmp_path):
    with Server(lambda number, body: Act(status=400) if number % 3 == 1 else GOOD) as server:
        found = ask(server, tmp_path, 4 * endpoint.GIVE_UP_AFTER, concurrency=1)
    statuses = [outcome.status for outcome in found]
    assert statuses.count("unanswered") > endpoint.GIVE_UP_AFTER < statuses.count("answered")


def test_a_server_without_schemas_is_asked_in_words_decided_and_said_once(tmp_path):
    said = []

    def plan(number, body):
        return Act(status=400) if "response_format" in body else GOOD

    with Server(plan) as server:
        found = ask(server, tmp_path, 6, said, concurrency=4)
    assert {outcome.status for outcome in found} == {"answered"}
    assert len(server.bodies) == 7 and len(said) == 1 and "refuses a JSON schema" in said[0]
    assert '"enum": [1, 2, 3]' in server.bodies[-1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "act, status, detail",
    [
        (Act("{"), "malformed", "not JSON"),
        (Act("no"), "malformed", "no JSON object"),
        (Act('{"level": 2', finish="length"), "malformed", "cut at the token limit"),
        (Act('{"level": 6, "why": ""}'), "malformed", "level must be one of 1, 2, 3, got 6"),
        (Act('{"level": "3", "why": ""}'), "malformed", "type integer, got '3'"),
        (Act('{"level": true, "why": ""}'), "malformed", "type integer, got True"),
        (Act('{"level": 2.0, "why": ""}'), "malformed", "type integer, got 2.0"),
        (Act('{"why": ""}'), "malformed", "must have level, why, got why"),
        (Act('{"level": 1, "why": "", "x": 1}'), "malformed", "must have level, why"),
        (Act('{"level": 1, "why": null}'), "malformed", "why must be of type string"),
        (Act("{}{}"), "malformed", "not JSON"),
        (Act(refusal="I cannot"), "refused", "I cannot"),
        (Act("", finish="content_filter"), "refused", "content filter"),
    ],
    ids=str,
)
def test_a_bad_reply_is_asked_again_then_counted_never_guessed(act, status, detail, tmp_path):
    with Server(lambda number, body: act) as server:
        [outcome] = ask(server, tmp_path, answer_tries=3)
        assert outcome.status == status and outcome.value is None and detail in outcome.detail
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == 3
        # It was paid for: another run of as many tries asks nothing, one of more tries the rest.
        assert ask(server, tmp_path, answer_tries=3) == [outcome] and len(server.bodies) == 3
        server.plan = lambda number, body: GOOD
        assert ask(server, tmp_path, answer_tries=4)[0].status == "answered"
    assert len(server.bodies) == 4


@pytest.mark.parametrize(
    "text",
    [
        '{"level": 3, "why": "{x}"}',
        '```json\n{"level": 3, "why": "{x}"}\n```',
        '<think>{"level": 1}?</think>So: {"level": 3, "why": "{x}"}.',
    ],
)
def test_an_object_is_found_in_text(text):
    assert answers.parse_object(text) == {"level": 3, "why": "{x}"}


def test_the_key_is_of_the_question_not_of_the_server():
    [base] = requests(1)
    changed = [requests(2)[1]] + [
        requests(1, **change)[0]
        for change in (
            {"model": "n"}, {"seed": 1}, {"temperature": None}, {"max_tokens": 0},
            {"schema": {"type": "string"}},
        )
    ]  # fmt: skip
    assert requests(1)[0].key == base.key
    assert len({request.key for request in [base, *changed]}) == 7


def test_equal_requests_are_asked_once(tmp_path):
    with replies.Cache(tmp_path / "c") as cache:
        outcomes, missing = answers.split(requests(3) + requests(4), cache, 1)
    assert outcomes == {} and [r.key for r in missing] == [r.key for r in requests(4)]


def test_ctrl_c_waits_for_what_was_sent_and_sends_nothing_more(tmp_path):
    def plan(number, body):
        if number == 3:  # two are under way
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        return Act(GOOD.content, delay_s=0.3 if number >= 2 else 0)

    main, said = threading.main_thread().ident, []
    with Server(plan) as server:
        with pytest.raises(KeyboardInterrupt):
            ask(server, tmp_path, 9, said)
        sent = len(server.bodies)
        assert sent == 4 and "Waiting" in said[0]
        assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == sent
        server.plan = lambda number, body: GOOD
        assert len(ask(server, tmp_path, 9)) == len(server.bodies) == 9
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "change, message",
    [
        ({"url": "localhost:8000"}, "base_url must start with http://"),
        ({"concurrency": 0}, "concurrency must be at least 1; got 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0"),
        ({"api_key_env": "NO_SUCH_KEY"}, "set the environment variable NO_SUCH_KEY"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(errors.UserError, match=message):
        endpoint.connect(settings(**{"url": "http://x"} | change))


def test_a_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(errors.UserError, match=r"diq_jax\[judge\]"):
        endpoint.connect(settings("http://x"))
