"""The tables of influence.direction and influence.engine: a row says all of its kind.

The configuration reads names, sentences and conflicts here, and --help shows them. So what takes
seconds to import (JAX, the engines) is imported inside the functions.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diq_jax import influence_config
    from diq_jax.influence import direction, engines, problems

PEFT = "peft:"  # influence.direction=peft:FOLDER
Conflicts = Iterator[tuple[bool, str]]


def _no_conflicts(settings: "influence_config.Influence") -> Conflicts:
    yield from ()


@dataclasses.dataclass(frozen=True)
class DirectionKind:
    """Says how a direction is made.

    Attributes:
        says: what it is, for --help.
        turn: (problem, space, checkpoint, mean gradient of some targets) -> the direction, nested
            like that gradient, and what is known of how it was found, for records.
        conflicts: settings -> pairs (whether they do not go together, the sentence).
        features: (examples' gradients, first and second moments) -> what is scored in their place,
            where that is not the gradients themselves; needs engine=projected.
        apart: every target has a direction of its own. A group's score is the mean of the cosines
            with its targets, an example's is that of its best group.
    """

    says: str
    turn: Callable
    conflicts: Callable[["influence_config.Influence"], Conflicts] = _no_conflicts
    features: Callable | None = None
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class EngineKind:
    """Says how the products of examples' gradients with a direction are taken.

    Attributes:
        says: what it does, for --help.
        open: (problem, space, checkpoint) -> engines.Engine.
        conflicts: as of a DirectionKind.
    """

    says: str
    open: Callable[..., "engines.Engine"]
    conflicts: Callable[["influence_config.Influence"], Conflicts] = _no_conflicts


def _mean(problem, space, checkpoint, gbar):
    return gbar, {}


def adam(v: Any, checkpoint: "direction.Point") -> Any:
    """Divides v by sqrt(second moment) + eps, the moment corrected for its start at zero, as Adam.

    Where the moment is 0 the run has never seen a gradient and the direction is 0 (else a row of
    the embedding that no warm-up example reads would outweigh everything).
    """
    import jax
    import jax.numpy as jnp

    from diq_jax.models import training

    correction = 1 - training.B2 ** checkpoint.count.astype(jnp.float32)

    def divide(g, second):
        return jnp.where(second > 0, g / (jnp.sqrt(second / correction) + training.EPS), 0.0)

    return jax.tree.map(divide, v, checkpoint.second)


def _adam(problem, space, checkpoint, gbar):
    import jax

    return jax.jit(adam)(gbar, checkpoint), {}


def _adam_conflicts(settings):
    yield (
        settings.warmup.epochs == 0,
        f"influence.direction={settings.direction} needs Adam's moments: set "
        "influence.warmup.epochs to at least 1.",
    )


def _gauss_newton(problem: "problems.Problem", space, checkpoint, gbar):
    """Solves against the Gauss-Newton matrix of a sample that is the same for every group."""
    import jax

    from diq_jax.data import example
    from diq_jax.influence import curvature, problems

    settings, solver = problem.settings, problem.settings.gauss_newton
    rows = [problem.pool[i] for i in example.draw(problem.pool, solver.examples, solver.seed)]
    fitting = problems.fit_microbatches(settings, problem.model.cfg, problem.placement)
    tokens = problems.microbatch_tokens(fitting)
    multiply = curvature.make_product(
        space,
        lambda: problems.placed(problem, rows, tokens),
        problem.model.cfg,
        settings.loss_reduction,
        problem.placement,
    )
    one = jax.tree.map(lambda x: x[None], gbar)
    limits = solver.damping, solver.iterations, solver.tolerance
    v, [about] = curvature.solve(multiply, one, *limits)
    return jax.tree.map(lambda x: x[0], v), about


def less_features(gradients: Any, first: Any, second: Any) -> Any:
    """Gives LESS's form of examples' gradients: the Adam update that each alone would make.

    The gradient enters both moments; as LESS has it, nothing is corrected for the start at zero and
    eps stands inside the root.

    Args:
        gradients: leaves (b, ...).
        first: a checkpoint's first moment, leaves (...).
        second: its second moment.
    """
    import jax
    import jax.numpy as jnp

    from diq_jax.models import training

    B1, B2, EPS = training.B1, training.B2, training.EPS

    def update(g, m, s):
        g = g.astype(jnp.float32)
        return (B1 * m[None] + (1 - B1) * g) / jnp.sqrt(B2 * s[None] + (1 - B2) * g * g + EPS)

    return jax.tree.map(update, gradients, first, second)


def _less_conflicts(settings):
    yield from _adam_conflicts(settings)
    yield (
        (settings.engine, settings.normalize) != ("projected", "cosine"),
        "influence.direction=less is not linear in the example's gradient: it needs "
        "engine=projected and normalize=cosine.",
    )


def _peft_conflicts(settings):
    yield (
        settings.parameters != "all" or settings.warmup.epochs > 0 or settings.engine != "exact",
        "influence.direction=peft:FOLDER is a direction of the base model's weights: it "
        "needs engine=exact, parameters=all and no warm-up.",
    )
    yield (
        settings.targets != "mean",
        f"influence.direction=peft:FOLDER is one direction; got targets={settings.targets}.",
    )


DIRECTIONS = {
    "mean": DirectionKind("the mean target gradient (DIQ)", _mean),
    "adam": DirectionKind(
        "that, divided by the root of Adam's second moment after the warm-up",
        _adam,
        _adam_conflicts,
    ),
    "gauss_newton": DirectionKind(
        "that, solved against the Gauss-Newton matrix (influence functions)", _gauss_newton
    ),
    "less": DirectionKind(
        "LESS's own form, by Adam's update of each example",
        _mean,
        _less_conflicts,
        less_features,
        apart=True,
    ),
    # Read from disk whole, without targets (direction.from_peft).
    f"{PEFT}FOLDER": DirectionKind("the update of a LoRA adapter", _mean, _peft_conflicts),
}


def _open_exact(problem, space, point):
    from diq_jax.influence import engines

    return engines.exact_engine(problem, space, point)


def _open_by_features(problem, space, point):
    from diq_jax.influence import features

    return features.open_engine(problem, space, point)


def _exact_conflicts(settings):
    yield (
        settings.normalize == "cosine",
        "influence.normalize=cosine needs each example's gradient norm, which the "
        "forward-mode engine 'exact' never forms; use dot, or engine=projected or factored.",
    )
    yield (
        settings.parameters == "lora" and settings.direction_rank > 0,
        "influence.direction_rank does nothing with parameters=lora: its direction is thin "
        "already; set it to 0.",
    )


def _by_features_conflicts(settings):
    for name in ("direction_rank", "per_token", "packing"):
        yield (
            bool(getattr(settings, name)),
            f"influence.{name} belongs to engine=exact; got engine={settings.engine}.",
        )
    yield (
        settings.engine == "factored" and settings.parameters == "lora",
        "influence.engine=factored projects whole matrices; with parameters=lora use projected.",
    )


ENGINES = {
    "exact": EngineKind("forward mode, nothing projected", _open_exact, _exact_conflicts),
    "projected": EngineKind(
        "per-example gradients, projected and kept", _open_by_features, _by_features_conflicts
    ),
    "factored": EngineKind(
        "two-sided projections from one backward pass, kept",
        _open_by_features,
        _by_features_conflicts,
    ),
}


def of_direction(settings: "influence_config.Influence") -> DirectionKind:
    """Returns the row of the direction that influence.direction names."""
    return DIRECTIONS[
        f"{PEFT}FOLDER" if settings.direction.startswith(PEFT) else settings.direction
    ]
