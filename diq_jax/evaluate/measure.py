"""Evaluation as one verb: a model's weights and what is asked of it give a value for each row.

The stage `evaluate` and the studies measure by it alike. What is asked is a `Likelihoods` (of
targets, or of multiple-choice questions) or a generation.Answers. Each is made once, with its
compiled program, and serves every model of the same shape.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diq_jax import errors
from diq_jax.data import batches, example
from diq_jax.evaluate import options
from diq_jax.models import config as model_config
from diq_jax.models import loss
from diq_jax.run import devices, parts, progress

MAX_SHAPES = 4  # batch shapes of the targets, and of the tests: each is a compilation

Weights = tuple[dict, dict | None]  # parameters and an adapter, placed
Columns = dict[str, Any]  # a value for each row, by column


def measure(
    model: str,
    weights: Weights,
    asked: Sequence[Any],
    folder: pathlib.Path | None = None,
    bar: progress.Progress | None = None,
) -> dict[str, Columns]:
    """Measures a model.

    Args:
        model: its name, for messages.
        weights: of the shape that `asked` was compiled for.
        asked: each has a name, rows, run(model, weights, rows that are done) -> batches of (rows,
            columns), and tokens(rows, their columns); see Likelihoods.
        folder: where finished batches are kept (run/parts.py), so that a killed run goes on after
            the last one; if None nowhere.
        bar: told of each batch.

    Returns:
        {name of what was asked: the columns of all its rows, in order}.

    Raises:
        UserError: a likelihood is not finite, naming the model and the example.
    """
    found = {}
    for part in asked:
        kept = parts.Parts(folder / part.name) if folder else parts.Memory()
        for rows, columns in part.run(model, weights, kept.done):
            kept.add(rows, columns)
            if bar is not None:
                bar.update(len(rows), part.tokens(rows, columns), model=model)
        found[part.name] = kept.columns()
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihoods:
    """Rows of known tokens, scored a batch at a time.

    Attributes:
        score: compiled (params, adapter, batch) -> an output for each row (B, ...).
        pack: (rows, B, T, A) -> a numpy batch.
        values: (a row, its output) -> {column: its value}.
    """

    name: str
    rows: list[example.Encoded]
    groups: list[batches.Group]
    placement: devices.Placement
    score: Callable[..., jax.Array]
    pack: Callable[..., batches.Batch]
    values: Callable[[int, np.ndarray], dict[str, Any]]

    def tokens(self, rows: Sequence[int], columns: Columns) -> int:
        """Counts the tokens read for rows."""
        return sum(len(self.rows[i].input_ids) for i in rows)

    def run(
        self, model: str, weights: Weights, done: Collection[int]
    ) -> Iterator[tuple[list[int], Columns]]:
        """Scores the rows that are not done; yields a batch's rows and their values."""

        def dispatched():
            for group in self.groups:
                if not all(i in done for i in group.indices):
                    batch = self.pack(group.indices, group.rows, group.tokens, group.answers)
                    yield group, self.score(*weights, self.placement.batch(batch))

        for group, output in devices.one_behind(dispatched()):
            output = np.asarray(output)
            new = {i: output[k] for k, i in enumerate(group.indices) if i not in done}
            values = [self._finite(model, i, self.values(i, row)) for i, row in new.items()]
            yield list(new), {name: [of[name] for of in values] for name in values[0]}

    def _finite(self, model, row, values):
        if not np.all(np.isfinite(np.hstack(list(values.values())))):
            raise errors.UserError(
                f"evaluate: model {model!r} gives {self.name} {self.rows[row].example_id!r} a "
                f"likelihood that is not finite ({values}); check the weights, the fine-tuning "
                "(finetune/losses.jsonl) and model.dtype."
            )
        return values


def ask(
    targets: Sequence[example.Encoded],
    questions: Sequence[options.Question],
    cfg: model_config.DecoderConfig,
    placement: devices.Placement,
    batch_tokens: int,
) -> tuple[Likelihoods, Likelihoods]:
    """Makes what is asked of every model, each with its compiled program.

    Returns:
        `target`, with the column loss, and `question`, with log_likelihoods and
        letter_log_likelihoods (of each option) and loss (of the right one); see options.scores and
        options.letter_scores.
    """
    questions = options.as_read_by(questions, cfg)

    # A target's loss is the very function that the influence direction differentiates.
    def target_losses(params, adapter, batch):
        return loss.example_losses(params, cfg, batch, "mean", adapter)

    def option_losses(params, adapter, batch):
        return loss.token_losses(params, cfg, batch, adapter)

    def question_values(i, output):
        sums, right = options.scores(questions[i], output)
        letters = options.letter_scores(questions[i], output)
        return {
            "log_likelihoods": sums.tolist(),
            "letter_log_likelihoods": letters.tolist(),
            "loss": right,
        }

    def make(name, rows, score, pack, values):
        groups = batches.plan(rows, batch_tokens, placement.rows_multiple, MAX_SHAPES)
        compiled = placement.compile(score, rows=True)
        return Likelihoods(name, rows, groups, placement, compiled, pack, values)

    return (
        make(
            "target", list(targets), target_losses,
            lambda rows, *shape: batches.make_batch([targets[i] for i in rows], *shape),
            lambda _, output: {"loss": float(output)},
        ),
        make(
            "question", [question.row for question in questions], option_losses,
            lambda rows, *shape: options.pack([questions[i] for i in rows], *shape),
            question_values,
        ),
    )  # fmt: skip
