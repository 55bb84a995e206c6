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

from diq_jax.common import errors, influence_config

HYGIENE = ("off", "report", "remove")
PERSPECTIVES = ("knowledge", "reasoning", "overall")
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
        errors.check("model.path", bool(self.path), "a model", self.path)
        errors.check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        errors.check("model.max_tokens", self.max_tokens >= 16, "at least 16", self.max_tokens)
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
            errors.check(
                f"data.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name)
            )
        for name in ("pool", "targets", "tests"):
            errors.check(
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
        errors.check(
            "difficulty.percentile", 0 <= self.percentile <= 100, "in [0, 100]", self.percentile
        )
        errors.check("difficulty.folds", self.folds >= 2, "at least 2", self.folds)
        for name in ("layers", "epochs"):
            errors.check(
                f"difficulty.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name)
            )
        for name in ("batch_size", "learning_rate", "max_tokens"):
            errors.check(
                f"difficulty.{name}", getattr(self, name) > 0, "above 0", getattr(self, name)
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
            errors.check(f"selection.{name}", 0 < value <= 1, "in (0, 1]", value)
        for name, least in (("shingle_words", 1), ("ngram_words", 1), ("boilerplate_texts", 2)):
            value = getattr(self, name)
            errors.check(f"selection.{name}", value >= least, f"at least {least}", value)
        ok = 0 <= self.paraphrase_similarity <= 1
        errors.check("selection.paraphrase_similarity", ok, "in [0, 1]", self.paraphrase_similarity)
        ok = sorted(self.quadrant_order.split(",")) == ["1", "2", "3", "4"]
        expected = "1, 2, 3 and 4 in some order, separated by commas"
        errors.check("selection.quadrant_order", ok, expected, self.quadrant_order)
        errors.check("selection.source_cap", 0 < self.source_cap <= 1, "in (0, 1]", self.source_cap)

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
            errors.check(
                f"finetune.{name}", getattr(self, name) >= 1, "at least 1", getattr(self, name)
            )
        for name in ("learning_rate", "alpha"):
            errors.check(
                f"finetune.{name}", getattr(self, name) > 0, "above 0", getattr(self, name)
            )
        for name in ("weight_decay", "clip_norm"):
            errors.check(
                f"finetune.{name}", getattr(self, name) >= 0, "at least 0", getattr(self, name)
            )
        errors.check("finetune.dropout", 0 <= self.dropout < 1, "in [0, 1)", self.dropout)
        errors.check(
            "finetune.warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)", self.warmup_ratio
        )
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
        errors.check(
            "evaluate.batch_tokens", self.batch_tokens >= 1, "at least 1", self.batch_tokens
        )
        ok = self.bootstrap_samples >= 100
        errors.check("evaluate.bootstrap_samples", ok, "at least 100", self.bootstrap_samples)


@dataclasses.dataclass(frozen=True)
class Parallel:
    # mesh: jit over a ("data", "model") mesh; pmap: data-parallel over local devices
    strategy: str = "mesh"
    data: int = 0  # devices along the batch; 0 = all that `model` leaves
    model: int = 1  # devices over which parameters are split

    def __post_init__(self):
        errors.check_choice("parallel.strategy", self.strategy, ("mesh", "pmap"))
        errors.check("parallel.data", self.data >= 0, "at least 0", self.data)
        errors.check("parallel.model", self.model >= 1, "at least 1", self.model)
        if self.strategy == "pmap" and self.model != 1:
            raise errors.UserError("parallel.model must be 1 with parallel.strategy=pmap.")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    difficulty: Difficulty
    influence: influence_config.Influence
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
                self.check_method(field, method)

    def check_method(self, field: str, method: str) -> None:
        """Raises UserError where a selection method's input would be missing: before hours of work,
        not after.
        """
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
