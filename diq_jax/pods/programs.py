"""The programs of a run as they are compiled, on arrays that are shapes and places only."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from diq_jax import config, trees
from diq_jax.data import batches, steps
from diq_jax.finetune import sft
from diq_jax.influence import direction, engines, features
from diq_jax.models import config as model_config
from diq_jax.models import decoder, load, training
from diq_jax.run import devices

THIN = 16  # the rank of exact16's direction


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of a run.

    Attributes:
        jitted: what jax.jit made.
        arguments: of it, as shapes with shardings.
        beside: arrays that stay on the chips while it runs, and are none of its arguments.
    """

    jitted: Any
    arguments: tuple[Any, ...]
    beside: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Planned(devices.Placement):
    """Places shapes instead of arrays, and keeps the programs that are called.

    Attributes:
        hbm: the bytes of a chip.
    """

    hbm: int = 0
    called: list[Program] = dataclasses.field(default_factory=list)

    @property
    def memory(self) -> int:
        """Returns the bytes of a chip, as `Placement.memory`."""
        return self.hbm

    def _put(self, array, spec):
        where = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(np.shape(array), array.dtype, sharding=where)

    def _made(self, shape, spec, read):
        return self._put(read(()), spec)

    def compile(self, fn: Callable, rows: bool) -> Callable:
        """Records a program with its arguments instead of running it."""
        jitted = self.program(fn, rows)

        def call(*arguments):
            self.called.append(Program(jitted, arguments))
            return jax.eval_shape(fn, *arguments)

        return call


@dataclasses.dataclass(frozen=True)
class Job:
    """What a program is made for.

    Attributes:
        cfg: the run's configuration.
        rows, tokens: of a batch, on each data shard of the mesh.
    """

    model: load.Model
    cfg: config.Config
    placement: Planned
    rows: int
    tokens: int

    @property
    def batch(self) -> batches.Batch:
        """A batch as numpy arrays, half of whose tokens are scored."""
        B, T, A = self.rows * self.placement.rows_multiple, self.tokens, self.answers

        def zeros(*shape):
            return np.zeros(shape, np.int32)

        return batches.Batch(
            zeros(B, T), zeros(B, T), zeros(B, T), zeros(B, A), zeros(B, A),
            np.zeros((B, A), np.float32), np.zeros(B, bool),
        )  # fmt: skip

    @property
    def answers(self) -> int:
        """Returns the answer tokens of a row: half of all."""
        return max(self.tokens // 2, 1)


def make_job(
    cfg: config.Config,
    shape: model_config.DecoderConfig,
    mesh: jax.sharding.Mesh,
    hbm: int,
    rows: int,
    tokens: int,
) -> Job:
    """Places a model of a shape on a mesh, without its weights."""
    placement = Planned(mesh, cfg.parallel.fsdp, hbm)
    params = place_shapes(shape, cfg.model.dtype, placement)
    return Job(load.Model(params, shape, {}, ""), cfg, placement, rows, tokens)


def place_shapes(
    shape: model_config.DecoderConfig, dtype: str, placement: Planned
) -> dict[str, Any]:
    """Returns a model's parameters as shapes where the partition rules put them."""
    size = decoder.size(shape) * jnp.dtype(dtype).itemsize
    place = placement.place(decoder.PARTITION_RULES, size)
    return trees.map_named(
        lambda name, dims: place(name, dims, lambda _: jax.ShapeDtypeStruct(dims, dtype)),
        decoder.shapes(shape),
        lambda x: isinstance(x, tuple),
    )


def _space(job, **changes):
    settings = dataclasses.replace(job.cfg.influence, **changes)
    return settings, direction.make_space(job.model, settings, job.placement)


def _loss(job):
    settings, space = _space(job, parameters="all")
    losses = functools.partial(
        direction.losses, cfg=job.model.cfg, reduction=settings.loss_reduction
    )
    job.placement.compile(losses, rows=True)(*space, job.placement.batch(job.batch))


def _exact(job, parameters="all", rank=0):
    settings, space = _space(job, engine="exact", parameters=parameters, direction_rank=rank)

    def stacked(leaf):
        where = NamedSharding(job.placement.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype, sharding=where)

    v = jax.eval_shape(lambda chosen: direction.stack([chosen], [1.0], rank), space[0])
    v = job.placement.replicate(v)
    if not rank:
        v = v.replace(whole=jax.tree.map(stacked, space[0]))
    step = engines.exact_step(space, v, settings, job.model.cfg, job.placement)
    step(job.placement.batch(job.batch))


def _features(job, engine, parameters="all", **projection):
    sketch = dataclasses.replace(job.cfg.influence.projection, **projection)
    settings, space = _space(job, engine=engine, parameters=parameters, projection=sketch)
    made = features.open_features(space, settings, job.model.cfg, job.placement, None)
    made.step(job.placement.batch(job.batch))


def _mean_gradient(job):
    settings, space = _space(job, parameters="all")
    direction.mean_gradient_step(job.model.cfg, settings.loss_reduction, job.placement)(
        *space, job.placement.batch(job.batch)
    )


def _train(job, parameters):
    placement, model = job.placement, job.model
    settings = dataclasses.replace(
        job.cfg.finetune, parameters=parameters, batch_size=job.rows * placement.rows_multiple
    )
    if settings.trains_adapter:
        adapter = jax.eval_shape(lambda: sft.init_adapter(model.cfg, settings, 0))
        factors, frozen = (placement.replicate(x) for x in sft.split_adapter(adapter))
    else:
        frozen = None  # what the model had is an argument for its dtype alone: it stays beside
        factors = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), model.params
        )
    rows = np.zeros(job.batch.tokens.shape[0], np.int32)
    batch = placement.batch(steps.Microbatch(job.batch, rows))
    optimizer = training.adamw(settings.weight_decay, settings.clip_norm)
    sums = placement.compile(sft.example_sums(model.cfg, settings), rows=False)(
        model.params, factors, frozen, None, batch
    )
    where = jax.tree.map(lambda x: x.sharding, factors)
    everywhere = NamedSharding(placement.mesh, PartitionSpec())

    def put(x, sharding=everywhere):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer, put, jax.eval_shape(optimizer.init, factors), where, transform_non_params=put
    )
    gradient = jax.tree.map(put, sums.pop("gradient"), where)
    sums = jax.tree.map(put, sums) | {"gradient": gradient}
    [step] = placement.called
    placement.called[:] = [
        dataclasses.replace(step, beside=(opt_state, model.params if frozen is None else ())),
        Program(
            training.make_update(optimizer), (factors, opt_state, sums, np.float32(0)), model.params
        ),
    ]


