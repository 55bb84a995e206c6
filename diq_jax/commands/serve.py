r"""Serves a model of ours to clients of the OpenAI API, such as lm-eval or Inspect.

    diq serve --model=PATH [--adapter=RUN/finetune/adapter] [--port=8000]

Answers GET /v1/models, POST /v1/completions (also with echo and logprobs, by which evaluations
score options) and POST /v1/chat/completions, on the loopback address, one request at a time and
without streaming or a key. A bad request gets the API's error object. For example:

    lm_eval run --model local-completions --tasks medmcqa --model_args \
        base_url=http://127.0.0.1:8000/v1/completions,model=NAME,tokenizer=PATH,num_concurrent=1
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from diq_jax.commands import opened

if TYPE_CHECKING:
    from diq_jax.evaluate import serving

NAME = flags.DEFINE_string("name", "", "What requests call it; empty = the end of --model.")
PORT = flags.DEFINE_integer("port", 8000, "Of this machine; 0 = a free one.", 0, 2**16 - 1)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 4096, "Of a prompt and its answer; at most the model's positions.", lower_bound=2
)
SEED = flags.DEFINE_integer("seed", 0, "Of requests that name none.", lower_bound=0)


def open_served() -> "serving.Served":
    """Opens the model. Raises UserError where the model or adapter cannot be read."""
    from diq_jax.evaluate import serving

    found = opened.open_model()
    name = NAME.value or pathlib.PurePath(opened.MODEL.value).name
    tokens = min(MAX_TOKENS.value, found.model.cfg.max_positions)
    limits = tokens, opened.BATCH_TOKENS.value, SEED.value
    return serving.Served(found.model, found.layout, found.placement, name, *limits, found.adapter)


def main() -> None:
    """Serves until Ctrl-C."""
    from diq_jax.evaluate import api

    served = open_served()
    with api.ApiServer(PORT.value, served, opened.DTYPE.value) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        print(f"{address}  model {served.name}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
