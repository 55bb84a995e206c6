"""The classifier on a tiny random encoder."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diq_jax import errors
from diq_jax.difficulty import classifier, folds, heads
from diq_jax.models import encoder

CFG = encoder.EncoderConfig(
    family="bert", num_layers=2, model_dim=16, ffn_dim=24, num_heads=4, head_dim=4, vocab_size=40,
    max_positions=96, num_token_types=2, norm_eps=1e-12, activation="gelu",
)  # fmt: skip
SETTINGS = types.SimpleNamespace(
    epochs=2, learning_rate=1e-3, batch_size=8, max_tokens=96, seed=0, words=False
)  # fmt: skip
FEATURES = CFG.num_layers * CFG.model_dim


def random_encoder(seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.3, s).astype(np.float32), encoder.shapes(CFG), is_leaf=is_shape
    )
    return tiny.placement().replicate(params)


def rows(count=30, seed=0):
    """Token ids, and levels that a token of each text gives away."""
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.integers(1, 6, (count, 1)), 3, axis=1).astype(np.int32)
    texts = [
        [1, *[2 + level] * 5, *rng.integers(10, 40, rng.integers(2, 55)).tolist()]
        for level in levels[:, 0].tolist()
    ]
    return texts, levels


def pool(params, texts):
    out = np.zeros((len(texts), FEATURES), np.float32)
    for batch in classifier.scoring_batches(texts, range(len(texts)), SETTINGS):
        out[batch] = classifier.features(params, CFG, SETTINGS, texts, batch, tiny.placement())
    return out


def trained(levels=None, chosen=None, **changes):
    """(parameters, loss of each step) of heads fitted on the chosen rows and fine-tuned."""
    texts, known = rows()
    levels = known if levels is None else levels
    settings = types.SimpleNamespace(**vars(SETTINGS) | changes)
    mine = np.arange(len(texts)) if chosen is None else np.flatnonzero(chosen)
    params = random_encoder()
    fitted, _ = heads.fit(pool(params, texts)[mine], None, levels[mine].astype(float))
    out, records, tokens = classifier.train(
        {"encoder": params, "heads": fitted}, CFG, settings, texts, levels, None, mine, 0,
        tiny.placement(),
    )  # fmt: skip
    assert tokens == settings.epochs * sum(len(texts[row]) for row in mine)
    return jax.device_get(out), [record["loss"] for record in records]


def same(left, right):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, left, right)))


def test_expected_level_of_known_distributions():
    uniform = np.full(5, 0.2, np.float32)
    assert classifier.expected_level(uniform) == 3
    # 0.5 * 1 + 0.25 * 2 + 0.25 * 5 = 2.25
    assert classifier.expected_level([0.5, 0.25, 0, 0, 0.25]) == 2.25
    sure = np.array([0, 0, 0, 0, 1 + 1e-6], np.float32)
    assert classifier.expected_level(sure) == 5


def test_loss_is_log_5_when_heads_are_zero_and_ignores_padding():
    texts, levels = rows()
    zero = {"kernel": jnp.zeros((FEATURES, 3, 5)), "bias": jnp.zeros((3, 5))}
    params = {"encoder": random_encoder(), "heads": zero}
    for size in (4, 7):
        batch = classifier.collate(texts, levels, None, [3, 1, 2, 0], size, 96)
        value = jax.jit(classifier.loss, static_argnums=1)(params, CFG, batch)
        np.testing.assert_allclose(value, np.log(5), rtol=1e-6)


def test_padding_changes_nothing():
    texts, levels = rows()
    kernel = jax.random.normal(jax.random.key(1), (FEATURES, 3, 5))
    params = {"encoder": random_encoder()}
    params["heads"] = {"kernel": kernel, "bias": jnp.zeros((3, 5))}
    offsets = np.random.default_rng(0).normal(size=(len(texts), 3, 5)).astype(np.float32)
    short = classifier.collate(texts, levels, offsets, [0, 1], 2, 64)
    long = classifier.collate(texts, levels, offsets, [0, 1], 5, 64)
    add = ((0, 0), (0, 32))
    long = long.replace(tokens=np.pad(long.tokens, add), mask=np.pad(long.mask, add))
    forward = jax.jit(classifier.forward, static_argnums=1)
    one, other = (forward(params, CFG, b) for b in (short, long))
    np.testing.assert_allclose(one, other[:2], atol=2e-5)
    gradient = jax.jit(jax.grad(classifier.loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        gradient(params, CFG, short), gradient(params, CFG, long),
    )  # fmt: skip


def test_scoring_batches_partition_and_share_a_width():
    texts, _ = rows(count=200)
    batches = list(classifier.scoring_batches(texts, range(5, 200), SETTINGS))
    assert sorted(row for batch in batches for row in batch) == list(range(5, 200))
    for batch in batches:
        widths = {classifier.width(len(texts[row]), 96) for row in batch}
        assert len(widths) == 1
        assert len(batch) * widths.pop() <= classifier.SCORING_TOKENS


@pytest.mark.parametrize(("length", "expected"), [(1, 32), (32, 32), (33, 64), (65, 90), (90, 90)])
def test_width(length, expected):
    assert classifier.width(length, 90) == expected


def test_a_model_that_its_training_ruined_is_refused():
    good = {"encoder": {"w": jnp.ones(3)}, "heads": {"b": jnp.zeros(2)}, "words": {"ids": "abc"}}
    assert folds.sound(good) is good
    with pytest.raises(errors.UserError, match=r"not finite .*heads/b.*difficulty.learning_rate"):
        folds.sound(good | {"heads": {"b": jnp.array([0.0, np.inf])}})


def test_training_is_deterministic_and_depends_on_the_seed():
    assert same(trained()[0], trained()[0])
    assert not same(trained()[0], trained(seed=1)[0])


def test_rows_that_are_not_chosen_leave_no_trace():
    _, levels = rows()
    chosen = np.arange(len(levels)) % 3 > 0
    flipped = np.where(chosen[:, None], levels, 6 - levels)
    assert same(trained(levels, chosen)[0], trained(flipped, chosen)[0])
    assert not same(trained(levels, chosen)[0], trained(6 - levels, chosen)[0])


def test_training_learns_what_a_token_gives_away():
    texts, levels = rows()
    params, losses = trained(epochs=100, learning_rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    batches = list(classifier.scoring_batches(texts, range(len(texts)), SETTINGS))
    for batch in batches:
        found = classifier.features(
            params["encoder"], CFG, SETTINGS, texts, batch, tiny.placement()
        )
        p = np.exp(heads.apply(params["heads"], found))
        assert p.shape == (len(batch), 3, 5) and p.dtype == np.float32
        error = np.abs(classifier.expected_level(p)[:, 0] - levels[batch, 0])
        assert error.mean() < 0.5


def test_schedule_rises_then_falls_to_near_zero():
    rates = classifier.learning_rates(SETTINGS, 20)
    assert rates.argmax() in (1, 2) and rates.max() == np.float32(SETTINGS.learning_rate)
    assert (np.diff(rates[2:]) < 0).all() and rates[-1] < 0.02 * rates.max()
    assert len(classifier.learning_rates(SETTINGS, 1)) == 1


def test_words_offsets_shift_the_scores_and_stay():
    """Fine-tuning with an offset that gives the level away leaves little to learn."""
    texts, levels = rows()
    sure = 8 * np.eye(5, dtype=np.float32)[levels - 1]
    params, every = random_encoder(), np.arange(len(texts))
    zero = {"kernel": np.zeros((FEATURES, 3, 5), np.float32), "bias": np.zeros((3, 5), np.float32)}
    before = sure.copy()
    _, records, _ = classifier.train(
        {"encoder": params, "heads": zero}, CFG, SETTINGS, texts, levels, sure, every, 0,
        tiny.placement(),
    )  # fmt: skip
    np.testing.assert_array_equal(sure, before)
    assert max(record["loss"] for record in records) < 0.2
