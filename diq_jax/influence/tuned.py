"""Scores from losses before and after a short LoRA training: forward passes alone over the pool.

- **color** (CoLoR-Filter, arXiv 2406.10670): a row's loss at the base model less its loss after
  training on the targets. To first order in the learning rate it is the influence on the targets of
  one step; the training takes finite steps, and Adam's.
- **temp** (after arXiv 2606.26797): a row's mean loss over its first answer tokens, at weights
  between the base model's and those after training on a part of the pool, says how hard it is; rows
  whose token losses are alike are one cluster. An adapter at a share of its scale is exactly the
  mix of the weights. The paper's own mixes and clusters are not known in detail: this is ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import influence_config, trees
from diq_jax.data import example
from diq_jax.influence import direction, problems, warmup
from diq_jax.models import load, loss
from diq_jax.run import devices, parts, processes

FIELD = "influence.tuned"


def scores(
    model: load.Model,
    pool: Sequence[example.Encoded],
    targets: Sequence[example.Encoded],
    settings: influence_config.Influence,
    placement: devices.Placement,
    keep: Callable[[str], Any] = lambda name: parts.Memory(),
    epochs: Callable[[str], warmup.Epochs] = lambda name: warmup.EpochMemory(),
) -> dict[str, np.ndarray]:
    """Computes what influence.tuned asks for.

    Args:
        model: with its parameters placed by `placement`.
        keep: gives a place for the finished rows of a pass, by its name (score.Kept).
        epochs: those of a training that are done, by its name; new ones are added.

    Returns:
        Of color (n,) float32, larger is better; temp (n,) float32 and temp_cluster (n,) int32. {}
        where neither is asked for.

    Raises:
        UserError: a loss, or a trained parameter, is not finite.
    """
    asked, found = settings.tuned, {}
    trainer = _Trainer(model, settings, placement)
    with devices.matmul_precision(trainer.on(pool, 1.0).dtype):
        if asked.color:
            base, trained = trainer.train("color", targets, 1.0, epochs("color"))
            before, after = (
                _pass(trainer.on(pool, 1.0), f"color, {name}", _mean_losses, space, keep)["loss"]
                for name, space in (("before", base), ("after", trained))
            )
            found["color"] = before - after
        if asked.temp:
            _, trained = trainer.train("temp", pool, asked.fraction, epochs("temp"))
            first = functools.partial(_first_losses, count=asked.first_tokens)
            space = mixed(trained, asked.mix)
            columns = _pass(trainer.on(pool, 1.0), "temp", first, space, keep)
            counts = [min(row.answer_tokens, asked.first_tokens) for row in pool]
            vectors, found["temp"] = fill(columns["first"], np.array(counts))
            ids = [row.example_id.encode() for row in pool]
            order = np.argsort(np.array(ids, object), kind="stable")
            found["temp_cluster"] = np.empty(len(pool), np.int32)
            found["temp_cluster"][order] = cluster(vectors[order], asked.clusters, asked.seed)
    return found


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """Trains a LoRA adapter on rows as the warm-up does."""

    model: load.Model
    settings: influence_config.Influence
    placement: devices.Placement

    def on(self, rows, fraction) -> problems.Problem:
        asked = self.settings.tuned
        warm = influence_config.Warmup(
            asked.epochs, fraction, asked.learning_rate, asked.batch_size, asked.seed
        )
        settings = influence_config.Influence(
            parameters="lora",
            loss_reduction=self.settings.loss_reduction,
            batch_tokens=self.settings.batch_tokens,
            remat=False,
            lora=self.settings.lora,
            warmup=warm,
        )
        return problems.Problem(self.model, rows, [], {}, settings, self.placement)

    def train(self, name, rows, fraction, epochs) -> tuple[direction.Space, direction.Space]:
        """Returns the space before and after."""
        problem = self.on(rows, fraction)
        space = direction.make_space(self.model, problem.settings, self.placement)
        point, _ = warmup.run(problem, space, epochs, FIELD)[-1]
        chosen = jax.tree.map(lambda p, x: x.astype(p.dtype), space[0], point.chosen)
        return space, (self.placement.like(space[0], chosen), space[1])


def mixed(space: direction.Space, share: float) -> direction.Space:
    """Returns a trained LoRA space whose update of each matrix counts a share of itself."""
    chosen, rest = space

    def scale(name, leaf):
        return leaf * share if name.startswith("adapter/") and name.endswith("/scale") else leaf

    return chosen, trees.map_named(scale, rest)


def fill(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts each row's mean loss where it has no more tokens.

    Args:
        first: (n, K) losses, of row i the first counts[i] (at least 1) are its own.

    Returns:
        (n, K) float32 and the means (n,) float32.
    """
    own = np.arange(first.shape[1]) < counts[:, None]
    means = np.where(own, first, 0).sum(axis=1, dtype=np.float64) / counts
    means = means.astype(np.float32)
    return np.where(own, first, means[:, None]).astype(np.float32), means


def cluster(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Clusters rows (n, K) by k-means: (n,) int32, at most as many clusters as distinct rows."""
    from sklearn import cluster as clustering  # seconds to import

    count = min(clusters, len(np.unique(vectors, axis=0)))
    options: dict[str, Any] = {"n_init": 4, "random_state": seed}
    found = clustering.KMeans(count, **options).fit_predict(vectors)
    return np.asarray(found, np.int32)


def _mean_losses(chosen, rest, batch, cfg, reduction):
    return {"loss": direction.losses(chosen, rest, batch, cfg, reduction)}


def _first_losses(chosen, rest, batch, cfg, reduction, count):
    """The losses of each row's first answer tokens, (B, count), 0 where it has no more."""
    both = trees.combine(chosen, rest)
    values = loss.token_losses(both["params"], cfg, batch, both["adapter"])[:, :count]
    return {"first": jnp.pad(values, ((0, 0), (0, count - values.shape[1])))}


def _pass(problem, name, outputs, space, keep) -> dict[str, np.ndarray]:
    """Runs a forward pass over the pool; returns its columns, in order."""
    cfg, reduction = problem.model.cfg, problem.settings.loss_reduction
    compiled = problem.placement.compile(
        functools.partial(outputs, cfg=cfg, reduction=reduction), rows=True
    )
    kept = keep(name.replace(", ", "-"))
    done = frozenset(kept.done)
    for group, out in problems.run_batches(
        name, problem, problem.pool, lambda batch: compiled(*space, batch), done
    ):
        new = [k for k, i in enumerate(group.indices) if i not in done]
        columns = {column: values[new] for column, values in out.items()}
        rows = [group.indices[k] for k in new]
        [values] = columns.values()
        means = values.reshape(len(rows), -1).mean(axis=1)
        problems.check_finite(problem, "loss", rows, means[:, None], means)
        kept.add(rows, columns)
    processes.wait(f"{name} rows")
    return kept.columns()
