r"""Do scores predict what training does? The linear datamodeling score of each way of scoring.

    python experiments/measure_lds.py --config=configs/quickstart.py --workdir=runs/lds \
        [--rows=400] [--subsets=64] [--width=64] [--layers=2] [--vocab=2048] \
        [--dims=256,1024,4096] [--peers=kronfluence,bergson]

With --peers the influence functions of other tools (after `make peers`) stand beside ours, on the
same model, rows, targets and halves.

A tiny model with the config's tokenizer is trained on rows of data.pool that are left aside (the
base), then from there on many random halves of --rows other rows. LDS is the Spearman correlation,
over the halves, of a target's measured loss with the sum of the scores of the rows in the half (its
sign turned), averaged over targets. Written: lds.json, lds.png, .svg, .csv. A killed run continues
after its last training. The config's influence.gauss_newton says how that direction is solved.

Intervals are over targets and halves. `reliability` is the LDS of one training seed's losses with
another's, carried over to their mean: no score can be expected above its root.
"""

import collections
import dataclasses
import functools
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pictures
from absl import flags
from ml_collections import config_flags

import datamodel
import lds_scores
from diq_jax import config, errors, stats, trees
from diq_jax.commands import cli
from diq_jax.data import batches, chat, encoded, example, sources
from diq_jax.models import config as model_config
from diq_jax.models import decoder, rope, tokenizer
from diq_jax.report import style
from diq_jax.run import artifacts, devices, parts, progress

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
ROWS = flags.DEFINE_integer("rows", 400, "Of the pool, that subsets are drawn from.", lower_bound=8)
SUBSETS = flags.DEFINE_integer("subsets", 64, "Random halves of them.", lower_bound=4)
SEEDS = flags.DEFINE_integer("seeds", 2, "Trainings on each half, averaged.", lower_bound=1)
TARGETS = flags.DEFINE_integer("targets", 32, "Drawn from data.targets.", lower_bound=2)
TOKENS = flags.DEFINE_integer("tokens", 128, "Longer rows are cut.", lower_bound=16)
WIDTH = flags.DEFINE_integer("width", 64, "Of the tiny model; heads of 16.", lower_bound=16)
VOCAB = flags.DEFINE_integer(
    "vocab", 2048, "Most frequent tokens; the rest are one.", lower_bound=2
)
LAYERS = flags.DEFINE_integer("layers", 2, "Of the tiny model.", lower_bound=1)
BASE_EPOCHS = flags.DEFINE_integer("base_epochs", 4, "Over the rows left aside.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 3, "Over each half.", lower_bound=1)
RATE = flags.DEFINE_float("learning_rate", 1e-3, "AdamW's peak; three times that for the base.")
DIMS = flags.DEFINE_list("dims", ["256", "1024", "4096"], "Of the rademacher projections.")
PEERS = flags.DEFINE_list("peers", [], "Methods of peers/score_peers.py, each in its own process.")
BATCH = 16  # rows of an optimiser step
BOOTSTRAP = 500


def encode(cfg: config.Config) -> tuple[list, list, list]:
    """Returns (base rows, pool rows, targets), frequent tokens from 1 and all others 0: cheaper."""
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, len(tok), cfg.data.date, "model.path")
    found = sources.load_examples(cfg.data.pool, cfg.data.columns, cfg.data.pool_limit)
    goals = sources.load_targets(cfg.data.targets, 0, cfg.data.seed, cfg.data.columns)
    rows, goals = (
        encoded.encode_all(part, layout, cfg.data.template, TOKENS.value, "end")[0]
        for part in (found, goals)
    )
    if len(rows) < ROWS.value + BATCH or len(goals) < TARGETS.value:
        raise errors.UserError(
            f"--rows={ROWS.value} and --targets={TARGETS.value} need as many, and {BATCH} rows "
            f"more for the base; there are {len(rows)} and {len(goals)} that fit --tokens."
        )
    drawn = set(example.draw(rows, ROWS.value, cfg.data.seed))
    parts = (
        [row for i, row in enumerate(rows) if i not in drawn],
        [rows[i] for i in sorted(drawn)],
        [goals[i] for i in example.draw(goals, TARGETS.value, cfg.data.seed)],
    )
    rows = [row for part in parts for row in part]
    used = collections.Counter(token for row in rows for token in row.input_ids.tolist())
    number = {token: n for n, (token, _) in enumerate(used.most_common(VOCAB.value - 1), start=1)}

    def renumber(row):
        ids = np.array([number.get(i, 0) for i in row.input_ids.tolist()], np.int32)
        labels = np.where(row.labels == example.IGNORED, example.IGNORED, ids).astype(np.int32)
        return dataclasses.replace(row, input_ids=ids, labels=labels)

    base, pool, goals = ([renumber(row) for row in part] for part in parts)
    return base, pool, goals


def lay_out(rows) -> batches.Batch:
    tokens = max(len(row.input_ids) for row in rows)
    made = batches.make_batch(rows, len(rows), tokens, max(row.answer_tokens for row in rows))
    return jax.tree.map(jnp.asarray, made)


