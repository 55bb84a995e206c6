"""The configuration of a run: one frozen dataclass for each section, every field explained where it
stands.

A config file calls `default()`, sets fields, and returns the locked ConfigDict; `resolve` turns
that into the dataclasses, which check ranges and combinations. Flags override fields:
`--config.selection.retention_ratio=0.01`.
"""

import dataclasses
import datetime
import functools
import math
from collections.abc import Iterator
from typing import Any

import ml_collections

from diq_jax import errors, finetune_config, influence_config, limits

HYGIENE = ("off", "report", "remove")
SAMPLE = "sample"  # the word for the shipped rows
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
    path: str = ""  # hub id, local folder, a .gguf file, or package:NAME/FILE
    dtype: str = "float32"  # of parameters and activations: float32 or bfloat16
    max_tokens: int = 8192  # longest example, prompt and completion together
    # longer ones: error, drop, end (cut the completion), prompt (cut the prompt's start)
    truncation: str = "end"

    def __post_init__(self):
        errors.check("model.path", bool(self.path), "a model", self.path)
        errors.check_choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        errors.check_ranges("model", self, max_tokens=(16, limits.TOKENS[1]))
        errors.check_choice("model.truncation", self.truncation, ("error", "drop", "end", "prompt"))


@dataclasses.dataclass(frozen=True)
class Data:
    pool: str = SAMPLE  # path, glob, several by commas, hub:NAME[:CONFIG[:SPLIT]], or sample
    pool_limit: int = 0  # the first so many rows; 0 = all
    # rows of the tasks that matter: their mean gradient is the direction; also benchmark:NAME, or
    # benchmark:standard, challenging or all (data/benchmarks.py); "" = the sample's, with its pool
    targets: str = ""
    targets_per_task: int = 20  # drawn with the seed; 0 = all
    tests: str = ""  # held-out rows of the same tasks; as for targets
    tests_per_task: int = 0  # drawn with the seed; 0 = all
    # huatuo, m23k, medreason, finemed, or question=A,reasoning=B,answer=C; "" = our names
    columns: str = ""
    # the completion: plain, huatuo, think, or a text with {reasoning} and {answer}
    template: str = "plain"
    # YYYY-MM-DD: the day that chat templates take for today, whenever they run; Llama 3.1's own
    # fallback
    date: str = "2024-07-26"
    seed: int = 0  # of the draws above

    def __post_init__(self):
        counts = dict.fromkeys(("pool_limit", "targets_per_task", "tests_per_task"), limits.COUNT)
        errors.check_ranges("data", self, **counts, seed=limits.SEED)
        errors.check("data.date", _is_date(self.date), "a day as YYYY-MM-DD", self.date)
        errors.check("data.pool", bool(self.pool.strip()), "a path, glob, hub:NAME or sample", "")


