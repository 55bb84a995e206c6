"""Thin directions: the matrices of a direction as two factors of low rank."""

import functools

import jax
import jax.numpy as jnp

from diq_jax import trees

# Randomised truncated SVD (Halko et al., arXiv 0909.4061): columns beyond the rank, and passes.
OVERSAMPLE, PASSES = 16, 4
MATRICES = ("kernel", "embedding")  # leaves that a factored direction or a probe may stand beside


def truncate(v: trees.Tree, rank: int) -> tuple[trees.Tree, dict[str, dict[str, jax.Array]]]:
    """Replaces each matrix of v by its truncated SVD.

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
    """Finds the leading subspace by iteration; its basis is orthonormal by a Gram matrix."""
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
    """Makes columns orthonormal by Cholesky QR, twice since once squares the condition number."""
    for _ in range(2):
        gram = columns.swapaxes(-1, -2) @ columns
        # Above the rounding of the Gram matrix: one target's gradient may have rank 1.
        shift = 1e-6 * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        eye = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
        lower = jnp.linalg.cholesky(gram + (shift + jnp.finfo(jnp.float32).tiny) * eye)
        columns = jax.lax.linalg.triangular_solve(lower, columns, lower=True, transpose_a=True)
    return columns
