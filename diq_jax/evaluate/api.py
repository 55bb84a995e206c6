"""The OpenAI API over HTTP, on the loopback address (`diq serve`)."""

import http.server
import json
import threading
import traceback
from typing import Any

from diq_jax import errors
from diq_jax.evaluate import serving
from diq_jax.run import devices, reading

MOST_BYTES = 2**24  # of a request


class ApiHandler(http.server.BaseHTTPRequestHandler):
    """Answers with JSON; `server.served` has the answers."""

    protocol_version = "HTTP/1.1"
    server: "ApiServer"

    def do_GET(self) -> None:
        """Lists the model."""
        if self.path.rstrip("/") != "/v1/models":
            self._fail(404, f"there is no GET {self.path}; there is /v1/models.")
        else:
            self._send(200, self.server.served.models())

    def do_POST(self) -> None:
        """Completes a prompt or answers a chat."""
        served = self.server.served
        routes = {
            "/v1/completions": served.completions,
            "/v1/chat/completions": served.chat_completions,
        }
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True  # the body is not read
            self._fail(413, f"a request has a Content-Length of at most {MOST_BYTES:,} bytes.")
            return
        text = self.rfile.read(int(length)).decode("utf-8", "replace")
        route = routes.get(self.path.rstrip("/"))
        if route is None:
            self._fail(404, f"there is no POST {self.path}; there are {', '.join(routes)}.")
            return
        try:
            # The precision is the thread's, and each connection has its own.
            with self.server.turn, devices.matmul_precision(self.server.dtype):
                answer = route(reading.parse_json(text, "the request"))
        except errors.UserError as e:
            self._fail(400, str(e))
        except Exception:  # a fault of ours ends this request, not the server
            traceback.print_exc()
            self._fail(500, "a fault of diq_jax; its traceback is on the server's terminal.")
        else:
            self._send(200, answer)

    def log_message(self, format: str, *args: object) -> None:
        """Drops the line that a request would print."""

    def _fail(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._send(
            status, {"error": {"message": message, "type": kind, "param": None, "code": None}}
        )

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class ApiServer(http.server.ThreadingHTTPServer):
    """Holds connections open side by side, and lets one request at a time compute.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, port: int, served: serving.Served, dtype: str) -> None:
        self.served, self.dtype, self.turn = served, dtype, threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), ApiHandler)
        except OSError as e:
            raise errors.UserError(f"--port={port}: {e.strerror}; choose another.") from e