@dataclasses.dataclass(frozen=True)
class Difficulty:
    # labelled rows to train on (path, glob, hub:NAME, sample), columns[:knowledge=A,...], "" = the
    # sample's, with its pool, or a
    # folder by experiments/train_difficulty.py, whose encoder, max_tokens and head then count
    source: str = ""
    encoder: str = ""  # the BERT-type encoder to fine-tune: hub id, folder or package:NAME/FOLDER
    # also TF-IDF of words and pairs of words, fitted with the head on the frozen encoder
    words: bool = False
    head: str = "categorical"  # categorical (a softmax over levels) or ordinal (proportional odds)
    class_weights: str = "none"  # none, or balanced: each level weighs the same in the training
    perspective: str = "overall"  # knowledge, reasoning or overall: the one that selection uses
    percentile: float = 50.0  # tau_d: difficulty at or above this percentile of the pool is high
    # of the cross-validation; a labelled pool row is scored by the model that did not see it
    folds: int = 5
    layers: int = 0  # of the encoder, from the bottom; 0 = all
    # Over the labelled rows, everything trained; 0 = heads on the frozen encoder only.
    epochs: int = 5
    learning_rate: float = 1e-4  # AdamW's peak
    # of the learning rate from each layer to the one below it, the heads standing on top; 1 = none
    layer_decay: float = 1.0
    # epochs without a better loss on a held-out tenth of the training rows, after which training
    # stops; the best epoch is kept; 0 = no row is held out and all epochs run
    patience: int = 0
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
        errors.check_choice("difficulty.head", self.head, ("categorical", "ordinal"))
        errors.check_choice("difficulty.class_weights", self.class_weights, ("none", "balanced"))
        ok = 0 < self.layer_decay <= 1
        errors.check("difficulty.layer_decay", ok, "in (0, 1]", self.layer_decay)
        errors.check_ranges(
            "difficulty",
            self,
            folds=(2, 1000),
            layers=(0, 1000),
            epochs=limits.or_none(limits.EPOCHS),
            patience=limits.or_none(limits.EPOCHS),
            learning_rate=limits.POSITIVE,
            batch_size=limits.BATCH,
            max_tokens=(1, 2**16),
            seed=limits.SEED,
        )
        if self.patience and not self.epochs:
            raise errors.UserError("difficulty.patience needs difficulty.epochs above 0.")


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
        errors.check_ranges(
            "selection",
            self,
            seed=limits.SEED,
            shingle_words=(1, 1000),
            ngram_words=(1, 1000),
            boilerplate_texts=(2, limits.COUNT[1]),
        )
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
class Evaluate:
    batch_tokens: int = 4096  # tokens of one evaluation batch on all devices, answers included
    bootstrap_samples: int = 2000  # of every 95 % interval
    seed: int = 0  # of the bootstrap, and of drawn answers
    # what accuracy is of: options (the likeliest option) or generate (the model thinks step by step
    # and its answer is read off the text)
    protocol: str = "options"
    max_new_tokens: int = 512  # of a generated answer
    temperature: float = 0.0  # of generated answers; 0 = the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens that have this probability together
    samples: int = 1  # answers to each question, of which the majority counts
    stop: str = ""  # texts that end an answer, separated by |, beside the end of the turn
    # accuracies averaged over tasks of the tests, each weighing the same: NAME=TASK+TASK, separated
    # by ;, where a TASK may be a group before it; "" = none. These nine names are ours: of the
    # paper it is known that three are standard and six challenging, not which
    groups: str = (
        "AvgS=medqa+medmcqa+mmlu_med;AvgC=pubmedqa+mmlu_pro_health+medbullets_op4+medbullets_op5"
        "+medxpertqa+hle_biomed;AvgA=AvgS+AvgC"
    )

    def __post_init__(self):
        errors.check_ranges(
            "evaluate",
            self,
            batch_tokens=limits.TOKENS,
            bootstrap_samples=(100, 100_000),
            seed=limits.SEED,
            max_new_tokens=(1, 2**20),
            temperature=(0, 100),
            samples=(1, 1000),
        )
        errors.check_choice("evaluate.protocol", self.protocol, ("options", "generate"))
        ok = self.temperature == 0 or self.temperature >= 0.001  # logits are divided by it
        errors.check("evaluate.temperature", ok, "0 or at least 0.001", self.temperature)
        errors.check("evaluate.top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p)
        parse_groups(self.groups)
        if self.samples > 1 and self.temperature == 0:
            raise errors.UserError(
                f"evaluate.samples={self.samples} draws different answers: evaluate.temperature "
                "must be above 0."
            )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(filter(None, self.stop.split("|")))

    @property
    def group_tasks(self) -> dict[str, tuple[str, ...]]:
        """{group: its tasks}, in order."""
        return parse_groups(self.groups)


def parse_groups(text: str) -> dict[str, tuple[str, ...]]:
    """Reads evaluate.groups: {group: its tasks}.

    Raises:
        UserError: it is not written as it must be, or a name stands twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, members = (piece.strip() for piece in part.partition("="))
        named = [task.strip() for task in members.split("+")]
        tasks = [task for member in named for task in found.get(member, (member,))]
        if not (name and all(tasks)) or name in found or len(set(tasks)) < len(tasks):
            raise errors.UserError(
                "evaluate.groups must be like AvgS=medqa+medmcqa;AvgC=medxpertqa, without a name "
                f"that stands twice; got {part!r}."
            )
        found[name] = tuple(tasks)
    return found


@dataclasses.dataclass(frozen=True)
class Parallel:
    # mesh: jit over a ("data", "model") mesh; pmap: data-parallel over local devices
    strategy: str = "mesh"
    data: int = 0  # devices along the batch; 0 = all that `model` leaves
    model: int = 1  # devices over which parameters are split
    # several processes score as one, each with its devices (run_diq.py; README, Several hosts)
    distributed: bool = False

    def __post_init__(self):
        errors.check_choice("parallel.strategy", self.strategy, ("mesh", "pmap"))
        devices = {"data": limits.or_none(limits.DEVICES), "model": limits.DEVICES}
        errors.check_ranges("parallel", self, **devices)
        if self.strategy == "pmap" and self.model != 1:
            raise errors.UserError("parallel.model must be 1 with parallel.strategy=pmap.")
        if self.strategy == "pmap" and self.distributed:
            raise errors.UserError("parallel.distributed needs parallel.strategy=mesh.")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    difficulty: Difficulty
    influence: influence_config.Influence
    selection: Selection
    finetune: finetune_config.Finetune
    evaluate: Evaluate
    parallel: Parallel

    def __post_init__(self):
        if self.selection.paraphrase_similarity > 0 and not self.difficulty.encoder:
            raise errors.UserError(
                "selection.paraphrase_similarity needs an encoder: set difficulty.encoder, or 0."
            )
        for method in self.finetune.baseline_methods:
            errors.check_choice("finetune.baselines", method, METHODS)
        for field, method in self.methods():
            self.check_method(field, method)

    def methods(self) -> list[tuple[str, str]]:
        """(field, method) of every selection method that is asked for."""
        baselines = [("finetune.baselines", method) for method in self.finetune.baseline_methods]
        return [("selection.method", self.selection.method), *baselines]

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


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


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
    return from_dict(config.to_dict())


def from_dict(values: dict[str, Any]) -> Config:
    """As `resolve`, of a config that was read from a stage.json."""
    return _with_sample(_build(Config, _typed(Config, values, "")))


def _with_sample(cfg: Config) -> Config:
    """The shipped targets, tests and labels where nothing is named, for the shipped pool alone."""
    if cfg.data.pool.strip() != SAMPLE:
        return cfg
    data, source = cfg.data, cfg.difficulty.source or SAMPLE
    data = dataclasses.replace(data, targets=data.targets or SAMPLE, tests=data.tests or SAMPLE)
    difficulty = dataclasses.replace(cfg.difficulty, source=source)
    return dataclasses.replace(cfg, data=data, difficulty=difficulty)


def check_form(values: dict[str, Any]) -> None:
    """Raises UserError where the fields or their types are not those of `default()`."""
    typed = _typed(Config, values, "")
    for name in field_names():
        *sections, field = name.split(".")
        if field not in functools.reduce(dict.__getitem__, sections, typed):
            raise errors.UserError(f"config field {name} is missing: begin with config.default().")


def _typed(cls, values: Any, prefix: str) -> dict[str, Any]:
    """The values of a section, whole numbers converted where a field is real."""
    if not isinstance(values, dict):
        raise errors.UserError(f"config field {prefix[:-1]} must be a section with fields.")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise errors.UserError(
                f"config field {prefix}{name} does not exist.{errors.nearest(str(name), fields)}"
            )
    found = {}
    for name, kind in fields.items():
        where = f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            found[name] = _typed(kind, values.get(name), f"{where}.")
        elif name in values:
            found[name] = _typed_value(kind, values[name], where)
    return found


def _typed_value(kind: type, value: Any, where: str) -> Any:
    if type(value) is int and abs(value) >= 2**63:  # too long to convert, even to print
        raise errors.UserError(f"{where} must be a number below 2**63 in size.")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise errors.UserError(f"{where} must be of type {kind.__name__}; got {value!r}.")
    if kind is float and not math.isfinite(value):
        raise errors.UserError(f"{where} must be finite; got {value}.")
    return value


def _build(cls, values: dict[str, Any]):
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    arguments = {
        name: _build(kinds[name], value) if dataclasses.is_dataclass(kinds[name]) else value
        for name, value in values.items()
    }
    return cls(**arguments)
