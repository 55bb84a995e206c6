"""The section `influence` of the configuration (config.py), and its own sections."""

import dataclasses
from collections.abc import Iterator

from diq_jax import fields
from diq_jax.fields import field

PROJECTIONS = ("rademacher", "gaussian", "sparse")
DECIDES = ("influence",)


@dataclasses.dataclass(frozen=True)
class Lora(fields.Section, section="influence.lora", decides=DECIDES):
    """Says which adapter's factors the gradients are of."""

    path: str = field(
        "",
        "A PEFT adapter folder, which is then part of the model; empty = a fresh adapter by the"
        " fields below, which changes no output: only the gradient is of its factors A and B.",
    )
    rank: int = field(8, "The rank of the fresh adapter.", fields.RANK)
    alpha: float = field(16.0, "The fresh adapter is scaled by alpha / rank.", fields.POSITIVE)
    targets: str = field(
        "(q|k|v)_proj", "The linear layers that get an adapter, by their paths.", regex=True
    )
    zero_b: bool = field(
        False,
        "Begins with B = 0, where the gradient of A vanishes, so that half of the adapter sees "
        "nothing.",
    )
    seed: int = field(0, "The seed of A and B.", fields.SEED)


@dataclasses.dataclass(frozen=True)
class Projection(fields.Section, section="influence.projection", decides=DECIDES):
    """Says how gradients are projected to store rows."""

    kind: str = field(
        "rademacher",
        "The random matrix: dense signs (rademacher) or normal numbers (gaussian) as in TRAK, "
        "or two signed buckets for each coordinate (sparse).",
        choices=PROJECTIONS,
    )
    dim: int = field(4096, "How many numbers are kept for an example.", fields.Span(1, 2**24))
    seed: int = field(
        0,
        "The seed of the matrix, which depends on nothing else but the paths of the parameters.",
        fields.SEED,
    )
    rank: int = field(
        0,
        "factored: the rank of each side; 0 = the largest that `dim` has room for.",
        fields.or_none(fields.RANK),
    )
    block_bytes: int = field(
        2**28, "The most bytes of the matrix that exist at once.", fields.BYTES, harmless=True
    )

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields an odd `dim` for two buckets."""
        yield (
            self.kind == "sparse" and self.dim % 2 == 1,
            "influence.projection.dim must be even with kind=sparse (two buckets); got "
            f"{self.dim!r}.",
        )


@dataclasses.dataclass(frozen=True)
class Store(fields.Section, section="influence.store", decides=DECIDES):
    """Says how a gradient store is written."""

    dtype: str = field(
        "float32", "The dtype of the stored rows.", choices=("float32", "bfloat16", "float16")
    )
    shard_rows: int = field(1024, "Examples of one file.", fields.Span(1, 2**24))


@dataclasses.dataclass(frozen=True)
class Warmup(fields.Section, section="influence.warmup", decides=DECIDES):
    """Trains influence.parameters by AdamW over a part of the pool before gradients are taken."""

    epochs: int = field(
        0,
        "Epochs of the warm-up; scores are taken after each and summed by learning rate; 0 = no"
        " warm-up, the base model alone.",
        fields.or_none(fields.EPOCHS),
    )
    fraction: float = field(
        0.05, "The share of the pool that is trained on, drawn with the seed.", fields.SHARE
    )
    learning_rate: float = field(
        1e-4,
        "The peak learning rate, after a linear warm-up over 3 % of the steps and before a "
        "linear decay to 0.",
        fields.POSITIVE,
    )
    batch_size: int = field(16, "Examples of an optimizer step.", fields.BATCH)
    seed: int = field(0, "The seed of the draw and of the order.", fields.SEED)


@dataclasses.dataclass(frozen=True)
class GaussNewton(fields.Section, section="influence.gauss_newton", decides=DECIDES):
    """Solves (G + lambda)^-1 by conjugate gradients, for direction=gauss_newton."""

    examples: int = field(
        64,
        "How many examples of the pool G is the mean over, drawn with the seed.",
        fields.AT_LEAST_ONE,
    )
    damping: float = field(
        0.1, "lambda, as a share of G's curvature along the target gradient.", fields.POSITIVE
    )
    iterations: int = field(
        10,
        "The most iterations; each costs five forward passes over the examples.",
        fields.Span(1, 10_000),
    )
    tolerance: float = field(
        0.01,
        "Stops at this norm of the residual, as a share of the target gradient's.",
        fields.UNIT,
    )
    seed: int = field(0, "The seed of the draw.", fields.SEED)


@dataclasses.dataclass(frozen=True)
class Tuned(fields.Section, section="influence.tuned", decides=DECIDES):
    """Scores by losses before and after a short LoRA training, for methods color and temp."""

    color: bool = field(
        False,
        "Each row's loss at the base model less that after training on the targets: two forward "
        "passes over the pool (CoLoR-Filter).",
    )
    temp: bool = field(
        False,
        "Each row's loss over its first tokens at a mix of base and trained weights, and the "
        "cluster of its token losses: trains on a part of the pool, then one forward pass.",
    )
    epochs: int = field(
        2, "Epochs of the training on the targets, or on the part of the pool.", fields.EPOCHS
    )
    learning_rate: float = field(
        1e-3,
        "The peak learning rate, after a linear warm-up over 3 % of the steps and before a "
        "linear decay to 0.",
        fields.POSITIVE,
    )
    batch_size: int = field(16, "Examples of an optimizer step.", fields.BATCH)
    fraction: float = field(
        0.05, "temp: the share of the pool that is trained on, drawn with the seed.", fields.SHARE
    )
    mix: float = field(
        0.5, "temp: the share of the trained weights in the mix; 0 = the base model.", fields.UNIT
    )
    first_tokens: int = field(
        100, "temp: how many answer tokens are read, from the first on.", fields.Span(1, 10_000)
    )
    clusters: int = field(
        10, "temp: the clusters of k-means over the losses of these tokens.", fields.Span(1, 10_000)
    )
    seed: int = field(0, "The seed of the draw, of the order and of k-means.", fields.SEED)


@dataclasses.dataclass(frozen=True)
class Influence(fields.Section, section="influence", decides=DECIDES):
    """Says how examples are scored against the targets."""

    engine: str = field(
        "exact",
        "How the product of an example's gradient and the direction is computed.",
        choices="influence.kinds.ENGINES",
    )
    parameters: str = field(
        "all",
        "The parameters of the gradients: all, lora, or a regex over parameter paths.",
        regex=True,
    )
    direction: str = field(
        "mean",
        "The direction that examples' gradients are multiplied with.",
        choices="influence.kinds.DIRECTIONS",
    )
    direction_rank: int = field(
        0,
        "exact: keeps the matrices of the direction as two thin factors of this rank; 0 = whole.",
        fields.or_none(fields.RANK),
    )
    targets: str = field(
        "mean",
        "Takes one direction for the mean of the targets, for each task, or for each example; "
        "the score is that of the mean, the others stand beside it.",
        choices=("mean", "task", "example"),
    )
    span: int = field(
        9,
        "targets=task or example: how many leading directions of the targets' gradients span the "
        "subspace in which selection.method=gist aligns examples with them.",
        fields.AT_LEAST_ONE,
    )
    loss_reduction: str = field(
        "mean",
        "How the losses of an example's answer tokens are combined.",
        choices=("mean", "sum"),
    )
    normalize: str = field(
        "dot",
        "The inner product (dot), or the cosine, which needs the norm of each gradient and so "
        "not engine=exact.",
        choices=("dot", "cosine"),
    )
    per_token: bool = field(False, "exact: also writes each answer token's share of the score.")
    packing: bool = field(
        False, "exact: puts several examples in a row, told apart by segment ids.", harmless=True
    )
    batch_tokens: int = field(
        4096,
        "Tokens of one scoring batch on each of the devices that share it (parallel.data).",
        fields.TOKENS,
        harmless=True,
    )
    microbatch_tokens: int = field(
        0,
        "projected, factored: tokens whose activations a device holds at once; 0 = 1,024 on a CPU, "
        "elsewhere what fits into half of its memory, 16,384 at most.",
        fields.or_none(fields.TOKENS),
        harmless=True,
    )
    gradient_bytes: int = field(
        2**30,
        "projected: bytes of per-example gradients that a device holds at once.",
        fields.BYTES,
        harmless=True,
    )
    remat: bool = field(
        False, "projected, factored: recomputes each layer in the backward pass.", harmless=True
    )
    lora: Lora = dataclasses.field(default_factory=Lora)
    projection: Projection = dataclasses.field(default_factory=Projection)
    store: Store = dataclasses.field(default_factory=Store)
    warmup: Warmup = dataclasses.field(default_factory=Warmup)
    gauss_newton: GaussNewton = dataclasses.field(default_factory=GaussNewton)
    tuned: Tuned = dataclasses.field(default_factory=Tuned)
