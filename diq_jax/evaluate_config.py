"""The section `evaluate` of the configuration (config.py)."""

import dataclasses
from collections.abc import Iterator

from diq_jax import errors, fields
from diq_jax.fields import field


@dataclasses.dataclass(frozen=True)
class Evaluate(fields.Section, section="evaluate", decides=("evaluate",)):
    """Says how models are measured on data.tests."""

    batch_tokens: int = field(
        4096,
        "Tokens of one evaluation batch on each of the devices that share it (parallel.data), "
        "answers included.",
        fields.TOKENS,
        harmless=True,
    )
    bootstrap_samples: int = field(
        2000, "Resamplings of every 95 % interval.", fields.Span(100, 100_000)
    )
    seed: int = field(0, "The seed of the bootstrap, and of drawn answers.", fields.SEED)
    protocol: str = field(
        "options",
        "What an answer is: the likeliest option, or the letter read off what the model writes "
        "step by step.",
        choices=("options", "generate"),
    )
    max_new_tokens: int = field(
        512, "The most tokens of a generated answer.", fields.Span(1, 2**20)
    )
    temperature: float = field(
        0.0, "The temperature of generated answers; 0 = the likeliest token.", fields.Span(0, 100)
    )
    top_p: float = field(
        1.0,
        "Draws from the fewest likeliest tokens that have this probability together.",
        fields.SHARE,
    )
    samples: int = field(
        1,
        "How many answers each question gets, of which the majority counts.",
        fields.Span(1, 1000),
    )
    stop: str = field("", "Texts that end an answer, separated by |, beside the end of the turn.")
    groups: str = field(
        "AvgS=medqa+medmcqa+mmlu_med;AvgC=pubmedqa+mmlu_pro_health+medbullets_op4+medbullets_op5"
        "+medxpertqa+hle_biomed;AvgA=AvgS+AvgC",
        "Accuracies averaged over tasks of the tests, each weighing the same: NAME=TASK+TASK, "
        "separated by ;, where a TASK may be a group before it; empty = none. These nine names are "
        "ours: of the paper it is known that three are standard and six challenging, not which.",
    )

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields settings of generation that exclude each other."""
        yield (  # logits are divided by it
            0 < self.temperature < 0.001,
            f"evaluate.temperature must be 0 or at least 0.001; got {self.temperature!r}.",
        )
        yield (
            self.samples > 1 and self.temperature == 0,
            f"evaluate.samples={self.samples} draws different answers: evaluate.temperature "
            "must be above 0.",
        )
        parse_groups(self.groups)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Returns the texts that end an answer."""
        return tuple(filter(None, self.stop.split("|")))

    @property
    def group_tasks(self) -> dict[str, tuple[str, ...]]:
        """Returns {group: its tasks}, in order."""
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
