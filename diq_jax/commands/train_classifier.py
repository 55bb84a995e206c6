r"""Trains a difficulty classifier once, to score any pool with.

    diq train-classifier --config=quickstart --workdir=runs/classifier \
        --config.difficulty.source=my_labels.jsonl [--config.difficulty.words=True]

Prints how well it agrees with the labels, cross-validated, then trains on all of them and writes
WORKDIR/classifier/. With --config.difficulty.source=WORKDIR/classifier `diq run` scores its
pool by it and trains nothing. transformers' AutoModel loads the encoder from the same folder. A
killed run continues.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from diq_jax.commands import cli

if TYPE_CHECKING:
    from diq_jax.run import stages

CONFIG = cli.define_config()
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder to write classifier/ into.", required=True
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Train again what differs or is done.")

FILES = ("difficulty.json", "difficulty.safetensors", "metrics.json", "partial/*")
flags.mark_flag_as_required("config")


def classifier() -> "stages.Stage":
    """Returns the stage that trains one."""
    from diq_jax import pipeline
    from diq_jax.difficulty import stage
    from diq_jax.run import stages

    return stages.Stage(
        "classifier", lambda context: (), (*pipeline.MODEL, *FILES),
        stage.fingerprints, stage.train,
    )  # fmt: skip


def shown(value: float | None, interval: dict[str, float]) -> str:
    """Writes a Spearman correlation with its interval."""
    if value is None:
        return f"{'not defined':<24}"
    ends = f"({interval['low']:+.3f} to {interval['high']:+.3f})" if interval else ""
    return f"{value:+.3f} {ends:<18}"


def print_agreement(metrics: dict[str, Any]) -> None:
    """Prints how the cross-validated classifier, and words alone, agree with the labels."""
    from diq_jax.difficulty import agreement

    print(f"{metrics['rows']:,} rows, {metrics['folds']} folds; Spearman with the label")
    for name, found in metrics["perspectives"].items():
        words, difference = (found[key][agreement.TF_IDF] for key in ("baselines", "difference"))
        ends = {key: difference[key] for key in ("low", "high") if key in difference}
        print(
            f"{name:<10} {shown(found['spearman'], found['interval'])}  {agreement.TF_IDF} "
            f"{shown(words['spearman'], {})}  difference {shown(difference.get('mean'), ends)}"
        )


def main() -> None:
    """Trains, or finds it done, and prints the agreement."""
    cfg = cli.read_config(CONFIG)

    import jax

    from diq_jax import pipeline
    from diq_jax.run import compiled, devices, records, stages

    compiled.keep()
    placement = devices.make_placement(cfg.parallel)
    context = stages.Context(cfg, cli.folder(WORKDIR), placement, cli.verify(VERIFY))
    # As in pipeline.run: TPUs and GPUs round float32 products unless told otherwise.
    with pipeline.locked(context.workdir), jax.default_matmul_precision("highest"):
        ran = stages.execute(classifier(), context, OVERWRITE.value)
    record = records.finished(context.workdir, "classifier")
    print_agreement(record["metrics"])
    made = f"trained in {record['seconds']:.1f} s" if ran else "trained before"
    print(f"{made}; use it with --config.difficulty.source={context.path('classifier')}")
