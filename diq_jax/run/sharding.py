"""Makes the mesh, and says inside a compiled program how its arrays lie on it.

`devices.Placement` traces a program inside `on(mesh)`. Elsewhere, and under pmap, these functions
change nothing.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, PartitionSpec, Sharding
from jax.typing import ArrayLike

from diq_jax import trees

AXES = ("data", "model")
_specs: contextvars.ContextVar[Mapping[str, PartitionSpec]] = contextvars.ContextVar("specs")


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


@contextlib.contextmanager
def on(mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> Iterator[None]:
    """A context in which a program for a ("data", "model") mesh is traced.

    Args:
        specs: where the parameters lie, by their paths.
    """
    token = _specs.set(specs)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _specs.reset(token)


def assembled(
    shape: tuple[int, ...], where: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Makes an array of the parts that this process's devices need, one at a time, each read once.

    Args:
        read: gives the part at a slice of each axis.
    """
    needed: dict[tuple, list[tuple]] = {}
    for device, part in where.addressable_devices_indices_map(shape).items():
        assert part is not None  # an addressable device has a part
        needed.setdefault(tuple((s.start, s.stop) for s in part), []).append((device, part))
    pieces = []
    for same in needed.values():
        piece = read(same[0][1])
        pieces += [jax.device_put(piece, device) for device, _ in same]
    return jax.make_array_from_single_device_arrays(shape, where, pieces)


def put(array: ArrayLike, where: Sharding) -> jax.Array:
    """Places an array, the same in every process, by a sharding; one that lies so stays itself."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.sharding.is_equivalent_to(where, array.ndim):
            return array
        return mover(where)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


@functools.cache
def mover(where: Sharding) -> Callable[[Any], Any]:
    """Compiles a program that moves arrays, also between processes."""
    return jax.jit(lambda tree: tree, out_shardings=where)


def whole(array: ArrayLike) -> np.ndarray:
    """Fetches a placed array to the host, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _is_on():
    return jax.sharding.get_abstract_mesh().axis_names == AXES  # pmap has "data" alone


def devices_along(axis: str) -> int:
    """Returns how many devices the mesh has along an axis; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)[axis] if _is_on() else 1


def stored(tree: Any, group: str = "") -> Any:
    """Returns a tree nested like the parameters with each leaf where its parameter lies.

    Leaves of other paths, such as an adapter's, are left to the compiler.

    Args:
        group: of which the tree is one layer, as "layers"; "" = the tree is the whole one. Of a
            layer's parameters the derivative is then split as soon as it is made.
    """
    specs = _specs.get({}) if _is_on() else {}

    def pin(path, x):
        spec = specs.get(f"{group}/{path}" if group else path)
        if spec is None:
            return x
        axes = [*spec, *(None,) * 4][1 if group else 0 :]
        return pinned(x, *axes[: x.ndim])

    return trees.map_named(pin, tree) if specs else tree


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
