r"""Which projection, which dimension? Agreement of projected scores with the exact ones, and cost.

    python experiments/ablate_projection.py --config=configs/quickstart.py --workdir=runs/ablate \
        --config.influence.parameters=lora [--kinds=rademacher,sparse] [--dims=256,1024,4096]

The exact engine scores the pool first (stages prepare and influence in --workdir). Then every
example's gradient is formed once and goes through all projections in turn, so that they meet the
same numbers; `factored`, for parameters other than lora, takes one more pass for each dimension.
Written: ablation.json, ablation.png, .svg, .csv. A killed run continues after its last batch.
"""

import dataclasses
import math
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

from diq_jax import errors, influence_config, pipeline, prepare, stats, trees
from diq_jax.commands import cli
from diq_jax.data import encoded
from diq_jax.influence import direction, features, per_example, problems, projection
from diq_jax.models import load
from diq_jax.report import style
from diq_jax.run import artifacts, devices, parts, stages

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
KINDS = flags.DEFINE_list("kinds", ["rademacher", "sparse"], "Projections to compare.")
DIMS = flags.DEFINE_list("dims", ["256", "1024", "4096", "8192"], "Their dimensions.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Draws of each projection.", lower_bound=1)

COLOURS = {
    "rademacher": style.ARMS[0], "gaussian": style.ARMS[1], "sparse": style.SELECTED,
    "factored": style.ARMS[2],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    kind: str
    dim: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.dim}/{self.seed}"

    @property
    def settings(self) -> influence_config.Projection:
        kind = "rademacher" if self.kind == "factored" else self.kind
        return influence_config.Projection(kind=kind, dim=self.dim, seed=self.seed)


def read_variants(parameters: str) -> list[Variant]:
    """All of --kinds, --dims and --seeds."""
    for kind in KINDS.value:
        errors.check_choice("--kinds", kind, COLOURS)
    if "factored" in KINDS.value and parameters == "lora":
        raise errors.UserError("--kinds=factored projects whole matrices, not parameters=lora.")
    dims = [int(d) if d.isdigit() else 0 for d in DIMS.value]
    if not all(dims):
        raise errors.UserError(f"--dims must be whole numbers above 0; got {DIMS.value}.")
    return [Variant(k, d, s) for k in KINDS.value for d in dims for s in range(SEEDS.value)]


def score_variants(
    problem: problems.Problem, space, v, variants: list[Variant], workdir: pathlib.Path
) -> dict[str, np.ndarray]:
    """Returns {name: (rows,) scores by that projection}, and "squares", squared norms."""
    sketched = [x for x in variants if x.kind != "factored"]
    passes = [[x] for x in variants if x.kind == "factored"] + ([sketched] if sketched else [])
    out = {}
    for members in passes:
        names = [x.name for x in members] + (["squares"] if members is sketched else [])
        make = gradient_step if members is sketched else factored_step
        step = make(space, v, members, problem)
        key = zlib.crc32("\n".join(names).encode())
        kept = parts.Parts(workdir / f"ablation-{key:08x}.partial")
        title, done = "projections" if members is sketched else names[0], frozenset(kept.done)
        for group, scores in problems.run_batches(title, problem, problem.pool, step, done):
            new = [k for k, i in enumerate(group.indices) if i not in done]
            kept.add([group.indices[k] for k in new], {"scores": scores[group.slots][new]})
        out |= dict(zip(names, kept.columns()["scores"].T, strict=True))
    return out


def gradient_step(space, v, variants: list[Variant], problem: problems.Problem):
    """Compiles placed batch -> (B, variants + 1): gradients by all projections; its square."""
    placement, settings, cfg = problem.placement, problem.settings, problem.model.cfg
    ends = [projection.project(jax.tree.map(lambda x: x[None], v), x.settings)[0] for x in variants]
    ends = placement.replicate(ends)

    def scores(chosen, rest, ends, batch):
        def apply(found):
            columns = [
                projection.project(found, x.settings) @ end
                for x, end in zip(variants, ends, strict=True)
            ]
            return jnp.stack([*columns, jax.vmap(lambda g: trees.vdot(g, g))(found)], axis=1)

        space, reduction = (chosen, rest), settings.loss_reduction
        return per_example.map_gradients(
            apply, space, batch, cfg, reduction, settings, placement.shards
        )[0]

    step = placement.compile(scores, rows=True)
    return lambda batch: step(*space, ends, batch)