PROGRAMS = {
    "loss": _loss,
    "exact": _exact,
    "exact16": functools.partial(_exact, rank=THIN),
    "exact_lora": functools.partial(_exact, parameters="lora"),
    "projected_lora": functools.partial(_features, engine="projected", parameters="lora"),
    "projected_lora_sparse": functools.partial(
        _features, engine="projected", parameters="lora", kind="sparse"
    ),
    "factored": functools.partial(_features, engine="factored"),
    "mean_gradient": _mean_gradient,
    "lora_step": functools.partial(_train, parameters="lora"),
    "full_step": functools.partial(_train, parameters="all"),
}
# Products of the parameters' matrices and of attention, in units of a forward pass.
PASSES = {"loss": (1, 1), "exact": (3, 3), "mean_gradient": (3, 3), "full_step": (3, 3)}


def of_run(cfg: config.Config) -> list[str]:
    """Returns the programs that a run of a config spends its time in."""
    settings = cfg.influence
    scores = {"exact": "exact", "factored": "factored", "projected": "projected_lora"}
    name = scores[settings.engine]
    if name == "exact" and settings.parameters == "lora":
        name = "exact_lora"
    return [name, "lora_step" if cfg.finetune.trains_adapter else "full_step"]


def make(name: str, job: Job) -> list[Program]:
    """Returns what a program of PROGRAMS runs on a batch, one or more compiled functions."""
    job.placement.called.clear()
    PROGRAMS[name](job)
    return list(job.placement.called)


def ideal_flops(
    name: str, cfg: model_config.DecoderConfig, rows: int, tokens: float, answers: float
) -> float:
    """Returns the fewest FLOPs that the mathematics of a program needs for a batch, on all chips.

    The head meets answer tokens alone, attention is causal, a token meets its own experts; a
    program that needs no gradient of a matrix goes through it forth and back, or along a thin
    direction, at twice a forward pass.
    """
    B, T, A = rows, tokens, answers
    shapes = trees.named_leaves(decoder.shapes(cfg)["layers"], lambda x: isinstance(x, tuple))
    kernels = {name: math.prod(x) for name, x in shapes.items() if name.endswith("kernel")}
    met = cfg.experts_per_token / cfg.num_experts if cfg.num_experts else 1
    matrices = sum(size * (met if "experts/" in name else 1) for name, size in kernels.items())
    products = 2 * B * (T * matrices + A * cfg.model_dim * cfg.vocab_size)
    attention = 2 * B * cfg.num_heads * cfg.head_dim * T * T * (cfg.num_layers // cfg.period)
    times, attended = PASSES.get(name, (2, 3))
    return times * products + attended * attention
