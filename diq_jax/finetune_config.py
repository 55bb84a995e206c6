"""The section `finetune` of the configuration (config.py), and its own section `dpo`."""

import dataclasses
from collections.abc import Iterator

from diq_jax import fields
from diq_jax.fields import field

BOTH = ("finetune", "dpo")
RATIO = fields.Span(0, 1, below=True)


class Steps(fields.Section, section="finetune"):
    """Cuts the rows of a section into optimizer steps."""

    batch_size: int
    accumulation_steps: int

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields a batch that does not split into its microbatches."""
        yield (
            self.batch_size % self.accumulation_steps > 0,
            f"{self.section}.accumulation_steps must divide batch_size {self.batch_size}, got "
            f"{self.accumulation_steps}.",
        )


@dataclasses.dataclass(frozen=True)
class Dpo(Steps, section="finetune.dpo", decides=("dpo",)):
    """Trains the adapter on by direct preference optimization (arXiv 2305.18290).

    weight_decay, clip_norm, remat and checkpoint_every_steps are finetune's; there is no dropout,
    so that the policy and its reference are compared as they are.
    """

    data: str = field(
        "",
        "Preference rows (path, glob, URL, several by commas, hub:NAME[:CONFIG[:SPLIT]]); empty = "
        "no DPO.",
        urls=True,
        decides=("dpo", "evaluate"),
    )
    limit: int = field(0, "Reads only so many rows from the start; 0 = all.", fields.COUNT)
    start: str = field(
        "sft",
        "Begins at the adapter of the selected rows (sft), or at a fresh one of the base model "
        "(base); the reference is where it begins.",
        choices=("sft", "base"),
    )
    beta: float = field(0.1, "How strongly the policy is held to the reference.", fields.POSITIVE)
    epochs: int = field(1, "Epochs over the pairs.", fields.EPOCHS)
    learning_rate: float = field(
        5e-6,
        "The peak learning rate of AdamW, after the warm-up and before the cosine.",
        fields.POSITIVE,
    )
    warmup_ratio: float = field(0.1, "The share of all steps that the linear warm-up takes.", RATIO)
    batch_size: int = field(8, "Pairs of an optimizer step.", fields.BATCH)
    accumulation_steps: int = field(
        1, "Microbatches of an optimizer step; must divide batch_size.", fields.BATCH
    )
    seed: int = field(0, "The seed of the order, and of A where start=base.", fields.SEED)


@dataclasses.dataclass(frozen=True)
class Finetune(Steps, section="finetune", decides=("finetune",)):
    """Says what is trained on the selected rows, and how."""

    baselines: str = field(
        "random",
        "Also trains on as many rows by these selection methods, separated by commas; empty = "
        "none.",
        decides=("finetune", "evaluate"),
    )
    parameters: str = field(
        "lora",
        "What is trained: lora, all, or a regex over parameter paths (float32 masters, whatever "
        "model.dtype is).",
        regex=True,
        decides=("finetune", "evaluate"),
    )
    rank: int = field(8, "The rank of the LoRA adapter.", fields.RANK, decides=BOTH)
    alpha: float = field(
        16.0, "The adapter is scaled by alpha / rank.", fields.POSITIVE, decides=BOTH
    )
    dropout: float = field(0.0, "The dropout on the adapter's input.", RATIO)
    targets: str = field(
        "(q|k|v)_proj",
        "The linear layers that get an adapter, by their paths.",
        regex=True,
        decides=BOTH,
    )
    learning_rate: float = field(
        1e-4,
        "The peak learning rate of AdamW, after the warm-up and before the cosine.",
        fields.POSITIVE,
    )
    warmup_ratio: float = field(0.1, "The share of all steps that the linear warm-up takes.", RATIO)
    weight_decay: float = field(
        0.0, "The weight decay of AdamW.", fields.Span(0, fields.POSITIVE.most), decides=BOTH
    )
    clip_norm: float = field(
        1.0,
        "The largest global norm of the gradient; 0 = no clipping.",
        fields.Span(0, fields.POSITIVE.most),
        decides=BOTH,
    )
    epochs: int = field(3, "Epochs over the subset.", fields.EPOCHS)
    max_steps: int = field(
        0, "Trains so many optimizer steps, whatever epochs says; 0 = by epochs.", fields.COUNT
    )
    batch_size: int = field(8, "Examples of an optimizer step.", fields.BATCH)
    accumulation_steps: int = field(
        1, "Microbatches of an optimizer step; must divide batch_size.", fields.BATCH
    )
    packing: bool = field(False, "Puts several examples in a row, told apart by segment ids.")
    remat: bool = field(
        False,
        "Recomputes each layer in the backward pass: less memory, a third more time.",
        harmless=True,
    )
    checkpoint_every_steps: int = field(
        10,
        "Writes the train state after so many steps; a killed run continues from it.",
        fields.AT_LEAST_ONE,
        harmless=True,
    )
    eval_every_steps: int = field(
        0,
        "Takes the targets' mean loss after so many steps and at the end, and keeps the best "
        "state; 0 = never.",
        fields.COUNT,
    )
    tensorboard: bool = field(
        False,
        "Also writes the curves as event files (pip install -e '.[tensorboard]').",
        harmless=True,
    )
    seed: int = field(0, "The seed of the order, of A and of dropout.", fields.SEED)
    dpo: Dpo = dataclasses.field(default_factory=Dpo)

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields what needs an adapter where none is trained."""
        yield from super().conflicts()
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
        """Returns the methods whose selections are trained on as well."""
        return tuple(m.strip() for m in self.baselines.split(",") if m.strip())

    @property
    def trains_adapter(self) -> bool:
        """Tells whether LoRA factors are trained, and not parameters themselves."""
        return self.parameters == "lora"
