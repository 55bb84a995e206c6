"""Serves a model of ours to clients of the OpenAI API, such as lm-eval, Inspect or your own script.

    diq serve --model=PATH [--adapter=RUN/finetune/adapter] [--port=8000]

Answers GET /v1/models, POST /v1/completions (also with echo and logprobs, by which evaluations
score options) and POST /v1/chat/completions, on the loopback address, one request at a time and
without streaming or a key. A bad request gets the API's error object. For example:

    lm_eval run --model local-completions --tasks medmcqa --model_args \\
        base_url=http://127.0.0.1:8000/v1/completions,model=NAME,tokenizer=PATH,num_concurrent=1
"""

import http.server
import json
import pathlib
import threading
import traceback
from typing import TYPE_CHECKING, Any

from absl import flags

from diq_jax import config, errors
from diq_jax.run import reading

if TYPE_CHECKING:
    from diq_jax.evaluate import serving

MODEL = flags.DEFINE_string("model", None, "As model.path.", required=True)
ADAPTER = flags.DEFINE_string("adapter", "", "A PEFT folder; empty = the base model.")
NAME = flags.DEFINE_string("name", "", "What requests call it; empty = the end of --model.")
PORT = flags.DEFINE_integer("port", 8000, "Of this machine; 0 = a free one.", 0, 2**16 - 1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "As model.dtype.")
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 4096, "Of a prompt and its answer; at most the model's positions.", lower_bound=2
)
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens of one batch.", lower_bound=1)
DATE = flags.DEFINE_string("date", config.Data().date, "As data.date.")
SEED = flags.DEFINE_integer("seed", 0, "Of requests that name none.", lower_bound=0)
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
        from diq_jax.run import devices

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

    def __init__(self, port: int, served: "serving.Served", dtype: str) -> None:
        self.served, self.dtype, self.turn = served, dtype, threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), ApiHandler)
        except OSError as e:
            raise errors.UserError(f"--port={port}: {e.strerror}; choose another.") from e


def open_served() -> "serving.Served":
    """Opens the model. Raises UserError where the model or adapter cannot be read."""
    from diq_jax.data import chat
    from diq_jax.evaluate import serving
    from diq_jax.models import load, lora, tokenizer
    from diq_jax.run import devices

    placement = devices.make_placement(config.Parallel())
    model = load.load(MODEL.value, DTYPE.value, placement, "--model")
    adapter = None
    if ADAPTER.value:
        adapter = placement.replicate(lora.load_peft(ADAPTER.value, model.cfg, "--adapter"))
    tok = tokenizer.load_tokenizer(MODEL.value, "--model")
    layout = chat.make_layout(tok, model.cfg.vocab_size, DATE.value, "--model")
    name = NAME.value or pathlib.PurePath(MODEL.value).name
    tokens = min(MAX_TOKENS.value, model.cfg.max_positions)
    limits = tokens, BATCH_TOKENS.value, SEED.value
    return serving.Served(model, layout, placement, name, *limits, adapter)


def main() -> None:
    """Serves until Ctrl-C."""
    served = open_served()
    with ApiServer(PORT.value, served, DTYPE.value) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        print(f"{address}  model {served.name}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
