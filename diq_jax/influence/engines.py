"""The three engines behind one interface: open one on a space, set its directions, score batches.

    exact       scores along the directions; nothing is kept
    projected   each example's gradient, projected; scores are inner products with what is kept
    factored    the same from two-sided projections

`Rows` engines (projected, factored) give features, and `project` gives the same features of a
direction; the gradient store is made of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diq_jax import influence_config, trees
from diq_jax.influence import direction, exact, factored, per_example, projection, warmup
from diq_jax.run import devices


@dataclasses.dataclass(frozen=True)
class Rows:
    """An engine that keeps a row of numbers for each example.

    Attributes:
        dim: of a row.
        features: placed batch -> rows (B, dim) and losses (B,), float32.
        project: a tree of leaves (Q, ...) like the space's chosen part -> (Q, dim).
        record: what made the rows, for manifest and stage.json.
    """

    dim: int
    features: Callable
    project: Callable
    record: dict[str, Any]


def exact_step(space, v: direction.Direction, settings, cfg, placement) -> Callable:
    """placed batch -> exact.Scores along v."""
    step = placement.compile(
        functools.partial(
            exact.scores,
            cfg=cfg,
            reduction=settings.loss_reduction,
            per_token=settings.per_token,
        ),
        rows=True,
    )
    v = placement.replicate(v) if placement.strategy == "pmap" else v
    chosen, rest = space
    return lambda batch: step(chosen, v, rest, batch)


def open_rows(
    space,
    settings: influence_config.Influence,
    cfg,
    placement: devices.Placement,
    checkpoint: warmup.Checkpoint | None,
) -> Rows:
    """The projected or the factored engine.

    Args:
        checkpoint: whose moments LESS's features take; others need none.

    Raises:
        UserError: the projection does not fit the space.
    """
    shapes = direction.shapes(space, placement)
    record = {"engine": settings.engine, "projection": dataclasses.asdict(settings.projection)}
    del record["projection"]["block_bytes"]  # a limit on memory, which changes no number
    if settings.engine == "factored":
        return _factored(space, shapes, settings, cfg, placement, record)
    return _projected(space, shapes, settings, cfg, placement, checkpoint, record)


def _projected(space, shapes, settings, cfg, placement, checkpoint, record):
    sketch = settings.projection
    projection.check(sketch, sum(int(np.prod(shape)) for shape in shapes.values()))
    less = settings.direction == "less"
    moments = placement.replicate((checkpoint.first, checkpoint.second)) if less else ()
    shards = _shards(placement)

    def features(chosen, rest, moments, batch):
        def apply(gradients):
            if less:
                gradients = warmup.less_features(gradients, *moments)
            return projection.project(gradients, sketch)

        space, reduction = (chosen, rest), settings.loss_reduction
        return per_example.map_gradients(apply, space, batch, cfg, reduction, settings, shards)

    step = placement.compile(features, rows=True)
    project = jax.jit(lambda v: projection.project(v, sketch))
    return Rows(sketch.dim, lambda batch: step(*space, moments, batch), project, record)


def _factored(space, shapes, settings, cfg, placement, record):
    layout = factored.make_layout(shapes, settings.projection)
    maps = factored.make_maps(layout)
    shards = _shards(placement)

    def features(params, maps, batch):
        def some(part):
            return factored.features(
                params, maps, part, cfg, settings.loss_reduction, layout, settings.remat
            )

        return per_example.in_microbatches(some, batch, settings, shards)

    step = placement.compile(features, rows=True)
    params = trees.combine(*space)["params"]
    placed = placement.replicate(maps)
    record["layout"] = {
        "rank": layout.rank,
        "matrices": sum(max(n, 1) for n, _, _ in layout.matrices.values()),
        "matrix_dim": layout.matrix_dim,
        "gains_and_biases": len(layout.vectors),
        "sketch_dim": layout.dim - layout.matrix_dim,
    }
    project = jax.jit(lambda v: factored.project_tree(v, maps, layout))
    return Rows(layout.dim, lambda batch: step(params, placed, batch), project, record)


def _shards(placement):
    """Devices that share a batch's rows inside the compiled step; pmap has split them before."""
    return placement.rows_multiple if placement.strategy == "mesh" else 1
