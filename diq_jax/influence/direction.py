"""Target examples -> a direction v in parameter space, so that an example's influence is <g(z), v>.

A `space` is the pair (chosen, rest) into which {"params", "adapter"} is split: gradients are taken
with respect to `chosen`, `rest` is held fixed. `trees.combine` joins them.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diq_jax import influence_config, trees
from diq_jax.models import load, lora, loss
from diq_jax.run import devices

# Randomised truncated SVD (Halko et al., arXiv 0909.4061): columns beyond the rank, and passes.
OVERSAMPLE, PASSES = 16, 4
MATRICES = ("kernel", "embedding")  # leaves that a factored direction or a probe may stand beside


@flax.struct.dataclass
class Direction:
    """Q directions in a space.

    Attributes:
        whole: nested like `chosen`, leaves (Q, ...), None at matrices that are kept in factors.
        factors: {path of such a matrix: {a (Q, ..., in, R), b (Q, ..., R, out)}}.
        weights: (Q,), the share of each in their mean.
    """

    whole: Any
    factors: dict[str, dict[str, jax.Array]]
    weights: jax.Array


def stack(trees_of_v: Sequence, weights: Sequence[float], rank: int = 0) -> Direction:
    """One Direction of Q trees like `chosen`; with a rank, their matrices as thin factors."""
    made = [truncate(v, rank) if rank else (v, {}) for v in trees_of_v]
    whole, factors = jax.tree.map(lambda *x: jnp.stack(x), *made)
    return Direction(whole, factors, jnp.asarray(weights, jnp.float32) / sum(weights))


def attach(both, factors, scales):
    """{"params", "adapter"} with each direction in factors beside its kernel (models/layers.py)."""
    extra = {
        f"{name.rsplit('/', 1)[0]}/direction": f | {"scale": scales[name]}
        for name, f in factors.items()
    }
    return trees.insert(both, extra)


def truncate(v, rank: int):
    """Each matrix of v by a truncated SVD.

    Returns:
        (v with None at its matrices, {path: {a (..., in, R), b (..., R, out)}}); stacked matrices
        are truncated one by one, and none gets a rank above its smaller side.
    """
    factors = {
        # One at a time: XLA's CPU client can lock up when several factorisations share two cores.
        name: jax.block_until_ready(_thin(leaf, rank))
        for name, leaf in trees.named_leaves(v).items()
        if name.endswith(MATRICES)
    }
    return trees.partition(v, factors.__contains__)[1], factors


@functools.partial(jax.jit, static_argnums=1)
def _thin(leaf, rank):
    """Subspace iteration, a basis made orthonormal by way of its small Gram matrix."""
    *batch, n_in, n_out = leaf.shape
    leaf = leaf.astype(jnp.float32)
    if rank >= min(n_in, n_out):
        whole = jnp.broadcast_to(jnp.eye(n_out), (*batch, n_out, n_out))
        return {"a": leaf, "b": whole}
    size = min(rank + OVERSAMPLE, n_in, n_out)
    probe = jax.random.normal(jax.random.key(0), (*batch, n_out, size))
    basis = _orthonormal(leaf @ probe)  # (..., in, size)
    for _ in range(PASSES):
        basis = _orthonormal(leaf @ _orthonormal(leaf.swapaxes(-1, -2) @ basis))
    inside = basis.swapaxes(-1, -2) @ leaf
    _, vectors = jnp.linalg.eigh(inside @ inside.swapaxes(-1, -2))  # ascending
    top = vectors[..., -rank:]
    return {"a": basis @ top, "b": top.swapaxes(-1, -2) @ inside}


def _orthonormal(columns):
    """Cholesky QR, twice, since once squares the condition number."""
    for _ in range(2):
        gram = columns.swapaxes(-1, -2) @ columns
        shift = 1e-7 * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        eye = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
        lower = jnp.linalg.cholesky(gram + (shift + jnp.finfo(jnp.float32).tiny) * eye)
        columns = jax.lax.linalg.triangular_solve(lower, columns, lower=True, transpose_a=True)
    return columns


def from_peft(folder: str, cfg, chosen) -> Direction:
    """The update W -> W + A B scale of a LoRA adapter as a direction, pointing back along it.

    A training step moves the parameters against a gradient, so the direction that stands for the
    adapter's training is minus its update: a positive influence means that the example's loss falls
    along the update.
    """
    adapter = trees.named_leaves(lora.load_peft(folder, cfg, "influence.direction"))
    factors = {}
    for name, a in adapter.items():
        if name.endswith("/a"):
            linear = name.removesuffix("/a")
            scale = adapter[f"{linear}/scale"][:, None, None]
            b = adapter[f"{linear}/b"]
            factors[f"params/{linear}/kernel"] = {"a": (-scale * a)[None], "b": b[None]}
    nothing = trees.partition(chosen, lambda name: False)[0]
    return Direction(nothing, factors, jnp.ones(1))


def make_space(
    model: load.Model, settings: influence_config.Influence, placement: devices.Placement
):
    """Makes the space that influence.parameters names: `all`, `lora`, or a regex over parameter
    paths.

    Whatever the space, the function that is differentiated is the model itself: a fresh LoRA
    adapter changes no output (lora.with_origin).

    Returns:
        (chosen, rest), each the nesting {"params", "adapter"} with None at the other's places.
    """
    adapter = None
    names = {f"params/{name}" for name in trees.named_leaves(model.params)}
    if settings.parameters == "lora":
        adapter = placement.replicate(_adapter(model, settings.lora))
        leaves = trees.named_leaves({"adapter": adapter})
        names = {name for name in leaves if lora.is_factor(name)}
    elif settings.parameters != "all":
        paths = trees.named_leaves(model.params)
        found = trees.matching(paths, settings.parameters, "influence.parameters")
        names = {f"params/{name}" for name in found}
    return trees.partition({"params": model.params, "adapter": adapter}, names.__contains__)


def shapes(space, placement: devices.Placement) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the chosen leaves, without the device axis of pmap; "params/" is cut off."""
    axis = 1 if placement.strategy == "pmap" else 0
    return {
        name.removeprefix("params/"): leaf.shape[axis:]
        for name, leaf in trees.named_leaves(space[0]).items()
    }


def losses(chosen, rest, batch, cfg, reduction, remat=False):
    """Losses (B,) float32 of a batch as a function of the chosen leaves."""
    both = trees.combine(chosen, rest)
    return loss.example_losses(both["params"], cfg, batch, reduction, both["adapter"], remat)


def mean_gradient(space, batches: Iterable, cfg, reduction, placement: devices.Placement):
    """The mean loss gradient over target examples (DIQ's gbar), accumulated in float32.

    Args:
        batches: (number of examples, placed batch) pairs; each batch is differentiated as a whole,
            with every layer recomputed in the backward pass.

    Returns:
        A tree nested like `chosen`, float32, without a device axis.
    """

    step = _gradient_step(cfg, reduction, placement)
    total, count = None, 0
    for examples, batch in batches:
        part = step(*space, batch)
        total = part if total is None else _add(total, part)
        count += examples
    return jax.tree.map(lambda g: g / count, total)


@functools.lru_cache(maxsize=1)
def _gradient_step(cfg, reduction, placement):
    """Compiled once for all groups of targets."""

    def gradient(chosen, rest, batch):
        def total(chosen):
            return jnp.sum(losses(chosen, rest, batch, cfg, reduction, remat=True))

        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(total)(chosen))

    return placement.compile(gradient, rows=False)


_add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)


def _adapter(model, settings):
    """The adapter whose factors are differentiated: a fresh one around the model as it is, or one
    of the user's, which is then part of the model.
    """
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
