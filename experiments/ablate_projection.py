"""Which projection, which dimension? Rank agreement of projected scores with the exact ones.

    python experiments/ablate_projection.py --config=configs/quickstart.py --workdir=runs/ablate \\
        --config.influence.parameters=lora [--kinds=rademacher,sparse] [--dims=256,1024,4096]

The exact engine scores the pool first (stages prepare and influence in --workdir). Then every
example's gradient is formed once and goes through all projections in turn, so that they meet the
same numbers; `factored`, for parameters other than lora, takes one more pass for each dimension.
Written: ablation.json, ablation.png. A killed run continues after its last batch.
"""

import dataclasses
import math
import pathlib
import zlib

import jax
import matplotlib.figure
import numpy as np
from absl import flags
from ml_collections import config_flags

from diq_jax import pipeline
from diq_jax.common import artifacts, cli, config, devices, errors, metrics, stages
from diq_jax.data import encoded
from diq_jax.influence import direction, engines, per_example, projection, scoring
from diq_jax.models import load

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of this run.")
KINDS = flags.DEFINE_list("kinds", ["rademacher", "sparse"], "Projections to compare.")
DIMS = flags.DEFINE_list("dims", ["64", "256", "1024", "4096", "8192"], "Their dimensions.")
SEEDS = flags.DEFINE_integer("seeds", 2, "Draws of each projection.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Variant:
    kind: str
    dim: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.dim}/{self.seed}"

    @property
    def settings(self) -> config.Projection:
        kind = "rademacher" if self.kind == "factored" else self.kind
        return config.Projection(kind=kind, dim=self.dim, seed=self.seed)


def read_variants(parameters: str) -> list[Variant]:
    """All of --kinds, --dims and --seeds."""
    kinds = (*config.PROJECTIONS, "factored")
    for kind in KINDS.value:
        errors.check_choice("--kinds", kind, kinds)
    if "factored" in KINDS.value and parameters == "lora":
        raise errors.UserError(
            "--kinds=factored projects whole matrices: not with parameters=lora."
        )
    dims = [int(d) if d.isdigit() else 0 for d in DIMS.value]
    if not all(dims):
        raise errors.UserError(f"--dims must be whole numbers above 0; got {DIMS.value}.")
    return [Variant(k, d, s) for k in KINDS.value for d in dims for s in range(SEEDS.value)]


def score_variants(task: scoring.Task, space, v, variants, workdir) -> dict[str, np.ndarray]:
    """{name: (rows,) scores by that projection}."""
    placement, settings, cfg = task.context.placement, task.settings, task.model.cfg
    sketched = [x for x in variants if x.kind != "factored"]
    passes = [("projected", sketched)] if sketched else []
    passes += [(x.name, [x]) for x in variants if x.kind == "factored"]
    by_id = {row.example_id: i for i, row in enumerate(task.pool)}
    out = {x.name: np.zeros(len(task.pool), np.float32) for x in variants}
    for title, members in passes:
        step = (
            gradient_step(space, v, members, settings, cfg, placement)
            if title == "projected"
            else factored_step(space, v, members[0], settings, cfg, placement)
        )
        names = "\n".join(x.name for x in members)
        file = workdir / f"ablation-{zlib.crc32(names.encode()):08x}.partial.jsonl"
        with artifacts.Journal(file) as journal:
            for entry in journal.entries:
                for x, value in zip(members, entry["scores"], strict=True):
                    out[x.name][by_id[entry["id"]]] = value
            done = [by_id[entry["id"]] for entry in journal.entries]
            for group, scores in scoring.run_batches(title, task.pool, step, task.context, done):
                rows = scores[group.slots]
                for x, column in zip(members, rows.T, strict=True):
                    out[x.name][list(group.indices)] = column
                ids = [task.pool[i].example_id for i in group.indices]
                entries = zip(ids, rows.tolist(), strict=True)
                journal.extend([{"id": i, "scores": row} for i, row in entries])
    return out


def gradient_step(space, v, variants, settings, cfg, placement):
    """placed batch -> (B, variants): each example's gradient once, through all projections."""
    ends = [projection.project(jax.tree.map(lambda x: x[None], v), x.settings)[0] for x in variants]
    ends = placement.replicate(ends)

    def scores(chosen, rest, ends, batch):
        found, _ = per_example.gradients(chosen, rest, batch, cfg, settings.loss_reduction)
        columns = [
            projection.project(found, x.settings) @ end
            for x, end in zip(variants, ends, strict=True)
        ]
        return jax.numpy.stack(columns, axis=1)

    step = placement.compile(scores, rows=True)
    return lambda batch: step(*space, ends, batch)


def factored_step(space, v, variant, settings, cfg, placement):
    settings = dataclasses.replace(settings, engine="factored", projection=variant.settings)
    engine = engines.open_rows(space, settings, cfg, placement, None)
    end = engine.project(jax.tree.map(lambda x: x[None], v))[0]
    return lambda batch: (engine.features(batch)[0] @ end)[:, None]


