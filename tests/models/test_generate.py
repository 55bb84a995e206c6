"""Generation equals transformers token for token, whatever the batch, order and devices."""

import functools
import os

import forks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from reference import torch
from torch_models import load, torch_model

from diq_jax.models import cache, decoder, generate, lora, sampling
from diq_jax.models import load as load_lib

GREEDY = sampling.Sampling(max_new_tokens=20, temperature=0.0, top_p=1.0, seed=0)
DRAWN = sampling.Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9, seed=3)


def prompts(count, vocab=50, longest=14, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, count)
    lengths[0] = longest
    return [
        generate.Prompt(f"p{i}", 0, rng.integers(0, vocab, n).astype(np.int32))
        for i, n in enumerate(lengths)
    ]


def spell(tokens):
    return " ".join(map(str, tokens))


@functools.cache
def tiny_model():
    return tiny.model()


@functools.cache
def one_device():
    return tiny.placement()


@functools.cache
def _generator(cfg, settings, ends, stop, placement):
    return generate.make_generator(cfg, settings, ends, stop, spell, placement)


def answers(model, asked, settings, rows, ends=(), stop=(), columns=None, parallel=None):
    """{(prompt_id, sample): Answer}; tokens are spelt as numbers."""
    placement = tiny.placement(**parallel) if parallel else one_device()
    maker = _generator(model.cfg, settings, ends, stop, placement)
    columns = columns or max(len(p.ids) for p in asked)
    stream = generate.Stream(tuple(range(len(asked))), rows, columns)
    params = tiny.placed(model.params, placement)
    found = dict(generate.run(maker, params, None, asked, stream))
    assert len(found) == len(asked)
    return {(asked[i].prompt_id, asked[i].sample): answer for i, answer in found.items()}


def theirs(model, asked, count):
    """What transformers' generate gives for a left-padded batch: (B, count)."""
    longest = max(len(p.ids) for p in asked)
    ids = np.stack([np.pad(p.ids, (longest - len(p.ids), 0)) for p in asked])
    mask = np.stack([np.arange(longest) >= longest - len(p.ids) for p in asked])
    # No token ends a row: the library's own settings have one.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    ids, mask = (torch.tensor(x, dtype=torch.long) for x in (ids, mask))
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count)
    return out[:, longest:].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama3-tied", "mistral-window", "qwen2-tied", "qwen3", "gemma3", "olmo3",
        "phi4-partial", "smollm3", "granite", "qwen3_5",
    ],
)  # fmt: skip
def test_greedy_equals_transformers_token_for_token(name, tmp_path):
    model = torch_model(name, tmp_path)
    params, cfg, _ = load(tmp_path)
    asked = prompts(8, vocab=100, longest=20)
    settings = sampling.Sampling(64, 0.0, 1.0, 0)
    found = answers(load_lib.Model(params, cfg, {}, ""), asked, settings, rows=8)
    expected = theirs(model, asked, 64)
    for prompt, tokens in zip(asked, expected, strict=True):
        assert found[prompt.prompt_id, 0] == generate.Answer(spell(tokens), 64, generate.LENGTH)


@pytest.mark.parametrize("window", [None, 4, 18, *tiny.APART])
def test_cached_logits_equal_uncached(window):
    """Across the border of a chunk, with an adapter, for rows of different lengths."""
    changes = tiny.APART.get(window, {"sliding_window": window, "qk_norm": True})
    model = tiny.model(**changes, tied_head=False)
    adapter = lora.init(jax.random.key(1), model.cfg, "qk?v?_proj|down_proj", 2, 4.0, False, "test")
    asked, steps = prompts(3), cache.CHUNK + 3
    settings = sampling.Sampling(steps, 0.0, 1.0, 0)
    maker = generate.make_generator(model.cfg, settings, (), (), spell, tiny.placement())
    stream = generate.Stream((0, 1, 2), 3, 14)
    state = generate.empty_state(maker, model.params, stream)
    batch = generate.make_batch(maker, asked, [0, 1, 2], stream)
    state, first = maker.begin(model.params, adapter, state, batch)
    rows = [[int(token)] for token in first]

    @jax.jit
    def cached(state):
        empty = jnp.zeros((*state.k.shape[:3], cache.CHUNK, state.k.shape[4]))
        start = stream.columns + state.generated - 1
        return cache.next_logits(
            model.params, adapter, state, (empty, empty), 0, start, model.cfg, settings
        )[0]

    state, tokens = maker.decode(model.params, adapter, state, None)
    rows = [row + new.tolist() for row, new in zip(rows, np.asarray(tokens), strict=True)]
    got = cached(state)
    for i, (prompt, row) in enumerate(zip(asked, rows, strict=True)):
        ids = np.concatenate([prompt.ids, row])[None]
        places = np.arange(ids.shape[1])[None], np.ones_like(ids)
        hidden = decoder.apply(model.params, model.cfg, ids, *places, adapter)
        logits = decoder.logits(model.params, model.cfg, hidden)[0]
        np.testing.assert_allclose(got[i], logits[-1], atol=1e-4)
        np.testing.assert_array_equal(row, np.argmax(logits, axis=-1)[len(prompt.ids) - 1 : -1])


def test_batch_order_padding_and_refilling_change_nothing():
    """Drawn answers, which the whole distribution decides."""
    model, asked, settings = tiny_model(), prompts(7), DRAWN
    whole = answers(model, asked, settings, rows=7)
    # Tokens at which some rows end early, at different times.
    ends = tuple(int(whole[f"p{i}", 0].text.split()[3 * i]) for i in (1, 2, 4))
    whole = answers(model, asked, settings, rows=7, ends=ends)
    assert len({answer.tokens for answer in whole.values()}) > 2
    for rows, order, columns in ((1, 1, None), (4, -1, None), (2, 1, 23)):
        assert answers(model, asked[::order], settings, rows, ends=ends, columns=columns) == whole
    alone = answers(model, [asked[2]], settings, rows=1, ends=ends)
    assert alone["p2", 0] == whole["p2", 0]


