"""The stage `finetune`: an adapter on the selected rows, and one on as many by each baseline.

All arms share the initial adapter, the schedule, the shapes and the compiled programs; only the
rows differ. The train state goes to disk every few steps, so that a killed run continues and gives
the same bytes.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diq_jax.common import artifacts, errors, progress, stages, trees
from diq_jax.data import encoded as encoded_lib
from diq_jax.data import example
from diq_jax.data import steps as steps_lib
from diq_jax.finetune import sft
from diq_jax.models import checkpoint, load, lora

SELECTED = "selected"


def run(context: stages.Context) -> dict[str, Any]:
    """Trains every arm and writes finetune/adapter, finetune/baselines/METHOD and losses.jsonl.

    Returns:
        rows: examples of all arms; tokens: those processed, padding not counted, resumed_tokens
        among them; arms: {arm: rows, steps, answer_tokens (of its rows, once), first_loss,
        last_loss}.
    """
    settings = context.config.finetune
    encoded, arms = _subsets(context)
    steps = sft.plan(encoded, arms, settings, context.placement.rows_multiple)
    losses_file, state_folder = (
        context.path("finetune/losses.jsonl"),
        context.path("finetune/state"),
    )
    finished = [folder / "adapter_config.json" for folder in _folders(context, arms).values()]
    tokens = 0
    if not all(file.exists() for file in (losses_file, *finished)):
        losses, tokens = _train_arms(context, encoded, steps)
        rows = [
            row for arm in arms for row in _rows(arm, steps[arm], losses[arm], encoded, settings)
        ]
        artifacts.write_jsonl(losses_file, rows)
    if state_folder.exists():
        shutil.rmtree(state_folder)
    return _summary(artifacts.read_jsonl(losses_file), encoded, arms, tokens)


def fingerprints(context: stages.Context) -> dict[str, str]:
    """What the stage reads beside artifacts: the weights."""
    opened = checkpoint.open_checkpoint(context.config.model.path, "model.path")
    return {"model.path": opened.fingerprint}


def _subsets(context) -> tuple[list[example.Encoded], dict[str, list[int]]]:
    """The examples of all arms, and each arm's as indices into them: the selected ones, and the
    first as many by each baseline's rank.
    """
    selection = artifacts.read_table(context.path("selection/selection.parquet"))
    ids = np.array(selection["example_id"].to_pylist())
    chosen = {SELECTED: set(ids[selection["selected"].to_numpy()])}
    methods = context.config.finetune.baseline_methods
    if methods:
        table = artifacts.read_table(context.path("selection/baselines.parquet"))
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
    pool = artifacts.read_table(context.path("prepare/pool.parquet"))
    needed = set().union(*chosen.values())
    encoded = encoded_lib.from_table(
        pool.filter(np.isin(pool["example_id"].to_pylist(), list(needed)))
    )
    place = {e.example_id: i for i, e in enumerate(encoded)}
    return encoded, {arm: sorted(place[i] for i in found) for arm, found in chosen.items()}


def _folders(context, arms):
    return {
        arm: context.path("finetune/adapter" if arm == SELECTED else f"finetune/baselines/{arm}")
        for arm in arms
    }


def _train_arms(context, encoded, steps: Mapping[str, Sequence[steps_lib.Step]]):
    """Trains and exports every arm. Returns ({arm: losses, one a step}, tokens of this call)."""
    settings, settings_model = context.config.finetune, context.config.model
    model = load.load(settings_model.path, settings_model.dtype, context.placement)
    # Factors stay float32 whatever the model's dtype: an update of 1e-4 vanishes in bfloat16.
    adapter = jax.jit(
        lambda key: lora.init(
            key, model.cfg, settings.targets, settings.rank, settings.alpha,
            zero_b=True, field="finetune.targets",
        )
    )(sft.split_key(settings.seed)[0])  # fmt: skip
    # Every arm has as many rows, so one schedule serves them all.
    optimizer = sft.make_optimizer(settings, len(steps[SELECTED]))
    train_step = sft.make_train_step(model.cfg, settings, optimizer, context.placement)
    losses, tokens = {}, 0
    for arm, folder in _folders(context, steps).items():
        state, frozen = sft.init_state(adapter, optimizer)
        state, losses[arm], new_tokens = _train(
            context, arm, encoded, steps[arm], state,
            lambda state, step, frozen=frozen: train_step(
                model.params, frozen, state, steps_lib.microbatches(encoded, step)
            ),
        )  # fmt: skip
        tokens += new_tokens
        trained = trees.combine(state.factors, frozen)
        lora.save_peft(folder, trained, settings.alpha, settings.dropout, settings_model.path)
    return losses, tokens


def _train(context, arm, encoded, steps, state, train_step):
    """One arm from its last checkpoint to its end. Returns (state, losses, tokens of this call)."""
    every = context.config.finetune.checkpoint_every_steps
    folder = context.path(f"finetune/state/{arm}").absolute()
    # The next step is on its way before a loss is fetched; `waiting` is the step to fetch.
    waiting: list[tuple[int, Any]] = []
    with _checkpoints(folder) as saved:
        state, losses = _restore(saved, state)
        done = len(losses)
        sizes = [len(step.indices) for step in steps]
        name = f"finetune {arm}"
        with progress.Progress(name, sum(sizes), resumed=sum(sizes[:done])) as bar:

            def fetch():
                for number, metrics in waiting:
                    indices = steps[number].indices
                    value = _finite(metrics, arm, number, [encoded[i].example_id for i in indices])
                    losses.append(value)
                    bar.update(len(indices), _tokens(encoded, indices), loss=f"{value:.3f}")
                waiting.clear()

            for number in range(done, len(steps)):
                state, metrics = train_step(state, steps[number])
                fetch()
                waiting.append((number, metrics))
                if (number + 1) % every == 0 or number + 1 == len(steps):
                    fetch()
                    _save(saved, state, losses)
    return state, losses, bar.tokens


def _finite(metrics, arm, number, ids) -> float:
    loss, norm = (float(metrics[name]) for name in ("loss", "gradient_norm"))
    if np.isfinite(loss) and np.isfinite(norm):
        return loss
    raise errors.UserError(
        f"finetune: arm {arm!r} has loss {loss} and gradient norm {norm} at step {number} "
        f"(examples {', '.join(ids)}). Try a lower finetune.learning_rate, finetune.clip_norm=1 "
        "or model.dtype=float32."
    )


def _checkpoints(folder) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def _save(saved, state, losses) -> None:
    items = {"state": ocp.args.StandardSave(state), "losses": ocp.args.JsonSave(losses)}
    saved.save(len(losses), args=ocp.args.Composite(**items))


def _restore(saved, state):
    """The last checkpoint, or the state given and no losses."""
    last = saved.latest_step()
    if last is None:
        return state, []
    template = jax.tree.map(np.asarray, state)
    items = {"state": ocp.args.StandardRestore(template), "losses": ocp.args.JsonRestore()}
    found = saved.restore(last, args=ocp.args.Composite(**items))
    return jax.tree.map(jnp.asarray, found["state"]), found["losses"]


def _tokens(encoded, indices) -> int:
    return sum(len(encoded[i].input_ids) for i in indices)


def _rows(arm, steps, losses, encoded, settings):
    """The lines of losses.jsonl."""
    rates = np.asarray(jax.jit(sft.schedule(settings, len(steps)))(jnp.arange(len(steps))))
    for number, (step, loss, rate) in enumerate(zip(steps, losses, rates, strict=True)):
        yield {
            "arm": arm,
            "step": number,
            "epoch": step.epoch,
            "loss": loss,
            "learning_rate": float(f"{rate:.6g}"),
            "tokens": _tokens(encoded, step.indices),
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