def factored_step(space, v, variants: list[Variant], problem: problems.Problem):
    [variant] = variants
    settings = dataclasses.replace(problem.settings, engine="factored", projection=variant.settings)
    made = features.open_features(space, settings, problem.model.cfg, problem.placement, None)
    end = made.project(jax.tree.map(lambda x: x[None], v))[0]
    return lambda batch: (made.step(batch)[0] @ end)[:, None]


def seconds_per_example(v, variant: Variant, rows: int = 16) -> float:
    """Of the projection alone, for `rows` gradients at once."""
    step = jax.jit(lambda g: projection.project(g, variant.settings))
    noise = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), v)
    jax.block_until_ready(step(noise))
    started = time.perf_counter()
    jax.block_until_ready(step(noise))
    return (time.perf_counter() - started) / rows


def predicted_pearson(exact, squares, v, dim: int) -> float:
    """If each score had independent noise of variance (|g|^2 |v|^2 + s^2) / dim."""
    noise = np.mean(squares * float(trees.vdot(v, v)) + exact.astype(np.float64) ** 2) / dim
    return float(np.sqrt(exact.var() / (exact.var() + noise)))


def summarise(scores, exact, tokens, v, variants) -> list[dict]:
    """A row for each kind and dimension, over the seeds; the last row is the length baseline."""
    rows = []
    for kind, dim in dict.fromkeys((x.kind, x.dim) for x in variants):
        members = [x for x in variants if (x.kind, x.dim) == (kind, dim)]
        row = {"kind": kind, "dim": dim, "seeds": len(members), "bytes": 4 * dim}
        row |= agreement([scores[x.name] for x in members], exact)
        if kind != "factored":
            row["seconds"] = seconds_per_example(v, members[0])
            row["predicted_pearson"] = predicted_pearson(exact, scores["squares"], v, dim)
        rows.append(row)
    row = {"kind": "shortest answers", "dim": 1, "seeds": 1, "bytes": 4}
    return [*rows, row | agreement([-tokens], exact)]


def agreement(found, exact) -> dict[str, float]:
    """Means over draws; of Spearman also the least and the most."""
    rank = [stats.spearman(s, exact) for s in found]
    high = exact >= np.median(exact)
    return {
        "spearman": float(np.mean(rank)),
        "spearman_least": float(np.min(rank)),
        "spearman_most": float(np.max(rank)),
        "pearson": float(np.mean([stats.pearson(s, exact) for s in found])),
        "top_1_percent": float(np.mean([overlap(s, exact, 0.01) for s in found])),
        "top_10_percent": float(np.mean([overlap(s, exact, 0.1) for s in found])),
        # Difficulty does not depend on the projection: a quadrant changes with the side of the
        # median influence.
        "same_quadrant": float(np.mean([np.mean((s >= np.median(s)) == high) for s in found])),
    }


def overlap(scores, exact, share: float) -> float:
    """The share of the exact top that the scores' top holds."""
    count = max(1, math.ceil(share * len(exact)))
    return len({*np.argsort(-scores)[:count]} & {*np.argsort(-exact)[:count]}) / count


