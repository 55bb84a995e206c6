"""Where arrays live and how a function of a batch is compiled: by mesh or by pmap."""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diq_jax import config, errors
from diq_jax.run import processes, sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """Spreads work over a ("data", "model") mesh by jit; PmapPlacement gives the same numbers."""

    mesh: Mesh
    fsdp: str = "off"  # parallel.fsdp
    specs: dict[str, PartitionSpec] = dataclasses.field(
        default_factory=dict, init=False, compare=False
    )
    strategy: ClassVar[str] = "mesh"

    @property
    def rows_multiple(self) -> int:
        """Returns the number of which a batch's rows must be a multiple."""
        return self.mesh.shape["data"]

    @property
    def shards(self) -> int:
        """Counts the devices that share the rows of the batch that a compiled function sees."""
        return self.rows_multiple

    def _put(self, array, spec):
        return sharding.put(array, NamedSharding(self.mesh, spec))

    def replicate(self, tree: Any) -> Any:
        """Puts a tree on every device, for `compile`."""
        return jax.tree.map(lambda x: self._put(x, PartitionSpec()), tree)

    def single(self, placed: Any) -> Any:
        """Returns a placed tree as a compiled function sees it."""
        return placed

    def shape(self, placed: jax.Array) -> tuple[int, ...]:
        """Returns the shape of a placed array as a compiled function sees it."""
        return placed.shape

    def argument(self, output: Any) -> Any:
        """Places what a compiled function gave, as an argument of another."""
        return output

    def like(self, placed: Any, tree: Any) -> Any:
        """Puts a tree where `placed`, a tree of the same shapes made by this placement, lies."""
        return jax.tree.map(lambda p, x: sharding.put(x, p.sharding), placed, tree)

    @property
    def memory(self) -> int:
        """The bytes that a device has, 0 where they are the host's or not known."""
        stats = self.mesh.local_devices[0].memory_stats() or {}
        return stats.get("bytes_limit", 0)

    def place(self, rules: Sequence[tuple[str, PartitionSpec]], size: int = 0) -> Callable:
        """Returns (path, shape, read) -> a parameter where the first rule that matches says.

        It is made of parts that read((a slice of each axis)) gives, one after the other. Matrices
        are split over the data axis as well where `fsdp` asks for it, or with `auto` where a device
        would fill a quarter of its memory with parameters.

        Args:
            size: the bytes of all parameters.

        Raises:
            UserError: the model axis does not divide the parameter.
            ValueError: no rule matches.
        """
        large = 4 * size / self.mesh.shape["model"] > self.memory > 0
        split = self.fsdp == "on" or (self.fsdp == "auto" and large)

        def make_by_rule(path, shape, read):
            spec = next((s for pattern, s in rules if re.fullmatch(pattern, path)), None)
            if spec is None:
                raise ValueError(f"No partition rule matches the parameter {path}.")
            if split and path.endswith(("kernel", "embedding")):
                spec = self._over_data(spec, shape)
            for axis, name in enumerate(spec):
                if name and shape[axis] % self.mesh.shape[name]:
                    raise errors.UserError(
                        f"parallel.model={self.mesh.shape[name]} does not divide axis {axis} of "
                        f"{path}, which has shape {shape}."
                    )
            self.specs[path] = spec
            return self._made(shape, spec, read)

        return make_by_rule

    def _made(self, shape, spec, read):
        return sharding.assembled(shape, NamedSharding(self.mesh, spec), read)

    def _over_data(self, spec, shape):
        """The spec with "data" at the axis of a matrix that is whole, where it divides."""
        axes = [*spec, *(None,) * (len(shape) - len(spec))]
        whole = [k for k in (-2, -1) if axes[k] is None]
        if whole and shape[whole[0]] % self.rows_multiple == 0:
            axes[whole[0]] = "data"
        return PartitionSpec(*axes)

    def batch(self, tree: Any) -> Any:
        """Splits a batch of numpy arrays (B, ...) over the data axis."""
        return jax.tree.map(lambda x: self._put(x, PartitionSpec("data")), tree)

    def compile(self, fn: Callable, rows: bool) -> Callable:
        """Compiles fn(*replicated, batch), whose last argument is a batch made by `batch`.

        Args:
            rows: True where fn gives an output a row (B, ...); False where it gives sums over the
                rows, which are then added up over devices.

        Returns:
            A function of placed arguments; its outputs are arrays without a device axis, and where
            rows are spread over processes every process gets all of them.
        """
        step = self.program(fn, rows)
        return (lambda *args: self._for_all(step(*args))) if rows else step

    def _for_all(self, rows):
        """Gives every process all rows, by a program of its own: scoring has no collectives."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return sharding.mover(whole)(rows) if self.mesh.is_multi_process else rows

    def program(self, fn: Callable, rows: bool) -> Any:
        """Returns fn under jit, traced on the mesh (run/sharding.py); `compile` runs it."""
        by_row = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.jit(self._traced(fn), out_shardings=by_row if rows else None)

    def _traced(self, fn):
        @functools.wraps(fn)
        def call(*args):
            with sharding.on(self.mesh, self.specs):
                return fn(*args)

        return call

    def state(self, shapes: Any, specs: Any) -> Any:
        """Makes zeros for `compile_state`.

        Args:
            shapes: a tree of jax.ShapeDtypeStruct, with rows where `specs` has "data".
        """

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return jax.jit(zeros, out_shardings=shardings)()

    def compile_state(self, fn: Callable, specs: Any) -> Callable:
        """Compiles fn(params, adapter, state, batch) -> (state, an output a row (B, ...)).

        The state stays on the devices: each call takes over its memory and gives the next one.

        Args:
            specs: a tree like the state, with the PartitionSpec of each leaf.
        """
        out = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        rows = NamedSharding(self.mesh, PartitionSpec("data"))
        step = jax.jit(self._traced(fn), donate_argnums=2, out_shardings=(out, rows))

        def call(*args):
            state, output = step(*args)
            return state, self._for_all(output)

        return call

    def slots(self, rows: Sequence[int | None], count: int) -> np.ndarray:
        """Returns how compiled code knows `count` rows of a state, (R,) int32; None: beyond all."""
        return np.array([count if row is None else row for row in rows], np.int32)


class PmapPlacement(Placement):
    """Replicates everything, with a leading device axis, and splits batches over local devices."""

    strategy: ClassVar[str] = "pmap"

    @property
    def shards(self) -> int:
        """Returns 1: pmap has split the rows before."""
        return 1  # pmap has split the rows before

    def _map(self, fn, **settings):
        return jax.pmap(fn, "data", devices=list(self.mesh.devices.flat), **settings)

    def replicate(self, tree: Any) -> Any:
        """Puts a copy on every device, along a new leading axis."""
        n, sharding = self.rows_multiple, NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                (n, *np.shape(x)), sharding, lambda _, x=x: np.asarray(x)[None]
            ),
            tree,
        )

    def single(self, placed: Any) -> Any:
        """Returns the first device's copy."""
        return jax.tree.map(lambda x: x[0], placed)

    def shape(self, placed: jax.Array) -> tuple[int, ...]:
        """Returns the shape without the axis of devices."""
        return placed.shape[1:]

    def argument(self, output: Any) -> Any:
        """Puts an output, which is whole here, on every device."""
        return self.replicate(output)

    def like(self, placed: Any, tree: Any) -> Any:
        """Puts a tree on every device, as all lie here."""
        return self.replicate(tree)

    def place(self, rules: Sequence[tuple[str, PartitionSpec]], size: int = 0) -> Callable:
        """Returns what makes a parameter whole on every device."""
        return lambda path, shape, read: self.replicate(read((slice(None),) * len(shape)))

    def batch(self, tree: Any) -> Any:
        """Splits rows over the devices."""
        n = self.rows_multiple
        return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)

    def compile(self, fn: Callable, rows: bool) -> Callable:
        """Compiles with pmap; without `rows`, devices' sums are added."""
        if rows:
            mapped = self._map(fn)
            return lambda *args: jax.tree.map(_joined, mapped(*args))
        summed = self._map(lambda *args: jax.lax.psum(fn(*args), "data"))
        return lambda *args: self.single(summed(*args))

    def state(self, shapes: Any, specs: Any) -> Any:
        """Makes zeros on every device for its own rows."""
        n = self.rows_multiple

        def own(shape, spec):
            split = itertools.zip_longest(shape.shape, spec)
            return np.zeros([x // n if axis == "data" else x for x, axis in split], shape.dtype)

        return self.replicate(jax.tree.map(own, shapes, specs))

    def compile_state(self, fn: Callable, specs: Any) -> Callable:
        """Compiles a step whose state each device keeps."""
        mapped = self._map(fn, donate_argnums=2)

        def call(*args):
            state, output = mapped(*args)
            return state, jax.tree.map(_joined, output)

        return call

    def slots(self, rows: Sequence[int | None], count: int) -> np.ndarray:
        """Returns each row's place among its device's own."""
        own = count // self.rows_multiple  # a device counts its own from 0
        return np.array([own if row is None else row % own for row in rows], np.int32)


STRATEGIES = {"mesh": Placement, "pmap": PmapPlacement}


def _joined(x):
    """Joins the device axis and the rows of each device."""
    return x.reshape(-1, *x.shape[2:])


def one_behind(started: Iterable) -> Iterator:
    """Yields each item once the next is made: a batch is under way while the last is fetched."""
    last = None
    for item in started:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last


def matmul_precision(dtype: str) -> contextlib.AbstractContextManager:
    """Returns a context for products by model.dtype: TPUs and GPUs round float32 otherwise."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def make_placement(settings: config.Parallel, everywhere: bool = False) -> Placement:
    """Makes the placement of `parallel.*` over this process's devices, or all processes'.

    Raises:
        UserError: more devices asked for than there are, or a compiler that gives wrong sums.
    """
    if settings.distributed and not processes.joined():
        raise errors.UserError("parallel.distributed is for `diq run` and compare_selection.py.")
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
    mesh = sharding.make_mesh(found[:needed], data, settings.model)
    return STRATEGIES[settings.strategy](mesh, settings.fsdp)


@functools.cache
def reduces_right() -> bool:
    """Tells whether rows are summed right in a case that a CPU compiler got wrong.

    It is |I x|^2 of 40,000 rows x, each a product with its square and sum (diq_jax/__init__.py).
    """
    x = np.stack([np.arange(40_000, dtype=np.float32), *np.zeros((2, 40_000), np.float32)], axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum(jnp.square(jnp.eye(3) @ row))))(x)
    return bool(np.allclose(squares, np.square(x[:, 0]), rtol=1e-5))
