"""The harness's generation arguments, and texts for them; the harness itself is not needed."""

import folders
import pytest
import tiny

from diq_jax import errors
from diq_jax.data import chat
from diq_jax.evaluate import generation, harness_generation
from diq_jax.models import generate, load, sampling, tokenizer


@pytest.fixture(scope="module", name="opened")
def _opened(tmp_path_factory):
    folder = str(folders.decoder(tmp_path_factory.mktemp("made")))
    model = load.load(folder, "float32", tiny.placement())
    tok = tokenizer.load_tokenizer(folder, "model.path")
    return model, chat.make_layout(tok, model.cfg.vocab_size, "2024-07-26", "model.path")


def make(opened, max_tokens=64, batch_tokens=128, seed=0):
    return harness_generation.make_generate(
        *opened, tiny.placement(), max_tokens, batch_tokens, seed, None
    )


def alone(opened, prompts, settings):
    """The text of each (ids, sample), as the generator gives it without any other."""
    model, layout = opened
    generator = generate.make_generator(
        model.cfg, settings, generation.end_tokens(*opened), (),
        lambda ids: layout.tokenizer.decode(ids, skip_special_tokens=True),
        tiny.placement(),
    )  # fmt: skip
    for ids, sample in prompts:
        prompt = generate.Prompt(generator.text(ids), sample, ids)
        stream = generate.Stream((0,), 1, 52)
        [(_, answer)] = generate.run(generator, model.params, None, [prompt], stream)
        yield answer.text


def test_texts_are_those_of_the_generator_alone(opened):
    contexts = [opened[1].tokenizer(text)["input_ids"] for text in ("what", "x" * 80, "what")]
    kept = [context[-52:] for context in contexts]  # 64 less 12
    greedy = {"until": [], "do_sample": False, "temperature": 0.7, "max_gen_toks": 12}
    found = make(opened)(contexts, greedy)
    settings = sampling.Sampling(12, 0.0, 1.0, 0)
    assert found == list(alone(opened, [(ids, 0) for ids in kept], settings))
    assert found[0] == found[2] != found[1]
    # A context that comes again is drawn again.
    draw = {"until": [], "temperature": 1.0, "top_p": 0.9, "max_tokens": 12}
    drawn = make(opened, seed=3)(contexts, draw)
    settings = sampling.Sampling(12, 1.0, 0.9, 3)
    assert drawn == list(alone(opened, zip(kept, (0, 0, 1), strict=True), settings))
    assert drawn[0] != drawn[2]


def test_a_special_token_stops_a_text(opened):
    ids = opened[1].tokenizer("what")["input_ids"]
    draw = {"temperature": 20.0, "max_gen_toks": 50}  # nearly uniform over 261 tokens
    texts = make(opened, batch_tokens=2000)([ids] * 40, draw | {"until": ["<|user|>"]})
    free = make(opened, batch_tokens=2000)([ids] * 40, draw)
    assert all(whole.startswith(text) for text, whole in zip(texts, free, strict=True))
    assert texts != free


@pytest.mark.parametrize(
    "arguments, temperature, longest, stop",
    [
        ({}, 0, 256, ()),
        ({"until": "\n"}, 0, 256, ("\n",)),
        ({"until": ["", "Q:"], "max_new_tokens": 3}, 0, 3, ("Q:",)),
        ({"max_tokens": 3, "max_gen_toks": 4}, 0, 4, ()),
        ({"do_sample": True}, 1, 256, ()),
        ({"temperature": 0.5}, 0.5, 256, ()),
        ({"do_sample": False, "temperature": 0.5}, 0, 256, ()),
    ],
)
def test_arguments(arguments, temperature, longest, stop):
    settings, found = harness_generation.read_arguments(arguments, 7)
    assert settings == sampling.Sampling(longest, temperature, 1.0, 7) and found == stop


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"top_k": 5}, "'top_k' is not known here; known are until, max_gen_toks"),
        ({"top-p": 0.5}, "Did you mean 'top_p'?"),
        ({"until": [1]}, "until must be a text or a list of texts; got [1]."),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number above 0; got 0."),
        ({"temperature": "hot"}, "temperature must be at least 0; got 'hot'."),
        ({"top_p": 0}, "top_p must be in (0, 1]; got 0."),
        ({"max_gen_toks": 64}, "texts of up to 64 tokens do not fit max_tokens = 64"),
    ],
)
def test_a_mistake_is_one_sentence(opened, arguments, message):
    with pytest.raises(errors.UserError) as caught:
        make(opened)([[1]], arguments)
    assert message in str(caught.value)
