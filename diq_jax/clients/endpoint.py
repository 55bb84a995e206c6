"""Asks many questions of a language model behind any OpenAI-compatible endpoint.

Requests run side by side up to a bound; a passing fault is waited out; every reply that was paid
for is on the disk before anything else happens, so that a killed run asks only for what is missing.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from diq_jax import errors
from diq_jax.clients import answers, replies

GIVE_UP_AFTER = 5  # requests in a row, each with all its tries, that got no reply;
GIVE_UP_UNHEARD = 2  # fewer where nobody got one yet, but not at the first: it may be its own fault
PASSING = (408, 409, 429)  # with all from 500, the statuses that another try may mend
REFUSES_SCHEMA = (400, 422)
MOST_BYTES = 2**24  # of a reply's body
FATAL = (401, 403, 404)  # no request will fare better: key, rights, path or model
KEPT = "replies so far are kept, and the same command continues"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The endpoint and how it is asked; nothing here changes an answer.

    Raises:
        UserError: a value out of range.
    """

    base_url: str  # http://localhost:8000/v1, as servers print it
    api_key_env: str  # the name of the environment variable that holds the key
    concurrency: int  # requests under way at once
    timeout_s: float  # of one request, from sending to the last byte
    answer_tries: int  # replies to ask for until one is an answer
    tries: int = 6  # to get a reply; 5 waits of 1, 2, 4, 8, 16 s, each less up to half
    backoff_s: float = 1.0  # the first wait; each is twice the last
    longest_wait_s: float = 120.0  # a server that asks for more is given up

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise errors.UserError(
                f"base_url must start with http:// or https://; got {self.base_url!r}."
            )
        for name in ("concurrency", "tries", "answer_tries"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("timeout_s", "backoff_s", "longest_wait_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise errors.UserError(f"{name} must be above 0; got {getattr(self, name)}.")


def connect(settings: Settings):
    """An openai.AsyncOpenAI client; nothing is sent yet.

    Raises:
        UserError: the client is not installed, or the key is not set.
    """
    try:
        import openai  # a second to import, and an extra
    except ModuleNotFoundError as e:
        if e.name != "openai":
            raise
        raise errors.UserError(
            "a language-model endpoint needs the openai client: pip install 'diq_jax[judge]'."
        ) from None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise errors.UserError(
            f"the API key is missing: set the environment variable {settings.api_key_env} (a "
            "server without keys takes any text), or name another one."
        )
    # Retries are ours: the client's own know nothing of a whole run.
    return openai.AsyncOpenAI(
        api_key=key, base_url=settings.base_url, timeout=settings.timeout_s, max_retries=0
    )


def ask_all(
    client,
    requests: Sequence[answers.Request],
    settings: Settings,
    cache: replies.Cache,
    done: Callable[[answers.Outcome], None],
    say: Callable[[str], None],
) -> list[answers.Outcome]:
    """Asks each request until the replies settle it, and closes the client. Main thread only.

    On Ctrl-C requests already sent are waited for and kept; a second Ctrl-C drops them.

    Args:
        client: of `connect`.
        requests: all different, as from `answers.split`.
        done: called with each outcome as it comes.
        say: called with a sentence that the user should see.

    Returns:
        The outcomes in the order of the requests.

    Raises:
        UserError: the endpoint takes nobody, or has stopped to answer. Replies are kept.
    """
    return asyncio.run(_ask_all(client, requests, settings, cache, done, say))


async def _ask_all(client, requests, settings, cache, done, say) -> list[answers.Outcome]:
    session = _Session(client, settings, cache, say)
    outcomes: list[answers.Outcome | None] = [None] * len(requests)
    left = iter(enumerate(requests))

    async def work() -> None:
        for i, request in left:
            outcomes[i] = await session.ask(request)
            if outcomes[i] is not None:
                done(outcomes[i])
            if session.stopped is not None:
                return

    async with client:
        with _first_interrupt(session):
            await asyncio.gather(*(work() for _ in range(settings.concurrency)))
    if session.stopped is not None:
        raise session.stopped
    return outcomes


@contextlib.contextmanager
def _first_interrupt(session) -> Iterator[None]:
    """The first Ctrl-C inside stops the session; the next is as usual."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        session.stop(KeyboardInterrupt())
        session.say("Waiting for the requests already sent; Ctrl-C again drops them.")

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _Fault(Exception):
    """A request got no reply. `passing`: another try may; `wait_s`: what the server asked for."""

    def __init__(self, sentence: str, passing: bool, wait_s: float = 0.0, status: int = 0):
        super().__init__(answers.shorten(sentence))
        self.passing, self.wait_s, self.status = passing, wait_s, status


class _Session:
    """One run over one endpoint: its cache, what it learnt of the server, and whether to stop."""

    def __init__(self, client, settings, cache, say):
        self.client, self.settings, self.cache, self.say = client, settings, cache, say
        self.stopped: BaseException | None = None
        self._stop = asyncio.Event()
        self._structured: bool | None = None  # None until the server has shown it
        self._deciding = asyncio.Lock()
        self._unanswered = 0  # in a row
        self._warned = False

    def stop(self, reason: BaseException) -> None:
        """Nothing more is sent; the first reason counts."""
        self.stopped = self.stopped or reason
        self._stop.set()

    async def ask(self, request: answers.Request) -> answers.Outcome | None:
        """None where the session stopped first."""
        tries = self.settings.answer_tries
        while isinstance(step := answers.settle(request, self.cache, tries), answers.Request):
            try:
                reply = await self._send(step)
            except _Fault as fault:
                if self.stopped is not None:
                    return None
                self._count_unanswered(fault)
                return answers.Outcome("unanswered", detail=str(fault))
            self.cache.put(step.key, reply)
            self._unanswered = 0
        return step

    def _count_unanswered(self, fault: _Fault) -> None:
        self._unanswered += 1
        unheard = fault.passing and self._structured is None
        limit = GIVE_UP_UNHEARD if unheard else GIVE_UP_AFTER
        if self._unanswered >= limit or self._is_fatal(fault):
            self.stop(errors.UserError(f"{self.settings.base_url}: {fault}; {KEPT}."))

    def _is_fatal(self, fault: _Fault) -> bool:
        return fault.status in FATAL or fault.wait_s > self.settings.longest_wait_s

    async def _send(self, request) -> replies.Reply:
        """The first request finds out alone whether the server takes a schema."""
        if self._structured is None:
            async with self._deciding:
                if self._structured is None:
                    return await self._persist(lambda: self._decide(request))
        return await self._persist(lambda: self._create(request, self._structured))

    async def _persist(self, send) -> replies.Reply:
        """Tries until there is a reply, or raises the last fault."""
        for number in itertools.count(1):
            try:
                return await send()
            except _Fault as fault:
                last = number == self.settings.tries or self.stopped is not None
                if last or not fault.passing or self._is_fatal(fault):
                    raise
                # Jitter, so that requests refused together do not come back together.
                backoff = self.settings.backoff_s * 2 ** (number - 1) * random.uniform(0.5, 1.0)
                wait = fault.wait_s + backoff
                if not self._warned:
                    self.say(f"{fault}: trying again; later faults are waited out in silence.")
                self._warned = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait)

    async def _decide(self, request) -> replies.Reply:
        try:
            reply = await self._create(request, structured=True)
        except _Fault as fault:
            if fault.status not in REFUSES_SCHEMA:
                raise
            reply = await self._create(request, structured=False)
            self._structured = False
            self.say(f"The server refuses a JSON schema ({fault}): JSON is asked for in words.")
            return reply
        self._structured = True
        return reply

    async def _create(self, request, structured: bool) -> replies.Reply:
        """One HTTP request.

        Raises:
            _Fault: no reply came of it.
        """
        import openai

        if self.stopped is not None:
            raise _Fault("stopped", passing=False)
        fields = answers.body(request, structured)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                body = await self._receive(fields)
        except (TimeoutError, openai.APITimeoutError):
            raise _Fault(f"no reply within {self.settings.timeout_s:g} s", passing=True) from None
        except openai.APIStatusError as e:
            raise _status_fault(e) from None
        except openai.APIConnectionError as e:
            raise _Fault(f"no connection ({e.__cause__ or e})", passing=True) from None
        try:
            return replies.read_completion(body.decode())
        except UnicodeDecodeError as e:
            raise _Fault(f"the reply is not UTF-8 ({e.reason})", passing=True) from None
        except errors.UserError as e:
            raise _Fault(str(e), passing=True) from None

    async def _receive(self, fields) -> bytes:
        """Sends one request and returns the body of its reply."""
        body = b""
        sent = self.client.chat.completions.with_streaming_response.create(**fields)
        async with sent as response:
            async for part in response.iter_bytes():
                body += part
                if len(body) > MOST_BYTES:
                    raise _Fault(f"the reply is longer than {MOST_BYTES:,} bytes", passing=False)
        return body


def _status_fault(error) -> _Fault:
    status, told = error.status_code, error.body if isinstance(error.body, dict) else {}
    told = told.get("message") or error.message
    wait_s = retry_after(error.response.headers.get("retry-after", ""), time.time())
    asked = f" (asks to wait {wait_s:,.0f} s)" if wait_s else ""
    sentence = f"status {status}: {told}{asked}"
    return _Fault(sentence, status in PASSING or status >= 500, wait_s, status)


def retry_after(header: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, a number or a date; 0 where it says nothing."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
        except ValueError:
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
