"""Supervised fine-tuning of LoRA factors or of parameters: the sums of a step, and its weights.

The loss of a step is the mean over its examples of each one's mean answer-token loss, which is the
loss that DIQ's influence is the derivative of. (A trainer that averages over the tokens of a batch
weighs long answers more.) Microbatches, padding and devices change nothing beyond float error:
everything is a sum over examples, divided once by their number.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax import finetune_config, trees
from diq_jax.models import config as model_config
from diq_jax.models import lora, loss, training
from diq_jax.run import sharding


def init_adapter(
    cfg: model_config.DecoderConfig, settings: finetune_config.Finetune, seed: int
) -> dict:
    """Returns a fresh adapter, which adds exactly 0.

    Factors stay float32 whatever the model's dtype: an update of 1e-4 vanishes in bfloat16.
    """
    key = jax.random.split(jax.random.key(seed))[0]
    return _init_adapter(key, cfg, settings.targets, settings.rank, settings.alpha)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _init_adapter(key, cfg, targets, rank, alpha):
    return lora.init(key, cfg, targets, rank, alpha, True, "finetune.targets")


def dropout_keys(seed: int, steps: int) -> np.ndarray:
    """Returns the key of each step's dropout as jax.random.key_data, (steps, 2) uint32."""
    key = jax.random.split(jax.random.key(seed))[1]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps))
    return np.asarray(jax.random.key_data(keys))


def init_state(
    adapter: dict, optimizer: optax.GradientTransformation
) -> tuple[training.TrainState, Any]:
    """Returns the state before the first step, and the adapter's leaves that stay as they are."""
    factors, frozen = split_adapter(adapter)
    return training.TrainState(factors, optimizer.init(factors)), frozen


def split_adapter(adapter: dict) -> tuple[Any, Any]:
    """Returns an adapter's trained leaves and the others, None elsewhere."""
    return trees.partition(adapter, lora.is_factor)


def init_weights(
    params: dict, pattern: str, optimizer: optax.GradientTransformation
) -> training.TrainState:
    """Returns the first state of training parameters: float32, since bfloat16 loses 1e-4 updates.

    Args:
        pattern: finetune.parameters, `all` or a regex over parameter paths; UserError where it
            matches none.
    """
    names = trees.named_leaves(params).keys()
    if pattern != "all":
        names = trees.matching(names, pattern, "finetune.parameters")
    chosen, _ = trees.partition(params, names.__contains__)
    factors = jax.tree.map(lambda x: jnp.array(x, jnp.float32), chosen)
    return training.TrainState(factors, optimizer.init(factors))


def merge(params: dict, factors: Any, frozen: Any) -> tuple[dict, dict | None]:
    """Returns the weights at a state, (parameters, adapter): a pure function.

    Args:
        frozen: the rest of the adapter; None where `factors` are parameters, which then replace the
            model's in its dtype.
    """
    if frozen is not None:
        return params, trees.combine(factors, frozen)
    cast = jax.tree.map(
        lambda new, old: old if new is None else new.astype(old.dtype),
        factors, params, is_leaf=lambda x: x is None,
    )  # fmt: skip
    return cast, None


def example_sums(cfg: model_config.DecoderConfig, settings: finetune_config.Finetune) -> Callable:
    """Makes a function (params, factors, frozen, key, steps.Microbatch) -> sums over its examples.

    It gives {"loss": () float32, "gradient": like factors, "examples": () float32}. Padding rows
    add 0. Dropout depends on (the step's key, a row's place in the step) and the layer only, so
    that neither microbatches nor devices change it.
    """

    def sums(params, factors, frozen, key, rows):
        def total(factors):
            weights, adapter = merge(params, factors, frozen)
            if settings.dropout > 0 and adapter is not None:
                drawn = jax.random.wrap_key_data(key)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(drawn, rows.places)
                adapter = lora.with_dropout(adapter, keys, settings.dropout)
            return jnp.sum(
                loss.example_losses(weights, cfg, rows.batch, "mean", adapter, settings.remat)
            )

        value, gradient = jax.value_and_grad(total)(factors)
        examples = jnp.sum(~rows.batch.is_padding, dtype=jnp.float32)
        return {"loss": value, "gradient": sharding.stored(gradient), "examples": examples}

    return sums
