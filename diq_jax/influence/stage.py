"""The influence stage: directions from the targets, then a score for each pool example."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from diq_jax import errors, influence_config, stats, trees
from diq_jax.data import encoded
from diq_jax.influence import direction, scoring, warmup
from diq_jax.models import checkpoint, decoder, load, lora
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, processes, records, stages


def fingerprints(context: stages.Context) -> Mapping[str, str]:
    settings = context.config.influence
    found = {"model.path": _weights(context)}
    if settings.parameters == "lora":
        # Also refuses scores of versions that added a random adapter to the model.
        found["gradients at"] = gradients_at(settings)
    folders = {"influence.lora.path": settings.lora.path if settings.parameters == "lora" else ""}
    if settings.direction.startswith(influence_config.PEFT_DIRECTION):
        folders["influence.direction"] = settings.direction.removeprefix(
            influence_config.PEFT_DIRECTION
        )
    for field, folder in folders.items():
        weights = pathlib.Path(folder) / "adapter_model.safetensors"
        if folder and weights.is_file():
            found[field] = artifacts.sha256(weights)
            if context.verify:
                records.verify(weights, found[field])
    return found


def check(context: stages.Context) -> None:
    """Raises UserError for what would end the stage later: an adapter that does not fit the model,
    parameters that match nothing.
    """
    settings = context.config.influence
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    cfg = model_config.decoder_config(opened.config, "model.path")
    peft = influence_config.PEFT_DIRECTION
    if settings.direction.startswith(peft):
        lora.load_peft(settings.direction.removeprefix(peft), cfg, "influence.direction")
    if settings.parameters == "lora" and settings.lora.path:
        lora.load_peft(settings.lora.path, cfg, "influence.lora.path")
    elif settings.parameters == "lora":
        trees.matching(lora.linear_shapes(cfg), settings.lora.targets, "influence.lora.targets")
    elif settings.parameters != "all":
        names = trees.named_leaves(decoder.shapes(cfg), lambda x: isinstance(x, tuple))
        trees.matching(names, settings.parameters, "influence.parameters")


def gradients_at(settings: influence_config.Influence) -> str:
    """Says which function is differentiated before any warm-up, for records."""
    path = settings.lora.path if settings.parameters == "lora" else ""
    return f"the base model with the adapter {path}" if path else "the base model"


def run(context: stages.Context) -> dict[str, Any]:
    """Writes influence/influence.parquet: example_id, influence, loss, tokens; with `targets` task
    or example also influence_by_target, with `per_token` token_influence (lists). The engines that
    keep gradients write influence/store/.

    After a warm-up the scores are summed over its epochs, by mean learning rate.

    A killed run continues after the last finished batch and gives identical bytes: which examples
    share a batch depends on the pool alone, and the directions are computed again.

    Raises:
        UserError: a loss, a direction or a score is not finite; the example is named.
    """
    cfg, placement = context.config, context.placement
    pool_table = context.table("prepare/pool.parquet", *encoded.COLUMNS)
    targets_table = context.table("prepare/targets.parquet", "task", *encoded.COLUMNS)
    targets, tasks = encoded.from_table(targets_table), targets_table["task"].to_pylist()
    task = scoring.Task(
        context,
        load.load(cfg.model.path, cfg.model.dtype, placement),
        encoded.from_table(pool_table),
        targets,
        group_targets(cfg.influence.targets, targets, tasks),
        made_from(context),
    )
    space = direction.make_space(task.model, cfg.influence, placement)
    target_losses = _target_losses(task, space)
    scored = _at_checkpoints(task, space)

    tokens = np.array([row.answer_tokens for row in task.pool], np.int32)
    influence, loss = scored.influence, scored.loss
    columns = {
        "example_id": pool_table["example_id"],
        "influence": pa.array(influence),
        "loss": pa.array(loss),
        "tokens": pa.array(tokens),
    }
    lists = pa.list_(pa.float32())
    if cfg.influence.targets != "mean":
        columns["influence_by_target"] = pa.array(list(scored.by_target), lists)
    if cfg.influence.per_token:
        columns["token_influence"] = pa.array(scored.tokens, lists)
    artifacts.write_table(context.path("influence/influence.parquet"), columns)
    processes.wait("scores")  # all have read what is dropped now
    scored.finish()
    return {
        "rows": len(task.pool),
        "tokens": sum(len(row.input_ids) for row in [*task.pool, *targets]),
        "resumed_tokens": sum(len(task.pool[i].input_ids) for i in scored.resumed),
        "differentiated_parameters": sum(
            int(np.prod(shape)) for shape in direction.shapes(space, placement).values()
        ),
        "gradients_at": gradients_at(cfg.influence),
        "target_groups": list(task.groups),
        "target_loss": _by_task(tasks, target_losses),
        "correlations": {
            "spearman_influence_tokens": stats.finite(stats.spearman(influence, tokens)),
            "spearman_influence_loss": stats.finite(stats.spearman(influence, loss)),
        },
        **scored.record,
    }


def _at_checkpoints(task: scoring.Task, space) -> scoring.Scored:
    """Scores at the base model, or summed over the warm-up's epochs."""
    settings, context = task.settings, task.context
    score = scoring.exact_scores if settings.engine == "exact" else scoring.kept_scores
    if settings.warmup.epochs == 0:
        return score(task, space, None, "")
    folder = context.path("influence/warmup")
    points = warmup.run(space, task.pool, settings, task.model.cfg, context.placement, folder)
    scored = []
    for k, (point, _) in enumerate(points):
        chosen = jax.tree.map(lambda p, x: x.astype(p.dtype), space[0], point.chosen)
        at = context.placement.like(space[0], chosen), space[1]
        scored.append(score(task, at, point, f"-epoch-{k + 1}"))
    shares = [share for _, share in points]

    def total(field):
        return sum(w * getattr(s, field) for w, s in zip(shares, scored, strict=True))

    def finish():
        for s in scored:
            s.finish()

    tokens = None
    if settings.per_token:
        rows = zip(*(s.tokens for s in scored), strict=True)
        tokens = [sum(w * t for w, t in zip(shares, row, strict=True)) for row in rows]
    return scoring.Scored(
        total("influence").astype(np.float32),
        scored[-1].loss,
        total("by_target").astype(np.float32),
        tokens,
        scored[0].resumed,
        {"checkpoints": [s.record | {"share": w} for w, s in zip(shares, scored, strict=True)]},
        finish,
    )


