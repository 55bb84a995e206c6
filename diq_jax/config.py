"""The configuration of a run: every field once, and the stages it can change (fields.py).

A config file calls `default()`, sets fields, and returns the locked ConfigDict; `resolve` turns
that into the dataclasses. Flags override fields: `--config.selection.retention_ratio=0.01`.
"""

import dataclasses
import datetime
import functools
from collections.abc import Iterator
from typing import Any

import ml_collections

from diq_jax import (
    errors,
    evaluate_config,
    fields,
    finetune_config,
    influence_config,
    selection_config,
)
from diq_jax.fields import field

SAMPLE = "sample"  # the word for the shipped rows
PERSPECTIVES = ("knowledge", "reasoning", "overall")
COMPUTING = ("difficulty", "influence", "finetune", "dpo", "evaluate")  # stages that run the model
ENCODING = ("prepare", "dpo")  # stages that encode rows


@dataclasses.dataclass(frozen=True)
class BaseModel(fields.Section, section="model"):
    """Says which model is scored and trained, in which dtype."""

    path: str = field(
        "",
        "The base model: a hub id, a folder or a .gguf file, of this machine or a URL (gs://, "
        "s3://), or package:NAME/FILE. Its files are fingerprinted.",
        urls=True,
        decides=("report",),
    )
    dtype: str = field(
        "float32",
        "The dtype of parameters and activations.",
        choices=("float32", "bfloat16"),
        decides=COMPUTING,
    )
    max_tokens: int = field(
        8192,
        "The most tokens of an example, prompt and completion together.",
        fields.TOKENS._replace(least=16),
        decides=ENCODING,
    )
    truncation: str = field(
        "end",
        "What happens to longer examples: error stops, drop leaves them out, end cuts the end "
        "of the completion, prompt the start of the prompt.",
        choices=("error", "drop", "end", "prompt"),
        decides=ENCODING,
    )

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields a missing path."""
        yield not self.path, "model.path must be a model; got ''."


@dataclasses.dataclass(frozen=True)
class Data(fields.Section, section="data", decides=("prepare",)):
    """Says which rows are read, and how they are written as chats."""

    pool: str = field(
        SAMPLE,
        "The rows to choose from: a path, a glob, a URL (gs://, s3://, https://), several of "
        "them separated by commas, hub:NAME[:CONFIG[:SPLIT]], or sample.",
        urls=True,
    )
    pool_limit: int = field(0, "Reads only so many rows from the start; 0 = all.", fields.COUNT)
    targets: str = field(
        "",
        "The rows of the tasks that matter, whose mean gradient is the direction: as data.pool,"
        " or benchmark:NAME, benchmark:standard, challenging or all; empty = the sample's, with"
        " its pool.",
        urls=True,
    )
    targets_per_task: int = field(
        20, "How many targets of each task are drawn, with data.seed; 0 = all.", fields.COUNT
    )
    tests: str = field("", "Held-out rows of the same tasks, named as data.targets.", urls=True)
    tests_per_task: int = field(
        0, "How many tests of each task are drawn, with data.seed; 0 = all.", fields.COUNT
    )
    columns: str = field(
        "",
        "How the columns are named: a layout (data/layouts.py) such as messages, huatuo or "
        "alpaca, or question=A,reasoning=B,answer=C; empty = recognized from the columns.",
    )
    turns: str = field(
        "last",
        "Which answers of a conversation are scored: the last, or all.",
        choices=("last", "all"),
        decides=("prepare", "selection"),
    )
    template: str = field(
        "plain",
        "The layout of the completion: plain, huatuo, think, or a text with {reasoning} and "
        "{answer}.",
        decides=(*ENCODING, "selection"),
    )
    date: str = field(
        "2024-07-26",
        "The day, YYYY-MM-DD, that chat templates take for today, whenever they run; the "
        "default is Llama 3.1's own fallback.",
        decides=(*ENCODING, "evaluate"),
    )
    seed: int = field(0, "The seed of the draws of targets and tests.", fields.SEED)

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields a date or a pool that is none."""
        yield not _is_date(self.date), f"data.date must be a day as YYYY-MM-DD; got {self.date!r}."
        pool = "data.pool must be a path, glob, hub:NAME or sample; got ''."
        yield not self.pool.strip(), pool


