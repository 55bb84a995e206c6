"""Trains a difficulty classifier once, to score any pool with.

    python experiments/train_difficulty.py --config=configs/quickstart.py --workdir=runs/classifier
        --config.difficulty.source=my_labels.jsonl [--config.difficulty.words=True]

Prints how well it agrees with the labels, cross-validated, then trains on all of them and writes
WORKDIR/classifier/. With --config.difficulty.source=WORKDIR/classifier a run of run_diq.py scores
its pool by it and trains nothing. transformers' AutoModel loads the encoder from the same folder. A
killed run continues.
"""

import jax
from absl import flags
from ml_collections import config_flags

from diq_jax import pipeline
from diq_jax.commands import cli
from diq_jax.difficulty import agreement, stage
from diq_jax.run import devices, records, stages

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
VERIFY = cli.define_verify()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder to write classifier/ into.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Train again what differs or is done.")

FILES = (*pipeline.MODEL, "difficulty.json", "difficulty.safetensors", "metrics.json", "partial/*")
STAGE = stages.Stage(
    "classifier", pipeline.LABELLING, lambda context: (), FILES, stage.fingerprints, stage.train
)


def shown(value: float | None, interval: dict[str, float]) -> str:
    if value is None:
        return f"{'not defined':<24}"
    ends = f"({interval['low']:+.3f} to {interval['high']:+.3f})" if interval else ""
    return f"{value:+.3f} {ends:<18}"


def print_agreement(metrics) -> None:
    print(f"{metrics['rows']:,} rows, {metrics['folds']} folds; Spearman with the label")
    for name, found in metrics["perspectives"].items():
        words, difference = (found[key][agreement.TF_IDF] for key in ("baselines", "difference"))
        ends = {key: difference[key] for key in ("low", "high") if key in difference}
        print(
            f"{name:<10} {shown(found['spearman'], found['interval'])}  {agreement.TF_IDF} "
            f"{shown(words['spearman'], {})}  difference {shown(difference.get('mean'), ends)}"
        )


def main() -> None:
    cfg = cli.read_config(CONFIG)
    placement = devices.make_placement(cfg.parallel)
    context = stages.Context(cfg, cli.folder(WORKDIR), placement, cli.verify(VERIFY))
    # As in pipeline.run: TPUs and GPUs round float32 products unless told otherwise.
    with pipeline.locked(context.workdir), jax.default_matmul_precision("highest"):
        ran = stages.execute(STAGE, context, OVERWRITE.value)
    record = records.finished(context.workdir, "classifier")
    print_agreement(record["metrics"])
    made = f"trained in {record['seconds']:.1f} s" if ran else "trained before"
    print(f"{made}; use it with --config.difficulty.source={context.path('classifier')}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
