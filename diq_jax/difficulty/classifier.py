"""The difficulty classifier: a BERT encoder, every layer mean-pooled, and a head over the 5 levels
for each perspective.

Parameters are {"encoder": models.encoder's tree, "heads": see heads.py}, in float32. The heads
are fitted first, on the frozen encoder; then everything is fine-tuned together (linear probing
before fine-tuning: Kumar et al., arXiv 2202.10054), or nothing more when epochs is 0. What words
add to the scores, with difficulty.words, is fitted with the heads and stays. There is no dropout:
training is a function of the rows and the seed alone.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config, trees
from diq_jax.difficulty import heads as heads_lib
from diq_jax.models import config as model_config
from diq_jax.models import encoder, training
from diq_jax.run import devices

WARMUP_RATIO = 0.1  # of all steps; a cosine to zero follows
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WIDTH_STEP = 32  # padded widths are its multiples: each costs one compilation
SCORING_TOKENS = 1024  # padded tokens of one scoring batch
HELD_OUT = 0.1  # of the training texts, with difficulty.patience: what early stopping looks at

# Its learning rate is 1: `train_step` multiplies, so that one compiled step serves every schedule.
OPTIMIZER = training.adamw(WEIGHT_DECAY, CLIP_NORM)

Texts = Sequence[Sequence[int]]  # token ids of each text, special tokens included


@flax.struct.dataclass
class Batch:
    """Rows padded to one width; padding tokens have mask 0, padding rows weight 0.

    Attributes:
        tokens: (B, T) int32.
        mask: (B, T) int32, 1 on real tokens.
        levels: (B, 3) float32 in [1, 5], in the order of config.PERSPECTIVES; nan is unknown.
        weights: (B,) float32.
        offsets: (B, 3, S) float32, what words add to the scores, or None.
    """

    tokens: np.ndarray
    mask: np.ndarray
    levels: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray | None


def forward(params, cfg: model_config.EncoderConfig, batch: Batch):
    """Log-probabilities of every level for each perspective: (B, 3, 5) float32."""
    pooled = encoder.layer_means(params["encoder"], cfg, batch.tokens, batch.mask)
    return heads_lib.apply(params["heads"], pooled, batch.offsets)


def loss(params, cfg: model_config.EncoderConfig, batch: Batch, class_weights):
    """Cross-entropy in nats, mean over perspectives and over the rows of weight 1; each level's
    counts by its class weight (3, 5).
    """
    shares = heads_lib.shares(batch.levels) * class_weights[None]
    chosen = jnp.sum(shares * forward(params, cfg, batch), axis=(1, 2)) / shares.shape[1]
    return -jnp.sum(batch.weights * chosen) / jnp.sum(batch.weights)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=(0, 1))
def train_step(
    params, opt_state, cfg: model_config.EncoderConfig, batch: Batch, class_weights, rates
):
    """One AdamW step on every parameter by its learning rate, a tree of scalars or, for stacked
    layers, of (N, 1, ...): (params, opt_state, loss before it).
    """
    value, gradient = jax.value_and_grad(loss)(params, cfg, batch, class_weights)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = jax.tree.map(lambda p, u, rate: p + rate * u, params, updates, rates)
    return params, opt_state, value


@functools.partial(jax.jit, static_argnums=1)
def _pooled(encoder_params, cfg, batch):
    return encoder.layer_means(encoder_params, cfg, batch.tokens, batch.mask)


def expected_level(probabilities) -> np.ndarray:
    """sum(level * p(level)) over the last axis, in [1, 5]; float64 inside, float32 returned."""
    p = np.asarray(probabilities, np.float64)
    # Float32 probabilities sum to 1 +- 1e-7, which would let a sure level 5 pass 5.
    levels = np.arange(1, p.shape[-1] + 1)
    return (p @ levels / p.sum(-1)).astype(np.float32)


def width(length: int, max_tokens: int) -> int:
    """The padded width of a text: the next multiple of WIDTH_STEP, at most `max_tokens`."""
    return min(max_tokens, _round_up(length, WIDTH_STEP))


def collate(texts: Texts, levels, offsets, rows, size: int, max_tokens: int) -> Batch:
    """Pads texts[rows] to the width of the longest and to `size` rows; levels (n, 3) and offsets
    (n, 3, S) may be None.
    """
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
    return Batch(tokens, mask, filled, weights, offsets)


def learning_rates(settings: config.Difficulty, steps: int) -> np.ndarray:
    """Returns the rate of every step (steps,) float32: a linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    return training.learning_rates(settings.learning_rate, steps, warmup - 1, hold=1)


def layer_scales(params, decay: float):
    """What the learning rate of each parameter is multiplied by: 1 for the heads, decay for the top
    layer, decay^2 for the one below it, and so on down to the embeddings.

    Returns:
        A tree like the parameters, of float32 scalars; of (N, 1, ...) for the stacked layers.
    """

    def scale(name, leaf):
        layers = jax.tree.leaves(params["encoder"]["layers"])[0].shape[0]
        if name.startswith("heads/"):
            return np.float32(1)
        if not name.startswith("encoder/layers/"):
            return np.float32(decay ** (layers + 1))
        powers = decay ** np.arange(layers, 0, -1, dtype=np.float32)
        return powers.reshape(-1, *(1,) * (leaf.ndim - 1))

    return trees.map_named(scale, params)