@dataclasses.dataclass(frozen=True)
class Difficulty(fields.Section, section="difficulty", decides=("difficulty", "classifier")):
    """Says where levels of difficulty come from."""

    source: str = field(
        "",
        "Labelled rows to train on (path, glob, hub:NAME, sample), columns[:knowledge=A,...], or a "
        "folder made by train-classifier, whose encoder and max_tokens then count; empty = the "
        "sample's, with its pool.",
        urls=True,
    )
    encoder: str = field(
        "",
        "The BERT-type encoder to fine-tune: a hub id, a folder, its URL, or package:NAME/FOLDER.",
        urls=True,
        decides=("difficulty", "classifier", "selection"),
    )
    words: bool = field(
        False,
        "Adds TF-IDF features of words and pairs of words, fitted with the head on the frozen "
        "encoder.",
    )
    perspective: str = field(
        "overall",
        "The perspective that selection uses.",
        choices=PERSPECTIVES,
        decides=("selection",),
    )
    percentile: float = field(
        50.0,
        "tau_d: difficulty at or above this percentile of the pool is high.",
        fields.Span(0, 100),
        decides=("selection",),
    )
    folds: int = field(
        5,
        "The folds of the cross-validation; a labelled pool row is scored by the model that did"
        " not see it.",
        fields.Span(2, 1000),
    )
    layers: int = field(
        0,
        "How many layers of the encoder are used, from the bottom; 0 = all.",
        fields.Span(0, 1000),
    )
    epochs: int = field(
        5,
        "Epochs over the labelled rows, in which everything is trained; 0 = only heads, on the "
        "frozen encoder.",
        fields.or_none(fields.EPOCHS),
    )
    learning_rate: float = field(1e-4, "The peak learning rate of AdamW.", fields.POSITIVE)
    batch_size: int = field(16, "Rows of an optimizer step.", fields.BATCH)
    max_tokens: int = field(256, "The most tokens of an encoder input.", fields.Span(1, 2**16))
    seed: int = field(0, "The seed of folds, order and head.", fields.SEED)
    model_scores: bool = field(
        False,
        "Also computes loss, perplexity, IFD and similarity to the targets by the base model, "
        "in two forward passes, for the selection methods that sort by them.",
    )


@dataclasses.dataclass(frozen=True)
class Parallel(fields.Section, section="parallel"):
    """Says how work is spread over devices."""

    strategy: str = field(
        "mesh",
        "mesh: jit over a (data, model) mesh; pmap: data-parallel over local devices.",
        choices=("mesh", "pmap"),
    )
    data: int = field(
        0, "Devices along the batch; 0 = all that `model` leaves.", fields.or_none(fields.DEVICES)
    )
    model: int = field(1, "Devices over which parameters are split.", fields.DEVICES)
    fsdp: str = field(
        "auto",
        "Splits matrices over the data axis as well (fully sharded data parallelism): auto = where "
        "a device would fill a quarter of its memory with parameters.",
        choices=("auto", "on", "off"),
    )
    distributed: bool = field(
        False, "Several processes work as one, each with its devices (the page Pods and clusters)."
    )

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields what pmap cannot do."""
        pmap = self.strategy == "pmap"
        yield (pmap and self.model != 1, "parallel.model must be 1 with parallel.strategy=pmap.")
        yield pmap and self.distributed, "parallel.distributed needs parallel.strategy=mesh."
        yield pmap and self.fsdp == "on", "parallel.fsdp=on needs parallel.strategy=mesh."


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds a checked section for each part of a run."""

    model: BaseModel
    data: Data
    difficulty: Difficulty
    influence: influence_config.Influence
    selection: selection_config.Selection
    finetune: finetune_config.Finetune
    evaluate: evaluate_config.Evaluate
    parallel: Parallel

    def __post_init__(self) -> None:
        if self.selection.paraphrase_similarity > 0 and not self.difficulty.encoder:
            raise errors.UserError(
                "selection.paraphrase_similarity needs an encoder: set difficulty.encoder, or 0."
            )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def default() -> ml_collections.ConfigDict:
    """Returns every field with its default, locked; model.path has none."""
    return ml_collections.ConfigDict(fields.defaults(Config)).lock()


def field_names() -> list[str]:
    """Lists the dotted name of every field, sections aside."""
    return [name for name, _, _ in fields.walk(Config)]


def decided_by(stage: str) -> frozenset[str]:
    """Returns the fields that can change a stage's result."""
    return fields.decided_by(Config, stage)


def describe(section: str = "") -> str:
    """Describes the fields of a section, or all, for --help; UserError for an unknown section."""
    return fields.describe(Config, section)


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Returns the checked, frozen form of a config.

    Raises:
        UserError: a field that does not exist (with the nearest that does), of the wrong type, out
            of range, or at odds with another.
    """
    return from_dict(config.to_dict())


def from_dict(values: dict[str, Any]) -> Config:
    """As `resolve`, of a config that was read from a stage.json."""
    return _with_sample(fields.build(Config, values))


def _with_sample(cfg: Config) -> Config:
    """Fills in the shipped targets, tests and labels not named, for the shipped pool alone."""
    if cfg.data.pool.strip() != SAMPLE:
        return cfg
    data, source = cfg.data, cfg.difficulty.source or SAMPLE
    data = dataclasses.replace(data, targets=data.targets or SAMPLE, tests=data.tests or SAMPLE)
    difficulty = dataclasses.replace(cfg.difficulty, source=source)
    return dataclasses.replace(cfg, data=data, difficulty=difficulty)


def check_form(values: dict[str, Any]) -> None:
    """Raises UserError where the fields or their types are not those of `default()`."""
    typed = fields.typed(Config, values)
    for name in field_names():
        *sections, field = name.split(".")
        if field not in functools.reduce(dict.__getitem__, sections, typed):
            raise errors.UserError(f"config field {name} is missing: begin with config.default().")
