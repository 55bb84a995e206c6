"""Layers, as functions of their parameters; every matrix product goes through `linear`.

What influence is taken with (influence/exact.py, influence/factored.py) travels beside the
parameters, as the argument `probe`, nested like them; at a parameter it is one of

    {a (in, R), b (R, out), scale ()}: a low-rank direction of a matrix; the output's derivative in
        `scale`, which is 0, is (x a) b.
    {left (in,), core (B, P, P), right (out,)}, signs on both sides of a matrix: the gradient of the
        core, which is 0, is each example's own gradient of the matrix, folded by `fold`.
    {core (B, out)}: the same for a norm's gain and a bias.

Dims: B batch, T tokens, D model, H query heads, K kv heads, G = H // K, C head, R rank.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from diq_jax.trees import Tree


def checkpointed(layer: Callable, remat: bool = False) -> Callable:
    """Wraps a layer for `lax.scan`: backward it keeps products and `kept`, or with `remat` nothing.

    That is a third of all. Keeping less is also faster on a CPU, where fresh memory costs more than
    arithmetic (docs/results.md).
    """
    policies = jax.checkpoint_policies
    some = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("kept")
    )
    # A scan needs no barrier against common subexpressions.
    return jax.checkpoint(layer, prevent_cse=False, policy=None if remat else some)


def kept(x: jax.Array) -> jax.Array:
    """Returns x, and marks it as kept by the backward pass of a `checkpointed` layer."""
    return ad_checkpoint.checkpoint_name(x, "kept")


def linear(
    params: Tree, x: jax.Array, adapter: Tree | None = None, probe: Tree | None = None
) -> jax.Array:
    """Computes y = x W + b, plus a LoRA adapter's (x A) B * scale.

    Args:
        params: kernel (in, out), and bias (out,) where the family has one.
        x: (B, T, in).
        adapter: a (in, R), b (R, out), scale (); with a0 (in, R) and b0 (R, out), an origin, what
            is added is x (A B - A0 B0) * scale; with dropout_keys (B,) and dropout_rate, inverted
            dropout on the adapter's input as PEFT applies it, drawn for each row by its own key:
            the same on any number of devices and in any microbatch.
        probe: of kernel and bias, or None.
    """
    probe = probe or {}
    # Cut off from x: what passes on to x goes through the kernel alone.
    fixed = jax.lax.stop_gradient(x)
    # One product of B T rows: a kernel's gradient is then one too, without a copy of dy.
    y = (x.reshape(-1, x.shape[-1]) @ params["kernel"]).reshape(*x.shape[:-1], -1)
    y = probed(
        probe.get("kernel"),
        y,
        lambda a: fixed @ a.astype(x.dtype),
        lambda signs, size: fold(fixed, signs, size),
    )
    if "bias" in params:
        y = y + vector(params["bias"], probe.get("bias"), y)
    if adapter is not None:
        z = x
        if "dropout_keys" in adapter:
            keep = 1.0 - adapter["dropout_rate"]
            draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))
            kept = draw(adapter["dropout_keys"])
            z = jnp.where(kept, x / keep.astype(x.dtype), 0)
        a, b = _factors(adapter)
        y = y + z @ a.astype(x.dtype) @ b.astype(x.dtype) * adapter["scale"].astype(x.dtype)
    return y


def _factors(adapter):
    """Returns the two factors of an adapter's change of the kernel.

    With an origin it is A B - A0 B0 = (A - A0) B + A0 (B - B0), as one product of rank 2 R: exactly
    0 at the origin, where a difference of two products would leave their rounding.
    """
    a, b = adapter["a"], adapter["b"]
    if "a0" not in adapter:
        return a, b
    a0, b0 = adapter["a0"], adapter["b0"]
    return jnp.concatenate([a - a0, a0], -1), jnp.concatenate([b, b - b0], -2)


def probed(
    probe: Mapping[str, jax.Array] | None,
    y: jax.Array,
    enter: Callable[[jax.Array], jax.Array],
    enter_folded: Callable[[jax.Array, int], jax.Array],
    transposed: bool = False,
) -> jax.Array:
    """Returns y = x W, with what the matrix's probe, if it has one, adds to derivatives alone.

    Args:
        enter: a -> x a, for a factor a (in, R) on x's side.
        enter_folded: (signs, P) -> x folded, (B, T, P).
        transposed: the product is with the transposed matrix, as a tied head's.
    """
    if probe is None:
        return y
    if "core" not in probe:
        a, b = (probe["b"].T, probe["a"].T) if transposed else (probe["a"], probe["b"])
        return _along(y, enter(a), b, probe["scale"])
    left, core, right = probe["left"], probe["core"], probe["right"]
    if transposed:
        left, core, right = right, core.swapaxes(-1, -2), left
    return _probed(y, enter_folded(left, core.shape[-1]), core, right)


def fold(x: jax.Array, signs: jax.Array, size: int) -> jax.Array:
    """Adds coordinate i of the last axis, times its sign, to i mod `size`: (..., size) float32.

    With random signs the inner product of two folded vectors is unbiased for that of the vectors:
    a projection without a matrix.
    """
    places = jax.nn.one_hot(jnp.arange(x.shape[-1]) % size, size, dtype=x.dtype)
    signed = places * signs[:, None].astype(x.dtype)  # 0, 1 and -1 are exact in every dtype
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, signed, precision=exact, preferred_element_type=jnp.float32)


@jax.custom_jvp
def _along(y, low, b, scale):
    """Computes y + low b * scale at scale = 0: the product is formed for the tangent alone."""
    return y


@_along.defjvp
def _along_jvp(primals, tangents):
    y, low, b, _ = primals
    thin = low @ b.astype(low.dtype)
    return y, tangents[0] + thin.astype(y.dtype) * tangents[3].astype(y.dtype)


@jax.custom_vjp
def _probed(y, low, core, right):
    """Computes y + (low core) spread by `right` at core = 0, for the gradient of the core alone."""
    return y


def _probed_forward(y, low, core, right):
    return y, (low, right)


def _probed_backward(residuals, dy):
    low, right = residuals
    return dy, None, jnp.einsum("btp,btq->bpq", low, fold(dy, right, low.shape[-1])), None


_probed.defvjp(_probed_forward, _probed_backward)


def rms_norm(
    params: Tree, x: jax.Array, eps: float, probe: Tree | None = None, unit_offset: bool = False
) -> jax.Array:
    """Divides by the root mean square, in float32 since bfloat16 loses it; in the gain's dtype.

    Args:
        unit_offset: multiply by 1 + the gain, in float32, as Gemma does.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = vector(params["scale"], (probe or {}).get("scale"), x)
    if unit_offset:
        return (x32 * (1.0 + scale.astype(jnp.float32))).astype(scale.dtype)
    return x32.astype(scale.dtype) * scale


def layer_norm(params: Tree, x: jax.Array, eps: float) -> jax.Array:
    """Normalizes over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    x = x32.astype(x.dtype) * _along_last(params["scale"], x)
    return x + _along_last(params["bias"], x) if "bias" in params else x


def vector(vector: jax.Array, probe: Tree | None, x: jax.Array) -> jax.Array:
    """Returns a gain or bias as it broadcasts along x, its probe's core (B, out) added."""
    vector = _along_last(vector, x)
    if probe is None:
        return vector
    core = probe["core"]
    core = core.reshape(core.shape[0], *(1,) * (x.ndim - 2), core.shape[1])
    return vector + core.astype(vector.dtype)


def _along_last(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
