"""The configuration of a run: one frozen dataclass for each section, every field explained where it
stands.

A config file calls `default()`, sets fields, and returns the locked ConfigDict; `resolve` turns
that into the dataclasses, which check ranges and combinations. Flags override fields:
`--config.selection.retention_ratio=0.01`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import ml_collections

from diq_jax.common import errors

HYGIENE = ("off", "report", "remove")
PERSPECTIVES = ("knowledge", "reasoning", "overall")
ENGINES = ("exact", "projected", "factored")
DIRECTIONS = ("mean", "adam", "gauss_newton", "less")
PEFT_DIRECTION = "peft:"  # influence.direction=peft:FOLDER
PROJECTIONS = ("rademacher", "gaussian", "sparse")
# Selection methods by what they read beside difficulty and influence.
MODEL_SCORED = ("similarity", "perplexity", "middle_perplexity", "ifd", "long_reasoning")
DIVERSE = ("k_center", "facility_location")
METHODS = (
    *("diq", "random", "influence"),
    *(f"difficulty_{p}" for p in PERSPECTIVES),
    *(f"quadrant_{q}" for q in (1, 2, 3, 4)),
    *("short_answers", "long_answers"),
    *MODEL_SCORED,
    *DIVERSE,
)


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = ""  # hub id, local folder (safetensors), a .gguf file, or package:NAME/FILE
    dtype: str = "float32"  # of parameters and activations: float32 or bfloat16
    max_tokens: int = 8192  # longest example, prompt and completion together
    # longer ones: error, drop, end (cut the completion), prompt (cut the prompt's start)
    truncation: str = "end"

    def __post_init__(self):
        _check("model.path", bool(self.path), "a model", self.path)
        errors.check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        _check("model.max_tokens", self.max_tokens >= 16, "at least 16", self.max_tokens)
        errors.check_choice("model.truncation", self.truncation, ("error", "drop", "end", "prompt"))


@dataclasses.dataclass(frozen=True)
class Data:
    pool: str = "sample"  # path, glob, several by commas, hub:NAME[:CONFIG[:SPLIT]], or sample
    pool_limit: int = 0  # the first so many rows; 0 = all
    targets: str = "sample"  # rows of the tasks that matter: their mean gradient is the direction
    targets_per_task: int = 20  # drawn with the seed; 0 = all
    tests: str = "sample"  # held-out rows of the same tasks
    tests_per_task: int = 0  # drawn with the seed; 0 = all
    # huatuo, m23k, medreason, finemed, or question=A,reasoning=B,answer=C; "" = our names
    columns: str = ""
    # the completion: plain, huatuo, think, or a text with {reasoning} and {answer}
    template: str = "plain"
    seed: int = 0  # of the draws above

    def __post_init__(self):
        for name in ("pool_limit", "targets_per_task", "tests_per_task", "seed"):
            _check(f"data.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name))
        for name in ("pool", "targets", "tests"):
            _check(
                f"data.{name}", bool(getattr(self, name)), "a path, a glob, hub:NAME or sample", ""
            )


@dataclasses.dataclass(frozen=True)
class Difficulty:
    # labelled rows to train on (path, glob, hub:NAME, sample), or columns[:knowledge=A,...]
    source: str = "sample"
    encoder: str = ""  # the BERT-type encoder to fine-tune: hub id, folder or package:NAME/FOLDER
    perspective: str = "overall"  # knowledge, reasoning or overall: the one that selection uses
    percentile: float = 50.0  # tau_d: difficulty at or above this percentile of the pool is high
    # of the cross-validation; a labelled pool row is scored by the model that did not see it
    folds: int = 5
    layers: int = 0  # of the encoder, from the bottom; 0 = all
    # Over the labelled rows, everything trained; 0 = heads on the frozen encoder only.
    epochs: int = 5
    learning_rate: float = 1e-4  # AdamW's peak
    batch_size: int = 16  # rows a step
    max_tokens: int = 256  # of an encoder input
    seed: int = 0  # of folds, order and head
    # also loss, perplexity, IFD and similarity to the targets by the base model (model_scores.py):
    # two forward passes, for the selection methods that sort by them
    model_scores: bool = False

    def __post_init__(self):
        errors.check_choice("difficulty.perspective", self.perspective, PERSPECTIVES)
        _check("difficulty.percentile", 0 <= self.percentile <= 100, "in [0, 100]", self.percentile)
        _check("difficulty.folds", self.folds >= 2, "at least 2", self.folds)
        for name in ("layers", "epochs"):
            _check(
                f"difficulty.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name)
            )
        for name in ("batch_size", "learning_rate", "max_tokens"):
            _check(f"difficulty.{name}", getattr(self, name) > 0, "above 0", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class InfluenceLora:
    path: str = ""  # a PEFT adapter folder; "" = a fresh adapter by the fields below
    rank: int = 8  # of the fresh adapter
    alpha: float = 16.0  # its scale is alpha / rank
    targets: str = "(q|k|v)_proj"  # regex over the model's linear layers
    # True: B = 0, where the gradient of A vanishes and half the adapter is blind
    zero_b: bool = False
    seed: int = 0  # of A and B

    def __post_init__(self):
        _check("influence.lora.rank", self.rank >= 1, "at least 1", self.rank)
        _check("influence.lora.alpha", self.alpha > 0, "above 0", self.alpha)


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
        for name in ("dim", "block_bytes"):
            value = getattr(self, name)
            _check(f"influence.projection.{name}", value >= 1, "at least 1", value)
        for name in ("seed", "rank"):
            value = getattr(self, name)
            _check(f"influence.projection.{name}", value >= 0, "at least 0", value)
        ok = self.kind != "sparse" or self.dim % 2 == 0
        _check("influence.projection.dim", ok, "even with kind=sparse (two buckets)", self.dim)


@dataclasses.dataclass(frozen=True)
class Store:
    dtype: str = "float32"  # of the stored rows: float32, bfloat16 or float16
    shard_rows: int = 1024  # examples of one file

    def __post_init__(self):
        choices = ("float32", "bfloat16", "float16")
        errors.check_choice("influence.store.dtype", self.dtype, choices)
        _check("influence.store.shard_rows", self.shard_rows >= 1, "at least 1", self.shard_rows)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """AdamW on influence.parameters over a part of the pool before gradients are taken."""

    epochs: int = 0  # scores are taken after each and summed by learning rate; 0 = the base model
    fraction: float = 0.05  # of the pool, drawn with the seed
    learning_rate: float = 1e-4  # the peak: linear warm-up over 3 % of the steps, then linear to 0
    batch_size: int = 16  # examples an optimiser step
    seed: int = 0  # of the draw and the order

    def __post_init__(self):
        _check("influence.warmup.epochs", self.epochs >= 0, "at least 0", self.epochs)
        ok = 0 < self.fraction <= 1
        _check("influence.warmup.fraction", ok, "in (0, 1]", self.fraction)
        for name in ("learning_rate", "batch_size"):
            value = getattr(self, name)
            _check(f"influence.warmup.{name}", value > 0, "above 0", value)


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """direction=gauss_newton: (G + lambda)^-1 of the target gradient, by conjugate gradients."""

    examples: int = 64  # of the pool, drawn with the seed, over which G is the mean
    damping: float = 0.1  # lambda, as a share of G's curvature along the target gradient
    iterations: int = 10  # at most; each costs five forward passes over the examples
    tolerance: float = 0.01  # of the residual, as a share of the target gradient
    seed: int = 0

    def __post_init__(self):
        for name in ("examples", "iterations"):
            value = getattr(self, name)
            _check(f"influence.gauss_newton.{name}", value >= 1, "at least 1", value)
        _check("influence.gauss_newton.damping", self.damping > 0, "above 0", self.damping)
        value = self.tolerance
        _check("influence.gauss_newton.tolerance", value >= 0, "at least 0", value)


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
    loss_reduction: str = "mean"  # over an example's answer tokens: mean (the paper) or sum
    normalize: str = "dot"  # dot; cosine needs the gradient's norm, which forward mode never sees
    per_token: bool = False  # exact: also each answer token's share of the score
    packing: bool = False  # exact: several examples in a row, told apart by segment ids
    batch_tokens: int = 4096  # tokens of one scoring batch on all devices
    # projected, factored: tokens whose activations a device holds at once; 0 = 1,024 on a CPU,
    # 16,384 elsewhere
    microbatch_tokens: int = 0
    gradient_bytes: int = 2**30  # projected: per-example gradients held at once on a device
    remat: bool = False  # projected, factored: recompute each layer in the backward pass
    lora: InfluenceLora = dataclasses.field(default_factory=InfluenceLora)
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
        rank = self.direction_rank
        _check("influence.direction_rank", rank >= 0, "at least 0", rank)
        for name, least in (("batch_tokens", 1), ("microbatch_tokens", 0), ("gradient_bytes", 1)):
            value = getattr(self, name)
            _check(f"influence.{name}", value >= least, f"at least {least}", value)
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


@dataclasses.dataclass(frozen=True)
class Selection:
    # diq, or one of METHODS to compare it with (selection/methods.py)
    method: str = "diq"
    retention_ratio: float = 0.1  # the share of the pool to keep, in (0, 1]
    seed: int = 0  # of the random order
    # rows that repeat another, a target or a test: off, report (hygiene.parquet), or remove, which
    # ranks them last and never selects them
    hygiene: str = "report"
    # of two texts' shingles, the Jaccard similarity from which they are near duplicates
    near_similarity: float = 0.6
    # the share of the shorter text's shingles in the longer from which it is an excerpt
    excerpt_containment: float = 0.8
    shingle_words: int = 3  # words of a shingle
    ngram_words: int = 13  # words in a row that a pool row may not share with a target or a test
    # a phrase in more texts than this, or one in a thousand, is boilerplate: no overlap to share it
    boilerplate_texts: int = 10
    # cosine of difficulty.encoder's embeddings from which questions are paraphrases, such as 0.9;
    # 0 = none are looked for
    paraphrase_similarity: float = 0.0
    quadrant_order: str = "1,2,3,4"  # in which diq fills the budget; 1 2 3 4 in any order
    # the largest share of the budget from one `source` of the pool; below 1 a smaller budget need
    # not lie inside a larger one
    source_cap: float = 1.0
    # sort and cut by what a regression on log answer tokens leaves of the influence, not by itself
    length_residual: bool = False

    def __post_init__(self):
        errors.check_choice("selection.method", self.method, METHODS)
        errors.check_choice("selection.hygiene", self.hygiene, HYGIENE)
        for name in ("retention_ratio", "near_similarity", "excerpt_containment"):
            value = getattr(self, name)
            _check(f"selection.{name}", 0 < value <= 1, "in (0, 1]", value)
        for name, least in (("shingle_words", 1), ("ngram_words", 1), ("boilerplate_texts", 2)):
            value = getattr(self, name)
            _check(f"selection.{name}", value >= least, f"at least {least}", value)
        ok = 0 <= self.paraphrase_similarity <= 1
        _check("selection.paraphrase_similarity", ok, "in [0, 1]", self.paraphrase_similarity)
        ok = sorted(self.quadrant_order.split(",")) == ["1", "2", "3", "4"]
        expected = "1, 2, 3 and 4 in some order, separated by commas"
        _check("selection.quadrant_order", ok, expected, self.quadrant_order)
        _check("selection.source_cap", 0 < self.source_cap <= 1, "in (0, 1]", self.source_cap)

    @property
    def quadrants(self) -> tuple[int, ...]:
        """The quadrants in the order in which they fill the budget."""
        return tuple(int(q) for q in self.quadrant_order.split(","))


@dataclasses.dataclass(frozen=True)
class Finetune:
    # also train on as many rows by these selection methods, comma-separated; "" = none
    baselines: str = "random"
    rank: int = 8  # LoRA rank
    alpha: float = 16.0  # LoRA scale is alpha / rank
    dropout: float = 0.0  # on the adapter's input
    targets: str = "(q|k|v)_proj"  # regex over the model's linear layers
    learning_rate: float = 1e-4  # AdamW's peak, after warm-up, before the cosine
    warmup_ratio: float = 0.1  # of all steps
    weight_decay: float = 0.0  # AdamW
    clip_norm: float = 1.0  # of the global gradient; 0 = no clipping
    epochs: int = 3  # over the subset
    batch_size: int = 8  # examples an optimiser step
    accumulation_steps: int = 1  # microbatches an optimiser step; must divide batch_size
    remat: bool = False  # recompute each layer in the backward pass: less memory, a third more time
    checkpoint_every_steps: int = 10  # train state on disk; a killed run continues from it
    seed: int = 0  # of order, A and dropout

    def __post_init__(self):
        for method in self.baseline_methods:
            errors.check_choice("finetune.baselines", method, METHODS)
        for name in (
            "rank",
            "epochs",
            "batch_size",
            "accumulation_steps",
            "checkpoint_every_steps",
        ):
            _check(f"finetune.{name}", getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("learning_rate", "alpha"):
            _check(f"finetune.{name}", getattr(self, name) > 0, "above 0", getattr(self, name))
        for name in ("weight_decay", "clip_norm"):
            _check(f"finetune.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name))
        _check("finetune.dropout", 0 <= self.dropout < 1, "in [0, 1)", self.dropout)
        _check("finetune.warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)", self.warmup_ratio)
        if self.batch_size % self.accumulation_steps:
            raise errors.UserError(
                f"finetune.accumulation_steps must divide batch_size {self.batch_size}, "
                f"got {self.accumulation_steps}."
            )

    @property
    def baseline_methods(self) -> tuple[str, ...]:
        return tuple(m.strip() for m in self.baselines.split(",") if m.strip())


@dataclasses.dataclass(frozen=True)
class Evaluate:
    batch_tokens: int = 4096  # tokens of one evaluation batch on all devices
    bootstrap_samples: int = 2000  # of every 95 % interval
    seed: int = 0  # of the bootstrap

    def __post_init__(self):
        _check("evaluate.batch_tokens", self.batch_tokens >= 1, "at least 1", self.batch_tokens)
        ok = self.bootstrap_samples >= 100
        _check("evaluate.bootstrap_samples", ok, "at least 100", self.bootstrap_samples)


@dataclasses.dataclass(frozen=True)
class Parallel:
    # mesh: jit over a ("data", "model") mesh; pmap: data-parallel over local devices
    strategy: str = "mesh"
    data: int = 0  # devices along the batch; 0 = all that `model` leaves
    model: int = 1  # devices over which parameters are split

    def __post_init__(self):
        errors.check_choice("parallel.strategy", self.strategy, ("mesh", "pmap"))
        _check("parallel.data", self.data >= 0, "at least 0", self.data)
        _check("parallel.model", self.model >= 1, "at least 1", self.model)
        if self.strategy == "pmap" and self.model != 1:
            raise errors.UserError("parallel.model must be 1 with parallel.strategy=pmap.")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    difficulty: Difficulty
    influence: Influence
    selection: Selection
    finetune: Finetune
    evaluate: Evaluate
    parallel: Parallel

    def __post_init__(self):
        if self.selection.paraphrase_similarity > 0 and not self.difficulty.encoder:
            raise errors.UserError(
                "selection.paraphrase_similarity needs an encoder: set difficulty.encoder, or 0."
            )
        asked = {"selection.method": (self.selection.method,)}
        asked["finetune.baselines"] = self.finetune.baseline_methods
        for field, methods in asked.items():
            for method in methods:
                self._check_input(field, method)

    def _check_input(self, field, method):
        """Before hours of work, not after."""
        if method in MODEL_SCORED and not self.difficulty.model_scores:
            raise errors.UserError(f"{field}={method} needs difficulty.model_scores=True.")
        if method in DIVERSE and (self.influence.engine == "exact" or self.influence.warmup.epochs):
            raise errors.UserError(
                f"{field}={method} needs the base model's gradient store: set influence.engine to "
                "projected or factored, and influence.warmup.epochs to 0."
            )


def default() -> ml_collections.ConfigDict:
    """Every field with its default, locked; model.path has none."""

    def values(cls):
        out = {}
        for field in dataclasses.fields(cls):
            nested = dataclasses.is_dataclass(field.type)
            out[field.name] = values(field.type) if nested else field.default
        return out

    return ml_collections.ConfigDict(values(Config)).lock()


def field_names(cls=None, prefix: str = "") -> Iterator[str]:
    """The dotted name of every field, sections aside."""
    for field in dataclasses.fields(cls or Config):
        if dataclasses.is_dataclass(field.type):
            yield from field_names(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def resolve(config: ml_collections.ConfigDict) -> Config:
    """The checked, frozen form.

    Raises:
        UserError: a field that does not exist (with the nearest that does), of the wrong type, out
            of range, or at odds with another.
    """
    return _build(Config, config.to_dict(), "")


def _build(cls, values: dict[str, Any], prefix: str):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise errors.UserError(
                f"config field {prefix}{name} does not exist.{errors.nearest(name, fields)}"
            )
    arguments = {}
    for name, value in values.items():
        kind, where = fields[name].type, f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, value, f"{where}.")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise errors.UserError(f"{where} must be of type {kind.__name__}; got {value!r}.")
        if kind is float and not math.isfinite(value):
            raise errors.UserError(f"{where} must be finite; got {value}.")
        arguments[name] = value
    return cls(**arguments)


def _check(field: str, ok: bool, expected: str, value: Any) -> None:
    if not ok:
        raise errors.UserError(f"{field} must be {expected}; got {value!r}.")
