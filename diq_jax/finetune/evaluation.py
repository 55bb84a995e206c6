"""The loss on the targets while training: what tells the best state from the last."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from diq_jax.data import batches, encoded
from diq_jax.finetune import sft
from diq_jax.models import load, loss, training
from diq_jax.run import devices, stages

MAX_SHAPES = 4  # of batches: each is a compilation


def make(context: stages.Context, model: load.Model) -> Callable:
    """Makes a function (factors, frozen) -> the mean over targets of their mean answer-token loss.

    The targets are those of prepare/targets.parquet, all of them; no test is looked at.
    """
    targets = encoded.from_table(context.table("prepare/targets.parquet", *encoded.COLUMNS))
    placement = context.placement
    groups = batches.plan(
        targets, context.config.evaluate.batch_tokens, placement.rows_multiple, MAX_SHAPES
    )

    def sums(params, factors, frozen, batch):
        weights, adapter = sft.merge(params, factors, frozen)
        return jnp.sum(loss.example_losses(weights, model.cfg, batch, "mean", adapter))

    score = placement.compile(sums, rows=False)

    def mean_loss(factors, frozen) -> float:
        placed = training.place_factors(model.params, factors, frozen, placement)
        fixed = placement.replicate(frozen)
        started = (
            score(model.params, placed, fixed, placement.batch(batch))
            for _, batch in batches.iterate(groups, targets)
        )
        total = sum(float(part) for part in devices.one_behind(started))
        return float(np.float32(total / len(targets)))

    return mean_loss
