"""The section `influence` of the configuration (config.py), and its own sections."""

import dataclasses
from collections.abc import Iterator

from diq_jax import errors, limits

ENGINES = ("exact", "projected", "factored")
DIRECTIONS = ("mean", "adam", "gauss_newton", "less")
PEFT_DIRECTION = "peft:"  # influence.direction=peft:FOLDER
PROJECTIONS = ("rademacher", "gaussian", "sparse")


@dataclasses.dataclass(frozen=True)
class Lora:
    # a PEFT adapter folder, which is then part of the model; "" = a fresh adapter by the fields
    # below, around the model as it is: no output changes, and the gradient is of A and B
    path: str = ""
    rank: int = 8  # of the fresh adapter
    alpha: float = 16.0  # its scale is alpha / rank
    targets: str = "(q|k|v)_proj"  # regex over the model's linear layers
    # True: B = 0, where the gradient of A vanishes and half the adapter is blind
    zero_b: bool = False
    seed: int = 0  # of A and B

    def __post_init__(self):
        ranges = {"rank": limits.RANK, "alpha": limits.POSITIVE, "seed": limits.SEED}
        errors.check_ranges("influence.lora", self, **ranges)
        errors.check_regex("influence.lora.targets", self.targets)


@dataclasses.dataclass(frozen=True)
class Projection:
    # rademacher, gaussian: dense, TRAK-style; sparse: two signed buckets for each coordinate
    kind: str = "rademacher"
    dim: int = 4096  # numbers kept for an example
    seed: int = 0  # with the parameter's path, all that the matrix depends on
    rank: int = 0  # of each side of engine=factored; 0 = the largest that `dim` has room for
    block_bytes: int = 2**28  # the matrix exists in blocks of at most so many bytes

    def __post_init__(self):
        errors.check_choice("influence.projection.kind", self.kind, PROJECTIONS)
        errors.check_ranges(
            "influence.projection",
            self,
            dim=(1, 2**24),
            seed=limits.SEED,
            rank=limits.or_none(limits.RANK),
            block_bytes=limits.BYTES,
        )
        ok = self.kind != "sparse" or self.dim % 2 == 0
        errors.check(
            "influence.projection.dim", ok, "even with kind=sparse (two buckets)", self.dim
        )


@dataclasses.dataclass(frozen=True)
class Store:
    dtype: str = "float32"  # of the stored rows: float32, bfloat16 or float16
    shard_rows: int = 1024  # examples of one file

    def __post_init__(self):
        choices = ("float32", "bfloat16", "float16")
        errors.check_choice("influence.store.dtype", self.dtype, choices)
        errors.check_ranges("influence.store", self, shard_rows=(1, 2**24))


@dataclasses.dataclass(frozen=True)
class Warmup:
    """AdamW on influence.parameters over a part of the pool before gradients are taken."""

    epochs: int = 0  # scores are taken after each and summed by learning rate; 0 = the base model
    fraction: float = 0.05  # of the pool, drawn with the seed
    learning_rate: float = 1e-4  # the peak: linear warm-up over 3 % of the steps, then linear to 0
    batch_size: int = 16  # examples an optimiser step
    seed: int = 0  # of the draw and the order

    def __post_init__(self):
        ok = 0 < self.fraction <= 1
        errors.check("influence.warmup.fraction", ok, "in (0, 1]", self.fraction)
        errors.check_ranges(
            "influence.warmup",
            self,
            epochs=limits.or_none(limits.EPOCHS),
            learning_rate=limits.POSITIVE,
            batch_size=limits.BATCH,
            seed=limits.SEED,
        )


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """direction=gauss_newton: (G + lambda)^-1 of the target gradient, by conjugate gradients."""

    examples: int = 64  # of the pool, drawn with the seed, over which G is the mean
    damping: float = 0.1  # lambda, as a share of G's curvature along the target gradient
    iterations: int = 10  # at most; each costs five forward passes over the examples
    tolerance: float = 0.01  # of the residual, as a share of the target gradient
    seed: int = 0

    def __post_init__(self):
        errors.check_ranges(
            "influence.gauss_newton",
            self,
            examples=(1, limits.COUNT[1]),
            damping=limits.POSITIVE,
            iterations=(1, 10_000),
            tolerance=(0, 1),
            seed=limits.SEED,
        )


