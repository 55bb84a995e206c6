"""Direct preference optimisation (arXiv 2305.18290): the loss of pairs, and its gradient.

A pair's loss is -log sigmoid(m), m = beta ((log p_c - log r_c) - (log p_r - log r_r)): p and r are
the policy's and the reference's probabilities of the chosen and the rejected completion, summed
over answer tokens. The reference never changes, so its numbers are taken once and come with the
batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import finetune_config
from diq_jax.data import batches, preferences, steps
from diq_jax.finetune import sft
from diq_jax.models import config as model_config
from diq_jax.models import loss
from diq_jax.run import sharding


@flax.struct.dataclass
class PairRows:
    """Holds P pairs in 2 P rows, chosen and rejected in turn, so that devices part no pair."""

    batch: batches.Batch
    reference: Any  # (2 P,) float32: the reference's log-probability of each row's answer


def pair_losses(policy: jax.Array, reference: jax.Array, beta: float) -> tuple[Any, Any]:
    """Returns the loss and the margin m of each pair.

    Args:
        policy, reference: (P, 2) log-probabilities of the chosen and the rejected answer.

    Returns:
        (P,) and (P,). Where the policy is the reference they are log 2 and 0.
    """
    change = policy - reference
    margins = beta * (change[:, 0] - change[:, 1])
    return -jax.nn.log_sigmoid(margins), margins


def log_probabilities(
    params: dict,
    cfg: model_config.DecoderConfig,
    batch: batches.Batch,
    adapter: dict | None = None,
    remat: bool = False,
) -> jax.Array:
    """Returns the log-probability of each row's answer, (B,) float32: summed over its tokens."""
    return -loss.example_losses(params, cfg, batch, "sum", adapter, remat)


def example_sums(
    cfg: model_config.DecoderConfig, settings: finetune_config.Dpo, remat: bool
) -> Callable:
    """Makes (params, factors, frozen, key, PairRows) -> sums over the pairs, for a train step.

    Of loss, margin, accuracy (the margin is above 0), gradient, examples.
    """

    def sums(params, factors, frozen, key, rows):
        del key  # no dropout
        real = 1.0 - rows.batch.is_padding[::2].astype(jnp.float32)

        def total(factors):
            weights, adapter = sft.merge(params, factors, frozen)
            policy = log_probabilities(weights, cfg, rows.batch, adapter, remat).reshape(-1, 2)
            reference = rows.reference.reshape(-1, 2)
            losses, margins = pair_losses(policy, reference, settings.beta)
            return jnp.sum(losses * real), (jnp.sum(margins * real), jnp.sum((margins > 0) * real))

        (value, (margin, right)), gradient = jax.value_and_grad(total, has_aux=True)(factors)
        sums = {"loss": value, "margin": margin, "accuracy": right}
        return sums | {"examples": jnp.sum(real), "gradient": sharding.stored(gradient)}

    return sums


def make_batch(pairs: Sequence[preferences.PreferencePair], group: batches.Group) -> batches.Batch:
    """Lays out the group's pairs as numpy rows, two for each, then padding."""
    rows = [side for i in group.indices for side in pairs[i].sides]
    return batches.make_batch(rows, 2 * group.rows, group.tokens, group.answers)


def microbatches(
    pairs: Sequence[preferences.PreferencePair],
    reference: Mapping[str, Sequence[float]],
    step: steps.Step,
) -> list[PairRows]:
    """Lays out the rows of a step, with {pair: the reference's (chosen, rejected)} beside them."""
    out = []
    for group in step.groups:
        known = np.zeros((group.rows, 2), np.float32)
        for place, i in enumerate(group.indices):
            known[place] = reference[pairs[i].example_id]
        out.append(PairRows(make_batch(pairs, group), known.reshape(-1)))
    return out
