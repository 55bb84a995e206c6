"""The Gauss-Newton direction v = (G + damping)^-1 gbar, by conjugate gradients.

G is the mean over a sample of the pool of J^T H J: J the derivative of an example's logits at its
answer tokens, H = diag(p) - p p^T weighted as the loss weighs its tokens. No factor of it is kept:
a product is a push forward, H, and a pull back through one linearisation. Scores are linear in an
example's gradient, so every engine takes v as it takes gbar. (Influence functions with the
generalised Gauss-Newton matrix: arXiv 2209.05364; in place of EK-FAC, arXiv 2308.03296, the whole
matrix on a sample.)
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import trees
from diq_jax.data import batches
from diq_jax.models import config, decoder, loss
from diq_jax.run import devices, sharding

HEAD = ("params/embed/", "params/head/")  # what stands after the last hidden state


def product(
    chosen: trees.Tree,
    rest: trees.Tree,
    v: trees.Tree,
    batch: batches.Batch,
    cfg: config.DecoderConfig,
    reduction: str,
) -> trees.Tree:
    """Computes the sum over a batch's examples of J^T H J v.

    Args:
        chosen, rest: a space (influence/direction.py).
        v: a float32 tree like `chosen`.
        batch: data.batches.Batch of B rows, one example a row.

    Returns:
        A float32 tree like `chosen`.
    """
    moved = jax.tree.map(lambda p, t: t.astype(p.dtype), chosen, v)

    def states(chosen):
        both = trees.combine(chosen, rest)
        return loss.at_answers(
            loss.hidden_states(both["params"], cfg, batch, both["adapter"]), batch
        )

    hidden, push = jax.linearize(states, chosen)
    in_head = functools.partial(trees.partition, chosen=lambda name: name.startswith(HEAD))
    (head, body), (head_moved, _) = in_head(chosen), in_head(moved)

    def block(total, parts):
        hidden, hidden_moved, weights = parts

        def logits(head, hidden):
            both = trees.combine(trees.combine(head, body), rest)
            return decoder.logits(both["params"], cfg, hidden)

        z, dz = jax.jvp(logits, (head, hidden), (head_moved, hidden_moved))
        p = jax.nn.softmax(z, axis=-1)
        curved = p * (dz - jnp.sum(p * dz, axis=-1, keepdims=True)) * weights[..., None]
        head_back, hidden_back = jax.vjp(logits, head, hidden)[1](curved)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, head_back), hidden_back

    weights = loss.token_weights(batch, reduction)
    parts = [loss.head_blocks(x) for x in (hidden, push(moved), weights)]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    from_head, back = jax.lax.scan(block, zeros, parts)
    B, A, D = hidden.shape
    back = jnp.moveaxis(back, 0, 1).reshape(B, -1, D)[:, :A]
    (through,) = jax.linear_transpose(push, chosen)(back)
    through = jax.tree.map(lambda g: g.astype(jnp.float32), through)
    shared, others = in_head(through)
    total = trees.combine(jax.tree.map(jnp.add, shared, from_head), others)
    return sharding.stored(total)


def make_product(
    space: tuple[trees.Tree, trees.Tree],
    make_batches: Callable[[], Iterable[tuple[int, batches.Batch]]],
    cfg: config.DecoderConfig,
    reduction: str,
    placement: devices.Placement,
) -> Callable[[trees.Tree], trees.Tree]:
    """Makes v -> G v, the mean over the examples of `make_batches`; leaves (1, ...) both.

    Args:
        make_batches: gives (number of examples, placed batch) pairs anew at each call.
    """
    step = _compiled(cfg, reduction, placement)
    chosen, rest = space

    def multiply(v):
        total, count = None, 0
        v = jax.tree.map(lambda x: x[0], v)
        placed = placement.argument(v)
        for examples, batch in make_batches():
            part = step(chosen, rest, placed, batch)
            total = part if total is None else _add(total, part)
            count += examples
        return jax.tree.map(lambda g: g[None] / count, total)

    return multiply


@functools.lru_cache(maxsize=1)
def _compiled(
    cfg: config.DecoderConfig, reduction: str, placement: devices.Placement
) -> Callable[..., trees.Tree]:
    return placement.compile(functools.partial(product, cfg=cfg, reduction=reduction), rows=False)


def solve(
    multiply: Callable[[trees.Tree], trees.Tree],
    gbar: trees.Tree,
    damping: float,
    iterations: int,
    tolerance: float,
) -> tuple[trees.Tree, list[dict[str, Any]]]:
    """Solves (G + lambda I) v = gbar for Q right sides, by conjugate gradients from 0.

    Args:
        multiply: v -> G v of trees of leaves (Q, ...), G symmetric and positive semi-definite.
        gbar: leaves (Q, ...), float32.
        damping: lambda as a share of G's curvature along each gbar, <gbar, G gbar> / <gbar, gbar>.
        iterations: at most; it stops before once |residual| <= tolerance |gbar| for all.

    Returns:
        v, and for each right side {lambda, residuals}: |gbar - (G + lambda) v| / |gbar| after each
        iteration.
    """
    square = start = _dots(gbar, gbar)
    v, residual, search = jax.tree.map(jnp.zeros_like, gbar), gbar, gbar
    shift, residuals = None, []
    for _ in range(iterations):
        image = multiply(search)
        if shift is None:
            shift = damping * _dots(search, image) / square
        image = _plus(image, shift, search)
        alpha = square / _dots(search, image)
        v, residual = _plus(v, alpha, search), _plus(residual, -alpha, image)
        before, square = square, _dots(residual, residual)
        residuals.append(np.sqrt(square / start))
        if not np.max(residuals[-1]) > tolerance:
            break
        search = _plus(residual, square / before, search)
    about = zip(np.asarray(shift).tolist(), np.stack(residuals, axis=1).tolist(), strict=True)
    return v, [{"lambda": x, "residuals": r} for x, r in about]


_dots = jax.jit(jax.vmap(trees.vdot))


@jax.jit
def _plus(left: Any, factors, right):
    """Computes left + factor * right for each of Q."""
    return jax.tree.map(lambda a, b: a + factors.reshape(-1, *(1,) * (a.ndim - 1)) * b, left, right)


_add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
