"""The section `finetune` of the configuration (config.py), and its own section `dpo`."""

import dataclasses
from collections.abc import Iterator

from diq_jax import errors, limits


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation (arXiv 2305.18290) of the adapter, after fine-tuning.

    weight_decay, clip_norm, remat and checkpoint_every_steps are finetune's; there is no dropout,
    so that the policy and its reference are compared as they are.
    """

    # preference rows (path, glob, several by commas, hub:NAME[:CONFIG[:SPLIT]]); "" = no DPO
    data: str = ""
    limit: int = 0  # the first so many rows; 0 = all
    # sft: begin at the selected rows' adapter; base: at a fresh one. The reference is the beginning
    start: str = "sft"
    beta: float = 0.1  # how dear it is to leave the reference
    label_smoothing: float = 0.0  # the share of preferences taken to be the wrong way round
    epochs: int = 1  # over the pairs
    learning_rate: float = 5e-6  # AdamW's peak, after warm-up, before the cosine
    warmup_ratio: float = 0.1  # of all steps
    batch_size: int = 8  # pairs an optimiser step
    accumulation_steps: int = 1  # microbatches an optimiser step; must divide batch_size
    seed: int = 0  # of the order, and of A where start=base

    def __post_init__(self):
        errors.check_choice("finetune.dpo.start", self.start, ("sft", "base"))
        errors.check_ranges("finetune.dpo", self, limit=limits.COUNT, beta=limits.POSITIVE)
        ok = 0 <= self.label_smoothing < 0.5
        errors.check("finetune.dpo.label_smoothing", ok, "in [0, 0.5)", self.label_smoothing)
        check_steps("finetune.dpo", self)


@dataclasses.dataclass(frozen=True)
class Finetune:
    # also train on as many rows by these selection methods, comma-separated; "" = none
    baselines: str = "random"
    # what is trained: lora, all, or a regex over parameter paths (float32 masters, whatever
    # model.dtype is)
    parameters: str = "lora"
    rank: int = 8  # LoRA rank
    alpha: float = 16.0  # LoRA scale is alpha / rank
    dropout: float = 0.0  # on the adapter's input
    targets: str = "(q|k|v)_proj"  # regex over the model's linear layers
    learning_rate: float = 1e-4  # AdamW's peak, after warm-up, before the cosine
    warmup_ratio: float = 0.1  # of all steps
    weight_decay: float = 0.0  # AdamW
    clip_norm: float = 1.0  # of the global gradient; 0 = no clipping
    epochs: int = 3  # over the subset
    max_steps: int = 0  # train so many optimiser steps, whatever epochs says; 0 = by epochs
    batch_size: int = 8  # examples an optimiser step
    accumulation_steps: int = 1  # microbatches an optimiser step; must divide batch_size
    packing: bool = False  # several examples in a row, told apart by segment ids
    remat: bool = False  # recompute each layer in the backward pass: less memory, a third more time
    checkpoint_every_steps: int = 10  # train state on disk; a killed run continues from it
    # the targets' mean loss so often and at the end; the best state is kept; 0 = never
    eval_every_steps: int = 0
    tensorboard: bool = False  # curves as event files too (pip install -e '.[tensorboard]')
    seed: int = 0  # of order, A and dropout
    dpo: Dpo = dataclasses.field(default_factory=Dpo)

    def __post_init__(self):
        errors.check_ranges(
            "finetune",
            self,
            rank=limits.RANK,
            alpha=limits.POSITIVE,
            weight_decay=(0, limits.POSITIVE[1]),
            clip_norm=(0, limits.POSITIVE[1]),
            max_steps=limits.COUNT,
            checkpoint_every_steps=(1, limits.COUNT[1]),
            eval_every_steps=limits.COUNT,
        )
        errors.check("finetune.parameters", bool(self.parameters), "lora, all or a regex", "")
        for name in ("parameters", "targets"):
            errors.check_regex(f"finetune.{name}", getattr(self, name))
        errors.check("finetune.dropout", 0 <= self.dropout < 1, "in [0, 1)", self.dropout)
        check_steps("finetune", self)
        for wrong, sentence in self._conflicts():
            if wrong:
                raise errors.UserError(sentence)

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.dropout > 0 and not self.trains_adapter,
            "finetune.dropout is on an adapter's input; with finetune.parameters="
            f"{self.parameters} there is none: set it to 0.",
        )
        yield (
            bool(self.dpo.data) and not self.trains_adapter,
            "finetune.dpo trains an adapter: it needs finetune.parameters=lora; got "
            f"{self.parameters}.",
        )

    @property
    def baseline_methods(self) -> tuple[str, ...]:
        return tuple(m.strip() for m in self.baselines.split(",") if m.strip())

    @property
    def trains_adapter(self) -> bool:
        """Whether LoRA factors are trained, or else parameters themselves."""
        return self.parameters == "lora"


def check_steps(field: str, settings: Dpo | Finetune) -> None:
    """The fields by which both sections cut their rows into optimiser steps."""
    errors.check_ranges(
        field,
        settings,
        epochs=limits.EPOCHS,
        learning_rate=limits.POSITIVE,
        batch_size=limits.BATCH,
        accumulation_steps=limits.BATCH,
        seed=limits.SEED,
    )
    ratio = settings.warmup_ratio
    errors.check(f"{field}.warmup_ratio", 0 <= ratio < 1, "in [0, 1)", ratio)
    if settings.batch_size % settings.accumulation_steps:
        raise errors.UserError(
            f"{field}.accumulation_steps must divide batch_size {settings.batch_size}, "
            f"got {settings.accumulation_steps}."
        )
