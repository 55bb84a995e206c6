"""The influence stage: a direction from the targets, then a score for each pool example."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from diq_jax.common import artifacts, devices, errors, metrics, progress, stages, trees
from diq_jax.data import batches, encoded, example
from diq_jax.influence import direction, exact
from diq_jax.models import checkpoint, load


def fingerprints(context: stages.Context) -> Mapping[str, str]:
    cfg = context.config
    found = {"model.path": checkpoint.open_checkpoint(cfg.model.path, "model.path").fingerprint}
    if cfg.influence.parameters == "lora" and cfg.influence.lora.path:
        weights = context.path(cfg.influence.lora.path) / "adapter_model.safetensors"
        if weights.is_file():
            found["influence.lora.path"] = artifacts.sha256(weights)
    return found


def run(context: stages.Context) -> dict[str, Any]:
    """Writes influence/influence.parquet (example_id, influence, loss, tokens).

    A killed run continues after the last finished batch and gives identical bytes: which examples
    share a batch depends on the pool alone, and the direction is computed again.

    Raises:
        UserError: a loss, the direction or a score is not finite; the example is named.
    """
    cfg, placement = context.config, context.placement
    pool_table = artifacts.read_table(context.path("prepare/pool.parquet"))
    targets_table = artifacts.read_table(context.path("prepare/targets.parquet"))
    pool, targets = encoded.from_table(pool_table), encoded.from_table(targets_table)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    space = direction.make_space(model, cfg.influence, placement)
    bound = {"cfg": model.cfg, "reduction": cfg.influence.loss_reduction}

    losses = placement.compile(functools.partial(direction.losses, **bound), rows=True)
    target_losses = _by_row("target losses", targets, lambda b: (losses(*space, b),), context)
    v = _direction(space, targets, bound, context)
    norm = math.sqrt(trees.vdot(v, v))
    if not math.isfinite(norm):
        raise errors.UserError(
            "The mean target gradient is not finite though every target's loss is; "
            f"model.dtype is {cfg.model.dtype}: try float32."
        )

    score = placement.compile(functools.partial(exact.scores, **bound), rows=True)
    chosen, rest = space
    v = placement.replicate(v) if placement.strategy == "pmap" else v
    partial = context.path("influence/scores.partial.jsonl")
    with artifacts.Journal(partial) as journal:
        resumed = {i for entry in journal.entries for i in entry["ids"]}
        rows = _by_row("influence", pool, lambda b: score(chosen, v, rest, b), context, journal)

    influence, loss = rows
    tokens = np.array([row.answer_tokens for row in pool], np.int32)
    artifacts.write_table(
        context.path("influence/influence.parquet"),
        {
            "example_id": pool_table["example_id"],
            "influence": pa.array(influence),
            "loss": pa.array(loss),
            "tokens": pa.array(tokens),
        },
    )
    partial.unlink()
    return {
        "rows": len(pool),
        "tokens": sum(len(row.input_ids) for row in [*pool, *targets]),
        "resumed_tokens": sum(len(row.input_ids) for row in pool if row.example_id in resumed),
        "differentiated_parameters": trees.size(v),
        "direction_norm": norm,
        "target_loss": _by_task(targets_table["task"].to_pylist(), target_losses[0]),
        "correlations": {
            "spearman_influence_tokens": metrics.finite(metrics.spearman(influence, tokens)),
            "spearman_influence_loss": metrics.finite(metrics.spearman(influence, loss)),
        },
    }


def _direction(space, targets, bound, context):
    """The mean target gradient, with a bar."""
    placement = context.placement
    groups = _plan(targets, context)

    def placed(bar):
        for indices, batch in batches.iterate(groups, targets):
            yield len(indices), placement.batch(batch)
            bar.update(len(indices), sum(len(targets[i].input_ids) for i in indices))

    with progress.Progress("target gradient", len(targets)) as bar:
        return direction.mean_gradient(
            space, placed(bar), bound["cfg"], bound["reduction"], placement
        )


def _by_row(
    name: str,
    rows: list[example.Encoded],
    step: Callable,
    context: stages.Context,
    journal: artifacts.Journal | None = None,
) -> np.ndarray:
    """Runs step(placed batch) -> k arrays (B,) over all rows; the last of the k is the loss.

    The next batch is dispatched before the last is fetched. With a journal, batches that it holds
    are not run again.

    Returns:
        (k, number of rows) float32.
    """
    done = {tuple(entry["ids"]): entry["values"] for entry in journal.entries} if journal else {}
    values: dict[int, list[float]] = {}
    groups = []
    for group in _plan(rows, context):
        saved = done.get(tuple(rows[i].example_id for i in group.indices))
        if saved is None:
            groups.append(group)
        else:
            values |= zip(group.indices, saved, strict=True)

    def started():
        for indices, batch in batches.iterate(groups, rows):
            yield indices, step(context.placement.batch(batch))

    with progress.Progress(name, len(rows), resumed=len(values)) as bar:
        for indices, outputs in devices.one_behind(started()):
            table = np.stack(jax.device_get(outputs), axis=1)[: len(indices)]
            ids = [rows[i].example_id for i in indices]
            _check_finite(name, ids, table, context.config.model.dtype)
            if journal:
                journal.append({"ids": ids, "values": table.tolist()})
            values |= zip(indices, table.tolist(), strict=True)
            bar.update(len(indices), sum(len(rows[i].input_ids) for i in indices))
    return np.array([values[i] for i in range(len(rows))], np.float32).T


def _check_finite(name, ids, table, dtype):
    for example_id, row in zip(ids, table, strict=True):
        if not np.isfinite(row).all():
            what = "influence" if np.isfinite(row[-1]) else "loss"
            raise errors.UserError(
                f"The {what} of example {example_id!r} is not finite ({name}: {row.tolist()}); "
                f"check the example and the weights; model.dtype is {dtype}."
            )


def _plan(rows, context):
    tokens = context.config.influence.batch_tokens
    return batches.plan(rows, tokens, context.placement.rows_multiple)


def _by_task(tasks, losses):
    """Mean loss of each task and of all targets."""
    by_task = {t: float(losses[[t == u for u in tasks]].mean()) for t in sorted(set(tasks))}
    return {"mean": float(losses.mean()), "tasks": by_task}