def make_setting(cfg: config.Config) -> lds_scores.Setting:
    """Trains the base."""
    base, pool, goals = encode(cfg)
    heads = max(1, WIDTH.value // 16)
    shape = model_config.DecoderConfig(
        family="llama", num_layers=LAYERS.value, model_dim=WIDTH.value, ffn_dim=3 * WIDTH.value,
        num_heads=heads, num_kv_heads=heads, head_dim=16, vocab_size=VOCAB.value, norm_eps=1e-5,
        rope=rope.Rope(1e4, "default", ()), max_positions=TOKENS.value, tied_head=True,
        qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, sliding_window=None,
    )  # fmt: skip
    params = decoder.init(jax.random.key(cfg.data.seed), shape, jnp.float32)
    everyone = np.ones(len(base), bool)
    order = datamodel.order_of(everyone, BASE_EPOCHS.value, BATCH, cfg.data.seed)
    started = time.perf_counter()
    point = datamodel.fit(params, lay_out(base), order, 3 * RATE.value, shape)
    targets = lay_out(goals)
    before, after = (
        float(datamodel.losses(p, targets, shape).mean()) for p in (params, point.chosen)
    )
    print(
        f"base: {trees.size(params):,} parameters, {len(base)} rows, {BASE_EPOCHS.value} epochs, "
        f"{time.perf_counter() - started:.0f} s; target loss {before:.3f} -> {after:.3f}"
    )
    return lds_scores.Setting(shape, point.chosen, pool, goals, lay_out(pool), targets)


def train_subsets(setting: lds_scores.Setting, subsets, workdir: pathlib.Path) -> np.ndarray:
    """Measures target losses after each subset and seed, (subsets, seeds, targets), once each."""
    key = zlib.crc32(repr(settings_of()).encode())
    for leaf in jax.tree.leaves(setting.params):
        key = zlib.crc32(np.asarray(leaf).tobytes(), key)
    folder, count = workdir / f"trainings-{key:08x}", len(subsets)
    seeds = [parts.Parts(folder / f"seed-{seed}") for seed in range(SEEDS.value)]
    left = [(seed, s) for seed, done in enumerate(seeds) for s in done.remaining(count)]
    total = count * SEEDS.value
    with progress.Progress("trainings", total, resumed=total - len(left)) as bar:
        for seed, s in left:
            order = datamodel.order_of(subsets[s], EPOCHS.value, BATCH, seed)
            point = datamodel.fit(setting.params, setting.batch, order, RATE.value, setting.cfg)
            found = datamodel.losses(point.chosen, setting.targets, setting.cfg)
            seeds[seed].add([s], {"losses": np.asarray(found)[None]})
            bar.update(1, tokens=0)
    return np.stack([done.columns()["losses"][:count] for done in seeds], axis=1)


def settings_of() -> dict:
    names = ("rows", "targets", "tokens", "width", "vocab", "layers", "base_epochs", "epochs")
    return {name: flags.FLAGS[name].value for name in names} | {"learning_rate": RATE.value}


def draw(rows: list[dict], reliability: float, title: str) -> matplotlib.figure.Figure:
    """A bar for each way of scoring, with its interval."""
    figure = matplotlib.figure.Figure(figsize=(8, 0.42 * len(rows) + 1.4))
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    values = np.array([[r["lds"], r["low"], r["high"]] for r in rows])
    spread = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
    axes.barh(places, values[:, 0], 0.62, color=style.ARMS[0], xerr=spread, ecolor=style.MUTED)
    axes.set_yticks(places, [r["name"] for r in rows])
    axes.axvline(0, color=style.MUTED, linewidth=1)
    if reliability > 0:
        axes.axvline(np.sqrt(reliability), color=style.SELECTED, linestyle=":", linewidth=1)
    axes.set_xlabel("LDS (dotted: the most that the trainings' own noise allows)")
    axes.grid(axis="y", visible=False)
    pictures.title(figure, title)
    return figure


def main() -> None:
    cfg = cli.read_config(CONFIG)
    if not DIMS.value or not all(d.isdigit() and int(d) for d in DIMS.value):
        raise errors.UserError(f"--dims must be whole numbers above 0; got {DIMS.value}.")
    devices.make_placement(cfg.parallel)
    workdir = cli.folder(WORKDIR)
    with jax.default_matmul_precision("highest"):
        setting = make_setting(cfg)
        seed = cfg.data.seed
        subsets = datamodel.draw_subsets(SUBSETS.value, ROWS.value, 0.5, seed)
        measured = train_subsets(setting, subsets, workdir)
        fit = functools.partial(
            datamodel.fit, setting.params, setting.batch,
            datamodel.order_of(np.ones(ROWS.value, bool), EPOCHS.value, BATCH, seed),
            RATE.value, setting.cfg,
        )  # fmt: skip
        dims = sorted(int(d) for d in DIMS.value)
        found = lds_scores.score_all(setting, cfg.influence.gauss_newton, dims, fit, seed)
        found |= lds_scores.score_peers(setting, PEERS.value, workdir / "peers")
    mean = measured.mean(axis=1)
    reliability = datamodel.reliability(measured) if SEEDS.value > 1 else float("nan")
    rows = []
    for name, (table, seconds) in found.items():
        low, high = datamodel.interval(table, subsets, mean, BOOTSTRAP, seed)
        value = float(np.mean(datamodel.lds(table, subsets, mean)))
        rows.append(
            {"name": name, "lds": value, "low": low, "high": high, "seconds": round(seconds, 1)}
        )
    title = (
        f"{SUBSETS.value} halves of {ROWS.value} rows, {TARGETS.value} targets, "
        f"{trees.size(setting.params):,} parameters"
    )
    artifacts.write_json(
        workdir / "lds.json",
        {
            "title": title,
            "settings": settings_of(),
            "reliability": stats.finite(reliability),
            "rows": rows,
        },
    )
    pictures.write(workdir, "lds", rows, draw, rows, reliability, title)
    print(f"{title}; reliability {reliability:.3f}")
    print(f"{'score':<26}{'LDS':>8}   95 % interval{'seconds':>14}")
    for r in rows:
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        print(f"{r['name']:<26}{r['lds']:>8.3f}   {interval:<17}{r['seconds']:>10,.1f}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
