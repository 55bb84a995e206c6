"""The difficulty classifier: a BERT encoder, mean-pooled, and a linear head over 5 levels for each
perspective.

Parameters are {"encoder": models.encoder's tree, "heads": {"kernel" (D, 3, 5), "bias" (3, 5)}}, in
float32. The heads are fitted first, on the frozen encoder; then everything is fine-tuned together
(linear probing before fine-tuning: Kumar et al., arXiv 2202.10054), or nothing more when epochs is
0. There is no dropout: training is a function of the rows and the seed alone.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax.common import config, devices
from diq_jax.difficulty import labels
from diq_jax.models import config as model_config
from diq_jax.models import encoder

# Gaussian priors of the heads, as inverse variances, for features of unit variance. The kernel's is
# a compromise of cross-validations: 30 to 100 suit the sample, 300 the noisier MMLU-Pro items. The
# bias's only keeps a level without rows finite.
KERNEL_PRECISION, BIAS_PRECISION = 100.0, 1.0
HEAD_STEPS = 60  # of L-BFGS
WARMUP_RATIO = 0.1  # of all steps; a cosine to zero follows
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WIDTH_STEP = 32  # padded widths are its multiples: each costs one compilation
SCORING_TOKENS = 1024  # padded tokens of one scoring batch

# Its learning rate is 1: `train_step` multiplies, so that one compiled step serves every schedule.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(CLIP_NORM), optax.adamw(1.0, weight_decay=WEIGHT_DECAY)
)

Texts = Sequence[Sequence[int]]  # token ids of each text, special tokens included


@flax.struct.dataclass
class Batch:
    """Rows padded to one width; padding tokens have mask 0, padding rows weight 0.

    Attributes:
        tokens: (B, T) int32.
        mask: (B, T) int32, 1 on real tokens.
        levels: (B, 3) float32 in [1, 5], in the order of config.PERSPECTIVES; nan is unknown.
        weights: (B,) float32.
    """

    tokens: np.ndarray
    mask: np.ndarray
    levels: np.ndarray
    weights: np.ndarray


@jax.jit
def fit_heads(features, levels, weights) -> dict:
    """The most probable heads on frozen features: multinomial regression with a Gaussian prior.

    The problem is convex, so the answer depends on no seed.

    Args:
        features: (n, D) float32, pooled by `features`.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.
        weights: (n,) float32; a row of weight 0 has no influence at all.
    """
    total = jnp.sum(weights)
    mean = weights @ features / total
    scale = jnp.sqrt(jnp.mean(weights @ jnp.square(features - mean[None]) / total))
    x = (features - mean[None]) / scale

    def objective(heads):
        chosen = log_likelihoods(apply_heads(heads, x), levels)
        prior = KERNEL_PRECISION * jnp.sum(jnp.square(heads["kernel"]))
        prior = prior + BIAS_PRECISION * jnp.sum(jnp.square(heads["bias"]))
        return (0.5 * prior - jnp.sum(weights[:, None] * chosen)) / total

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        heads, state = carry
        value, grad = value_and_grad(heads, state=state)
        updates, state = solver.update(
            grad, state, heads, value=value, grad=grad, value_fn=objective
        )
        return (optax.apply_updates(heads, updates), state), None

    shape = (len(config.PERSPECTIVES), labels.LEVELS)
    start = {"kernel": jnp.zeros((x.shape[1], *shape)), "bias": jnp.zeros(shape)}
    (heads, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=HEAD_STEPS)
    kernel = heads["kernel"] / scale
    return {"kernel": kernel, "bias": heads["bias"] - jnp.einsum("d,dpl->pl", mean, kernel)}


def apply_heads(heads, features):
    """Logits of every level for each perspective: (B, D) -> (B, 3, 5) float32."""
    return jnp.einsum("bd,dpl->bpl", features, heads["kernel"]) + heads["bias"][None]


def log_likelihoods(logits, levels):
    """(..., 5) and (...,) -> (...,): of the level, 0 where it is unknown (nan). One between two
    whole levels belongs to both by its nearness, so that the expected level is fitted to it.
    """
    known = jnp.isfinite(levels)
    distance = jnp.abs(jnp.where(known, levels, 1.0)[..., None] - _whole_levels(logits.ndim))
    shares = jnp.maximum(1.0 - distance, 0.0)
    return jnp.where(known, jnp.sum(shares * jax.nn.log_softmax(logits), axis=-1), 0.0)


def _whole_levels(ndim):
    return jnp.arange(1.0, labels.LEVELS + 1).reshape((1,) * (ndim - 1) + (-1,))


def forward(params, cfg: model_config.EncoderConfig, tokens, mask):
    """Logits of every level for each perspective: (B, T) int32 tokens -> (B, 3, 5) float32."""
    hidden = encoder.apply(params["encoder"], cfg, tokens, mask)
    return apply_heads(params["heads"], encoder.mean_pool(hidden, mask))


def loss(params, cfg: model_config.EncoderConfig, batch: Batch):
    """Cross-entropy in nats, mean over perspectives and over the rows of weight 1."""
    chosen = log_likelihoods(forward(params, cfg, batch.tokens, batch.mask), batch.levels)
    return -jnp.sum(batch.weights * jnp.mean(chosen, axis=1)) / jnp.sum(batch.weights)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=(0, 1))
def train_step(params, opt_state, cfg: model_config.EncoderConfig, batch: Batch, learning_rate):
    """One AdamW step on every parameter: (params, opt_state, loss before it)."""
    value, gradient = jax.value_and_grad(loss)(params, cfg, batch)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
    params = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
    return params, opt_state, value


@functools.partial(jax.jit, static_argnums=1)
def _pooled(encoder_params, cfg, batch):
    hidden = encoder.apply(encoder_params, cfg, batch.tokens, batch.mask)
    return encoder.mean_pool(hidden, batch.mask)


def expected_level(probabilities) -> np.ndarray:
    """sum(level * p(level)) over the last axis, in [1, 5]; float64 inside, float32 returned."""
    p = np.asarray(probabilities, np.float64)
    # Float32 probabilities sum to 1 +- 1e-7, which would let a sure level 5 pass 5.
    levels = np.arange(1, labels.LEVELS + 1)
    return (p @ levels / p.sum(-1)).astype(np.float32)


def width(length: int, max_tokens: int) -> int:
    """The padded width of a text: the next multiple of WIDTH_STEP, at most `max_tokens`."""
    return min(max_tokens, _round_up(length, WIDTH_STEP))


def collate(texts: Texts, levels, rows, size: int, max_tokens: int) -> Batch:
    """Pads texts[rows] to the width of the longest and to `size` rows; levels (n, 3) or None."""
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
    return Batch(tokens, mask, filled, weights)


def learning_rates(settings: config.Difficulty, steps: int) -> np.ndarray:
    """The schedule (steps,) float32: a linear warm-up, then a cosine that ends near zero."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    step = np.arange(steps)
    decay = 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))
    return (settings.learning_rate * np.where(step < warmup, (step + 1) / warmup, decay)).astype(
        np.float32
    )


