"""Target examples -> a direction v in parameter space, so that an example's influence is <g(z), v>.

Which directions there are: influence/kinds.py. A `space` is the pair (chosen, rest) into which
{"params", "adapter"} is split: gradients are taken with respect to `chosen`, `rest` is held fixed.
`trees.combine` joins them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import kinds, problems
from diq_jax.models import config, load, loss
from diq_jax.run import devices, progress, sharding

Space = tuple[trees.Tree, trees.Tree]


@flax.struct.dataclass
class Direction:
    """Holds Q directions in a space.

    Attributes:
        whole: nested like `chosen`, leaves (Q, ...), None at matrices that are kept in factors.
        factors: {path of such a matrix: {a (Q, ..., in, R), b (Q, ..., R, out)}}.
        weights: (Q,), the share of each in their mean.
    """

    whole: Any
    factors: dict[str, dict[str, jax.Array]]
    weights: jax.Array


def stack(
    trees_of_v: Iterable, weights: Sequence[float] | np.ndarray, rank: int = 0, like: Any = None
) -> Direction:
    """Makes one Direction of Q trees like `chosen`; with a rank, their matrices as thin factors.

    Args:
        trees_of_v: taken one by one.
        like: a tree of the same nesting, in whose dtypes whole leaves are kept: those in which
            `exact.scores` takes them.
    """
    if rank:
        from diq_jax.influence import thin

    made = []
    for v in trees_of_v:
        whole, factors = thin.truncate(v, rank) if rank else (v, {})
        if like is not None:
            kept = trees.partition_like(like, whole)[0]
            whole = jax.tree.map(lambda x, p: x.astype(p.dtype), whole, kept)
        made.append((whole, factors))
    whole, factors = jax.tree.map(lambda *x: jnp.stack(x), *made)
    return Direction(whole, factors, jnp.asarray(weights, jnp.float32) / sum(weights))


@jax.jit
def gram(v: Direction) -> jax.Array:
    """Returns the inner products of Q directions, (Q, Q) float32."""

    def products(x):  # neither a copy of the leaf in float32, nor axes merged that are split
        axes = tuple(range(1, x.ndim))
        return jnp.tensordot(x, x, (axes, axes), preferred_element_type=jnp.float32)

    found = [products(leaf) for leaf in jax.tree.leaves(v.whole)]
    for factors in v.factors.values():
        # <A B, C D> = <A'C, B D'>.
        a, b = (factors[name].astype(jnp.float32) for name in ("a", "b"))
        left = jnp.einsum("q...ir,p...is->qp...rs", a, a)
        right = jnp.einsum("q...ro,p...so->qp...rs", b, b)
        found.append(jnp.sum(left * right, range(2, left.ndim)))
    return sum(found, jnp.zeros((len(v.weights),) * 2))


def as_probe(factors: dict, scales: dict) -> dict:
    """Returns the thin directions as a tree nested like the parameters (models/layers.py)."""
    nodes = {
        name.removeprefix("params/"): f | {"scale": scales[name]} for name, f in factors.items()
    }
    return trees.insert({}, nodes)


def from_peft(folder: str, cfg: config.DecoderConfig, chosen: trees.Tree) -> Direction:
    """Reads the update W -> W + A B scale of a LoRA adapter as a direction, pointing back along it.

    A training step moves the parameters against a gradient, so the direction that stands for the
    adapter's training is minus its update: a positive influence means that the example's loss falls
    along the update.
    """
    from diq_jax.models import lora

    adapter = trees.named_leaves(lora.load_peft(folder, cfg, "influence.direction"))
    factors = {}
    for name, a in adapter.items():
        if name.endswith("/a"):
            linear = name.removesuffix("/a")
            scale = adapter[f"{linear}/scale"][..., None, None]
            b = adapter[f"{linear}/b"]
            factors[f"params/{linear}/kernel"] = {"a": (-scale * a)[None], "b": b[None]}
    nothing = trees.partition(chosen, lambda name: False)[0]
    return Direction(nothing, factors, jnp.ones(1))


def make_space(
    model: load.Model, settings: influence_config.Influence, placement: devices.Placement
) -> Space:
    """Makes the space influence.parameters names: `all`, `lora`, or a regex over parameter paths.

    Whatever the space, the function that is differentiated is the model itself: a fresh LoRA
    adapter changes no output (lora.with_origin).

    Returns:
        (chosen, rest), each the nesting {"params", "adapter"} with None at the other's places.
    """
    adapter = None
    names = {f"params/{name}" for name in trees.named_leaves(model.params)}
    if settings.parameters == "lora":
        from diq_jax.models import lora

        adapter = placement.replicate(_adapter(model, settings.lora))
        leaves = trees.named_leaves({"adapter": adapter})
        names = {name for name in leaves if lora.is_factor(name)}
    elif settings.parameters != "all":
        paths = trees.named_leaves(model.params)
        found = trees.matching(paths, settings.parameters, "influence.parameters")
        names = {f"params/{name}" for name in found}
    return trees.partition({"params": model.params, "adapter": adapter}, names.__contains__)


def shapes(space: Space, placement: devices.Placement) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the chosen leaves as the function sees them, without "params/"."""
    return {
        name.removeprefix("params/"): placement.shape(leaf)
        for name, leaf in trees.named_leaves(space[0]).items()
    }


