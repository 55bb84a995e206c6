"""Asks many questions of a language model behind any OpenAI-compatible endpoint.

Requests run side by side up to a bound; the openai client tries again what another try may mend,
and waits as long as a server asks, up to two minutes. Every reply that was paid for is on the disk
before anything else happens, so that a killed run asks only for what is missing.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from diq_jax import errors
from diq_jax.clients import answers, replies

if TYPE_CHECKING:
    import openai

GIVE_UP_AFTER = 5  # requests in a row, each with all its tries, that got no reply;
GIVE_UP_UNHEARD = 2  # fewer before any reply, but not the first: it may be that request's own fault
REFUSES_SCHEMA = (400, 422)
FATAL = (401, 403, 404)  # no request will fare better: key, rights, path or model
MOST_BYTES = 2**24  # of a reply's body
BACKOFF_S = 0.5  # before an unreadable reply is asked for again; doubles each time
KEPT = "replies so far are kept, and the same command continues"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Names the endpoint and says how it is asked; nothing here changes an answer.

    Raises:
        UserError: a value out of range.
    """

    base_url: str  # http://localhost:8000/v1, as servers print it
    api_key_env: str  # the name of the environment variable that holds the key
    concurrency: int  # requests under way at once
    timeout_s: float  # of one try, to the first byte and from there to the last
    answer_tries: int  # replies to ask for until one is an answer
    tries: int = 6  # to get a reply

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise errors.UserError(
                f"base_url must start with http:// or https://; got {self.base_url!r}."
            )
        for name in ("concurrency", "tries", "answer_tries"):
            if getattr(self, name) < 1:
                raise errors.UserError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 < self.timeout_s < math.inf:
            raise errors.UserError(f"timeout_s must be above 0; got {self.timeout_s}.")


def connect(settings: Settings) -> "openai.AsyncOpenAI":
    """Makes a client; nothing is sent yet.

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
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=settings.base_url,
        timeout=settings.timeout_s,
        max_retries=settings.tries - 1,
    )


def ask_all(
    client: "openai.AsyncOpenAI",
    requests: Sequence[answers.Request],
    settings: Settings,
    cache: replies.Cache,
    done: Callable[[answers.Outcome], None],
    say: Callable[[str], None],
) -> list[answers.Outcome]:
    """Asks each request until the replies settle it, and closes the client. Main thread only.

    On Ctrl-C requests already sent are waited for and kept; a second Ctrl-C drops them.

    Args:
        client: from `connect`.
        requests: all different, as from `answers.split`.
        done: called with each outcome as it comes.
        say: called with a sentence that the user should see.

    Returns:
        The outcomes in the order of the requests.

    Raises:
        UserError: the endpoint rejects every request, or stopped answering. Replies are kept.
    """
    return asyncio.run(_ask_all(client, requests, settings, cache, done, say))


async def _ask_all(client, requests, settings, cache, done, say) -> list[answers.Outcome]:
    session = _Session(client, settings, cache, say)
    outcomes: list[Any] = [None] * len(requests)
    left = iter(enumerate(requests))

    async def work() -> None:
        for i, request in left:
            outcomes[i] = await session.ask(request)
            if outcomes[i] is not None:
                done(outcomes[i])
            if session.stopped is not None:
                return

    log = logging.getLogger("openai._base_client")
    log.handlers, log.propagate = [session], False
    log.setLevel(logging.INFO)
    async with client:
        with _first_interrupt(session):
            await asyncio.gather(*(work() for _ in range(settings.concurrency)))
    if session.stopped is not None:
        raise session.stopped
    return outcomes


@contextlib.contextmanager
def _first_interrupt(session) -> Iterator[None]:
    """Lets the first Ctrl-C stop the session; the next is as usual."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        session.stopped = KeyboardInterrupt()
        session.say("Waiting for the requests already sent; Ctrl-C again drops them.")

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _Fault(Exception):
    """Says why a request got no reply; `status`: the server's, `again`: whether to ask again."""

    def __init__(self, sentence: str, status: int = 0, again: bool = False) -> None:
        super().__init__(answers.shorten(sentence))
        self.status, self.again = status, again


