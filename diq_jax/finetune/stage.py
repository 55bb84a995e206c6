"""The stage `finetune`: a model trained on the selected rows, and one on as many by each baseline.

All arms share the initial weights, the schedule, the shapes and the compiled programs; only the
rows differ. The train state goes to disk every few steps, so that a killed run continues and gives
the same bytes.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors, trees
from diq_jax.data import encoded as encoded_lib
from diq_jax.data import example
from diq_jax.data import steps as steps_lib
from diq_jax.finetune import curves, evaluation, fit, sft
from diq_jax.models import checkpoint, decoder, export, load, loop, lora
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, parts, processes, reading, stages

SELECTED = "selected"


def run(context: stages.Context) -> dict[str, Any]:
    """Trains every arm; writes adapter or model, baselines/METHOD, losses.jsonl, the best ones.

    Returns:
        rows: examples of all arms; tokens: those processed, padding not counted, resumed_tokens
        among them; arms: {arm: rows, steps, answer_tokens (of its rows, once), first_loss,
        last_loss}.
    """
    settings = context.config.finetune
    encoded, arms = _subsets(context)
    steps = fit.plan(encoded, arms, settings, settings.seed, context.placement.rows_multiple)
    losses_file = context.path("finetune/losses.jsonl")
    last_file = "adapter_config.json" if settings.trains_adapter else "config.json"
    finished = [folder / last_file for folder in _folders(context, arms).values()]
    tokens = 0
    if not processes.agreed(lambda: all(file.exists() for file in (losses_file, *finished))):
        records, tokens = _train_arms(context, encoded, steps)
        rows = [
            row for arm in arms for row in _rows(arm, steps[arm], records[arm], encoded, settings)
        ]
        artifacts.write_jsonl(losses_file, rows)
    parts.drop(context.path("finetune/state"))
    return _summary(reading.read_jsonl(losses_file), encoded, arms, tokens)


def check(context: stages.Context) -> None:
    """Raises UserError where finetune.targets or finetune.parameters match nothing of the model."""
    settings = context.config.finetune
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    cfg = model_config.decoder_config(opened.config, "model.path")
    if settings.trains_adapter:
        trees.matching(lora.linear_shapes(cfg), settings.targets, "finetune.targets")
    elif settings.parameters != "all":
        names = trees.named_leaves(decoder.shapes(cfg), lambda x: isinstance(x, tuple))
        trees.matching(names, settings.parameters, "finetune.parameters")


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Fingerprints what the stage reads beside artifacts: the weights."""
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    return {"model.path": opened.fingerprint}


def _subsets(context) -> tuple[list[example.Encoded], dict[str, list[int]]]:
    """Returns all arms' examples, and each arm's as indices: selected, or a baseline's first."""
    selection = context.table("selection/selection.parquet", "example_id", "selected")
    ids = np.array(selection["example_id"].to_pylist())
    chosen = {SELECTED: set(ids[selection["selected"].to_numpy()])}
    methods = context.config.finetune.baseline_methods
    if methods:
        table = context.table("selection/baselines.parquet")
        missing = [method for method in methods if method not in table.column_names]
        if missing:
            raise errors.UserError(
                f"finetune.baselines: {missing[0]} was left out of selection/baselines.parquet, as "
                "its input (a difficulty perspective, difficulty.model_scores, a gradient store) "
                f"was not there; there are {', '.join(table.column_names[1:])}."
            )
        ids = np.array(table["example_id"].to_pylist())
        count = len(chosen[SELECTED])
        chosen |= {method: set(ids[table[method].to_numpy() <= count]) for method in methods}
    pool = context.table("prepare/pool.parquet", *encoded_lib.COLUMNS)
    needed = set().union(*chosen.values())
    encoded = encoded_lib.from_table(
        pool.filter(np.isin(pool["example_id"].to_pylist(), list(needed)))
    )
    place = {e.example_id: i for i, e in enumerate(encoded)}
    return encoded, {arm: sorted(place[i] for i in found) for arm, found in chosen.items()}


