"""Makes the mesh, and says inside a compiled program how its arrays lie on it.

`devices.Placement` traces a program inside `on(mesh)`. Elsewhere, and under pmap, these functions
change nothing.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

AXES = ("data", "model")


def make_mesh(chosen: Sequence[Any], data: int, model: int) -> Mesh:
    """Lays devices out as a ("data", "model") mesh."""
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(device_grid(chosen, data, model), AXES, axis_types=auto)


def device_grid(chosen: Sequence[Any], data: int, model: int) -> np.ndarray:
    """Returns the devices as an array (data, model), neighbors on the interconnect side by side.

    Where the axes of a TPU slice do not match those, one of them is split. (jax.make_mesh gives up
    there, on many slices of v4, v5p and v6e.)
    """
    try:
        return mesh_utils.create_device_mesh((data, model), chosen)
    except NotImplementedError:
        split = {"allow_split_physical_axes": True}
        return mesh_utils.create_device_mesh((data, model), chosen, **split)


def on(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Returns a context in which a program for a ("data", "model") mesh is traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _is_on():
    return jax.sharding.get_abstract_mesh().axis_names == AXES  # pmap has "data" alone


def devices_along(axis: str) -> int:
    """Returns how many devices the mesh has along an axis; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)[axis] if _is_on() else 1


def alike(tree: Any, like: Any) -> Any:
    """Returns `tree` with each leaf where the leaf of `like` lies, a tree of the same shapes.

    It tells the compiler where to put an array, and changes no number. jax 0.12 no longer has it:
    there the compiler chooses.
    """
    if not _is_on() or importlib.util.find_spec("jax.experimental.shard_alike") is None:
        return tree
    module = importlib.import_module("jax.experimental.shard_alike")
    return jax.tree.map(lambda x, y: module.shard_alike(x, y)[0], tree, like)


def pinned(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x, split over the mesh axis that is given for each of its axes, None for whole.

    An axis that the mesh does not divide is left to the compiler, as one row of a batch is where a
    function of one row is mapped over it.
    """
    if not _is_on():
        return x
    free = PartitionSpec.UNCONSTRAINED
    spec = [
        free if name and size % devices_along(name) else name
        for name, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
