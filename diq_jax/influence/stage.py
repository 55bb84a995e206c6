"""The influence stage: directions from the targets, then a score for each pool example."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from absl import logging

from diq_jax import influence_config, stats, trees
from diq_jax.data import encoded
from diq_jax.influence import kinds, score, store, tuned
from diq_jax.models import checkpoint, decoder, load, lora
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, parts, records, stages

PARTIAL = "influence/partial"  # finished batches of a run that goes on


def fingerprints(context: stages.Context) -> Mapping[str, str]:
    """Fingerprints the model, and the adapters that the settings name."""
    settings = context.config.influence
    found = {"model.path": _weights(context)}
    if settings.parameters == "lora":
        # Also refuses scores of versions that added a random adapter to the model.
        found["gradients at"] = gradients_at(settings)
    folders = {"influence.lora.path": settings.lora.path if settings.parameters == "lora" else ""}
    if settings.direction.startswith(kinds.PEFT):
        folders["influence.direction"] = settings.direction.removeprefix(kinds.PEFT)
    for field, folder in folders.items():
        weights = pathlib.Path(folder) / "adapter_model.safetensors"
        if folder and weights.is_file():
            found[field] = artifacts.sha256(weights)
            if context.verify:
                records.verify(weights, found[field])
    return found


def check(context: stages.Context) -> None:
    """Raises UserError for an adapter that does not fit, or parameters that match nothing."""
    settings = context.config.influence
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    cfg = model_config.decoder_config(opened.config, "model.path")
    if settings.direction.startswith(kinds.PEFT):
        lora.load_peft(settings.direction.removeprefix(kinds.PEFT), cfg, "influence.direction")
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
    """Writes influence.parquet (_write_table), tuned.parquet if asked, store/ of gradient engines.

    A killed run continues after the last finished batch and gives identical bytes: which examples
    share a batch depends on the pool alone, and the directions are computed again.

    Raises:
        UserError: a loss, a direction or a score is not finite; the example is named.
    """
    cfg, settings = context.config, context.config.influence
    pool = encoded.from_table(context.table("prepare/pool.parquet", *encoded.COLUMNS))
    targets_table = context.table("prepare/targets.parquet", "task", *encoded.COLUMNS)
    targets, tasks = encoded.from_table(targets_table), targets_table["task"].to_pylist()
    writers: dict[str, store.Writer] = {}
    resumed: list[set[int]] = []

    def keep(name: str) -> score.Kept:
        found = parts.Parts(context.path(f"{PARTIAL}/rows{name}"))
        resumed.append(set(found.done))
        if settings.engine == "exact":
            return found
        folder, stored = context.path(f"influence/store{name}"), settings.store
        writers[name] = store.Writer(folder, found, len(pool), stored.dtype, stored.shard_rows)
        return writers[name]

    model = load.load(cfg.model.path, cfg.model.dtype, context.placement)
    epochs = EpochFiles(context.path("influence/warmup"))
    scores = score.score(model, pool, targets, settings, context.placement, tasks, keep, epochs)
    made = made_from(context) if writers else {}
    for (name, writer), (joined, _) in zip(writers.items(), scores.checkpoints, strict=False):
        of_rows = made | joined.made_by | ({"checkpoint": name[1:]} if name else {})
        writer.finish(scores.example_ids, joined.ends, list(joined.record["directions"]), of_rows)
    _write_table(context.path("influence/influence.parquet"), scores, settings)
    _write_tuned(context, model, pool, targets)
    parts.drop(context.path(PARTIAL))
    return {
        "rows": len(pool),
        "tokens": sum(len(row.input_ids) for row in [*pool, *targets]),
        "resumed_tokens": sum(len(pool[i].input_ids) for i in resumed[0]),
        "differentiated_parameters": scores.parameters,
        "gradients_at": gradients_at(settings),
        "target_groups": scores.groups,
        "target_loss": _by_task(tasks, scores.target_losses),
        "correlations": {
            f"spearman_influence_{name}": stats.finite(stats.spearman(scores.influence, values))
            for name, values in (("tokens", scores.tokens), ("loss", scores.loss))
        },
        **_record(scores, settings),
    }


def _write_tuned(context, model, pool, targets) -> None:
    columns = tuned.scores(
        model, pool, targets, context.config.influence, context.placement,
        lambda name: parts.Parts(context.path(f"{PARTIAL}/{name}")),
        lambda name: EpochFiles(context.path(f"{PARTIAL}/epochs-{name}")),
    )  # fmt: skip
    if columns:
        ids = {"example_id": pa.array([row.example_id for row in pool])}
        columns = ids | {name: pa.array(values) for name, values in columns.items()}
        artifacts.write_table(context.path("influence/tuned.parquet"), columns)


def _write_table(path: pathlib.Path, scores: score.Scores, settings) -> None:
    """Writes example_id, influence, loss, tokens, and what `targets` and `per_token` ask for."""
    columns = {
        "example_id": pa.array(scores.example_ids),
        "influence": pa.array(scores.influence),
        "loss": pa.array(scores.loss),
        "tokens": pa.array(scores.tokens),
    }
    lists = pa.list_(pa.float32())
    if settings.targets != "mean":
        columns["influence_by_target"] = pa.array(list(scores.by_target), lists)
    if scores.alignment is not None:
        columns["alignment"] = pa.array(scores.alignment)
    if settings.per_token:
        columns["token_influence"] = pa.array(scores.token_influence, lists)
    artifacts.write_table(path, columns)


def _record(scores: score.Scores, settings) -> dict[str, Any]:
    """Returns how the scores were made, for stage.json."""
    found: dict[str, Any] = {"span": scores.span} if scores.span else {}
    if settings.warmup.epochs:
        return found | {
            "checkpoints": [joined.record | {"share": w} for joined, w in scores.checkpoints]
        }
    return found | scores.checkpoints[0][0].record


class EpochFiles:
    """Keeps a warm-up's epochs in a folder, a file each, with a checksum (warmup.Epochs)."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def _file(self, epoch: int) -> pathlib.Path:
        return self.folder / f"epoch-{epoch}.safetensors"

    def get(self, epoch: int) -> dict[str, np.ndarray] | None:
        """Reads an epoch; None where it is not there, or is damaged and trained again."""
        file = self._file(epoch)
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, "numpy") as opened:
                said = (opened.metadata() or {}).get("sha256")
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
        except safetensors.SafetensorError:
            said, arrays = "", {}
        if said == _checksum(arrays):
            return arrays
        logging.warning("%s is damaged: the epoch is trained again.", file)
        return None

    def __setitem__(self, epoch: int, arrays: dict[str, np.ndarray]) -> None:
        with artifacts.atomic(self._file(epoch)) as temporary:
            metadata = {"sha256": _checksum(arrays)}
            safetensors.numpy.save_file(arrays, temporary, metadata)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _weights(context):
    return checkpoint.open_checkpoint(context.config.model.path, "model.path").fingerprint


def made_from(context: stages.Context) -> dict[str, Any]:
    """Returns what a store's rows depend on, beside the projection."""
    cfg = context.config
    settings = cfg.influence
    record: dict[str, Any] = {
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
    if kinds.of_direction(settings).features:
        record["form"] = settings.direction
    return record


def _by_task(tasks, losses):
    """Averages the loss over each task and over all targets."""
    by_task = {t: float(losses[[t == u for u in tasks]].mean()) for t in sorted(set(tasks))}
    return {"mean": float(losses.mean()), "tasks": by_task}