def hold_out(texts: Texts, rows, settings: config.Difficulty, stream: int):
    """Splits rows in (to train on, to look at): a tenth of the distinct texts with patience, at
    least one; none without. Rows of one text stay together.
    """
    if not settings.patience:
        return rows, rows[:0]
    distinct = list(dict.fromkeys(tuple(texts[row]) for row in rows))
    order = np.random.Generator(np.random.PCG64([settings.seed, stream, 1]))
    count = max(1, round(HELD_OUT * len(distinct)))
    held = {distinct[i] for i in order.permutation(len(distinct))[:count]}
    looked = np.array([tuple(texts[row]) in held for row in rows], bool)
    return rows[~looked], rows[looked]


def train(
    start,
    cfg: model_config.EncoderConfig,
    settings: config.Difficulty,
    texts: Texts,
    levels,
    offsets,
    rows,
    held,
    stream: int,
    placement: devices.Placement,
    on_step: Callable[[int, int, float], None],
):
    """Fine-tunes everything for `settings.epochs`; with patience until the loss of the held-out
    rows has not fallen for so many epochs, and then the parameters of the best epoch are kept, the
    start counting as one.

    Args:
        start: {"encoder", "heads"}, replicated; not changed.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.
        offsets: (n, 3, S), what words add to the scores, or None.
        rows, held: indices of the rows to train on and to look at; nothing of others is used.
        stream: separates this training's order of rows from others of the same seed.
        on_step: told (rows, real tokens, loss of the step before) after each step.

    Returns:
        Parameters, replicated over the devices.
    """
    # Copied, because a step gives its parameters' memory to the next ones.
    params = placement.replicate(jax.tree.map(jnp.copy, start))
    opt_state = jax.jit(OPTIMIZER.init)(params)
    weights = heads_lib.class_weights(levels[rows], settings.class_weights)
    scales = layer_scales(params, settings.layer_decay)
    order = np.random.Generator(np.random.PCG64([settings.seed, stream]))
    size = _round_up(settings.batch_size, placement.rows_multiple)
    per_epoch = -(-len(rows) // settings.batch_size)
    rates = iter(learning_rates(settings, settings.epochs * per_epoch))
    best, waited, previous = (np.inf, params), 0, None

    def held_loss(params):
        return _mean_loss(params, cfg, settings, texts, levels, offsets, held, weights, placement)

    if len(held):
        best = held_loss(params), jax.tree.map(jnp.copy, params)
    for _ in range(settings.epochs):
        for group in np.array_split(order.permutation(rows), per_epoch):
            made = collate(texts, levels, offsets, group, size, settings.max_tokens)
            rate = next(rates)
            params, opt_state, value = train_step(
                params, opt_state, cfg, placement.batch(made), weights,
                jax.tree.map(lambda s, rate=rate: rate * s, scales),
            )  # fmt: skip
            # The loss of the step before: fetching this one's would leave the device idle.
            shown = float(value if previous is None else previous)
            on_step(len(group), sum(len(texts[row]) for row in group), shown)
            previous = value
        if not len(held):
            continue
        found = held_loss(params)
        waited = 0 if found < best[0] else waited + 1
        if not waited:
            best = found, jax.tree.map(jnp.copy, params)
        elif waited == settings.patience:
            break
    return best[1] if len(held) else params


def _mean_loss(params, cfg, settings, texts, levels, offsets, rows, weights, placement) -> float:
    total = 0.0
    for batch in scoring_batches(texts, rows.tolist(), settings):
        T = width(max(len(texts[row]) for row in batch), settings.max_tokens)
        size = _round_up(_scoring_rows(T), placement.rows_multiple)
        made = placement.batch(collate(texts, levels, offsets, batch, size, settings.max_tokens))
        total += len(batch) * float(_loss(params, cfg, made, weights))
    return total / len(rows)


_loss = jax.jit(loss, static_argnums=1)


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
    encoder_params,
    cfg: model_config.EncoderConfig,
    settings: config.Difficulty,
    texts: Texts,
    rows: Sequence[int],
    placement: devices.Placement,
) -> np.ndarray:
    """Every layer's mean-pooled hidden states (len(rows), N * D) float32 of one batch of
    `scoring_batches`.
    """
    T = width(max(len(texts[row]) for row in rows), settings.max_tokens)
    size = _round_up(_scoring_rows(T), placement.rows_multiple)
    batch = placement.batch(collate(texts, None, None, rows, size, settings.max_tokens))
    return np.asarray(_pooled(encoder_params, cfg, batch))[: len(rows)]


def _scoring_rows(T):
    return max(1, SCORING_TOKENS // T)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
