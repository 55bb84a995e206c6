"""The difficulty classifier: a BERT encoder, mean-pooled in every layer, and heads over 5 levels.

Parameters are {"encoder": models.encoder's tree, "heads": see heads.py}, in float32. The heads
are fitted first, on the frozen encoder; then everything is fine-tuned together (linear probing
before fine-tuning: Kumar et al., arXiv 2202.10054), or nothing more when epochs is 0. What words
add to the scores, with difficulty.words, is fitted with the heads and stays. There is no dropout:
training is a function of the rows and the seed alone.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config, trees
from diq_jax.difficulty import heads as heads_lib
from diq_jax.models import encoder, loop, training
from diq_jax.run import devices, sharding

WARMUP_RATIO = 0.1  # of all steps; a cosine to zero follows
WIDTH_STEP = 32  # padded widths are its multiples: each costs one compilation
SCORING_TOKENS = 1024  # padded tokens of one scoring batch
OPTIMIZER = training.adamw(weight_decay=0.01, clip_norm=1.0)

Texts = Sequence[Sequence[int]]  # token ids of each text, special tokens included


@flax.struct.dataclass
class TextBatch:
    """Texts padded to one width; padding tokens have mask 0, padding rows weight 0.

    Attributes:
        tokens: (B, T) int32.
        mask: (B, T) int32, 1 on real tokens.
        levels: (B, 3) float32 in [1, 5], in the order of config.PERSPECTIVES; nan is unknown.
        weights: (B,) float32.
        offsets: (B, 3, 5) float32, what words add to the scores, or None.
    """

    tokens: trees.Array
    mask: trees.Array
    levels: trees.Array
    weights: trees.Array
    offsets: trees.Array | None


def forward(params: dict, cfg: encoder.EncoderConfig, batch: TextBatch) -> jax.Array:
    """Returns log-probabilities of every level for each perspective: (B, 3, 5) float32."""
    pooled = encoder.layer_means(params["encoder"], cfg, batch.tokens, batch.mask)
    return heads_lib.apply(params["heads"], pooled, batch.offsets)


def loss(params: dict, cfg: encoder.EncoderConfig, batch: TextBatch) -> jax.Array:
    """Returns the cross-entropy in nats, mean over perspectives and over the rows of weight 1."""
    shares = heads_lib.shares(batch.levels)
    chosen = jnp.sum(shares * forward(params, cfg, batch), axis=(1, 2)) / shares.shape[1]
    return -jnp.sum(batch.weights * chosen) / jnp.sum(batch.weights)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def train_step(
    state: training.TrainState, cfg: encoder.EncoderConfig, batch: TextBatch, rate: float
) -> tuple[training.TrainState, jax.Array]:
    """Takes one AdamW step on every parameter: (the new state, the loss before it)."""
    value, gradient = jax.value_and_grad(loss)(state.factors, cfg, batch)
    return training.apply(OPTIMIZER, state, gradient, rate), value


@functools.partial(jax.jit, static_argnums=1)
def _pooled(encoder_params, cfg, batch):
    return encoder.layer_means(encoder_params, cfg, batch.tokens, batch.mask)


def expected_level(probabilities: np.ndarray) -> np.ndarray:
    """Returns sum(level * p(level)) over the last axis, in [1, 5]: float32, summed in float64."""
    p = np.asarray(probabilities, np.float64)
    # Float32 probabilities sum to 1 +- 1e-7, which would let a sure level 5 pass 5.
    levels = np.arange(1, p.shape[-1] + 1)
    return (p @ levels / p.sum(-1)).astype(np.float32)


def width(length: int, max_tokens: int) -> int:
    """Returns the padded width of a text: the next multiple of WIDTH_STEP, at most `max_tokens`."""
    return min(max_tokens, _round_up(length, WIDTH_STEP))


def collate(
    texts: Texts,
    levels: np.ndarray | None,
    offsets: np.ndarray | None,
    rows: Sequence[int] | np.ndarray,
    size: int,
    max_tokens: int,
) -> TextBatch:
    """Pads texts[rows] to the longest and to `size` rows; levels (n, 3), offsets (n, 3, 5)."""
    T = width(max(len(texts[row]) for row in rows), max_tokens)
    tokens, mask = np.zeros((2, size, T), np.int32)
    weights = np.zeros(size, np.float32)
    filled = np.full((size, len(config.PERSPECTIVES)), np.nan, np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(texts[row])] = texts[row]
        mask[i, : len(texts[row])] = 1
    weights[: len(rows)] = 1.0
    if levels is not None:
        filled[: len(rows)] = levels[rows]
    if offsets is not None:
        empty = np.zeros((size - len(rows), *offsets.shape[1:]), np.float32)
        offsets = np.concatenate([offsets[rows], empty])
    return TextBatch(tokens, mask, filled, weights, offsets)


def learning_rates(settings: config.Difficulty, steps: int) -> np.ndarray:
    """Returns the rate of every step (steps,) float32: a linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    return training.learning_rates(settings.learning_rate, steps, warmup - 1, hold=1)


