r"""Scores a pool against new targets from the gradient store of a finished run, in seconds.

    diq score --workdir=runs/mine --targets=new_targets.jsonl \
        --output=new_scores.parquet

The run must have been made with influence.engine=projected or factored: only the new targets are
differentiated, at the same weights and through the same projection. Written: example_id, influence
(of the mean of all targets), and one column for each task.
"""

import pathlib
import time

from absl import flags

from diq_jax import config, errors
from diq_jax.commands import cli

POOL, STORE = "prepare/pool.parquet", "influence/store"

VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a finished run.", required=True)
TARGETS = flags.DEFINE_string(
    "targets", None, "As data.targets; all of its rows are taken.", required=True
)
OUTPUT = flags.DEFINE_string("output", None, "The parquet file to write.", required=True)


def read_run(workdir: pathlib.Path) -> config.Config:
    """Returns the config that the run's influence stage was made with.

    Raises:
        UserError: the stage has not finished, or it keeps no gradients of one fixed model.
    """
    from diq_jax.run import records

    cfg = records.config_of(records.finished(workdir, "influence"), workdir / "influence")
    if cfg.influence.engine == "exact":
        raise errors.UserError(
            f"--workdir: {workdir} was scored by engine=exact, which keeps no gradients; run it "
            "with influence.engine=projected or factored."
        )
    if cfg.influence.warmup.epochs:
        raise errors.UserError(
            f"--workdir: {workdir} was scored after a warm-up; only a store of the base model can "
            "be scored anew."
        )
    return cfg


def main() -> None:
    """Scores the pool of a run anew."""
    workdir = pathlib.Path(cli.run_folder(WORKDIR.value, "--workdir"))
    verified = cli.verify(VERIFY)
    cfg = read_run(workdir)

    import numpy as np
    import pyarrow as pa

    from diq_jax.data import chat, encoded, sources
    from diq_jax.influence import direction, features, problems, store
    from diq_jax.influence import stage as influence
    from diq_jax.models import load, tokenizer
    from diq_jax.run import artifacts, compiled, devices, records, stages

    compiled.keep()
    placement = devices.make_placement(cfg.parallel)
    context = stages.Context(cfg, workdir, placement)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, model.cfg.vocab_size, cfg.data.date, "model.path")
    found = sources.load_targets(TARGETS.value, 0, 0, cfg.data.columns)
    rows, _, _ = encoded.encode_all(
        found, layout, cfg.data.template, cfg.model.max_tokens, cfg.model.truncation
    )
    tasks = {target.example_id: target.task for target in found}
    groups = problems.group_targets("task", rows, [tasks[row.example_id] for row in rows])

    space = direction.make_space(model, cfg.influence, placement)
    made = features.open_features(space, cfg.influence, model.cfg, placement, None)
    if verified:
        for name in (POOL, f"{STORE}/manifest.json"):
            records.verify(workdir / name)
    opened = store.open_store(workdir / STORE, influence.made_from(context) | made.record, verified)
    problem = problems.Problem(model, [], rows, groups, cfg.influence, placement)
    targets, _ = made.of_directions(problem, space, None)
    started = time.perf_counter()
    mean = (problem.weights @ targets)[None]
    scores = opened.scores(np.concatenate([targets, mean]), cfg.influence.normalize)
    seconds = time.perf_counter() - started
    columns = {"example_id": opened.example_ids, "influence": pa.array(scores[:, -1])}
    columns |= {name: pa.array(scores[:, q]) for q, name in enumerate(groups)}
    artifacts.write_table(OUTPUT.value, columns)
    print(
        f"{len(opened):,} rows x {len(groups)} tasks ({len(rows)} targets) from "
        f"{workdir / STORE}: {seconds:.2f} s for the products; wrote {OUTPUT.value}"
    )
