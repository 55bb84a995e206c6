"""Does the score predict? One small SGD step on an example against the change it was said to make.

    python experiments/validate_influence.py --config=configs/quickstart.py [--eta=1e-4]

For each of the pool's first examples: the measured change of the mean target loss after one step of
size eta along its gradient, and -eta times its influence. To first order they are equal.
"""

import functools

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from diq_jax import stats
from diq_jax.commands import cli
from diq_jax.data import batches, chat, encoded, sources
from diq_jax.influence import direction, exact
from diq_jax.models import load, tokenizer
from diq_jax.run import devices

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
EXAMPLES = flags.DEFINE_integer("examples", 24, "Of the pool, from its start.", lower_bound=3)
TARGETS = flags.DEFINE_integer("targets", 8, "Target examples, from the start.", lower_bound=1)
ETA = flags.DEFINE_float("eta", 1e-4, "Size of the SGD step.", lower_bound=0)


def main() -> None:
    cfg = cli.read_config(CONFIG)
    placement = devices.make_placement(cfg.parallel)
    model = load.load(cfg.model.path, cfg.model.dtype, placement)
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, model.cfg.vocab_size, cfg.data.date, "model.path")
    bound = {"cfg": model.cfg, "reduction": cfg.influence.loss_reduction}

    def encode(examples):
        return encoded.encode_all(
            examples, layout, cfg.data.template, cfg.model.max_tokens, cfg.model.truncation
        )[0]

    pool = encode(sources.load_examples(cfg.data.pool, cfg.data.columns, EXAMPLES.value))
    targets = encode(
        sources.load_targets(cfg.data.targets, 0, cfg.data.seed, cfg.data.columns)[: TARGETS.value]
    )
    longest = max(len(row.input_ids) for row in pool)
    target_batch = placement.batch(
        batches.make_batch(
            targets,
            len(targets),
            max(len(row.input_ids) for row in targets),
            max(row.answer_tokens for row in targets),
        )
    )
    space = chosen, rest = direction.make_space(model, cfg.influence, placement)
    v = direction.mean_gradient(space, [(len(targets), target_batch)], placement=placement, **bound)
    v = direction.stack([v], [1.0])
    score = jax.jit(functools.partial(exact.scores, **bound))

    @jax.jit
    def target_loss_after(chosen, rest, batch, eta):
        g = jax.grad(lambda c: direction.losses(c, rest, batch, **bound)[0])(chosen)
        stepped = jax.tree.map(lambda p, g: p - eta * g, chosen, g)
        return direction.losses(stepped, rest, target_batch, **bound).mean()

    before = float(direction.losses(chosen, rest, target_batch, **bound).mean())
    influence, change = [], []
    for row in pool:
        batch = placement.batch(batches.make_batch([row], 1, longest, longest))
        influence.append(float(score(chosen, v, rest, batch).influence[0, 0]))
        change.append(float(target_loss_after(chosen, rest, batch, ETA.value)) - before)
        print(f"{row.example_id:<12} -eta * influence {-ETA.value * influence[-1]:+.3e}   "
              f"measured {change[-1]:+.3e}", flush=True)  # fmt: skip
    predicted = -ETA.value * np.array(influence)
    slope = float(np.sum(predicted * change) / np.sum(predicted**2))
    print(f"{len(pool)} examples, {len(targets)} targets, eta {ETA.value:g}: "
          f"Pearson {stats.pearson(predicted, change):.4f}, slope {slope:.3f}")  # fmt: skip


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