@dataclasses.dataclass(frozen=True)
class Influence:
    # exact: forward mode, nothing projected; projected: per-example gradients, projected and kept;
    # factored: two-sided projections from one backward pass, kept
    engine: str = "exact"
    # the space of the gradients: all, lora, or a regex over parameter paths
    parameters: str = "all"
    # mean: the mean target gradient (DIQ); adam: that, divided by the root of Adam's second moment
    # after the warm-up; gauss_newton: that, solved against the Gauss-Newton matrix (influence
    # functions); less: LESS's own form (engine=projected); peft:FOLDER: an adapter's update
    direction: str = "mean"
    # exact: matrices of the direction as two thin factors of this rank; 0 = whole
    direction_rank: int = 0
    # one direction for the mean of the targets, for each task, or for each example; the score is
    # the mean's, the others stand beside it
    targets: str = "mean"
    loss_reduction: str = "mean"  # over an example's answer tokens: mean or sum
    normalize: str = "dot"  # dot; cosine needs the gradient's norm, which forward mode never sees
    per_token: bool = False  # exact: also each answer token's share of the score
    packing: bool = False  # exact: several examples in a row, told apart by segment ids
    batch_tokens: int = 4096  # tokens of one scoring batch on all devices
    # projected, factored: tokens whose activations a device holds at once; 0 = 1,024 on a CPU,
    # 16,384 elsewhere
    microbatch_tokens: int = 0
    gradient_bytes: int = 2**30  # projected: per-example gradients held at once on a device
    remat: bool = False  # projected, factored: recompute each layer in the backward pass
    lora: Lora = dataclasses.field(default_factory=Lora)
    projection: Projection = dataclasses.field(default_factory=Projection)
    store: Store = dataclasses.field(default_factory=Store)
    warmup: Warmup = dataclasses.field(default_factory=Warmup)
    gauss_newton: GaussNewton = dataclasses.field(default_factory=GaussNewton)

    def __post_init__(self):
        errors.check_choice("influence.engine", self.engine, ENGINES)
        if not self.direction.startswith(PEFT_DIRECTION):
            errors.check_choice("influence.direction", self.direction, DIRECTIONS)
        errors.check_choice("influence.targets", self.targets, ("mean", "task", "example"))
        errors.check_choice("influence.loss_reduction", self.loss_reduction, ("mean", "sum"))
        errors.check_choice("influence.normalize", self.normalize, ("dot", "cosine"))
        errors.check("influence.parameters", bool(self.parameters), "all, lora or a regex", "")
        errors.check_regex("influence.parameters", self.parameters)
        errors.check_ranges(
            "influence",
            self,
            direction_rank=limits.or_none(limits.RANK),
            batch_tokens=limits.TOKENS,
            microbatch_tokens=limits.or_none(limits.TOKENS),
            gradient_bytes=limits.BYTES,
        )
        for wrong, sentence in self._conflicts():
            if wrong:
                raise errors.UserError(sentence)

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        exact, lora = self.engine == "exact", self.parameters == "lora"
        peft, less = self.direction.startswith(PEFT_DIRECTION), self.direction == "less"
        yield (
            exact and self.normalize == "cosine",
            "influence.normalize=cosine needs each example's gradient norm, which the "
            "forward-mode engine 'exact' never forms; use dot, or engine=projected or factored.",
        )
        for name in ("direction_rank", "per_token", "packing"):
            yield (
                not exact and bool(getattr(self, name)),
                f"influence.{name} belongs to engine=exact; got engine={self.engine}.",
            )
        yield (
            lora and self.direction_rank > 0,
            "influence.direction_rank does nothing with parameters=lora: its direction is thin "
            "already; set it to 0.",
        )
        yield (
            lora and self.engine == "factored",
            "influence.engine=factored projects whole matrices; with parameters=lora use "
            "projected.",
        )
        yield (
            self.direction in ("adam", "less") and self.warmup.epochs == 0,
            f"influence.direction={self.direction} needs Adam's moments: set "
            "influence.warmup.epochs to at least 1.",
        )
        yield (
            less and (self.engine, self.normalize) != ("projected", "cosine"),
            "influence.direction=less is not linear in the example's gradient: it needs "
            "engine=projected and normalize=cosine.",
        )
        yield (
            peft and (self.parameters != "all" or self.warmup.epochs > 0 or not exact),
            "influence.direction=peft:FOLDER is a direction of the base model's weights: it "
            "needs engine=exact, parameters=all and no warm-up.",
        )
        yield (
            peft and self.targets != "mean",
            f"influence.direction=peft:FOLDER is one direction; got targets={self.targets}.",
        )
