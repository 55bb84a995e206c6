"""The harness adapter against the decoder itself and against our own evaluator."""

import json
import types

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

pytest.importorskip("lm_eval", reason="lm-eval is not installed: extra `harness`")

import tiny

from diq_jax import config, errors, pipeline
from diq_jax.data import chat
from diq_jax.evaluate import harness, harness_generation
from diq_jax.models import decoder, load, tokenizer
from diq_jax.run import reading

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: >-
  {{{{ "{before}" + question + "\\n\\nA. " + options.A + "\\nB. " + options.B + "\\nC. " + options.C
  + "{after}" }}}}
doc_to_choice: "{{{{['A. ' + options.A, 'B. ' + options.B, 'C. ' + options.C]}}}}"
doc_to_target: "{{{{['A', 'B', 'C'].index(answer_idx)}}}}"
target_delimiter: "{delimiter}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer_idx}}}}"
generation_kwargs: {{until: [{stop}], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    for name, is_chat in (("plain", False), ("chat", True)):
        folders.decoder(base / name, is_chat)
    folders.write(base / "pool.jsonl", folders.pool_rows(4))
    folders.write(base / "targets.jsonl", folders.choice_rows(2, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(12, "test"))
    return base


def requests(*arguments):
    return [types.SimpleNamespace(args=of) for of in arguments]


def open_model(made, name="plain", **changes):
    placement = tiny.placement()
    model = load.load(str(made / name), "float32", placement)
    tok = tokenizer.load_tokenizer(str(made / name), "model.path")
    settings = {"max_tokens": 64, "batch_tokens": 256} | changes
    layout = chat.make_layout(tok, model.cfg.vocab_size, "2024-07-26", "model.path")
    return harness.HarnessModel(model, layout, placement, **settings)


def oracle(model, ids):
    """(T - 1,) log-probabilities of each token after the first, and whether each is the likeliest,
    from all logits of the row alone.
    """
    tokens = jnp.array([ids])
    places = jnp.arange(len(ids))[None], jnp.ones_like(tokens)
    hidden = decoder.apply(model.params, model.cfg, tokens, *places)
    logs = jax.nn.log_softmax(decoder.logits(model.params, model.cfg, hidden)[0, :-1])
    logs, labels = np.asarray(logs), np.array(ids[1:])
    return logs[np.arange(len(labels)), labels], logs.argmax(1) == labels


def test_log_likelihoods_are_the_decoders_own(made):
    lm = open_model(made)
    texts = [
        ("what is two", " four"),
        ("what", " is it"),
        ("what is two", " five, or so"),
        ("", "a"),
    ]
    texts += [("what", ""), ("x" * 200, " cut")]
    found = lm.loglikelihood(requests(*texts))
    for (context, follows), (value, greedy) in zip(texts, found, strict=True):
        follows = lm.tok_encode(follows)
        before = lm.tok_encode(context)[-(64 - len(follows)) :] or [lm.eot_token_id]
        logs, likeliest = oracle(lm.model, before + follows)
        assert value == pytest.approx(logs[len(before) - 1 :].sum(), abs=1e-4)
        assert greedy == likeliest[len(before) - 1 :].all()
    # The likeliest token is the one that greedy decoding gives.
    ids = lm.tok_encode("what is")
    places = jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), int)
    hidden = decoder.apply(lm.model.params, lm.model.cfg, jnp.array([ids]), *places)
    best = int(jnp.argmax(decoder.logits(lm.model.params, lm.model.cfg, hidden)[0, -1]))
    assert lm._scores([(ids, [best]), (ids, [best ^ 1])])[0][1]
    assert not lm._scores([(ids, [best]), (ids, [best ^ 1])])[1][1]
    with pytest.raises(errors.UserError, match="an answer of 99 tokens does not fit max_tokens"):
        lm.loglikelihood(requests(("a", "b" * 99)))


def test_rolling_scores_every_token_once_in_windows(made):
    lm = open_model(made, max_tokens=17)
    short, long = "a short text", "a text of more tokens than a window takes"
    found = lm.loglikelihood_rolling(requests((short,), (long,), ("",)))
    ids = lm.tok_encode(short)
    assert found[0] == pytest.approx(oracle(lm.model, [lm.eot_token_id, *ids])[0].sum(), abs=1e-4)
    # Windows of 16 tokens, each after the one before its first; the last one is filled up.
    ids, expected = [lm.eot_token_id, *lm.tok_encode(long)], 0.0
    for start in range(1, len(ids), 16):
        stop = min(start + 16, len(ids))
        logs, _ = oracle(lm.model, ids[max(0, stop - 17) : stop])
        expected += logs[-(stop - start) :].sum()
    assert found[1] == pytest.approx(expected, abs=1e-4) and found[2] == 0


def test_generation_is_delegated_and_stopped(made):
    asked = []

    def generate(contexts, arguments):
        asked.append((contexts, arguments))
        return [f"said {len(c)}. Then" for c in contexts]

    lm = open_model(made, generate=generate)
    stop, plain = {"until": [".", "\n"], "max_gen_toks": 4}, {"until": []}
    found = lm.generate_until(requests(("ab", stop), ("abc", plain), ("abcd", stop)))
    assert found == ["said 2", "said 3. Then", "said 4"]
    assert [(list(map(len, contexts)), of) for contexts, of in asked] == [
        ([2, 4], stop), ([3], plain),
    ]  # fmt: skip
    with pytest.raises(errors.UserError, match="no way to generate was given"):
        open_model(made).generate_until(requests(("ab", stop)))


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_the_harness_gives_the_accuracy_of_our_evaluator(made, tmp_path, name):
    settings = config.default()
    settings.model.path, settings.model.max_tokens = str(made / name), 256
    settings.evaluate.bootstrap_samples = 100
    for part in ("pool", "targets", "tests"):
        settings.data[part] = str(made / f"{part}.jsonl")
    pipeline.run(config.resolve(settings), tmp_path / "run", ["prepare", "evaluate"], False)
    ours = reading.read_jsonl(tmp_path / "run/evaluate/predictions.jsonl")
    accuracy = reading.read_json(tmp_path / "run/evaluate/results.json")["models"]["base"]

    before, after = ("Question: ", "\\n\\nAnswer:") if name == "plain" else ("", "")
    (tmp_path / "sums.yaml").write_text(
        TASK.format(rows=made / "tests.jsonl", before=before, after=after,
                    delimiter=" " if name == "plain" else "")
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        lm, manager = open_model(made, name, max_tokens=256), harness.find_tasks(["sums"], tmp_path)
        found, table = harness.run(lm, ["sums"], manager, 0, None, name == "chat")
    assert "|sums" in table
    assert found["results"]["sums"]["acc,none"] == accuracy["accuracy"]["mean"]
    samples = {s["doc"]["id"]: s["filtered_resps"] for s in found["samples"]["sums"]}
    for row in ours:
        theirs = [value for value, _ in samples[row["example_id"]]]
        np.testing.assert_allclose(theirs, list(row["log_likelihoods"].values()), atol=1e-4)


@pytest.mark.slow
def test_the_harness_gives_the_text_of_our_generator(made, tmp_path):
    plain = open_model(made)
    shape = plain.placement, 64, 256
    generate = harness_generation.make_generate(plain.model, plain.tokenizer, *shape, 0, None)
    questions = [row["question"] for row in reading.read_jsonl(made / "tests.jsonl")]
    contexts = [plain.tok_encode(text) for text in questions]
    ours = generate(contexts, {"max_gen_toks": 12})
    # A character, past the first ones, that some text has.
    stop = next(c for text in ours for c in text[2:] if c.isascii())
    (tmp_path / "writes.yaml").write_text(
        WRITES.format(rows=made / "tests.jsonl", stop=json.dumps(stop))
    )
    lm = open_model(made, generate=generate)
    found, _ = harness.run(lm, ["writes"], harness.find_tasks(["writes"], tmp_path), 0, None, False)
    theirs = {s["doc"]["question"]: s["resps"] for s in found["samples"]["writes"]}
    assert theirs == {q: [[o.partition(stop)[0]]] for q, o in zip(questions, ours, strict=True)}
    # An empty context is one token that begins a text.
    [empty] = lm.generate_until(requests(("", {"max_gen_toks": 12})))
    assert [empty] == generate([[lm.prefix_token_id]], {"max_gen_toks": 12})


@pytest.mark.slow
def test_the_script_runs_a_task_and_names_a_mistake(made, tmp_path):
    (tmp_path / "sums.yaml").write_text(
        TASK.format(rows=made / "tests.jsonl", before="", after="", delimiter=" ")
    )
    out = tmp_path / "found.json"
    always = f"--model={made / 'plain'}", f"--include_path={tmp_path}", f"--out={out}", "--limit=4"

    def script(*flags):
        return scripts.script("harness", *always, *flags)

    ended = script("--tasks=sums")
    assert ended.returncode == 0 and "|sums" in ended.stdout, ended.stderr[-2000:]
    assert reading.read_json(out)["n-samples"]["sums"]["effective"] == 4
    for flags, message in (
        (["--tasks=summs"], "the harness has no task 'summs'. Did you mean"),
        (["--tasks=sums", "--adapter=none"], "none has no adapter_config.json"),
    ):
        ended = script(*flags)
        assert ended.returncode == 2 and message in ended.stderr, ended.stderr[-2000:]
        assert "Traceback" not in ended.stderr
