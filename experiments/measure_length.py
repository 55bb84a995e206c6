"""How much of an influence score is the answer's length?

    python experiments/measure_length.py --workdir=RUN [--retention_ratio=0.1]

RUN has finished the stages prepare, difficulty and influence with a gradient store
(influence.engine=projected or factored, normalize=dot, loss_reduction=mean, no warm-up), so that
every variant of the score comes from the same gradients, against the same mean target gradient:

    dot, mean loss      as DIQ has it: the gradient of the mean over an example's answer tokens
    dot, sum loss       of the sum over them: the same times the number of answer tokens
    cosine              divided by the gradient's norm; the same for mean and sum
    residual            dot with the mean loss less its regression on log answer tokens

Printed, and written to length/length.json, .png, .svg, .csv: Spearman of each with answer tokens,
with the loss and with difficulty, inside the largest sources too; what DIQ selects by it, and how
many of those rows the plain score selects.
"""

import collections
import dataclasses
import pathlib

import matplotlib.figure
import numpy as np
import pictures
from absl import flags

from diq_jax import errors, stats
from diq_jax.commands import cli
from diq_jax.data import gradient_store
from diq_jax.report import style
from diq_jax.run import artifacts, records
from diq_jax.selection import methods, select

VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "A run with a gradient store and difficulty.")
RETENTION = flags.DEFINE_float("retention_ratio", 0.1, "Of the pool, as in selection.")
SOURCES = flags.DEFINE_integer("sources", 4, "Largest sources that are shown apart.", lower_bound=0)
PLAIN = "dot, mean loss"
FEWEST = 100  # rows of a source that is shown apart


@dataclasses.dataclass(frozen=True)
class Pool:
    """What is known of each row, (n,) each."""

    influence: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    difficulty: np.ndarray
    sources: np.ndarray
    id_order: np.ndarray
    norms: np.ndarray  # of the stored gradients


def read(workdir: pathlib.Path, verified: bool) -> tuple[Pool, float]:
    """The rows, and the percentile that splits difficulty."""
    made = {
        stage: records.config_of(records.finished(workdir, stage), workdir / stage)
        for stage in ("prepare", "difficulty", "influence")
    }
    was = made["influence"].influence
    expected = {"direction": "mean", "normalize": "dot", "loss_reduction": "mean"}
    for field, value in expected.items():
        found = getattr(was, field)
        errors.check(f"influence.{field} of {workdir}", found == value, value, found)
    epochs = was.warmup.epochs
    errors.check(f"influence.warmup.epochs of {workdir}", epochs == 0, "0", epochs)
    if verified:
        records.verify(workdir / "influence/store/manifest.json")
    store = gradient_store.open_store(workdir / "influence/store", verified=verified)
    table = records.table(workdir, "influence/influence.parquet", verified)
    ids = table["example_id"].to_pylist()
    settings = made["difficulty"].difficulty
    levels = records.table(workdir, "difficulty/difficulty.parquet", verified)
    pool = records.table(workdir, "prepare/pool.parquet", verified)
    for other in (store.example_ids, levels["example_id"].to_pylist()):
        if other != ids:
            raise errors.UserError(f"{workdir}: influence, store and difficulty differ in rows.")
    norms = np.concatenate([np.linalg.norm(rows, axis=1) for _, rows in store.blocks()])
    influence, loss, tokens = (table[name].to_numpy() for name in ("influence", "loss", "tokens"))
    return Pool(
        influence,
        loss,
        tokens,
        levels[settings.perspective].to_numpy(),
        np.array(pool["source"].to_pylist()),
        methods.id_order(ids),
        norms,
    ), settings.percentile


def variants(pool: Pool) -> dict[str, np.ndarray]:
    """{name: (n,) scores}."""
    return {
        PLAIN: pool.influence,
        "dot, sum loss": pool.influence * pool.tokens,
        "cosine": pool.influence / np.where(pool.norms > 0, pool.norms, 1),
        "residual": select.length_residual(pool.influence, pool.tokens, pool.id_order),
    }


def diq(scores: np.ndarray, pool: Pool, percentile: float) -> np.ndarray:
    """(n,) bool, the rows that DIQ selects by these scores."""
    given = {"id_order": pool.id_order, "influence": scores, "overall": pool.difficulty}
    ranks = np.asarray(methods.ranks("diq", given, methods.OrderSettings(percentile=percentile)))
    return ranks <= select.budget(RETENTION.value, len(scores))


