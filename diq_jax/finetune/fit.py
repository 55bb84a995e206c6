"""Fine-tuning as one verb: a model, rows, settings and a seed give an adapter or parameters.

The stage `finetune` and the studies train by it alike; what goes to disk is the caller's choice
(loop.Upkeep).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import finetune_config, trees
from diq_jax.data import batches, example
from diq_jax.data import steps as steps_lib
from diq_jax.finetune import sft
from diq_jax.models import load, loop, training
from diq_jax.run import devices

MOST_SHAPES = 8  # of `shapes`: each is a compilation


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """Holds the results of a training.

    Attributes:
        factors: the trained leaves in float32, None at the others.
        frozen: the rest of the adapter; None where parameters are trained.
        records: {"loss", "gradient_norm", and "target_loss" where evaluated} of each step.
        tokens: those of this call, padding not counted.
    """

    factors: Any
    frozen: Any
    records: list[loop.Record]
    tokens: int

    @property
    def adapter(self) -> dict:
        """Returns the whole adapter: trained and frozen leaves."""
        return trees.combine(self.factors, self.frozen)


def fit(
    model: load.Model,
    rows: Sequence[example.Encoded],
    settings: finetune_config.Finetune,
    seed: int,
    placement: devices.Placement,
    name: str = "finetune",
    steps: Sequence[steps_lib.Step] | None = None,
    train_step: Callable | None = None,
    upkeep: loop.Upkeep | None = None,
) -> Fitted:
    """Fine-tunes a model on rows: AdamW, a linear warm-up and a cosine to 0.

    Args:
        seed: of the order, of the adapter's A and of dropout.
        steps: what to train on, of `plan`; if None all rows.
        train_step: of `make_train_step`, where several trainings share it; if None a new one.
        upkeep: what goes to disk on the way; if None nothing.

    Raises:
        UserError: a loss or a trained parameter is not finite, or no target matches.
    """
    if steps is None:
        planned = plan(rows, {"all": range(len(rows))}, settings, seed, placement.rows_multiple)
        steps = planned["all"]
    train_step = train_step or make_train_step(model, settings, placement)
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    if settings.trains_adapter:
        state, frozen = sft.init_state(sft.init_adapter(model.cfg, settings, seed), optimizer)
    else:
        params = placement.single(model.params)
        state, frozen = sft.init_weights(params, settings.parameters, optimizer), None
    rates, keys = learning_rates(settings, len(steps)), [None] * len(steps)
    if settings.dropout > 0:
        keys = sft.dropout_keys(seed, len(steps))

    def take(state, number):
        found = steps_lib.microbatches(rows, steps[number])
        return train_step(model.params, frozen, state, found, rates[number], keys[number])

    examples = [(row.example_id, len(row.input_ids)) for row in rows]
    indices = [step.indices for step in steps]
    state, records, tokens = loop.train(
        name, indices, examples, state, frozen, take, upkeep or loop.Upkeep()
    )
    return Fitted(state.factors, frozen, records, tokens)


def make_train_step(
    model: load.Model, settings: finetune_config.Finetune, placement: devices.Placement
) -> Callable:
    """Returns a step that serves every training by these settings: any rows, seed, length."""
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    return training.make_train_step(sft.example_sums(model.cfg, settings), optimizer, placement)


def learning_rates(
    settings: finetune_config.Finetune | finetune_config.Dpo, steps: int
) -> np.ndarray:
    """Returns each step's rate, (steps,) float32: a linear warm-up, then a cosine to 0.

    The warm-up takes ceil(warmup_ratio * steps) steps, the last one aside.
    """
    warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    return training.learning_rates(settings.learning_rate, steps, warmup)


def plan(
    rows: Sequence[example.Encoded],
    arms: Mapping[str, Sequence[int]],
    settings: finetune_config.Finetune,
    seed: int,
    rows_multiple: int,
    shapes: Sequence[tuple[int, int]] = (),
) -> dict[str, list[steps_lib.Step]]:
    """Plans all steps of each arm (data/steps.py).

    Args:
        arms: {name: indices into `rows`}.
        shapes: (tokens, answers) that microbatches are padded to, of `shapes_of`; if empty a few
            shapes that suit the arms.
    """
    size, parts, epochs = settings.batch_size, settings.accumulation_steps, settings.epochs
    if settings.max_steps:
        fewest = min(-(-len(chosen) // size) for chosen in arms.values())
        epochs = -(-settings.max_steps // fewest)
    if settings.packing:
        planned = steps_lib.plan_packed(rows, arms, epochs, size, parts, seed, rows_multiple)
    else:
        planned = steps_lib.plan(rows, arms, epochs, size, size // parts, seed, rows_multiple)
        if shapes:
            planned = {arm: [_fit(s, rows, shapes) for s in cut] for arm, cut in planned.items()}
    return {arm: cut[: settings.max_steps or None] for arm, cut in planned.items()}


def shapes_of(rows: Sequence[example.Encoded]) -> list[tuple[int, int]]:
    """Returns a few (tokens, answers), ascending, of which one fits any microbatch of the rows.

    Trainings that are planned in them compile the same programs, and a training's numbers do not
    depend on which others there are.
    """
    edges = batches.bucket_edges([len(row.input_ids) for row in rows], MOST_SHAPES)
    step, shapes = batches.ANSWER_STEP, []
    for edge in edges:
        most = max((r.answer_tokens for r in rows if len(r.input_ids) <= edge), default=1)
        shapes.append((edge, min(-(-most // step) * step, edge)))
    return shapes


def _fit(step, rows, shapes):
    """Returns a step whose microbatches have the first shape that is long enough."""

    def padded(group):
        longest = max(len(rows[i].input_ids) for i in group.indices)
        tokens, answers = next(shape for shape in shapes if shape[0] >= longest)
        return dataclasses.replace(group, tokens=tokens, answers=answers)

    return dataclasses.replace(step, groups=tuple(map(padded, step.groups)))