def train(
    start: dict,
    cfg: encoder.EncoderConfig,
    settings: config.Difficulty,
    texts: Texts,
    levels: np.ndarray,
    offsets: np.ndarray | None,
    rows: np.ndarray,
    stream: int,
    placement: devices.Placement,
    folder: pathlib.Path | None = None,
) -> tuple[dict, list[loop.Record], int]:
    """Fine-tunes everything for `settings.epochs`.

    Args:
        start: {"encoder", "heads"}, replicated; not changed.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.
        offsets: (n, 3, 5), what words add to the scores, or None.
        rows: indices of the rows to train on; nothing of others is used.
        stream: separates this training's order of rows from others of the same seed.
        folder: where its state goes when SIGTERM comes, and from where it continues.

    Returns:
        Parameters, replicated over the devices; {"loss"} of each step; tokens of this call.

    Raises:
        UserError: training leads to a loss or parameters that are not finite.
    """
    # Copied, because a step gives its parameters' memory to the next ones.
    params = placement.replicate(jax.tree.map(jnp.copy, start))
    state = training.TrainState(params, jax.jit(OPTIMIZER.init)(params))
    order = np.random.Generator(np.random.PCG64([settings.seed, stream]))
    size = _round_up(settings.batch_size, placement.rows_multiple)
    per_epoch = -(-len(rows) // settings.batch_size)
    epochs = [order.permutation(rows) for _ in range(settings.epochs)]
    groups = [group.tolist() for epoch in epochs for group in np.array_split(epoch, per_epoch)]
    rates = learning_rates(settings, len(groups))

    def take(state, number):
        batch = collate(texts, levels, offsets, groups[number], size, settings.max_tokens)
        state, value = train_step(state, cfg, placement.batch(batch), rates[number])
        return state, {"loss": value}

    examples = [(f"labelled row {row}", len(text)) for row, text in enumerate(texts, start=1)]
    upkeep = loop.Upkeep(folder, advice="Try a lower difficulty.learning_rate.")
    name = f"difficulty, training {stream + 1},"
    state, records, tokens = loop.train(name, groups, examples, state, None, take, upkeep)
    return state.factors, records, tokens


def scoring_batches(
    texts: Texts, rows: Iterable[int], settings: config.Difficulty
) -> Iterator[list[int]]:
    """Cuts `rows` into batches of one padded width, shortest texts first."""
    by_width: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: (len(texts[row]), row)):
        by_width.setdefault(width(len(texts[row]), settings.max_tokens), []).append(row)
    for T, group in by_width.items():
        size = _scoring_rows(T)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def features(
    encoder_params: dict,
    cfg: encoder.EncoderConfig,
    settings: config.Difficulty,
    texts: Texts,
    rows: Sequence[int],
    placement: devices.Placement,
) -> np.ndarray:
    """Returns every layer's mean-pooled hidden states of a batch, (len(rows), N * D) float32."""
    T = width(max(len(texts[row]) for row in rows), settings.max_tokens)
    size = _round_up(_scoring_rows(T), placement.rows_multiple)
    batch = placement.batch(collate(texts, None, None, rows, size, settings.max_tokens))
    return sharding.whole(_pooled(encoder_params, cfg, batch))[: len(rows)]


def _scoring_rows(T):
    return max(1, SCORING_TOKENS // T)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
