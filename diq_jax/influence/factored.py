"""The factored engine: two-sided projections of every example's gradient by one backward pass.

Each chosen matrix W (in, out) gets a probe, y = x W + x L C R with C = 0 (P, P) for each example:
the gradient of C is Lt G Rt, where G is the example's own gradient of W, which is never formed. L
and R give each coordinate a random sign and fold it onto P places (models/layers.py, fold): a pass
over x and over dy in place of thin matrix products. So <Lt G Rt, Lt H Rt> is unbiased for <G, H>;
for G = a bt and H = c dt its factors have means m = <a, c>, n = <b, d> and variances u, w of about
(|a|^2 |c|^2 + m^2) / P and (|b|^2 |d|^2 + n^2) / P, hence a variance of m^2 w + n^2 u + u w.
(LoGra, arXiv 2405.13954, with dense maps or principal components.)

All parameters take part. The embedding is a matrix like the others, at the input and, where it is
tied, at the head. Gains and biases are small: their gradients come whole, and one sparse
projection takes them together to what `dim` leaves.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp

from diq_jax import errors, influence_config, trees
from diq_jax.data import batches
from diq_jax.influence import projection, thin
from diq_jax.models import config, layers, loss


@dataclasses.dataclass(frozen=True)
class ProbeLayout:
    """Describes how an example's `dim` numbers are made up.

    Attributes:
        matrices: {parameter path: (in, out), behind the axes over which matrices are stacked}.
        vectors: the paths of gains and biases.
        rank: P, of each side of a matrix.
        sketch: the projection of all vectors together; None where there are none.
    """

    matrices: dict[str, tuple[int, ...]]
    vectors: tuple[str, ...]
    rank: int
    sketch: influence_config.Projection | None
    seed: int

    @property
    def matrix_dim(self) -> int:
        """Returns the numbers of all matrices' cores."""
        return self.rank**2 * self.count

    @property
    def count(self) -> int:
        """Returns how many matrices there are, of all layers."""
        return sum(math.prod(shape[:-2]) for shape in self.matrices.values())

    @property
    def dim(self) -> int:
        """Returns the numbers of an example's feature."""
        return self.matrix_dim + (self.sketch.dim if self.sketch else 0)


def make_layout(
    shapes: dict[str, tuple[int, ...]], settings: influence_config.Projection
) -> ProbeLayout:
    """Spreads projection.dim over the chosen parameters, {path: shape}.

    With rank 0, P is the largest that leaves the vectors a sixteenth of dim, or their number if
    that is less.

    Raises:
        UserError: dim has no room, or the rank exceeds a matrix.
    """
    matrices = {name: shape for name, shape in shapes.items() if name.endswith(thin.MATRICES)}
    vectors = tuple(name for name in shapes if name not in matrices)
    size = sum(math.prod(shapes[name]) for name in vectors)
    count = sum(math.prod(shape[:-2]) for shape in matrices.values())
    least = min(size, settings.dim // 16) // 2 * 2
    rank = settings.rank or math.isqrt((settings.dim - least) // max(count, 1))
    most = min((min(shape[-2:]) for shape in matrices.values()), default=rank)
    if matrices and not settings.rank:
        rank = min(rank, most)
    left = settings.dim - rank**2 * count
    if left < (2 if vectors else 0) or (matrices and rank < 1):
        raise errors.UserError(
            f"influence.projection.dim={settings.dim} has no room for {count} matrices of rank "
            f"{max(rank, 1)} on each side and {len(vectors)} kinds of gains and biases; take a "
            f"dimension of at least {max(rank, 1) ** 2 * count * 16 // 15 + 2}."
        )
    if rank > most:
        raise errors.UserError(
            f"influence.projection.rank={rank} exceeds the smallest matrix, which has a side of "
            f"{most}."
        )
    sketch = None
    if vectors:
        sketch = dataclasses.replace(settings, kind="sparse", dim=min(left, size) // 2 * 2)
    return ProbeLayout(matrices, vectors, rank, sketch, settings.seed)


def make_maps(layout: ProbeLayout) -> dict[str, dict[str, jax.Array]]:
    """Makes {matrix path: {left (in,), right (out,)}} of signs, stacked where the matrix is."""
    maps = {}
    for name, (*stack, n_in, n_out) in layout.matrices.items():
        key = jax.random.fold_in(jax.random.key(layout.seed), zlib.crc32(name.encode()))
        sides = {"left": (*stack, n_in), "right": (*stack, n_out)}
        maps[name] = {
            side: jax.random.rademacher(k, shape, jnp.float32)
            for k, (side, shape) in zip(jax.random.split(key), sides.items(), strict=True)
        }
    return maps


def features(
    params: trees.Tree,
    maps: dict[str, dict[str, jax.Array]],
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
    layout: ProbeLayout,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes each example's projected gradient.

    Args:
        maps: from `make_maps`.
        batch: data.batches.Batch of B rows, one example a row.

    Returns:
        (B, layout.dim) float32 and the losses (B,); both 0 on padding rows.
    """
    B = batch.tokens.shape[0]
    cores = {}
    for name, (*stack, _, _) in layout.matrices.items():
        cores[name] = jnp.zeros((*stack, B, layout.rank, layout.rank), jnp.float32)
    named = trees.named_leaves(params)
    for name in layout.vectors:
        *stack, size = named[name].shape
        cores[name] = jnp.zeros((*stack, B, size), jnp.float32)

    def total(cores):
        nodes = {name: {**maps.get(name, {}), "core": core} for name, core in cores.items()}
        probe = trees.insert({}, nodes)
        losses = loss.example_losses(params, cfg, batch, reduction, None, remat, probe)
        return jnp.sum(losses), losses

    found, losses = jax.grad(total, has_aux=True)(cores)
    by_row = {
        name: jnp.moveaxis(g, -3 if name in layout.matrices else -2, 0) for name, g in found.items()
    }
    return _join(by_row, layout), losses


def project_tree(
    v: trees.Tree, maps: dict[str, dict[str, jax.Array]], layout: ProbeLayout
) -> jax.Array:
    """Projects directions in the same way.

    Args:
        v: {"params": ..., "adapter"} of leaves (Q, ...), as a space's chosen part.

    Returns:
        (Q, layout.dim) float32.
    """
    named = trees.named_leaves(v["params"])
    cores = {name: named[name].astype(jnp.float32) for name in layout.vectors}
    for name, m in maps.items():
        both = _fold_both
        for _ in m["left"].shape[:-1]:  # over layers and experts
            both = jax.vmap(both, (0, 0, 0, None))
        both = jax.vmap(both, (0, None, None, None))
        cores[name] = both(named[name], m["left"], m["right"], layout.rank)
    return _join(cores, layout)


def _fold_both(G, left, right, rank):
    """Computes Lt G Rt of one matrix, (P, P)."""
    return layers.fold(layers.fold(G, right, rank).T, left, rank).T


def _join(cores, layout):
    parts = [cores[name].reshape(cores[name].shape[0], -1) for name in layout.matrices]
    if layout.sketch:
        vectors = {name: cores[name] for name in layout.vectors}
        parts.append(projection.project(vectors, layout.sketch))
    return jnp.concatenate(parts, axis=1)
