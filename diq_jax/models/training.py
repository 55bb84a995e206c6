"""The optimizer, learning rates and step of every training.

The optimizer has the learning rate 1, and the rate of a step is an argument of the step. So one
compiled update serves every schedule, and the rates that are reported are those that were used.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diq_jax import trees
from diq_jax.run import devices, sharding

B1, B2, EPS = 0.9, 0.999, 1e-8  # Adam's
DECAYS = {
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


@flax.struct.dataclass
class TrainState:
    """Holds what a step changes and a checkpoint keeps.

    Attributes:
        factors: the trained leaves in float32, None at the others.
        opt_state: the state of `adamw`.
    """

    factors: Any
    opt_state: Any


def learning_rates(
    peak: float, steps: int, warmup: int, decay: str = "cosine", hold: int = 0
) -> np.ndarray:
    """Returns the learning rate of every step, (steps,) float32.

    The rate rises linearly from peak / (warmup + 1), so that no step is wasted, to `peak` after
    `warmup` steps. It stays there for `hold` steps and falls to 0 at the end of the last one.

    Args:
        decay: a name in DECAYS.
    """
    start = warmup + hold
    rate = DECAYS[decay](peak, max(1, steps - start))
    if start:
        rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        rate = optax.join_schedules([rising, rate], [start])
    return np.asarray(jax.jit(rate)(jnp.arange(steps)), np.float32)


def adamw(weight_decay: float = 0.0, clip_norm: float = 0.0) -> optax.GradientTransformation:
    """Returns AdamW at the learning rate 1, after clipping by the global norm where clip_norm > 0.

    A caller multiplies the update by the step's learning rate (`apply`).
    """
    made = optax.adamw(1.0, B1, B2, EPS, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), made) if clip_norm else made


def apply(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Any, rate: Any
) -> TrainState:
    """Returns the state after one update at the learning rate `rate`, () float32."""
    change, opt_state = optimizer.update(gradient, state.opt_state, state.factors)
    factors = jax.tree.map(lambda p, c: p + rate * c, state.factors, change)
    return TrainState(factors, opt_state)


def make_train_step(
    sums: Callable,
    optimizer: optax.GradientTransformation,
    placement: devices.Placement,
    place: Callable | None = None,
) -> Callable:
    """Returns a function (params, frozen, state, microbatches, rate, key) -> (state, metrics).

    Metrics are those of the whole step, before its update and before clipping: "gradient_norm" and
    every sum divided by the examples. Nothing waits for the device. `state` is used up: its memory
    is taken for the next one. The function is compiled once for all trainings.

    Args:
        sums: (params, factors, frozen, key, microbatch) -> {"gradient": like factors, "examples",
            further sums such as "loss"}, each a sum over the microbatch's examples.
        place: (params, factors, frozen) -> the factors on the devices; `place_factors` if None.
    """
    gradients = placement.compile(sums, rows=False)
    add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right))
    place = place or functools.partial(place_factors, placement=placement)

    update = make_update(optimizer)

    def train_step(params, frozen, state, microbatches: Iterable, rate, key):
        factors = place(params, state.factors, frozen)
        fixed = placement.replicate((frozen, key))
        total = None
        for rows in microbatches:
            part = gradients(params, factors, *fixed, placement.batch(rows))
            total = part if total is None else add(total, part)
        return update(*_beside(total, factors, state, optimizer, placement), np.float32(rate))

    return train_step


def make_update(optimizer: optax.GradientTransformation) -> Callable:
    """Compiles (factors, opt_state, sums of a step, rate) -> (state, metrics)."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(factors, opt_state, sums, rate):
        means = jax.tree.map(lambda x: x / sums["examples"], sums)
        metrics = {k: x for k, x in means.items() if k not in ("gradient", "examples")}
        metrics["gradient_norm"] = jnp.sqrt(trees.vdot(means["gradient"], means["gradient"]))
        return apply(optimizer, TrainState(factors, opt_state), means["gradient"], rate), metrics

    return update


def place_factors(params: Any, factors: Any, frozen: Any, placement: devices.Placement) -> Any:
    """Puts the trained leaves on the devices: LoRA's factors on each, parameters by their rules."""
    if frozen is not None:
        return placement.replicate(factors)
    return placement.like(trees.partition_like(params, factors)[0], factors)


def _beside(sums, factors, state, optimizer, placement):
    """Puts each leaf and moment where its gradient is wanted: so the update compiles once."""
    everywhere = sums["examples"].sharding
    if placement.strategy == "pmap":
        where = jax.tree.map(lambda _: everywhere, state.factors)
    else:
        where = jax.tree.map(lambda x: x.sharding, factors)
    opt_state = optax.tree_map_params(
        optimizer, sharding.put, state.opt_state, where,
        transform_non_params=lambda x: sharding.put(x, everywhere),
    )  # fmt: skip
    sums = sums | {"gradient": jax.tree.map(sharding.put, sums["gradient"], where)}
    return jax.tree.map(sharding.put, state.factors, where), opt_state, sums