class _Session(logging.Handler):
    """Runs requests over one endpoint: its cache, what is known of the server, whether to stop.

    It handles the client's log, where alone the client says that it tries again.
    """

    def __init__(self, client, settings, cache, say) -> None:
        super().__init__()
        self.client, self.settings, self.cache, self.say = client, settings, cache, say
        self.stopped: BaseException | None = None
        self._structured: bool | None = None  # whether the server takes a JSON schema
        self._deciding = asyncio.Lock()
        self._unanswered, self._warned = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Passes on what the client says of retries."""
        if str(record.msg).startswith("Retrying"):
            self._warn("a request got no reply")

    def _warn(self, fault: str) -> None:
        if not self._warned:
            self.say(f"{fault}: trying again; later faults are waited out in silence.")
        self._warned = True

    async def ask(self, request: answers.Request) -> answers.Outcome | None:
        """Asks until replies settle the request; None where the session stopped first."""
        tries = self.settings.answer_tries
        while isinstance(step := answers.settle(request, self.cache, tries), answers.Request):
            if self.stopped is not None:
                return None
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
        own = fault.status and fault.status < 500 and fault.status != 429
        unheard = self._structured is None and not own
        limit = GIVE_UP_UNHEARD if unheard else GIVE_UP_AFTER
        if self._unanswered >= limit or fault.status in FATAL:
            self.stopped = errors.UserError(f"{self.settings.base_url}: {fault}; {KEPT}.")

    async def _send(self, request) -> replies.Reply:
        """Sends a request; the first one finds out alone whether the server takes a schema."""
        if self._structured is None:
            async with self._deciding:
                if self._structured is None:
                    return await self._decide(request)
        return await self._read(request, self._structured)

    async def _decide(self, request) -> replies.Reply:
        try:
            reply = await self._read(request, structured=True)
        except _Fault as fault:
            if fault.status not in REFUSES_SCHEMA:
                raise
            reply = await self._read(request, structured=False)
            self._structured = False
            self.say(f"The server refuses a JSON schema ({fault}): JSON is asked for in words.")
            return reply
        self._structured = True
        return reply

    async def _read(self, request, structured: bool) -> replies.Reply:
        """Asks until a reply can be read, or raises the last fault."""
        for number in range(self.settings.tries):
            try:
                return await self._create(answers.body(request, structured))
            except _Fault as fault:
                last = number + 1 == self.settings.tries or self.stopped is not None
                if last or not fault.again:
                    raise
                self._warn(str(fault))
            await asyncio.sleep(BACKOFF_S * 2**number)
        raise AssertionError("unreachable")

    async def _create(self, fields: dict[str, Any]) -> replies.Reply:
        """Sends one request, which the client repeats until it is answered."""
        import httpx2  # what the client is made of
        import openai

        seconds, body = self.settings.timeout_s, b""
        try:
            sent = self.client.chat.completions.with_streaming_response.create(**fields)
            async with sent as response, asyncio.timeout(seconds):
                async for part in response.iter_bytes():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise _Fault(f"the reply is longer than {MOST_BYTES:,} bytes")
        except openai.APIStatusError as e:
            told = e.body.get("message") if isinstance(e.body, dict) else None
            raise _Fault(f"status {e.status_code}: {told or e.message}", e.status_code) from None
        except openai.APITimeoutError:
            raise _Fault(f"no reply within {seconds:g} s") from None
        except openai.APIConnectionError as e:
            raise _Fault(f"no connection ({e.__cause__ or e})") from None
        except TimeoutError:
            raise _Fault(f"no reply within {seconds:g} s", again=True) from None
        except httpx2.HTTPError as e:
            raise _Fault(f"the connection broke off ({e})", again=True) from None
        try:
            return replies.read_completion(body.decode())
        except UnicodeDecodeError as e:
            raise _Fault(f"the reply is not UTF-8 ({e.reason})", again=True) from None
        except errors.UserError as e:
            raise _Fault(str(e), again=True) from None