def test_samples_and_seeds_differ_and_repeat():
    model, (first, *_) = tiny_model(), prompts(1)
    asked = [generate.Prompt("p", sample, first.ids) for sample in range(4)]
    drawn = answers(model, asked, DRAWN, rows=4)
    assert len({answer.text for answer in drawn.values()}) == 4
    assert answers(model, asked, DRAWN, rows=3) == drawn
    other = answers(model, asked, sampling.Sampling(20, 1.0, 0.9, 4), rows=4)
    assert not {a.text for a in other.values()} & {a.text for a in drawn.values()}


def test_a_nucleus_of_nothing_is_greedy():
    model, asked = tiny_model(), prompts(4)
    narrow = sampling.Sampling(20, 1.0, 1e-6, 3)
    assert answers(model, asked, narrow, 4) == answers(model, asked, GREEDY, 4)


def draw(logits, count, **changes):
    settings = sampling.Sampling(**({"max_new_tokens": 1, "top_p": 1.0, "seed": 5} | changes))
    rows = jnp.tile(jnp.array([logits], jnp.float32), (count, 1))
    zeros = jnp.zeros(count, jnp.int32)
    pick = jax.jit(functools.partial(sampling.pick, settings=settings))
    tokens = pick(rows, zeros.astype(jnp.uint32), jnp.arange(count), zeros)
    return np.bincount(tokens, minlength=3) / count


@pytest.mark.parametrize(
    "top_p, expected",
    # 0.5 and 0.3 alone make 0.8, so that 0.75 leaves two tokens and 0.85 all three.
    [(1.0, [0.5, 0.3, 0.2]), (0.75, [0.625, 0.375, 0.0]), (0.85, [0.5, 0.3, 0.2])],
)
def test_tokens_come_as_often_as_they_should(top_p, expected):
    count, expected = 20_000, np.array(expected)
    # At temperature 2 logits of 2 log p give back p.
    shares = draw(2 * np.log([0.5, 0.3, 0.2]), count, temperature=2.0, top_p=top_p)
    errors = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(shares - expected) <= 4 * errors), shares


def test_nucleus_by_hand():
    scores = np.log(np.array([[0.1, 0.4, 0.25, 0.25], [1e-30, 0.9, 0.1, 1e-9]], np.float32))
    # 0.4 is short of 0.5; 0.25 comes twice, and both belong.
    expected = [[False, True, True, True], [False, True, False, False]]
    np.testing.assert_array_equal(sampling.in_nucleus(scores, 0.5), expected)
    np.testing.assert_array_equal(sampling.in_nucleus(scores, 0.3)[0], [0, 1, 0, 0])


def test_an_answer_ends_at_its_end_its_length_or_a_stop():
    model, asked = tiny_model(), prompts(1)
    text = answers(model, asked, GREEDY, 1)["p0", 0].text
    words = text.split()
    assert len(words) == 20
    ended = answers(model, asked, GREEDY, 1, ends=(int(words[7]),))["p0", 0]
    first = words.index(words[7])
    assert ended == generate.Answer(" ".join(words[:first]), first + 1, generate.END)
    # A stop across two tokens; the text before it is kept to the letter.
    stop = text[10:14]
    stopped = answers(model, asked, GREEDY, 1, stop=("nowhere", stop))["p0", 0]
    assert (stopped.text, stopped.finish) == (text[: text.index(stop)], generate.STOP)
    short = sampling.Sampling(1, 0.0, 1.0, 0)
    assert answers(model, asked, short, 1)["p0", 0].text == words[0]


def test_streams_take_prompts_by_length():
    asked = prompts(9, longest=30)
    streams = generate.plan(asked, [12, 30], max_new_tokens=10, tokens=100, multiple=2)
    assert [stream.columns for stream in streams] == [12, 30]
    assert sorted(i for stream in streams for i in stream.indices) == list(range(9))
    for stream in streams:
        assert all(len(asked[i].ids) <= stream.columns for i in stream.indices)
        assert stream.rows % 2 == 0 and stream.rows <= 2 * max(1, 100 // (stream.columns + 10))


def test_logits_that_are_not_finite_name_the_prompt():
    model = tiny_model()
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[49].set(jnp.nan)
    broken = load_lib.Model(params, model.cfg, {}, "")
    with pytest.raises(ValueError, match="gives 'p0' logits that are not finite"):
        answers(broken, prompts(1), GREEDY, 1)


DEVICES = """
import sys
sys.path[:0] = ["tests", "tests/models"]
import test_generate as t, tiny
asked = t.prompts(11)
for of, settings in (({}, t.GREEDY), ({}, t.DRAWN), (tiny.APART["delta"], t.GREEDY)):
    model = tiny.model(**of, num_kv_heads=4)
    one = t.answers(model, asked, settings, 3, ends=(4, 11, 17), parallel={"data": 1})
    for parallel in ({"data": 8}, {"strategy": "pmap"}, {"data": 4, "model": 2}):
        assert t.answers(model, asked, settings, 8, (4, 11, 17), parallel=parallel) == one, parallel
"""


@pytest.mark.slow
def test_eight_devices_are_one(monkeypatch):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", flags)
    ended = forks.run(["-c", "import warnings; warnings.simplefilter('error')\n" + DEVICES])
    assert ended.returncode == 0, ended.stderr[-3000:]
