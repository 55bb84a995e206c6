"""A mixture of experts in place of the MLP: y = sum over experts e of share_e(x) MLP_e(x).

The router's softmax gives the shares; those of all but a token's largest are 0. Every token goes
through every expert, so that no token is dropped, all devices have the same work and memory
whatever the router chooses, and one device's numbers are those of eight. The price is the work of
a dense model of all experts.

A derivative passes through the router by the shares of the chosen experts. The choice itself is
constant, as it is almost everywhere: where two shares are equal there is no derivative, and a step
that changes a choice is not in it.

Dims: B batch, T tokens, D model, F of one expert, E experts, M of them at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax.models import config, layers
from diq_jax.run import sharding
from diq_jax.trees import Tree


def read(config: Any) -> dict[str, Any]:
    """Reads how a token's experts are chosen, as fields of DecoderConfig.

    Args:
        config: a config.Reader.

    Raises:
        UserError: layers without experts, or fewer experts than a token has.
    """
    config.expect("decoder_sparse_step", (1,))
    config.expect("mlp_only_layers", ([], None))
    key = "num_local_experts" if "num_local_experts" in config.config else "num_experts"
    count, chosen = config.size(key), config.size("num_experts_per_tok")
    if chosen > count:
        raise config.wrong("num_experts_per_tok", f"at most the {count} experts")
    shares = {"experts_per_token": chosen, "norm_shares": config.flag("norm_topk_prob")}
    return {"num_experts": count, **shares}


def shapes(cfg: config.DecoderConfig) -> Tree:
    """Returns the parameters with a shape tuple at each leaf, stacked over layers and experts."""
    N, D, F, E = cfg.num_layers, cfg.model_dim, cfg.ffn_dim, cfg.num_experts
    ends = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    return {
        "router": {"kernel": (N, D, E)},
        "experts": {name: {"kernel": (N, E, *end)} for name, end in ends.items()},
    }


def shares(cfg: config.DecoderConfig, logits: jax.Array) -> jax.Array:
    """Returns the share of each expert in each token, (B, T, E) float32, 0 where it is not chosen.

    Of equal logits the first is chosen.
    """
    soft = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(soft), cfg.experts_per_token)
    soft = soft * jax.nn.one_hot(chosen, logits.shape[-1]).sum(axis=-2)
    return soft / soft.sum(axis=-1, keepdims=True) if cfg.norm_shares else soft


def mix(
    cfg: config.DecoderConfig,
    activation: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    params: Tree,
    adapter: Tree,
    probe: Tree,
) -> jax.Array:
    """Computes a layer's mixture, an expert of each device along `model` at a time.

    Args:
        x: (B, T, D).
        params, adapter, probe: of the layer's MLP; `layers.linear` has what they do.

    Returns:
        (B, T, D) float32, in which the experts are summed.
    """
    beside = (tree.get("router") for tree in (adapter, probe))
    share = shares(cfg, layers.linear(params["router"], x, *beside))

    def expert(params, adapter, probe, share):
        def linear(name, x):
            return layers.linear(params[name], x, adapter.get(name), probe.get(name))

        h = activation(linear("gate_proj", x)) * linear("up_proj", x)
        return share[..., None] * linear("down_proj", h)  # float32

    def add(total, some):
        return total + _by_device(jax.vmap(expert)(*some)), None

    own = [tree.get("experts", {}) for tree in (params, adapter, probe)]
    some = jax.tree.map(_some_at_a_time, (*own, jnp.moveaxis(share, -1, 0)))
    total = _by_device(jnp.zeros((some[-1].shape[1], *x.shape), jnp.float32))
    return jax.lax.scan(layers.checkpointed(add, remat=True), total, some)[0].sum(axis=0)


def _some_at_a_time(leaf):
    """Splits the experts of a leaf (E, ...) to (E / M, M, ...), M one of each device's own."""
    devices = sharding.devices_along("model")
    size = devices if leaf.shape[0] % devices == 0 else 1
    return leaf.reshape(size, -1, *leaf.shape[1:]).swapaxes(0, 1)


def _by_device(y):
    return sharding.pinned(y, "model", "data", None, None)
