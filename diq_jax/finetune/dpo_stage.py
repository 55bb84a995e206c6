"""The stage `dpo`: the selected rows' adapter trained on, by preferences (dpo.py)."""

import dataclasses
from typing import Any

import jax
import numpy as np

from diq_jax import config, errors, finetune_config, trees
from diq_jax.data import batches, chat, preferences, sources
from diq_jax.finetune import curves, dpo, fit, sft
from diq_jax.models import checkpoint, load, loop, lora, tokenizer, training
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, devices, parts, processes, progress, reading, stages

DATA = "finetune.dpo.data"
SFT = "finetune/adapter"
REFERENCE, PARTIAL = "dpo/reference.parquet", "dpo/partial"
MAX_SHAPES = 4  # of the reference's batches: each is a compilation


def run(context: stages.Context) -> dict[str, Any]:
    """Writes dpo/adapter, dpo/losses.jsonl and dpo/reference.parquet.

    Returns:
        rows: pairs; tokens: processed in training, padding not counted; resumed_tokens among them;
        dropped_ids where some pairs are too long; first and last loss, margin and accuracy.
    """
    settings = context.config.finetune
    pairs, dropped = load_pairs(context.config, _layout(context.config))
    as_sft = _as_sft(settings)
    longer, multiple = [pair.longer for pair in pairs], context.placement.rows_multiple
    planned = fit.plan(longer, {"dpo": range(len(pairs))}, as_sft, as_sft.seed, multiple)["dpo"]
    losses_file = context.path("dpo/losses.jsonl")
    tokens = 0
    if not processes.agreed(losses_file.exists):
        records, tokens = _train(context, pairs, planned, as_sft)
        rows = [
            {"step": number, "epoch": step.epoch, **record,
             "tokens": sum(pairs[i].tokens for i in step.indices)}
            for number, (step, record) in enumerate(zip(planned, records, strict=True))
        ]  # fmt: skip
        artifacts.write_jsonl(losses_file, rows)
    parts.drop(context.path("dpo/state"))
    rows = reading.read_jsonl(losses_file)
    total = sum(row["tokens"] for row in rows)
    ends = {
        f"{end}_{name}": row[name]
        for end, row in (("first", rows[0]), ("last", rows[-1]))
        for name in ("loss", "margin", "accuracy")
    }
    counts = {"rows": len(pairs), "tokens": total, "resumed_tokens": total - tokens}
    return counts | ({"dropped_ids": dropped} if dropped else {}) | ends