def group_targets(kind, targets, tasks):
    """{name: indices} of the targets that share a direction."""
    if kind == "example":
        return {row.example_id: [i] for i, row in enumerate(targets)}
    if kind == "task":
        return {t: [i for i, u in enumerate(tasks) if t == u] for t in sorted(set(tasks))}
    return {"mean": list(range(len(targets)))}


def _weights(context):
    return checkpoint.open_checkpoint(context.config.model.path, "model.path").fingerprint


def made_from(context):
    """What a store's rows depend on, beside the projection."""
    cfg = context.config
    settings = cfg.influence
    record = {
        "weights": _weights(context),
        "data": artifacts.sha256(context.path("prepare/pool.parquet")),
        "model_path": cfg.model.path,
        "model_dtype": cfg.model.dtype,
        "parameters": settings.parameters,
        "gradients_at": gradients_at(settings),
        "loss_reduction": settings.loss_reduction,
    }
    if settings.parameters == "lora":
        record["lora"] = dataclasses.asdict(settings.lora)
    if settings.warmup.epochs:
        record["warmup"] = dataclasses.asdict(settings.warmup)
    if settings.direction == "less":
        record["form"] = "less"
    return record


def _target_losses(task, space):
    """(targets,) float32, checked."""
    settings, placement = task.settings, task.context.placement
    step = placement.compile(
        functools.partial(direction.losses, cfg=task.model.cfg, reduction=settings.loss_reduction),
        rows=True,
    )
    losses = np.zeros(len(task.targets), np.float32)
    for group, found in scoring.run_batches(
        "target losses", task.targets, lambda batch: step(*space, batch), task.context
    ):
        losses[list(group.indices)] = found.reshape(-1)[group.slots]
    for row, value in zip(task.targets, losses, strict=True):
        if not np.isfinite(value):
            raise errors.UserError(
                f"The loss of target {row.example_id!r} is not finite; check the example and the "
                f"weights; model.dtype is {task.context.config.model.dtype}."
            )
    return losses


def _by_task(tasks, losses):
    """Mean loss of each task and of all targets."""
    by_task = {t: float(losses[[t == u for u in tasks]].mean()) for t in sorted(set(tasks))}
    return {"mean": float(losses.mean()), "tasks": by_task}
