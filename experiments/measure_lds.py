"""Do scores predict what training does? The linear datamodeling score of each way of scoring.

    python experiments/measure_lds.py --config=configs/quickstart.py --workdir=runs/lds \\
        [--rows=400] [--subsets=64] [--width=64] [--layers=2] [--vocab=2048] \\
        [--dims=256,1024,4096]

A tiny model with the config's tokenizer is trained on rows of data.pool that are left aside (the
base), then from there on many random halves of --rows other rows. LDS is the Spearman correlation,
over the halves, of a target's measured loss with the sum of the scores of the rows in the half (its
sign turned), averaged over targets. Written: lds.json, lds.png. A killed run continues after its
last training. The config's influence.gauss_newton says how that direction is solved.

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
from absl import flags
from ml_collections import config_flags

import datamodel
from diq_jax import config, errors, influence_config, stats, trees
from diq_jax.commands import cli
from diq_jax.data import batches, chat, encoded, example, sources
from diq_jax.influence import curvature, direction, exact, kinds, projection
from diq_jax.models import config as model_config
from diq_jax.models import decoder, rope, tokenizer
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
BATCH = 16  # rows of an optimiser step
CHUNK = 8  # directions, or rows, that one scoring program takes
BOOTSTRAP = 500


@dataclasses.dataclass(frozen=True)
class Setting:
    """The tiny model at its base, and batches of one shape."""

    cfg: model_config.DecoderConfig
    params: dict
    pool: batches.Batch
    targets: batches.Batch
    lengths: np.ndarray  # (rows,) answer tokens


def encode(cfg: config.Config) -> tuple[list, list, list]:
    """(base rows, pool rows, targets). The most frequent tokens are numbered from 1, all others 0:
    nearly all of a tiny model's cost is its vocabulary.
    """
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


def make_setting(cfg: config.Config) -> Setting:
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
    lengths = np.array([row.answer_tokens for row in pool])
    return Setting(shape, point.chosen, lay_out(pool), targets, lengths)


def train_subsets(setting: Setting, subsets, workdir: pathlib.Path) -> np.ndarray:
    """Measures the target losses after training on each subset with each seed, (subsets, seeds,
    targets). What was trained by an earlier call, of fewer subsets or seeds too, is read.
    """
    key = zlib.crc32(repr(settings_of()).encode())
    for leaf in jax.tree.leaves(setting.params):
        key = zlib.crc32(np.asarray(leaf), key)
    folder, count = workdir / f"trainings-{key:08x}", len(subsets)
    seeds = [parts.Parts(folder / f"seed-{seed}") for seed in range(SEEDS.value)]
    left = [(seed, s) for seed, done in enumerate(seeds) for s in done.remaining(count)]
    total = count * SEEDS.value
    with progress.Progress("trainings", total, resumed=total - len(left)) as bar:
        for seed, s in left:
            order = datamodel.order_of(subsets[s], EPOCHS.value, BATCH, seed)
            point = datamodel.fit(setting.params, setting.pool, order, RATE.value, setting.cfg)
            found = datamodel.losses(point.chosen, setting.targets, setting.cfg)
            seeds[seed].add([s], {"losses": np.asarray(found)[None]})
            bar.update(1, tokens=0)
    return np.stack([done.columns()["losses"][:count] for done in seeds], axis=1)


def score_all(
    setting: Setting, settings: influence_config.GaussNewton, seed: int
) -> dict[str, np.ndarray]:
    """{way of scoring: (rows, targets)}, larger is better; all at the base."""
    cfg, pool = setting.cfg, setting.pool
    rest = {"params": jax.tree.map(lambda x: None, setting.params), "adapter": None}
    space = ({"params": setting.params, "adapter": None}, rest)
    rows = len(setting.lengths)

    one = jax.jit(
        jax.grad(lambda chosen, batch: direction.losses(chosen, rest, batch, cfg, "mean")[0])
    )
    goals = [
        one(space[0], jax.tree.map(lambda x, i=i: x[i : i + 1], setting.targets))
        for i in range(TARGETS.value)
    ]
    everyone = datamodel.order_of(np.ones(rows, bool), EPOCHS.value, BATCH, seed)
    point = datamodel.fit(setting.params, pool, everyone, RATE.value, cfg)
    moments = dataclasses.replace(point, second={"params": point.second, "adapter": None})
    parts = in_parts(pool, np.arange(rows))
    sample = np.random.Generator(np.random.PCG64(settings.seed)).permutation(rows)
    solved = gauss_newton(space, goals, in_parts(pool, sample[: settings.examples]), settings, cfg)
    found = {
        "exact, mean": along(space, goals, parts, cfg),
        "exact, adam": along(space, [kinds.adam(g, moments) for g in goals], parts, cfg),
        "exact, gauss_newton": along(space, solved, parts, cfg),
    }
    found |= projected(space, goals, parts, cfg)
    losses = np.asarray(datamodel.losses(setting.params, pool, cfg))
    rng = np.random.Generator(np.random.PCG64(seed))
    columns = {
        "highest loss": losses,
        "shortest answers": -setting.lengths.astype(np.float64),
        "random": rng.normal(size=rows),
    }
    return found | {k: np.repeat(v[:, None], TARGETS.value, axis=1) for k, v in columns.items()}


def in_parts(pool: batches.Batch, rows: np.ndarray) -> list[batches.Batch]:
    """Some rows of the pool, a few at a time."""
    return [jax.tree.map(lambda x, i=i: x[rows[i : i + 32]], pool) for i in range(0, len(rows), 32)]


def gauss_newton(space, goals, parts, settings: influence_config.GaussNewton, cfg) -> list:
    """The direction of each target, with G over the rows of `parts`."""
    one = functools.partial(curvature.product, cfg=cfg, reduction="mean")
    # Only v differs between targets, so that the rows are linearised once.
    step = jax.jit(jax.vmap(one, in_axes=(None, None, 0, None)))
    rows = sum(part.tokens.shape[0] for part in parts)

    def multiply(v):
        images = (step(*space, v, part) for part in parts)
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), images)
        return jax.tree.map(lambda x: x / rows, total)

    limits = settings.damping, settings.iterations, settings.tolerance
    solved = []
    with progress.Progress("gauss_newton", len(goals)) as bar:
        for i in range(0, len(goals), CHUNK):
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *goals[i : i + CHUNK])
            v, abouts = curvature.solve(multiply, stacked, *limits)
            solved += [jax.tree.map(lambda x, k=k: x[k], v) for k in range(len(abouts))]
            bar.update(len(abouts), tokens=0)
    return solved


def along(space, directions, parts, cfg) -> np.ndarray:
    """Exact scores along each direction, (rows, Q)."""
    step = jax.jit(lambda v, batch: exact.scores(space[0], v, space[1], batch, cfg, "mean"))
    columns = []
    for i in range(0, len(directions), CHUNK):
        v = direction.stack(directions[i : i + CHUNK], [1.0] * len(directions[i : i + CHUNK]))
        columns.append(np.concatenate([step(v, part).influence for part in parts]))
    return np.concatenate(columns, axis=1)


def projected(space, goals, parts, cfg) -> dict[str, np.ndarray]:
    """Products of projected gradients, and their cosine at the largest dimension."""
    found, dims = {}, sorted(int(d) for d in DIMS.value)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *goals)
    for dim in dims:
        settings = influence_config.Projection(dim=dim)

        @jax.jit
        def sketch(tree, settings=settings):
            return projection.project(tree, settings)

        @jax.jit
        def rows_of(batch, settings=settings):
            def one(row):
                row = jax.tree.map(lambda x: x[None], row)
                return jax.grad(lambda c: direction.losses(c, space[1], row, cfg, "mean")[0])(
                    space[0]
                )

            return projection.project(jax.vmap(one)(batch), settings)

        left = np.concatenate([rows_of(part) for part in parts])
        right = np.asarray(sketch(stacked))
        found[f"projected {dim:,}"] = left @ right.T
    left = left / np.linalg.norm(left, axis=1, keepdims=True)
    return found | {f"projected {dims[-1]:,}, cosine": left @ right.T}


def settings_of() -> dict:
    names = ("rows", "targets", "tokens", "width", "vocab", "layers", "base_epochs", "epochs")
    return {name: flags.FLAGS[name].value for name in names} | {"learning_rate": RATE.value}


def draw(rows: list[dict], reliability: float, file: pathlib.Path, title: str) -> None:
    """A bar for each way of scoring, with its interval."""
    figure = matplotlib.figure.Figure(figsize=(8, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    values = np.array([[r["lds"], r["low"], r["high"]] for r in rows])
    spread = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
    axes.barh(places, values[:, 0], 0.62, color="#0072b2", xerr=spread, ecolor="#7a828c")
    axes.set_yticks(places, [r["name"] for r in rows])
    axes.axvline(0, color="#7a828c", linewidth=1)
    if reliability > 0:
        axes.axvline(np.sqrt(reliability), color="#d55e00", linestyle=":", linewidth=1)
    axes.set_xlabel("LDS (dotted: the most that the trainings' own noise allows)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d9dde1", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    with artifacts.atomic(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


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
        scores = score_all(setting, cfg.influence.gauss_newton, seed)
    mean = measured.mean(axis=1)
    reliability = datamodel.reliability(measured) if SEEDS.value > 1 else float("nan")
    rows = []
    for name, table in scores.items():
        low, high = datamodel.interval(table, subsets, mean, BOOTSTRAP, seed)
        value = float(np.mean(datamodel.lds(table, subsets, mean)))
        rows.append({"name": name, "lds": value, "low": low, "high": high})
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
    draw(rows, reliability, workdir / "lds.png", title)
    print(f"{title}; reliability {reliability:.3f}")
    print(f"{'score':<26}{'LDS':>8}   95 % interval")
    for r in rows:
        print(f"{r['name']:<26}{r['lds']:>8.3f}   {r['low']:.3f} to {r['high']:.3f}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