def _folders(context, arms):
    """Returns where each arm's last state goes; its best goes beside it, as best_NAME."""
    selected = "adapter" if context.config.finetune.trains_adapter else "model"
    return {
        arm: context.path(f"finetune/{selected if arm == SELECTED else f'baselines/{arm}'}")
        for arm in arms
    }


def _keeps_best(context, model, folder: pathlib.Path, target_loss: Callable[..., float]):
    def keep_best(state, frozen, records) -> float:
        """Exports a state that beats all before it."""
        now = target_loss(state.factors, frozen)
        before = [record["target_loss"] for record in records if "target_loss" in record]
        if np.isfinite(now) and all(now < loss for loss in before):
            _export(context, model, folder, state.factors, frozen)
        return now

    return keep_best


def _train_arms(context, encoded, steps: Mapping[str, Sequence[steps_lib.Step]]):
    """Trains and exports every arm. Returns ({arm: metrics of each step}, tokens of this call)."""
    settings, settings_model = context.config.finetune, context.config.model
    model = load.load(settings_model.path, settings_model.dtype, context.placement)
    train_step = fit.make_train_step(model, settings, context.placement)
    target_loss = evaluation.make(context, model) if settings.eval_every_steps else None
    records, tokens = {}, 0
    for arm, folder in _folders(context, steps).items():
        best = folder.with_name(f"best_{folder.name}")
        keep_best = target_loss and _keeps_best(context, model, best, target_loss)
        events = context.path(f"finetune/tensorboard/{arm}")
        with curves.open_log(events, settings.tensorboard) as log:
            upkeep = loop.Upkeep(
                context.path(f"finetune/state/{arm}"), settings.checkpoint_every_steps,
                settings.eval_every_steps, keep_best, log,
            )  # fmt: skip
            fitted = fit.fit(
                model, encoded, settings, settings.seed, context.placement, f"finetune {arm}",
                steps[arm], train_step, upkeep,
            )  # fmt: skip
        records[arm], tokens = fitted.records, tokens + fitted.tokens
        _export(context, model, folder, fitted.factors, fitted.frozen)
    return records, tokens


def _export(context, model, folder, factors, frozen):
    settings, path = context.config.finetune, context.config.model.path
    if frozen is not None:
        adapter = trees.combine(factors, frozen)
        lora.save_peft(folder, adapter, model.cfg, settings.alpha, settings.dropout, path)
        return
    params, _ = sft.merge(context.placement.single(model.params), factors, None)
    export.save_model(folder, params, model.hf_config, path, "model.path")


def _rows(arm, steps, records, encoded, settings):
    """Yields the lines of losses.jsonl; target_loss stands where it was evaluated."""
    rates = fit.learning_rates(settings, len(steps))
    for number, (step, record, rate) in enumerate(zip(steps, records, rates, strict=True)):
        yield {
            "arm": arm,
            "step": number,
            "epoch": step.epoch,
            "loss": record["loss"],
            "learning_rate": float(f"{rate:.6g}"),
            "tokens": sum(len(encoded[i].input_ids) for i in step.indices),
            **({"target_loss": record["target_loss"]} if "target_loss" in record else {}),
        }


def _summary(rows, encoded, arms, new_tokens) -> dict[str, Any]:
    out = {}
    for arm, chosen in arms.items():
        losses = [row["loss"] for row in rows if row["arm"] == arm]
        out[arm] = {
            "rows": len(chosen),
            "steps": len(losses),
            "answer_tokens": sum(encoded[i].answer_tokens for i in chosen),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    tokens = sum(row["tokens"] for row in rows)
    return {
        "rows": sum(len(chosen) for chosen in arms.values()),
        "tokens": tokens,
        "resumed_tokens": tokens - new_tokens,
        "arms": out,
    }
