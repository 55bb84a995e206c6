"""`diq serve`: a client of the OpenAI API gets the model's own numbers, and its mistakes named."""

import json
import threading
import urllib.error
import urllib.request

import folders
import jax
import numpy as np
import pytest
import tiny

from diq_jax.data import chat
from diq_jax.evaluate import api, serving
from diq_jax.models import load, tokenizer


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory):
    folder = str(folders.decoder(tmp_path_factory.mktemp("made")))
    placement = tiny.placement(data=1)
    model = load.load(folder, "float32", placement)
    tok = tokenizer.load_tokenizer(folder, "--model")
    layout = chat.make_layout(tok, model.cfg.vocab_size, "2024-07-26", "--model")
    served = serving.Served(model, layout, placement, "tiny", 96, 256, 0)
    with api.ApiServer(0, served, "float32") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, body=None, raw=None):
    """The status and the JSON of an answer."""
    url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.load(e)


def test_the_one_model_is_listed(server):
    status, found = ask(server, "/v1/models")
    assert status == 200 and [m["id"] for m in found["data"]] == ["tiny"]


def test_echoed_tokens_have_the_models_own_likelihoods(server):
    """As an evaluation asks: the prompt as token ids, one greedy token, echo and logprobs."""
    served = server.served
    ids = served.layout.tokenizer("what is 1 plus 1")["input_ids"]
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}
    status, found = ask(server, "/v1/completions", asked | {"model": "tiny", "seed": 1234})
    assert status == 200, found
    [choice] = found["choices"]
    told = choice["logprobs"]
    logits = served.model.logits(np.array([ids]))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    own = expected[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(told["token_logprobs"][1:-1], own, atol=1e-5)
    np.testing.assert_allclose(told["token_logprobs"][-1], expected[-1].max(), atol=1e-5)
    for top, row in zip(told["top_logprobs"][1:], expected, strict=True):
        np.testing.assert_allclose(max(top.values()), row.max(), atol=1e-5)
    assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())  # it was greedy
    assert choice["text"].startswith("what is 1 plus 1") and len(told["tokens"]) == len(ids) + 1
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
    assert found["usage"] == usage
    only = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    again = ask(server, "/v1/completions", only)[1]["choices"][0]["logprobs"]
    assert again["token_logprobs"] == told["token_logprobs"][:-1]


def test_the_client_of_lm_eval_gets_the_models_own_numbers(server, tmp_path):
    """Its local-completions, which sends token ids: sums of log-likelihoods, and greedy texts."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: extra `harness`")
    from lm_eval.api import instance
    from lm_eval.models import openai_completions

    served = server.served
    folders.tokenizer().save_pretrained(tmp_path)
    client = openai_completions.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.server_address[1]}/v1/completions",
        model="tiny", tokenizer=str(tmp_path), num_concurrent=1, max_length=96,
    )  # fmt: skip

    def ask_all(kind, arguments):
        made = [instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
        return getattr(client, kind)(made)

    asked = [("what is 1 plus 1", " it is 2"), ("why?", " because"), ("why?", " so")]
    for (question, answer), (found, greedy) in zip(
        asked, ask_all("loglikelihood", asked), strict=True
    ):
        before, ids = (
            served.layout.tokenizer(text)["input_ids"] for text in (question, question + answer)
        )
        logits = np.asarray(jax.nn.log_softmax(served.model.logits(np.array([ids]))[0]))
        places = np.arange(len(before) - 1, len(ids) - 1)
        own = logits[places, ids[len(before) :]].sum()
        np.testing.assert_allclose(found, own, atol=1e-4)
        assert greedy == (logits[places].argmax(-1) == ids[len(before) :]).all()
    settings = {"until": ["<|user|>"], "max_gen_toks": 8, "do_sample": False}
    [text] = ask_all("generate_until", [("why?", settings)])
    body = {"prompt": "why?", "max_tokens": 8, "temperature": 0, "stop": ["<|user|>"]}
    assert ask(server, "/v1/completions", body)[1]["choices"][0]["text"] == text


def test_texts_stop_and_a_seed_repeats_them(server):
    asked = {"prompt": ["what", "what is"], "max_tokens": 12, "temperature": 1.5, "n": 2}
    first, again = (ask(server, "/v1/completions", asked | {"seed": 7})[1] for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert [c["index"] for c in first["choices"]] == [0, 1, 2, 3] and texts[0] != texts[1]
    longest = max(texts, key=len)
    place = texts.index(longest)
    stopped = ask(server, "/v1/completions", asked | {"seed": 7, "stop": longest[2:4]})[1]
    choice = stopped["choices"][place]
    assert choice["text"] == longest[: longest.find(longest[2:4])]
    assert choice["finish_reason"] == "stop"


def test_a_chat_is_the_completion_of_what_the_template_writes(server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    greedy = {"max_tokens": 12, "temperature": 0}
    found = ask(server, "/v1/chat/completions", {"messages": messages} | greedy)[1]
    text = chat.write_conversation(messages, server.served.layout, True)
    completed = ask(server, "/v1/completions", {"prompt": text} | greedy)[1]
    [answer], [completion] = found["choices"], completed["choices"]
    assert answer["message"] == {"role": "assistant", "content": completion["text"]}
    assert answer["finish_reason"] == completion["finish_reason"] and answer["index"] == 0


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/v1/completions", {"prompt": "a", "stream": True}, 400, "stream is not built here"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 400, "must be one of tiny; got 'gpt'"),
        ("/v1/completions", {"prompt": "a", "tempratur": 1}, 400, "Did you mean 'temperature'"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature must be from 0"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "4"}, 400, "max_tokens must be a whole"),
        ("/v1/completions", {"prompt": "a" * 200}, 400, "do not fit the 96 tokens of this server"),
        ("/v1/completions", {"prompt": [10**6]}, 400, "prompt must be a text or token ids from 0"),
        ("/v1/completions", {"prompt": []}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": "a", "logprobs": 6}, 400, "logprobs must be from 0 to 5"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "do not fit"),
        ("/v1/completions", {}, 400, "the request has no field 'prompt'"),
        ("/v1/completions", ["a"], 400, "must hold a JSON object"),
        ("/v1/chat/completions", {"messages": []}, 400, "at least one message"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "no field 'content'"),
        ("/v1/embeddings", {}, 404, "there is no POST /v1/embeddings"),
        ("/v2", None, 404, "there is no GET /v2"),
    ],
)
def test_bad_requests_get_the_errors_of_the_api(server, path, body, status, message):
    code, found = ask(server, path, body)
    assert code == status and message in found["error"]["message"], found
    assert found["error"]["type"] == "invalid_request_error"


def test_what_is_no_json_or_too_large_is_refused(server, monkeypatch):
    code, found = ask(server, "/v1/completions", raw=b'{"prompt": ')
    assert code == 400 and "the request is not JSON" in found["error"]["message"]
    monkeypatch.setattr(api, "MOST_BYTES", 10)
    code, found = ask(server, "/v1/completions", {"prompt": "a" * 20})
    assert code == 413 and "at most 10 bytes" in found["error"]["message"]
