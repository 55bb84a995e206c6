"""What the engines must equal: one gradient an example, by vmap(grad), written out."""

import functools

import jax
import jax.numpy as jnp

from diq_jax.influence import direction


@functools.partial(jax.jit, static_argnames=("cfg", "reduction"))
def gradients(chosen, rest, batch, cfg, reduction="mean"):
    """Leaves (B, ...)."""

    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        return jax.grad(lambda c: direction.losses(c, rest, row, cfg, reduction)[0])(chosen)

    return jax.vmap(one)(batch)


def dots(found, v):
    """<g(z), v>, (B,)."""
    products = jax.tree.map(
        lambda g, x: jnp.einsum("bi,i->b", g.reshape(g.shape[0], -1), x.reshape(-1)), found, v
    )
    return sum(jax.tree.leaves(products))


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    )
