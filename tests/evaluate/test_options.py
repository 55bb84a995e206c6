"""One packed row gives what one row for each option gives, and what torch gives."""

import jax
import numpy as np
import pyarrow as pa
import pytest
import tiny
import transformers
from reference import torch

from diq_jax import config, errors
from diq_jax.data import batches, example
from diq_jax.evaluate import options
from diq_jax.models import attention, load, loss
from diq_jax.run import devices

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
)
WINDOW = 7  # shorter than every prompt and than the options before the last


def make_questions(count=4, vocab=61):
    rng = np.random.default_rng(0)

    def draw(low, high):
        return rng.integers(0, vocab, rng.integers(low, high)).astype(np.int32)

    return [
        options.Question(
            f"q{i}",
            "t",
            draw(8, 14),
            ("A", "B", "C"),
            tuple(draw(1, 7) for _ in "ABC"),
            i % 3,
            (7,),
        )
        for i in range(count)
    ]


def score(model, questions, rows, tokens, answers):
    """Log-likelihoods of each question, from one packed batch of that shape."""
    questions = options.as_read_by(questions, model.cfg)
    batch = options.pack(questions, rows, tokens, answers)
    losses = np.asarray(
        jax.jit(loss.token_losses, static_argnums=1)(model.params, model.cfg, batch)
    )
    assert np.all(losses[len(questions) :] == 0)
    return [options.scores(q, row)[0] for q, row in zip(questions, losses, strict=False)]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3_5"])
def models(request, tmp_path_factory):
    """A tiny random model in jax and in torch (Mistral has a sliding window, Qwen3.5 a state), and
    the first's log-likelihoods of make_questions().
    """
    torch.manual_seed(0)
    if request.param == "llama":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    elif request.param == "qwen3_5":
        sizes = dict(
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=8, head_dim=8, full_attention_interval=2,
        )  # fmt: skip
        theirs = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SHAPE | sizes))
    else:
        settings = transformers.MistralConfig(**SHAPE, sliding_window=WINDOW, head_dim=8)
        settings._attn_implementation = "eager"
        theirs = transformers.MistralForCausalLM(settings)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.eval().save_pretrained(folder)
    placement = devices.make_placement(config.Parallel(data=1))
    ours = load.load(str(folder), "float32", placement)
    assert ours.cfg.sliding_window == (WINDOW if request.param == "mistral" else None)
    return ours, theirs, score(ours, make_questions(), 4, 64, 20)


def test_packed_is_one_row_for_each_option(models):
    model, _, scores = models
    losses = jax.jit(loss.example_losses, static_argnums=(1, 3))
    for question, packed in zip(make_questions(), scores, strict=True):
        prompt = question.prompt_ids
        rows = [
            example.Encoded(
                letter,
                np.concatenate([prompt, ids]),
                np.concatenate([np.full(len(prompt), example.IGNORED, np.int32), ids]),
            )
            for letter, ids in zip(question.letters, question.option_ids, strict=True)
        ]
        batch = batches.make_batch(rows, len(rows), 24, 8)
        alone = -losses(model.params, model.cfg, batch, "sum")
        np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=1e-5)


def test_torch_gives_the_same_log_likelihoods(models):
    _, theirs, scores = models
    for question, packed in zip(make_questions(), scores, strict=True):
        start = len(question.prompt_ids)
        for ids, ours in zip(question.option_ids, packed, strict=True):
            tokens = torch.tensor(np.concatenate([question.prompt_ids, ids])[None]).long()
            with torch.no_grad():
                logs = torch.log_softmax(theirs(tokens).logits[0].double(), -1)
            picked = logs[torch.arange(start - 1, start - 1 + len(ids)), tokens[0, start:]]
            np.testing.assert_allclose(ours, picked.sum().item(), rtol=1e-4, atol=1e-4)


