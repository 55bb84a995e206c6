"""The engine of features: gradients as rows of a store, whose inner products stand for theirs.

projected   each example's gradient, projected
factored    two-sided projections from one backward pass
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diq_jax import errors, influence_config, trees
from diq_jax.data import gradient_store
from diq_jax.influence import direction, engines, factored, kinds, per_example, problems, projection
from diq_jax.models import config
from diq_jax.run import devices


def open_engine(
    problem: problems.Problem, space: direction.Space, point: direction.Point | None
) -> engines.Engine:
    """Opens the engine that keeps each example's projected gradient and scores by products."""
    settings, dtype = problem.settings, problem.settings.store.dtype
    cosine, apart = settings.normalize == "cosine", kinds.of_direction(settings).apart
    features = open_features(space, settings, problem.model.cfg, problem.placement, point)
    ends, about = features.of_directions(problem, space, point)
    size = features.dim * gradient_store.stored(dtype).itemsize
    record = {"directions": about, "bytes_per_example": size, **features.record}

    def columns(group, outputs):
        rows, loss = (x[: len(group.indices)] for x in outputs)
        problems.check_finite(problem, "gradient", group.indices, rows, loss)
        _check_fits(problem, group.indices, rows)
        return {"gradient": gradient_store.to_stored(rows, dtype), "loss": loss}

    def join(columns):
        def blocks():
            for start in range(0, len(problem.pool), gradient_store.READ_ROWS):
                part = columns["gradient"][start : start + gradient_store.READ_ROWS]
                yield start, gradient_store.from_stored(part, dtype)

        combined = _combined(problem, ends, cosine, apart)
        scores = gradient_store.products(blocks(), len(problem.pool), combined, cosine)
        gram = combined[:-1] @ combined[:-1].T
        by_target, influence = scores[:, :-1], scores[:, -1]
        if apart:
            influence = by_target.max(axis=1)
        loss = columns["loss"]
        return engines.Joined(influence, loss, by_target, gram, None, record, ends, features.record)

    return engines.Engine(features.step, columns, join)


@dataclasses.dataclass(frozen=True)
class Features:
    """Maps gradients to rows of numbers whose inner products stand for theirs.

    Attributes:
        dim: of a row.
        step: placed batch -> rows (B, dim) and losses (B,), float32.
        project: a tree of leaves (Q, ...) like the space's chosen part -> (Q, dim).
        record: what made the rows, for manifest and stage.json.
    """

    dim: int
    step: Callable
    project: Callable
    record: dict[str, Any]

    def of_directions(
        self, problem: problems.Problem, space: direction.Space, checkpoint: direction.Point | None
    ) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
        """Returns the directions as rows (Q, dim), and {name: what is known of it}."""
        rows, about = [], {}
        for name, tree, known in direction.make(problem, space, checkpoint):
            rows.append(np.asarray(self.project(jax.tree.map(lambda x: x[None], tree)))[0])
            about[name] = known
        return np.stack(rows), about


def open_features(
    space: direction.Space,
    settings: influence_config.Influence,
    cfg: config.DecoderConfig,
    placement: devices.Placement,
    checkpoint: direction.Point | None,
) -> Features:
    """Opens the features of the projected or the factored engine.

    Args:
        checkpoint: whose moments a kind of direction with its own features takes.

    Raises:
        UserError: the projection does not fit the space.
    """
    shapes = direction.shapes(space, placement)
    record = {"engine": settings.engine, "projection": dataclasses.asdict(settings.projection)}
    del record["projection"]["block_bytes"]  # a limit on memory, which changes no number
    settings = problems.fit_microbatches(settings, cfg, placement)
    if settings.engine == "factored":
        return _factored(space, shapes, settings, cfg, placement, record)
    return _projected(space, shapes, settings, cfg, placement, checkpoint, record)


def _projected(space, shapes, settings, cfg, placement, checkpoint, record):
    sketch = settings.projection
    projection.check(sketch, sum(int(np.prod(shape)) for shape in shapes.values()))
    form = kinds.of_direction(settings).features
    moments = placement.replicate((checkpoint.first, checkpoint.second)) if form else ()

    def features(chosen, rest, moments, batch):
        def apply(gradients):
            return projection.project(form(gradients, *moments) if form else gradients, sketch)

        space, reduction = (chosen, rest), settings.loss_reduction
        return per_example.map_gradients(
            apply, space, batch, cfg, reduction, settings, placement.shards
        )

    step = placement.compile(features, rows=True)
    project = jax.jit(lambda v: projection.project(v, sketch))
    return Features(sketch.dim, lambda batch: step(*space, moments, batch), project, record)


def _factored(space, shapes, settings, cfg, placement, record):
    layout = factored.make_layout(shapes, settings.projection)
    maps = factored.make_maps(layout)

    def features(params, maps, batch):
        def some(part):
            return factored.features(
                params, maps, part, cfg, settings.loss_reduction, layout, settings.remat
            )

        return per_example.in_microbatches(some, batch, settings, placement.shards)

    step = placement.compile(features, rows=True)
    params = trees.combine(*space)["params"]
    placed = placement.replicate(maps)
    record["layout"] = {
        "rank": layout.rank,
        "matrices": layout.count,
        "matrix_dim": layout.matrix_dim,
        "gains_and_biases": len(layout.vectors),
        "sketch_dim": layout.dim - layout.matrix_dim,
    }
    project = jax.jit(lambda v: factored.project_tree(v, maps, layout))
    return Features(layout.dim, lambda batch: step(params, placed, batch), project, record)


def _combined(problem, ends, cosine, apart):
    """Returns each group's direction and their mean, (Q + 1, dim), of unit length where asked.

    Where targets stand apart, a group's mean cosine is the product with the mean of their unit
    rows.
    """
    if apart:
        edges = np.cumsum([len(group) for group in problem.groups.values()])[:-1]
        parts = np.split(gradient_store.unit(ends), edges)
        groups = np.stack([part.mean(axis=0) for part in parts])
        return np.concatenate([groups, (problem.weights @ groups)[None]])
    both = np.concatenate([ends, (problem.weights @ ends)[None]])
    return gradient_store.unit(both) if cosine else both


def _check_fits(problem, indices, rows):
    """Raises UserError naming the first example whose row the store's dtype cannot hold."""
    dtype = problem.settings.store.dtype
    fits = gradient_store.fits(rows, dtype)
    if not fits.all():
        k = int(np.argmin(fits))
        able = [
            name for name in gradient_store.DTYPES if gradient_store.fits(rows[[k]], name).all()
        ]
        raise errors.UserError(
            f"The gradient of example {problem.pool[indices[k]].example_id!r} does not fit "
            f"influence.store.dtype={dtype}: its largest number is {np.abs(rows[k]).max():.3g}. "
            f"Set influence.store.dtype={' or '.join(able)}."
        )