def summarise(scores, exact, tokens, variants) -> list[dict]:
    """A row for each kind and dimension: Spearman with the exact scores over the seeds."""
    rows = []
    for kind, dim in dict.fromkeys((x.kind, x.dim) for x in variants):
        found = [x.name for x in variants if (x.kind, x.dim) == (kind, dim)]
        rank = [metrics.spearman(scores[name], exact) for name in found]
        top = [overlap(scores[name], exact, 0.1) for name in found]
        rows.append({
            "kind": kind, "dim": dim, "seeds": len(found), "spearman": float(np.mean(rank)),
            "spearman_least": float(np.min(rank)), "spearman_most": float(np.max(rank)),
            "top_tenth": float(np.mean(top)),
        })  # fmt: skip
    length = metrics.spearman(-tokens, exact)
    rows.append({
        "kind": "shortest answers", "dim": 1, "seeds": 1, "spearman": length,
        "spearman_least": length, "spearman_most": length,
        "top_tenth": overlap(-tokens, exact, 0.1),
    })  # fmt: skip
    return rows


def overlap(scores, exact, share: float) -> float:
    """The share of the exact top that the scores' top holds."""
    count = max(1, math.ceil(share * len(exact)))
    return len({*np.argsort(-scores)[:count]} & {*np.argsort(-exact)[:count]}) / count


def draw(rows: list[dict], file: pathlib.Path, title: str) -> None:
    """Spearman against dimension, a line a kind, the spread over seeds as a band."""
    colours = {
        "rademacher": "#0072b2", "gaussian": "#009e73", "sparse": "#d55e00", "factored": "#cc79a7",
    }  # fmt: skip
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in colours.items():
        points = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["dim"])
        if points:
            dims = [r["dim"] for r in points]
            axes.plot(dims, [r["spearman"] for r in points], "o-", color=colour, label=kind)
            low, high = ([r[f"spearman_{end}"] for r in points] for end in ("least", "most"))
            axes.fill_between(dims, low, high, color=colour, alpha=0.2, linewidth=0)
    length = rows[-1]["spearman"]
    axes.axhline(length, color="#7a828c", linestyle=(0, (5, 3)), linewidth=1)
    place = {"xy": (1, length), "xycoords": ("axes fraction", "data"), "ha": "right"}
    axes.annotate("shortest answers first", **place, va="bottom", color="#7a828c", fontsize=9)
    dims = sorted({r["dim"] for r in rows[:-1]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [f"{d:,}" for d in dims])
    axes.minorticks_off()
    axes.set_xlabel("dimension kept for an example")
    axes.set_ylabel("Spearman with the exact scores")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9dde1", linewidth=0.7)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    with artifacts.atomic(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    cfg = cli.read_config(CONFIG)
    settings = dataclasses.replace(cfg.influence, engine="exact", normalize="dot", packing=False)
    cfg = dataclasses.replace(cfg, influence=settings)
    variants = read_variants(settings.parameters)
    workdir = pathlib.Path(WORKDIR.value)
    pipeline.run(cfg, workdir, ["prepare", "influence"], overwrite=False)

    placement = devices.make_placement(cfg.parallel)
    context = stages.Context(cfg, workdir, placement)
    pool, targets = (
        encoded.from_table(artifacts.read_table(workdir / f"prepare/{name}.parquet"))
        for name in ("pool", "targets")
    )
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    task = scoring.Task(context, model, pool, targets, {"mean": list(range(len(targets)))}, {})
    space = direction.make_space(model, settings, placement)
    size = sum(math.prod(shape) for shape in direction.shapes(space, placement).values())
    for variant in variants:
        if variant.kind != "factored":
            projection.check(variant.settings, size)
    [(_, v, _)] = scoring.directions(task, space, None)
    scores = score_variants(task, space, v, variants, workdir)

    table = artifacts.read_table(workdir / "influence/influence.parquet")
    exact, tokens = (table[name].to_numpy() for name in ("influence", "tokens"))
    rows = summarise(scores, exact, tokens.astype(np.float64), variants)
    title = f"{len(pool)} examples, parameters={settings.parameters}, {size:,} numbers a gradient"
    record = {"rows": rows, "examples": len(pool), "parameters": size, "title": title}
    artifacts.write_json(workdir / "ablation.json", record)
    draw(rows, workdir / "ablation.png", title)
    print(title)
    print(f"{'projection':<18}{'dim':>7}{'Spearman':>10}{'least':>8}{'most':>8}{'top 10 %':>10}")
    for r in rows:
        print(
            f"{r['kind']:<18}{r['dim']:>7,}{r['spearman']:>10.4f}{r['spearman_least']:>8.4f}"
            f"{r['spearman_most']:>8.4f}{r['top_tenth']:>10.0%}"
        )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