def test_order_padding_and_company_change_nothing(models):
    model, _, scores = models
    padded = score(model, make_questions()[::-1], 6, 72, 24)[::-1]
    for a, b in zip(scores, padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_options_do_not_see_each_other():
    """d(losses of option B) / d(queries, keys and values of option A) is exactly zero."""
    question = make_questions(1)[0]
    n, prompt, first = len(question.row.input_ids), len(question.prompt_ids), question.starts[1]
    batch = options.pack([question], 1, n, question.row.answer_tokens)

    def attend(x):
        out = attention.attend(
            x, x, x, batch.segment_ids, True, WINDOW, batch.positions, batch.parent_ids
        )
        return out[0, :, 0]

    x = jax.random.normal(jax.random.key(0), (1, n, 1, 4))
    reach = np.abs(jax.jit(jax.jacobian(attend))(x)[:, 0, :, 0]).sum(-1) > 0  # (query, key)
    position, segment = batch.positions[0], batch.segment_ids[0]
    near = position[:, None] - position[None, :] < WINDOW
    own = (segment[:, None] == segment[None, :]) | (segment == 1)[None, :]
    np.testing.assert_array_equal(reach, np.tril(near & own))
    assert not reach[prompt + first :, prompt : prompt + first].any()


def test_the_row_by_hand():
    # prompt 5 6 7; options A = 8 9, B = 1, each ended by 4: the first token of each is read off
    # index 2, where the prompt ends, and their positions both begin at 3.
    prompt, a, b = (np.array(ids, np.int32) for ids in ([5, 6, 7], [8, 9], [1]))
    question = options.Question("q", "t", prompt, ("A", "B"), (a, b), 0, (4,))
    batch = options.pack([question], 2, 9, 6)
    assert batch.tokens[0].tolist() == [5, 6, 7, 8, 9, 4, 1, 4, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 0]
    assert batch.parent_ids[0].tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, -1]
    assert batch.loss_positions[0].tolist() == [2, 3, 4, 2, 6, 0]
    assert batch.loss_labels[0].tolist() == [8, 9, 4, 1, 4, 0]
    assert batch.loss_mask[0].tolist() == [1, 1, 1, 1, 1, 0]
    assert batch.is_padding.tolist() == [False, True]
    # Without a shared prompt each option has its own, and each token is read off the one before.
    [alone] = options.as_read_by([question], tiny.decoder_config(**tiny.APART["delta"]))
    batch = options.pack([alone], 2, 12, 6)
    assert batch.tokens[0].tolist() == [5, 6, 7, 8, 9, 4, 5, 6, 7, 1, 4, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]
    assert batch.parent_ids is None
    assert batch.loss_positions[0].tolist() == [2, 3, 4, 8, 9, 0]
    assert batch.loss_labels[0].tolist() == [8, 9, 4, 1, 4, 0]
    # The ends (0.3 and 0.7) are in the right answer's loss, (0.5 + 1.0 + 0.3) / 3, not in the sums.
    losses = np.array([0.5, 1.0, 0.3, 2.0, 0.7, 9.0], np.float32)
    sums, loss = options.scores(question, losses)
    assert sums.tolist() == [-1.5, -2.0]
    assert loss == pytest.approx(0.6)


def test_choice_loss_brier_and_margin_by_hand():
    # Shares 1/2, 1/4, 1/4; the right one is the second: -log(1/4) = 2 log 2; Brier
    # (1/2)^2 + (3/4)^2 + (1/4)^2 = 7/8; margin log(1/4) - log(1/2) = -log 2.
    scores = np.log([0.5, 0.25, 0.25]) - 900
    assert options.choice_loss(scores, 1) == pytest.approx(2 * np.log(2))
    assert options.brier(scores, 1) == pytest.approx(7 / 8)
    assert options.margin(scores, 1) == pytest.approx(-np.log(2))
    assert options.margin(scores, 0) == pytest.approx(np.log(2))
    alone = np.array([-3.0])
    assert [f(alone, 0) for f in (options.choice_loss, options.brier, options.margin)] == [0, 0, 0]


def test_letters_are_the_first_tokens_that_tell_options_apart():
    prompt, end = np.array([5], np.int32), (4,)

    def letters(*ids):
        found = tuple(np.array(x, np.int32) for x in ids)
        question = options.Question("q", "t", prompt, tuple("AB"), found, 0, end)
        # Of each token its place in the row: 0, 1, .. with the ends.
        return options.letter_scores(question, np.arange(20, dtype=np.float32)).tolist()

    assert letters([8, 1, 1], [9, 1]) == [-0.0, -4.0]  # the first token alone: places 0 and 4
    assert letters([7, 8, 1], [7, 9]) == [-1.0, -9.0]  # 7 is shared: places 0 + 1 and 4 + 5
    assert letters([7], [7, 9]) == [-0.0, -5.0]  # one begins the other: 0, and 2 + 3


def test_raw_and_normalised_choices_differ_by_length():
    # -2 over one token loses by its mean to -3 over three; a tie goes to the first.
    assert options.choose(np.array([-2.0, -3.0]), np.array([1, 3])) == (0, 1)
    assert options.choose(np.array([-2.0, -2.0]), np.array([1, 1])) == (0, 0)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"prompt_ids": []}, "tokens in its prompt"),
        ({"option_ids": [[1], []]}, "in every option"),
        ({"answer": 2}, "an answer among them"),
    ],
)
def test_a_bad_question_is_named(change, problem):
    row = {
        "example_id": "q7",
        "task": "t",
        "prompt_ids": [1],
        "options": ["A", "B"],
        "option_ids": [[1], [2]],
        "answer": 0,
        "end_ids": [3],
    }
    assert options.from_table(pa.Table.from_pylist([row]), "here")[0].letters == ("A", "B")
    with pytest.raises(errors.UserError, match=rf"here: question 'q7' must have .*{problem}"):
        options.from_table(pa.Table.from_pylist([row | change]), "here")
