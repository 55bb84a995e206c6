"""Where arrays live and how a function of a batch is compiled: one chip to a pod, by mesh or by
pmap.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diq_jax import config, errors
from diq_jax.run import processes


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices on a ("data", "model") mesh and the strategy that spreads work over them.

    `mesh` compiles with jit and lets sharding place the work; `pmap` replicates everything and
    splits the batch over local devices. Both take the same functions and give the same numbers.
    """

    strategy: str
    mesh: Mesh

    @property
    def rows_multiple(self) -> int:
        """A batch's rows must be a multiple of this."""
        return self.mesh.shape["data"]

    def _put(self, array, spec):
        return put(array, NamedSharding(self.mesh, spec))

    def replicate(self, tree):
        """Puts a tree on every device; under pmap with a leading device axis."""
        if self.strategy == "mesh":
            return jax.tree.map(lambda x: self._put(x, PartitionSpec()), tree)
        n, sharding = self.rows_multiple, NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                (n, *np.shape(x)), sharding, lambda _, x=x: np.asarray(x)[None]
            ),
            tree,
        )

    def single(self, placed):
        """A placed tree without the device axis that pmap adds."""
        return jax.tree.map(lambda x: x[0], placed) if self.strategy == "pmap" else placed

    def like(self, placed, tree):
        """Puts a tree where `placed`, a tree of the same shapes made by this placement, lies."""
        if self.strategy == "mesh":
            return jax.tree.map(lambda p, x: put(x, p.sharding), placed, tree)
        return self.replicate(tree)

    def place(self, rules: Sequence[tuple[str, PartitionSpec]]) -> Callable:
        """A function (path, array) that puts a parameter where the first rule that matches its path
        says.

        Raises:
            UserError: the model axis does not divide the parameter.
            ValueError: no rule matches.
        """

        def put(path, array):
            if self.strategy == "pmap":
                return self.replicate(array)
            spec = next((s for pattern, s in rules if re.fullmatch(pattern, path)), None)
            if spec is None:
                raise ValueError(f"No partition rule matches the parameter {path}.")
            for axis, name in enumerate(spec):
                if name and array.shape[axis] % self.mesh.shape[name]:
                    raise errors.UserError(
                        f"parallel.model={self.mesh.shape[name]} does not divide axis {axis} of "
                        f"{path}, which has shape {array.shape}."
                    )
            return self._put(array, spec)

        return put

    def batch(self, tree):
        """Splits a batch of numpy arrays (B, ...) over the data axis."""
        if self.strategy == "mesh":
            return jax.tree.map(lambda x: self._put(x, PartitionSpec("data")), tree)
        n = self.rows_multiple
        return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)

    def compile(self, fn: Callable, rows: bool) -> Callable:
        """Compiles fn(*replicated, batch), whose last argument is a batch made by `batch`.

        Args:
            rows: True where fn gives an output a row (B, ...); False where it gives sums over the
                rows, which are then added up over devices.

        Returns:
            A function of placed arguments; its outputs are arrays without a device axis, and where
            rows are spread over processes every process gets all of them.
        """
        if self.strategy == "mesh":
            spec = PartitionSpec("data") if rows else None
            step = jax.jit(fn, out_shardings=NamedSharding(self.mesh, spec) if rows else None)
            if not (rows and self.mesh.is_multi_process):
                return step
            # A program of its own: the one above needs no word from another device.
            gather = _to(NamedSharding(self.mesh, PartitionSpec()))
            return lambda *args: gather(step(*args))
        if rows:
            mapped = jax.pmap(fn, "data", devices=self.mesh.devices.flat)
            return lambda *args: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mapped(*args))
        summed = jax.pmap(
            lambda *args: jax.lax.psum(fn(*args), "data"), "data", devices=self.mesh.devices.flat
        )
        return lambda *args: jax.tree.map(lambda x: x[0], summed(*args))

    def state(self, shapes, specs):
        """Zeros for `compile_state`.

        Args:
            shapes: a tree of jax.ShapeDtypeStruct, with rows where `specs` has "data".
        """
        n = self.rows_multiple
        if self.strategy == "pmap":

            def own(shape, spec):
                split = itertools.zip_longest(shape.shape, spec)
                return np.zeros([x // n if axis == "data" else x for x, axis in split], shape.dtype)

            return self.replicate(jax.tree.map(own, shapes, specs))

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return jax.jit(zeros, out_shardings=shardings)()

    def compile_state(self, fn: Callable, specs) -> Callable:
        """Compiles fn(params, adapter, state, batch) -> (state, an output a row (B, ...)).

        The state stays on the devices: each call takes over its memory and gives the next one.

        Args:
            specs: a tree like the state, with the PartitionSpec of each leaf.
        """
        if self.strategy == "mesh":
            out = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
            rows = NamedSharding(self.mesh, PartitionSpec("data"))
            return jax.jit(fn, donate_argnums=2, out_shardings=(out, rows))
        mapped = jax.pmap(fn, "data", devices=self.mesh.devices.flat, donate_argnums=2)

        def call(*args):
            state, output = mapped(*args)
            return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)

        return call

    def slots(self, rows: Sequence[int | None], count: int) -> np.ndarray:
        """What a compiled function knows each of a state's `count` rows by, (R,) int32: under pmap
        a device counts its own from 0. None becomes an index beyond the last.
        """
        own = count if self.strategy == "mesh" else count // self.rows_multiple
        return np.array([own if row is None else row % own for row in rows], np.int32)


def put(array, sharding):
    """An array, the same in every process, as the sharding has it."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return _to(sharding)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@functools.cache
def _to(sharding):
    """A program that moves arrays between processes."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def whole(array) -> np.ndarray:
    """A placed array on the host, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
    return np.asarray(array)


def one_behind(started: Iterable) -> Iterator:
    """Yields each item once the next is made: a batch is under way while the last is fetched."""
    last = None
    for item in started:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last


def matmul_precision(dtype: str):
    """A context for matrix products as model.dtype asks: TPUs and GPUs round those of float32 to
    bfloat16 or TF32 unless told otherwise.
    """
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def make_placement(settings: config.Parallel, everywhere: bool = False) -> Placement:
    """The placement that `parallel.*` asks for: over this process's devices, or, `everywhere`, over
    those of all processes.

    Raises:
        UserError: more devices asked for than there are, or a compiler that gives wrong sums.
    """
    if settings.distributed and not processes.joined():
        raise errors.UserError("parallel.distributed is for experiments/run_diq.py.")
    if not reduces_right():
        raise errors.UserError(
            "This jaxlib gives wrong sums on a CPU: set XLA_FLAGS="
            "--xla_cpu_experimental_ynn_fusion_type= before jax starts, or install jaxlib 0.10.1."
        )
    found = jax.devices() if everywhere else jax.local_devices()
    if settings.distributed and not everywhere:
        model = min(settings.model, len(found))
        settings = dataclasses.replace(settings, data=0, model=model)
    data = settings.data or max(1, len(found) // settings.model)
    needed = data * settings.model
    if needed > len(found):
        raise errors.UserError(
            f"parallel.data={data} x parallel.model={settings.model} needs {needed} devices; "
            f"{len(found)} found ({found[0].device_kind})."
        )
    if everywhere and needed < len(found):
        raise errors.UserError(
            f"parallel.data={data} x parallel.model={settings.model} leaves out some of the "
            f"{len(found)} devices: with parallel.distributed all must take part."
        )
    mesh = jax.make_mesh(
        (data, settings.model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=found[:needed],
    )
    return Placement(settings.strategy, mesh)


@functools.cache
def reduces_right() -> bool:
    """Whether rows are summed right in a case that a CPU compiler got wrong (diq_jax/__init__.py):
    |I x|^2 of 40,000 rows x, each compiled as a matrix product with its square and sum.
    """
    x = np.stack([np.arange(40_000, dtype=np.float32), *np.zeros((2, 40_000), np.float32)], axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum(jnp.square(jnp.eye(3) @ row))))(x)
    return bool(np.allclose(squares, np.square(x[:, 0]), rtol=1e-5))
