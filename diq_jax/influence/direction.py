"""Target examples -> a direction v in parameter space, so that an example's influence is <g(z), v>.

A `space` is the pair (chosen, rest) into which {"params", "adapter"} is split: gradients are taken
with respect to `chosen`, `rest` is held fixed. `trees.combine` joins them.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from diq_jax.common import config, devices, trees
from diq_jax.models import load, lora, loss


def make_space(model: load.Model, settings: config.Influence, placement: devices.Placement):
    """The space that influence.parameters names: `all`, `lora`, or a regex over parameter paths.

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

    def gradient(chosen, rest, batch):
        def total(chosen):
            return jnp.sum(losses(chosen, rest, batch, cfg, reduction, remat=True))

        return jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(total)(chosen))

    step = placement.compile(gradient, rows=False)
    add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
    total, count = None, 0
    for examples, batch in batches:
        part = step(*space, batch)
        total = part if total is None else add(total, part)
        count += examples
    return jax.jit(lambda tree: jax.tree.map(lambda g: g / count, tree))(total)


def _adapter(model, settings):
    if settings.path:
        return lora.load_peft(settings.path, model.cfg, "influence.lora.path")
    return lora.init(
        jax.random.key(settings.seed),
        model.cfg,
        settings.targets,
        settings.rank,
        settings.alpha,
        settings.zero_b,
        "influence.lora.targets",
    )
