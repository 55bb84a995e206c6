"""A real local server of the chat-completions protocol, which misbehaves on command."""

import dataclasses
import http.server
import json
import threading
import time
import zlib
from collections.abc import Callable

LEVELS = ("knowledge", "reasoning", "overall")


@dataclasses.dataclass(frozen=True)
class Act:
    """What the server does with one request; by default it sends `content` as an answer."""

    content: str = "{}"
    refusal: str | None = None
    finish: str = "stop"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    raw: bytes | None = None  # the body, in place of a completion
    delay_s: float = 0.0
    hang: bool = False  # no reply until the server closes
    close: bool = False  # the connection, without a word
    close_after: bool = False  # the connection, after a part of the reply

    def __str__(self) -> str:
        """What is not as usual, for the names of tests."""
        values = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return ",".join(f"{f.name}={value}" for f, value in values if value != f.default)


def levels(question: str) -> dict:
    """The levels that a well-behaved server gives, a function of the question."""
    digest = zlib.crc32(question.encode())
    return {name: 1 + (digest >> 8 * i) % 5 for i, name in enumerate(LEVELS)}


def answer(found: dict) -> str:
    return json.dumps({f"{name}_reason": "because" for name in LEVELS} | found)


def question(body: dict) -> str:
    return body["messages"][-1]["content"].split("<question>\n")[-1].split("\n</question>")[0]


class Server:
    """A context manager.

    Attributes:
        plan: (number of the request from 0, body) -> Act, or None for a good answer.
        bodies: of the requests, in the order of their coming.
        most_at_once: requests that were under way together.
    """

    def __init__(self, plan: Callable[[int, dict], Act | None] = lambda number, body: None):
        self.plan, self.bodies, self.most_at_once, self._now = plan, [], 0, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer._take(self, body)

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._http.shutdown()
        self._http.server_close()

    def _take(self, handler, body: dict) -> None:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        act = self.plan(number, body) or Act(answer(levels(question(body))))
        if act.hang:
            self._closed.wait()
        time.sleep(act.delay_s)
        with self._lock:
            self._now -= 1
        if act.hang or act.close:
            handler.close_connection = True
            return
        self._send(handler, act, body)

    def _send(self, handler, act: Act, body: dict) -> None:
        message = {"role": "assistant", "content": act.content, "refusal": act.refusal}
        completion = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": act.finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }  # fmt: skip
        if act.status != 200:
            completion = {"error": {"message": f"told {act.status}", "type": "x", "code": None}}
        data = json.dumps(completion).encode() if act.raw is None else act.raw
        handler.send_response(act.status)
        handler.send_header("Content-Type", "application/json")
        if not act.close_after:
            handler.send_header("Content-Length", str(len(data)))
        for name, value in act.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = handler.close_connection or act.close_after