def measure(pool: Pool, percentile: float) -> list[dict]:
    """A row for each variant."""
    largest = [s for s, n in collections.Counter(pool.sources).most_common() if n >= FEWEST]
    found = variants(pool)
    plain = diq(found[PLAIN], pool, percentile)
    rows = []
    for name, scores in found.items():
        chosen = diq(scores, pool, percentile)
        inside = {
            str(source): stats.finite(
                stats.spearman(scores[pool.sources == source], pool.tokens[pool.sources == source])
            )
            for source in largest[: SOURCES.value]
        }
        rows.append(
            {
                "name": name,
                "tokens": stats.finite(stats.spearman(scores, pool.tokens)),
                "loss": stats.finite(stats.spearman(scores, pool.loss)),
                "difficulty": stats.finite(stats.spearman(scores, pool.difficulty)),
                "tokens_in_source": inside,
                "selected": int(chosen.sum()),
                "selected_tokens": float(np.mean(pool.tokens[chosen])),
                "selected_tokens_median": float(np.median(pool.tokens[chosen])),
                "kept_of_plain": float(np.mean(chosen[plain])),
                "selected_sources": dict(collections.Counter(pool.sources[chosen].tolist())),
            }
        )
    return rows


def draw(pool: Pool, percentile: float, rows: list[dict], title: str) -> matplotlib.figure.Figure:
    """Each variant's ranks against answer tokens, the selected rows on top."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.4))
    panels = figure.subplots(1, len(rows), sharey=True)
    for axes, row, scores in zip(panels, rows, variants(pool).values(), strict=True):
        ranks = np.argsort(np.argsort(scores, kind="stable")) / len(scores)
        chosen = diq(scores, pool, percentile)
        for members, colour, size in ((~chosen, style.POOL, 3), (chosen, style.SELECTED, 6)):
            axes.scatter(
                pool.tokens[members], ranks[members], s=size, color=colour, alpha=0.6, linewidth=0
            )
        axes.set_xscale("log")
        axes.set_title(f"{row['name']}: Spearman {row['tokens']:+.2f}", fontsize=9, loc="left")
        axes.set_xlabel("answer tokens")
    panels[0].set_ylabel("place by influence (1 = highest)")
    pictures.title(figure, title)
    return figure


def show(rows: list[dict]) -> None:
    names = list(rows[0]["tokens_in_source"])
    print(f"{'':<16}{'Spearman with':<31}{'selected by DIQ'}")
    print(
        f"{'score':<16}{'tokens':>7}{'loss':>9}{'difficulty':>12}   {'mean tokens':>11}"
        f"{'median':>8}{'as plain':>10}   tokens inside {', '.join(names)}"
    )
    for r in rows:
        inside = "  ".join(
            "  nan" if v is None else f"{v:+.2f}" for v in r["tokens_in_source"].values()
        )
        tokens, loss, difficulty = (
            float("nan") if r[k] is None else r[k] for k in ("tokens", "loss", "difficulty")
        )
        print(
            f"{r['name']:<16}{tokens:>+7.2f}{loss:>+9.2f}{difficulty:>+12.2f}"
            f"   {r['selected_tokens']:>11.0f}"
            f"{r['selected_tokens_median']:>8.0f}{r['kept_of_plain']:>10.0%}   {inside}"
        )


def main() -> None:
    errors.check("--retention_ratio", 0 < RETENTION.value <= 1, "in (0, 1]", RETENTION.value)
    workdir = cli.folder(WORKDIR)
    pool, percentile = read(workdir, cli.verify(VERIFY))
    rows = measure(pool, percentile)
    print(
        f"{len(pool.tokens):,} rows, answer tokens {np.mean(pool.tokens):.0f} on average, "
        f"{np.median(pool.tokens):.0f} in the middle; Spearman of loss with tokens "
        f"{stats.spearman(pool.loss, pool.tokens):+.2f}, of difficulty with tokens "
        f"{stats.spearman(pool.difficulty, pool.tokens):+.2f}"
    )
    show(rows)
    title = f"Influence and length, {len(pool.tokens):,} rows; selected by DIQ in colour"
    artifacts.write_json(workdir / "length/length.json", {"title": title, "rows": rows})
    pictures.write(workdir / "length", "length", rows, draw, pool, percentile, rows, title)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