def losses(
    chosen: trees.Tree,
    rest: trees.Tree,
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
    remat: bool = False,
) -> jax.Array:
    """Returns the losses (B,) float32 of a batch as a function of the chosen leaves."""
    both = trees.combine(chosen, rest)
    return loss.example_losses(both["params"], cfg, batch, reduction, both["adapter"], remat)


def _adapter(model, settings):
    """Returns the adapter to differentiate: a fresh one, or the user's, part of the model."""
    from diq_jax.models import lora

    if settings.path:
        return lora.load_peft(settings.path, model.cfg, "influence.lora.path")
    fresh = lora.init(
        jax.random.key(settings.seed),
        model.cfg,
        settings.targets,
        settings.rank,
        settings.alpha,
        settings.zero_b,
        "influence.lora.targets",
    )
    return lora.with_origin(fresh)


def mean_gradient(
    space: Space,
    placed: Iterable[tuple[int, batches.Batch]],
    cfg: config.DecoderConfig,
    reduction: str,
    placement: devices.Placement,
) -> trees.Tree:
    """Returns the mean loss gradient over target examples (DIQ's gbar), accumulated in float32.

    Args:
        placed: (number of examples, placed batch) pairs; each batch is differentiated as a whole,
            with every layer recomputed in the backward pass.

    Returns:
        A tree nested like `chosen`, float32, without a device axis.
    """
    step = mean_gradient_step(cfg, reduction, placement)
    total, count = None, 0
    for examples, batch in placed:
        part = step(*space, batch)
        total = part if total is None else _add(total, part)
        count += examples
    return jax.tree.map(lambda g: g / count, total)


@functools.lru_cache(maxsize=1)
def mean_gradient_step(
    cfg: config.DecoderConfig, reduction: str, placement: devices.Placement
) -> Callable:
    """Compiles (chosen, rest, batch) -> the sum of the gradients, once for all groups."""

    def gradient(chosen, rest, batch):
        def total(chosen):
            return jnp.sum(losses(chosen, rest, batch, cfg, reduction, remat=True))

        found = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(total)(chosen))
        return sharding.stored(found)

    return placement.compile(gradient, rows=False)


_add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)


@flax.struct.dataclass
class Point:
    """Holds a point at which gradients are taken, in trees like `chosen`, without a device axis.

    Attributes:
        chosen: the trained leaves, float32.
        first, second: Adam's running means of g and g^2, not corrected for their start at zero.
        count: () int32, steps done.
    """

    chosen: Any
    first: Any
    second: Any
    count: Any


def make(
    problem: problems.Problem, space: Space, checkpoint: Point | None
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields (name, tree, {norm, ..}) for each group of targets, one at a time.

    Raises:
        UserError: a direction is not finite; the target that makes it so is named.
    """
    kind, groups = kinds.of_direction(problem.settings), problem.groups
    if kind.apart:
        groups = {problem.targets[i].example_id: [i] for group in groups.values() for i in group}
    total = sum(len(group) for group in groups.values())
    with progress.Progress("target gradient", total) as bar:
        for name, group in groups.items():
            gbar = _mean_of(problem, space, group, bar)
            tree, about = kind.turn(problem, space, checkpoint, gbar)
            norm = float(np.sqrt(trees.vdot(tree, tree)))
            if not np.isfinite(norm):
                _name_bad_target(problem, space, group, name)
            yield name, tree, {"norm": norm, **about}


def make_direction(
    problem: problems.Problem, space: Space, checkpoint: Point | None
) -> tuple[Direction, dict[str, Any]]:
    """Returns the Direction of all groups for the exact engine, and how it was made."""
    settings = problem.settings
    if settings.direction.startswith(kinds.PEFT):
        folder = settings.direction.removeprefix(kinds.PEFT)
        return from_peft(folder, problem.model.cfg, space[0]), {}
    record = {}

    def found():
        for name, tree, about in make(problem, space, checkpoint):
            record[name] = about
            yield tree

    v = stack(found(), problem.weights, settings.direction_rank, space[0])
    return v, {"directions": record}


def _mean_of(problem, space, group, bar=None):
    rows = [problem.targets[i] for i in group]
    settings = problem.settings
    placed = problems.placed(problem, rows, settings.batch_tokens, bar)
    return mean_gradient(
        space, placed, problem.model.cfg, settings.loss_reduction, problem.placement
    )


def _name_bad_target(problem, space, group, name):
    """Raises UserError naming the target whose gradient is not finite."""
    for i in group:
        tree = _mean_of(problem, space, [i])
        if not np.isfinite(float(trees.vdot(tree, tree))):
            raise errors.UserError(
                f"The gradient of target {problem.targets[i].example_id!r} is not finite though "
                f"its loss is; model.dtype is {problem.dtype}: try float32, or drop the target."
            )
    raise errors.UserError(
        f"The direction of {name!r} is not finite though each target's gradient is; "
        f"influence.direction is {problem.settings.direction}."
    )
