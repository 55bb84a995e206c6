"""Times a run's programs on the devices that are here, with random weights and equal tokens."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diq_jax import config, errors
from diq_jax.models import config as model_config
from diq_jax.pods import plan, programs
from diq_jax.run import devices, sharding

BATCHES = 3
PRODUCTS = 20  # of square matrices, one after the other, that measure the devices' rate
WIDTH, CPU_WIDTH = 8192, 1024  # of those matrices


def rows(
    cfg: config.Config,
    hf_config: dict[str, Any],
    mesh: tuple[int, int],
    batch: tuple[int, int],
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yields plan.rows' rows with `measured_ms` for estimates, the median of BATCHES after one.

    `matmul_share` is the program's fewest FLOPs a second (programs.ideal_flops), as a share of what
    products of large matrices reach on the same devices.

    Args:
        mesh: the devices along data and model; 0 = all that `model` leaves.

    Raises:
        UserError: there are fewer devices, the model is not supported, or they do not divide it.
    """
    found, (data, model) = jax.devices(), mesh
    data = data or max(len(found) // model, 1)
    if data * model > len(found):
        raise errors.UserError(
            f"--mesh={data}x{model} needs {data * model} devices; there are {len(found)}."
        )
    shape = model_config.decoder_config(hf_config, "--shape")
    grid = sharding.make_mesh(found[: data * model], data, model)
    memory = devices.Placement(grid).memory
    job = programs.make_job(cfg, shape, grid, memory, *batch)
    rate = matmul_rate(cfg.model.dtype) * grid.size
    for name in names:
        with devices.matmul_precision(cfg.model.dtype):
            yield _row(name, programs.make(name, job), job, memory, rate)


def matmul_rate(dtype: str) -> float:
    """Measures the FLOPs a second of products of large square matrices on one device."""
    width = CPU_WIDTH if jax.default_backend() == "cpu" else WIDTH
    left = jax.random.normal(jax.random.key(0), (width, width), dtype) / width**0.5

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, y: left @ y, x)

    with devices.matmul_precision(dtype):
        multiply(left).block_until_ready()
        seconds = []
        for _ in range(BATCHES):
            started = time.perf_counter()
            multiply(left).block_until_ready()
            seconds.append(time.perf_counter() - started)
    return 2 * width**3 * PRODUCTS / min(seconds)


def _row(name, made, job, memory, rate) -> dict[str, Any]:
    row: dict[str, Any] = {
        "program": name, "fits": True, "gib_per_chip": None,
        "hbm_gib": round(memory / plan.GIB, 1) or None, "flops_over_ideal": None, "est_ms": None,
        "link_ms": None, "tokens_per_s_per_chip": None, "collectives": {}, "compile_s": None,
        "error": "", "measured_ms": None, "matmul_share": None,
    }  # fmt: skip
    try:
        seconds, compiling, sizes = zip(*map(_time, made), strict=True)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return row | {"fits": False, "error": " ".join(str(e).split())[:300]}
    mesh = job.placement.mesh
    tokens = job.rows * job.tokens * mesh.shape["data"]
    size = job.batch.tokens.shape[0], job.tokens, job.answers
    ideal = programs.ideal_flops(name, job.model.cfg, *size)
    return row | {
        "matmul_share": round(ideal / sum(seconds) / rate, 3),
        "measured_ms": round(1e3 * sum(seconds), 1),
        "tokens_per_s_per_chip": round(tokens / mesh.size / sum(seconds)),
        "compile_s": round(sum(compiling), 1),
        "gib_per_chip": round(max(sizes) / plan.GIB, 2),
    }


def _time(program) -> tuple[float, float, int]:
    """Returns the seconds of a call, those of compiling, and the bytes on a device."""
    started = time.perf_counter()
    compiled = program.jitted.lower(*program.arguments).compile()
    compiling = time.perf_counter() - started
    beside = jax.tree.map(_filled, program.beside)
    seconds = []
    for _ in range(1 + BATCHES):
        # Anew each time, since a training's step takes its arguments' memory.
        arguments = jax.block_until_ready(jax.tree.map(_filled, program.arguments))
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
    used = compiled.memory_analysis()
    size = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    size += used.temp_size_in_bytes + sum(x.addressable_shards[0].data.nbytes
                                          for x in jax.tree.leaves(beside))  # fmt: skip
    return statistics.median(seconds[1:]), compiling, size


def _filled(leaf):
    """Makes an array of a shape and a place: numbers are random, whole numbers 1."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return _filler(leaf.shape, jnp.dtype(leaf.dtype), leaf.sharding)()


@functools.cache
def _filler(shape, dtype, where):
    def make():
        if jnp.issubdtype(dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(0), shape, dtype)
        return jnp.full(shape, not jnp.issubdtype(dtype, jnp.bool_), dtype)

    return jax.jit(make, out_shardings=where)
