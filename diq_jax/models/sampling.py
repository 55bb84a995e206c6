"""The next token from its logits: the likeliest, or one drawn at a temperature from the nucleus."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from diq_jax.trees import Array

BROKEN = -2  # in the place of a token where the logits are not finite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Says how answers are drawn. The caller checks the ranges, which its config names."""

    max_new_tokens: int  # of an answer, the token that ends it included
    temperature: float  # logits are divided by it; 0 takes the likeliest token
    top_p: float  # in (0, 1]: draw from the likeliest tokens that have this probability together
    seed: int


def prompt_number(prompt_id: str) -> int:
    """Returns what a prompt's draws depend on, beside seed, sample and the token's index."""
    return zlib.crc32(prompt_id.encode())


def pick(
    logits: jax.Array, prompts: Array, samples: Array, indices: jax.Array, settings: Sampling
) -> jax.Array:
    """Picks the next token of each row.

    A draw depends on nothing but (seed, prompt, sample, index): not on the rows beside it, on the
    devices or on the order.

    Args:
        logits: (B, V) float32.
        prompts: (B,) uint32 of `prompt_number`; samples, indices: (B,) int32, which answer to that
            prompt, and which of its tokens.

    Returns:
        (B,) int32, BROKEN where the logits are not finite.
    """
    scores = logits
    if settings.temperature > 0:
        scores = logits / settings.temperature
        if settings.top_p < 1:
            scores = jnp.where(in_nucleus(scores, settings.top_p), scores, -jnp.inf)
        scores = scores + _gumbel(settings.seed, prompts, samples, indices, logits.shape[1])
    finite = jnp.isfinite(jnp.max(logits, axis=-1))  # a maximum passes nan on
    return jnp.where(finite, jnp.argmax(scores, axis=-1), BROKEN).astype(jnp.int32)


def in_nucleus(scores: jax.Array, top_p: float) -> jax.Array:
    """Marks the fewest likeliest tokens that have at least the probability top_p together.

    Returns (B, V) bool. Tokens as likely as the last of them belong too.

    The threshold is found by bisection over the bits of a float, which are ordered as the floats
    are: 31 sums over the vocabulary, exact, and cheaper than sorting it.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # the mass at and above low suffices, at and above high it does not
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(bits >= middle[:, None], probabilities, 0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(len(scores), jnp.int32)
    high = jnp.max(bits, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return bits >= low[:, None]


def _gumbel(seed, prompts, samples, indices, size):
    def draw(*numbers):
        key = jax.random.key(seed)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return jax.random.gumbel(key, (size,), jnp.float32)

    return jax.vmap(draw)(prompts, samples, indices)