def draw(rows: list[dict], title: str) -> matplotlib.figure.Figure:
    """Agreement against dimension, the prediction dashed, and against the projection's cost."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8))
    left, right = figure.subplots(1, 2, sharey=True)
    *projections, length = rows
    for kind, colour in COLOURS.items():
        points = sorted((r for r in projections if r["kind"] == kind), key=lambda r: r["dim"])
        if not points:
            continue
        dims, ranks = [r["dim"] for r in points], [r["spearman"] for r in points]
        left.plot(dims, ranks, "o-", color=colour, label=kind)
        low, high = ([r[f"spearman_{end}"] for r in points] for end in ("least", "most"))
        left.fill_between(dims, low, high, color=colour, alpha=0.2, linewidth=0)
        timed = [r for r in points if "seconds" in r]
        milliseconds = [1000 * r["seconds"] for r in timed]
        right.plot(milliseconds, [r["spearman"] for r in timed], "o-", color=colour, label=kind)
        for r, x in zip(timed, milliseconds, strict=True):
            at = {"xytext": (7, -3), "textcoords": "offset points", "ha": "left"}
            right.annotate(f"{r['dim']:,}", (x, r["spearman"]), **at, color=style.MUTED, fontsize=8)
    jl = {r["dim"]: r["predicted_pearson"] for r in projections if "predicted_pearson" in r}
    if jl:
        jl = dict(sorted(jl.items()))
        left.plot(
            *zip(*jl.items(), strict=True),
            "--",
            color=style.MUTED,
            label="JL prediction (Pearson)",
        )
    if length["spearman"] > 0:  # the scale ends at 0
        left.axhline(length["spearman"], color=style.MUTED, linestyle=":", linewidth=1)
        at = {"xy": (1, length["spearman"]), "xycoords": ("axes fraction", "data"), "ha": "right"}
        left.annotate("shortest answers first", **at, va="bottom", color=style.MUTED, fontsize=8)
    dims = sorted({r["dim"] for r in projections})
    left.set_xscale("log", base=2)
    left.set_xticks(dims, [f"{d:,}" for d in dims])
    left.minorticks_off()
    left.set_xlabel("dimension kept for an example")
    left.set_ylabel("Spearman with the exact scores")
    right.set_xscale("log")
    right.set_xlabel("projection, ms an example (16 at once)")
    left.set_yscale("logit", one_half="0.5")
    ticks = [t for t in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.995, 0.999) if t > low_end(rows)]
    left.set_yticks(ticks, [f"{t:g}" for t in ticks])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(axis="x", visible=False)
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.1))
    pictures.title(figure, title)
    return figure


def low_end(rows: list[dict]) -> float:
    """Just below the least agreement that is drawn."""
    drawn = [r["spearman"] for r in rows if r["spearman"] > 0]
    return 0.8 * min(drawn, default=0.5)


def show(rows: list[dict], title: str) -> None:
    print(title)
    print(
        f"{'projection':<18}{'dim':>6}{'Spearman':>10}{'least':>8}{'most':>8}{'Pearson':>9}"
        f"{'predicted':>11}{'top 1 %':>9}{'top 10 %':>10}{'quadrant':>10}{'ms/ex':>8}{'bytes':>8}"
    )
    for r in rows:
        predicted = f"{r['predicted_pearson']:.4f}" if "predicted_pearson" in r else ""
        milliseconds = f"{1000 * r['seconds']:.1f}" if "seconds" in r else ""
        print(
            f"{r['kind']:<18}{r['dim']:>6,}{r['spearman']:>10.4f}{r['spearman_least']:>8.4f}"
            f"{r['spearman_most']:>8.4f}{r['pearson']:>9.4f}{predicted:>11}"
            f"{r['top_1_percent']:>9.0%}{r['top_10_percent']:>10.0%}{r['same_quadrant']:>10.1%}"
            f"{milliseconds:>8}{r['bytes']:>8,}"
        )


def main() -> None:
    cfg = cli.read_config(CONFIG)
    settings = dataclasses.replace(cfg.influence, engine="exact", normalize="dot", packing=False)
    cfg = dataclasses.replace(cfg, influence=settings)
    if settings.warmup.epochs or settings.targets != "mean":
        raise errors.UserError("The ablation needs influence.targets=mean and no warm-up.")
    variants = read_variants(settings.parameters)
    workdir, verify = cli.folder(WORKDIR), cli.verify(VERIFY)
    pipeline.run(cfg, workdir, ["prepare", "influence"], overwrite=False, verify=verify)

    placement = devices.make_placement(cfg.parallel)
    context = stages.Context(cfg, workdir, placement, verify)
    pool, targets = (
        encoded.from_table(context.table(name, *encoded.COLUMNS))
        for name in (prepare.POOL, prepare.TARGETS)
    )
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    groups = {"mean": list(range(len(targets)))}
    problem = problems.Problem(model, pool, targets, groups, settings, placement)
    space = direction.make_space(model, settings, placement)
    size = sum(math.prod(shape) for shape in direction.shapes(space, placement).values())
    for variant in variants:
        if variant.kind != "factored":
            projection.check(variant.settings, size)
    [(_, v, _)] = direction.make(problem, space, None)
    scores = score_variants(problem, space, v, variants, workdir)

    table = context.table("influence/influence.parquet")
    exact, tokens = (table[name].to_numpy() for name in ("influence", "tokens"))
    rows = summarise(scores, exact, tokens.astype(np.float64), v, variants)
    title = f"{len(pool)} examples, parameters={settings.parameters}, {size:,} numbers a gradient"
    artifacts.write_json(workdir / "ablation.json", {"title": title, "rows": rows})
    pictures.write(workdir, "ablation", rows, draw, rows, title)
    show(rows, title)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
