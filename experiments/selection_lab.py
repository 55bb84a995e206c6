r"""Which selection helps? Every method x budgets x many seeds with a small model, on a real pool.

    diq train-classifier --config=quickstart --workdir=runs/classifier \
        --config.difficulty.source=../shared/data/difficulty/mmlu_pro_items.jsonl \
        --config.difficulty.words=True
    python experiments/selection_lab.py --workdir=runs/lab --split=0 \
        --config.difficulty.source=runs/classifier/classifier \
        [--general=../shared/data/pool/medquad_no_reasoning.jsonl] [--seeds=20] [--width=64] \
        [--dry_run]

The pool is split at random (--split): --candidates rows to select from, --held_out rows that
nothing trains on, and the rest, which trains a tokenizer and a small decoder (the base). The
stages of `diq run` score the candidates at the base, for each direction; every arm (lab/arms.py)
then trains the base on its rows with --seeds orders of them, several at once as one program, at the
settings of --config.finetune. `random` is drawn anew for each seed, and so is `the targets`: as
many of the targets as a selection has rows, or all. Measured: on multiple-choice
tests minus the log of the right option's share among the options (choice loss), accuracy and the
right answer's loss with and without the end of turn; the loss on held-out rows of the pool, and on
the targets.

Written: lab.json, .md, .png, .svg, .csv, after each budget. The same command continues a killed
run, and adds arms that did not exist before. --config is lab/settings.py unless given.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import pictures
from absl import flags
from ml_collections import config_flags

from comparison import cost
from diq_jax import config, errors, prepare
from diq_jax.commands import cli
from diq_jax.data import encoded, sources
from diq_jax.evaluate import options
from diq_jax.report import studies
from diq_jax.run import artifacts, records, stages
from diq_jax.selection import select
from lab import arms, base, summary, trainings

HERE = pathlib.Path(__file__).parent
CONFIG = config_flags.DEFINE_config_file(
    "config", str(HERE / "lab/settings.py"), "A file of configs/.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
SPLIT = flags.DEFINE_integer("split", 0, "The seed of the split.", lower_bound=0)
CANDIDATES = flags.DEFINE_integer("candidates", 1600, "Rows to select from.", lower_bound=16)
HELD_OUT = flags.DEFINE_integer("held_out", 64, "Rows that nothing trains on.", lower_bound=2)
GENERAL = flags.DEFINE_string("general", "", "Further rows for the base, as data.pool.")
WIDTH = flags.DEFINE_integer("width", 64, "Of the decoder; heads of 32.", lower_bound=32)
LAYERS = flags.DEFINE_integer("layers", 2, "Of the decoder.", lower_bound=1)
VOCAB = flags.DEFINE_integer("vocab", 2048, "Tokens of its tokenizer.", lower_bound=300)
BASE_EPOCHS = flags.DEFINE_integer("base_epochs", 6, "Over the base's rows.", lower_bound=1)
BASE_RATE = flags.DEFINE_float("base_learning_rate", 3e-3, "AdamW's peak for the base.")
BUDGETS = flags.DEFINE_list("budgets", ["0.01", "0.05", "0.1"], "Shares of the candidates.")
SEEDS = flags.DEFINE_integer("seeds", 20, "Trainings of each arm and budget.", lower_bound=2)
AT_ONCE = flags.DEFINE_integer("at_once", 10, "Trainings of one program.", lower_bound=1)
ARMS = flags.DEFINE_list(
    "arms", [], 'Only these, beside random and the targets; "influence, adam" in double quotes.'
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Score again; trainings of the same rows stay.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Make the base, predict the FLOPs, and stop.")


def base_settings() -> base.BaseSettings:
    """Returns what the flags say of the base."""
    return base.BaseSettings(
        SPLIT.value, CANDIDATES.value, HELD_OUT.value, GENERAL.value, WIDTH.value, LAYERS.value,
        VOCAB.value, BASE_EPOCHS.value, BASE_RATE.value,
    )  # fmt: skip


def with_base(cfg: config.Config, workdir: pathlib.Path) -> config.Config:
    """Returns the config of the stages: the lab's model, and the split's candidates as the pool."""
    return arms.changed(
        cfg,
        {"model": {"path": str(workdir / "base")}, "data": {"pool": str(workdir / "pool.jsonl")}},
    )


def budgets() -> list[float]:
    """Reads --budgets."""
    found = []
    for text in BUDGETS.value:
        value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
        errors.check("--budgets", 0 < value < 1, "shares of the pool below 1", text)
        found.append(value)
    return sorted(found)


def read_lab(cfg: config.Config, workdir: pathlib.Path) -> trainings.Lab:
    """Makes the lab of what the stage prepare wrote, and the held-out rows."""
    tables = {
        name: records.table(workdir / arms.MEAN, name)
        for name in (prepare.POOL, prepare.TARGETS, prepare.TESTS)
    }
    layout = prepare.open_layout(cfg)
    held_out, _, _ = encoded.encode_all(
        sources.load_examples(str(workdir / "held_out.jsonl"), cfg.data.columns),
        layout, cfg.data.template, cfg.model.max_tokens, cfg.model.truncation,
    )  # fmt: skip
    return trainings.make_lab(
        cfg,
        encoded.from_table(tables[prepare.POOL]),
        encoded.from_table(tables[prepare.TARGETS]),
        held_out,
        options.from_table(tables[prepare.TESTS], prepare.TESTS),
    )


def predict(lab: trainings.Lab, count: int) -> list[tuple[str, float]]:
    """Returns (what, FLOPs) of `count` arms, random and the targets among them, and of the pool."""
    cfg, settings = lab.model.cfg, lab.settings
    kind = "thin_gradient" if settings.trains_adapter else "gradient"
    pool = lab.candidates
    epoch = cost.total_flops(cfg, pool, kind, settings.remat)
    asked = [row for part in lab.asked for row in part.rows]
    tested = cost.total_flops(cfg, asked, "forward")
    shares = [select.budget(b, len(pool)) / len(pool) for b in budgets()]
    trained = settings.epochs * epoch
    return [
        (f"{count} arms x {100 * b:g} % x {SEEDS.value}", count * SEEDS.value * share * trained)
        for b, share in zip(budgets(), shares, strict=True)
    ] + [
        (f"the whole pool x {SEEDS.value}", SEEDS.value * trained),
        (
            "their measurements",
            (count * len(shares) + 1) * SEEDS.value * tested,
        ),
    ]


def work(
    cfg: config.Config,
    lab: trainings.Lab,
    ranks: dict[str, dict[float, np.ndarray]],
    workdir: pathlib.Path,
) -> None:
    """Trains and measures every arm, the cheapest budgets first, and writes after each budget."""
    seeds, ids = range(SEEDS.value), [row.example_id for row in lab.candidates]
    drawn = [arms.random_ranks(ids, seed) for seed in seeds]
    names = (arms.RANDOM, arms.TARGETS, *ranks)
    plan = [(name, b) for b in budgets() for name in names] + [(arms.FULL, 1.0)]
    found, about = {}, {}
    nothing = trainings.measure_base(lab, AT_ONCE.value)
    for number, (name, budget) in enumerate(plan, start=1):
        if name == arms.RANDOM:
            rows = [arms.chosen(order, budget) for order in drawn]
        elif name == arms.TARGETS:
            keep = select.budget(budget, len(ids))
            rows = [arms.drawn_targets(len(ids), lab.targets, keep, seed) for seed in seeds]
        elif name == arms.FULL:
            rows = [tuple(range(len(ids)))] * len(seeds)
        else:
            rows = [arms.chosen(ranks[name][budget], budget)] * len(seeds)
        values = trainings.run(lab, workdir / "trainings", rows, AT_ONCE.value)
        spent = {k: float(values.pop(k).sum()) for k in ("seconds", "cpu_seconds")}
        found[name, budget] = values
        lengths = [np.mean([lab.pool[i].answer_tokens for i in chosen]) for chosen in rows]
        about[name, budget] = {
            "rows": len(rows[0]), "answer_tokens": float(np.mean(lengths)), "seeds": len(rows),
            **spent,
        }  # fmt: skip
        print(f"[{number}/{len(plan)}] {name} {100 * budget:g} %: {spent['seconds']:.0f} s, "
              f"choice loss {values['choice_loss_letters'].mean():.4f}", flush=True)  # fmt: skip
        if number == len(plan) or plan[number][1] != budget:
            write(
                cfg,
                workdir,
                lab,
                summary.rows(
                    found, nothing, about, cfg.evaluate.bootstrap_samples, cfg.evaluate.seed
                ),
            )


def write(cfg: config.Config, workdir: pathlib.Path, lab: trainings.Lab, rows: list[dict]) -> None:
    """Writes lab.json, lab.md and the figure."""
    title = (
        f"{len(lab.candidates):,} candidates (split {SPLIT.value}), {LAYERS.value} layers of "
        f"{WIDTH.value}, {len(lab.questions)} questions of {len(set(lab.tasks))} tasks, "
        f"{SEEDS.value} seeds"
    )
    settings = {**dataclasses.asdict(base_settings()), "finetune": dataclasses.asdict(cfg.finetune)}
    artifacts.write_json(
        workdir / studies.LAB,
        {"title": title, "settings": settings, "rows": rows, "versions": stages.versions()},
    )
    artifacts.write_text(workdir / "lab.md", summary.as_markdown(rows, title))
    study = studies.read(workdir / studies.LAB)
    pictures.write(workdir, "lab", summary.lines(rows), studies.draw, study)


def main() -> None:
    """Makes the base, the orders and the trainings."""
    cfg, workdir = cli.read_config(CONFIG), cli.folder(WORKDIR)
    budgets()
    with jax.default_matmul_precision("highest"):
        base.make(cfg, base_settings(), workdir)
        cfg = with_base(cfg, workdir)
        ranks = arms.orders(cfg, workdir, budgets(), OVERWRITE.value)
        for name in ARMS.value:
            errors.check_choice("--arms", name, ranks)
        ranks = {k: v for k, v in ranks.items() if not ARMS.value or k in ARMS.value}
        lab = read_lab(cfg, workdir)
        predicted = predict(lab, len(ranks) + 2)
        for what, flops in predicted:
            print(f"{what:<40}{flops:>12.3g} FLOPs")
        print(f"{'together':<40}{sum(f for _, f in predicted):>12.3g} FLOPs", flush=True)
        if not DRY_RUN.value:
            work(cfg, lab, ranks, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