def reads(context: stages.Context) -> tuple[str, ...]:
    """Lists the files of the adapter to begin at."""
    if context.config.finetune.dpo.start == "base":
        return ()
    return tuple(f"{SFT}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Fingerprints what the stage reads beside artifacts: the weights and the preferences.

    Raises:
        UserError: no preferences are named.
    """
    spec = context.config.finetune.dpo.data
    if not spec:
        raise errors.UserError(f"Stage 'dpo' needs preference rows: set {DATA}.")
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    tokens = tokenizer.fingerprints(context.config.model.path, "model.path")
    return {"model.path": opened.fingerprint, **tokens, DATA: sources.fingerprint(spec, DATA)}


def _layout(cfg) -> chat.Layout:
    opened = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    shape = model_config.decoder_config(opened.config, "model.path")
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    return chat.make_layout(tok, shape.vocab_size, cfg.data.date, "model.path")


def load_pairs(
    cfg: config.Config, layout: chat.Layout
) -> tuple[list[preferences.PreferencePair], list[str]]:
    """Loads the preferences, tokenised, and the ids of those left out (preferences.encode).

    Raises:
        UserError: a wrong row, a token that the model does not have, or no pair that fits.
    """
    found = preferences.load_preferences(cfg.finetune.dpo.data, cfg.finetune.dpo.limit, DATA)
    pairs, dropped = preferences.encode(
        found, layout, cfg.data.template, cfg.model.max_tokens, cfg.model.truncation, DATA
    )
    if not pairs:
        raise errors.UserError(
            f"{DATA}: none of the {len(found)} pairs fits model.max_tokens = "
            f"{cfg.model.max_tokens} (model.truncation={cfg.model.truncation})."
        )
    return pairs, dropped


def _as_sft(settings: finetune_config.Finetune) -> finetune_config.Finetune:
    """Returns the settings by which steps are planned and taken: DPO's where it has its own."""
    own = ("epochs", "learning_rate", "warmup_ratio", "batch_size", "accumulation_steps", "seed")
    values = {name: getattr(settings.dpo, name) for name in own}
    return dataclasses.replace(settings, **values, dropout=0.0, packing=False, max_steps=0)


def _train(context, pairs, planned, settings):
    """Trains and exports. Returns (metrics of each step, tokens of this call)."""
    cfg, placement = context.config, context.placement
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    adapter = _start(context, model)
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    state, frozen = sft.init_state(adapter, optimizer)
    reference = _reference(context, model, adapter, pairs)
    sums = dpo.example_sums(model.cfg, settings.dpo, settings.remat)
    train_step = training.make_train_step(sums, optimizer, placement)
    rates = fit.learning_rates(settings, len(planned))

    def take(state, number):
        rows = dpo.microbatches(pairs, reference, planned[number])
        return train_step(model.params, frozen, state, rows, rates[number], None)

    examples = [(pair.example_id, pair.tokens) for pair in pairs]
    with curves.open_log(context.path("dpo/tensorboard"), settings.tensorboard) as log:
        upkeep = loop.Upkeep(context.path("dpo/state"), settings.checkpoint_every_steps, log=log)
        indices = [step.indices for step in planned]
        state, records, tokens = loop.train("dpo", indices, examples, state, frozen, take, upkeep)
    trained = trees.combine(state.factors, frozen)
    folder = context.path("dpo/adapter")
    lora.save_peft(folder, trained, model.cfg, _alpha(trained), 0.0, cfg.model.path)
    return records, tokens


def _start(context, model):
    """Loads the adapter where the policy begins, which is also the reference."""
    settings = context.config.finetune
    if settings.dpo.start == "sft":
        return lora.load_peft(context.path(SFT), model.cfg, "finetune.dpo.start=sft")
    key = jax.random.key(settings.dpo.seed)
    return lora.init(
        key, model.cfg, settings.targets, settings.rank, settings.alpha, True, "finetune.targets"
    )


def _alpha(adapter) -> float:
    """PEFT's lora_alpha, from a trained adapter itself: scale is alpha / rank."""
    leaves = trees.named_leaves(adapter)
    name = next(name for name in leaves if name.endswith("/a"))
    return float(leaves[f"{name[:-2]}/scale"][0]) * leaves[name].shape[-1]


def _reference(context, model, adapter, pairs) -> dict[str, list[float]]:
    """Computes {pair: the reference's log-probabilities (chosen, rejected)} once, kept on disk.

    A killed run continues after the last finished batch.
    """
    file = context.path(REFERENCE)
    if not processes.agreed(file.exists):
        finished = parts.Parts(context.path(PARTIAL))
        _score(context, model, adapter, pairs, finished)
        values = finished.columns()["log_probabilities"]
        columns = {name: values[:, k] for k, name in enumerate(preferences.SIDES)}
        artifacts.write_table(file, {"example_id": [p.example_id for p in pairs], **columns})
    parts.drop(context.path(PARTIAL))
    kinds = {"example_id": "text"} | dict.fromkeys(preferences.SIDES, "finite")
    columns = (reading.read_table(file, kinds)[name].to_pylist() for name in kinds)
    return {id_: [c, r] for id_, c, r in zip(*columns, strict=True)}


def _score(context, model, adapter, pairs, finished):
    """Adds the log-probabilities of the pairs that are not finished, a batch a part."""
    placement, rows = context.placement, [pair.longer for pair in pairs]
    # A pair is two rows.
    tokens = max(context.config.evaluate.batch_tokens // 2, 1)
    groups = batches.plan(rows, tokens, placement.rows_multiple, MAX_SHAPES)
    score = placement.compile(
        lambda params, adapter, batch: dpo.log_probabilities(params, model.cfg, batch, adapter),
        rows=True,
    )
    placed = placement.replicate(adapter)

    def started():
        for group in groups:
            if not finished.done.issuperset(group.indices):
                batch = placement.batch(dpo.make_batch(pairs, group))
                yield group.indices, score(model.params, placed, batch)

    with progress.Progress("dpo reference", len(pairs), len(finished.done)) as bar:
        for indices, output in devices.one_behind(started()):
            values = np.asarray(output, np.float64).reshape(-1, 2)
            new = [k for k, i in enumerate(indices) if i not in finished.done]
            chosen = [indices[k] for k in new]
            finished.add(chosen, {"log_probabilities": values[new]})
            bar.update(len(chosen), sum(pairs[i].tokens for i in chosen))