def train(
    encoder_params,
    cfg: model_config.EncoderConfig,
    settings: config.Difficulty,
    texts: Texts,
    levels,
    pooled,
    chosen,
    stream: int,
    placement: devices.Placement,
    on_step: Callable[[int, int, float], None],
):
    """Fits the heads on the frozen encoder, then fine-tunes everything for `settings.epochs`.

    Args:
        encoder_params: the pretrained encoder, replicated; not changed.
        levels: (n, 3) float32 in [1, 5]; nan is unknown.
        pooled: (n, D), the texts' `features` by that encoder.
        chosen: (n,) bool, the rows to train on; nothing of the others is used.
        stream: separates this training's order of rows from others of the same seed.
        on_step: told (rows, real tokens, loss of the step before) after each step.

    Returns:
        Parameters, replicated over the devices.
    """
    heads = fit_heads(pooled, levels, chosen.astype(np.float32))
    # Copied, because a step gives its parameters' memory to the next ones.
    params = {"encoder": jax.tree.map(jnp.copy, encoder_params), "heads": heads}
    params = placement.replicate(params)
    opt_state = jax.jit(OPTIMIZER.init)(params) if settings.epochs else None
    order = np.random.Generator(np.random.PCG64([settings.seed, stream]))
    rows = np.flatnonzero(chosen)
    size = _round_up(settings.batch_size, placement.rows_multiple)
    per_epoch = -(-len(rows) // settings.batch_size)
    rates = iter(learning_rates(settings, settings.epochs * per_epoch))
    previous = None
    for _ in range(settings.epochs):
        for group in np.array_split(order.permutation(rows), per_epoch):
            batch = placement.batch(collate(texts, levels, group, size, settings.max_tokens))
            params, opt_state, value = train_step(params, opt_state, cfg, batch, next(rates))
            # The loss of the step before: fetching this one's would leave the device idle.
            shown = float(value if previous is None else previous)
            on_step(len(group), sum(len(texts[row]) for row in group), shown)
            previous = value
    return params


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
    """Mean-pooled hidden states (len(rows), D) float32 of one batch of `scoring_batches`."""
    T = width(max(len(texts[row]) for row in rows), settings.max_tokens)
    size = _round_up(_scoring_rows(T), placement.rows_multiple)
    batch = placement.batch(collate(texts, None, rows, size, settings.max_tokens))
    return np.asarray(_pooled(encoder_params, cfg, batch))[: len(rows)]


def predict(params, cfg, settings, texts, rows, placement) -> np.ndarray:
    """Probabilities (len(rows), 3, 5) float32 of one batch of `scoring_batches`; see `features`."""
    pooled = features(params["encoder"], cfg, settings, texts, rows, placement)
    heads = jax.device_get(params["heads"])
    return np.asarray(jax.nn.softmax(apply_heads(heads, pooled)))


def _scoring_rows(T):
    return max(1, SCORING_TOKENS // T)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
