"""Multiple-choice questions, one row each: the prompt is read once for all its options.

A row is prompt + option A + option B + ...: the prompt is segment 1, the options are segments 2, 3,
... whose parent is the prompt, so that an option sees the prompt and itself. Positions of each
option begin where the prompt ends, as if it stood there alone. A model that carries a state from
token to token (delta.py) reads the prompt again for each option, in a segment of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diq_jax import errors
from diq_jax.data import batches, example
from diq_jax.models import config as model_config

PROMPT_SEGMENT = 1  # as batches.make_batch has it
NO_PARENT = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """Holds a question as token ids.

    Attributes:
        prompt_ids: (P,) int32, at least one.
        letters: the options' names.
        option_ids: for each option, int32, at least one.
        answer: index of the right option.
        end_ids: what ends a turn; it follows every option. Likelihoods leave it out, since they
            compare the answers; the right answer's loss has it, as the target loss does.
    """

    example_id: str
    task: str
    prompt_ids: np.ndarray
    letters: tuple[str, ...]
    option_ids: tuple[np.ndarray, ...]
    answer: int
    end_ids: tuple[int, ...] = ()
    shared: bool = True  # the options read the prompt once

    @property
    def lengths(self) -> np.ndarray:
        """Counts the tokens of each option, its end aside."""
        return np.array([len(ids) for ids in self.option_ids])

    @property
    def starts(self) -> np.ndarray:
        """Returns where each option begins among the scored tokens of the row."""
        spans = self.lengths + len(self.end_ids)
        return np.cumsum(spans) - spans

    @property
    def row(self) -> example.Encoded:
        """Joins prompt and options one after another, each with its end; the options are scored."""
        end, tokens, labels = np.array(self.end_ids, np.int32), [], []
        for i, ids in enumerate(self.option_ids):
            prompt = self.prompt_ids[:0] if i and self.shared else self.prompt_ids
            tokens += [prompt, ids, end]
            labels += [np.full_like(prompt, example.IGNORED), ids, end]
        return example.Encoded(self.example_id, np.concatenate(tokens), np.concatenate(labels))


def as_read_by(questions: Sequence[Question], cfg: model_config.DecoderConfig) -> list[Question]:
    """Returns the questions as `cfg` reads them: with delta layers the prompt once an option."""
    return [dataclasses.replace(question, shared=cfg.delta is None) for question in questions]


COLUMNS = ("example_id", "task", "prompt_ids", "options", "option_ids", "answer", "end_ids")


def from_table(table: pa.Table, where: str) -> list[Question]:
    """Reads the questions of prepare/tests.parquet.

    Raises:
        UserError: an empty prompt or option, or an answer that is no option; `where` is the file.
    """
    questions = []
    for row in table.to_pylist():
        options = tuple(np.asarray(ids, np.int32) for ids in row["option_ids"])
        prompt = np.asarray(row["prompt_ids"], np.int32)
        name = f"{where}: question {row['example_id']!r}"
        if not len(prompt) or not options or not all(len(ids) for ids in options):
            raise errors.UserError(f"{name} must have tokens in its prompt and in every option.")
        if not (len(row["options"]) == len(options) > row["answer"] >= 0):
            raise errors.UserError(
                f"{name} must have a letter for each of its {len(options)} options and an answer "
                f"among them; got {row['options']} and {row['answer']}."
            )
        named = row["example_id"], row["task"], prompt, tuple(row["options"])
        questions.append(Question(*named, options, row["answer"], tuple(row["end_ids"])))
    return questions


def pack(questions: Sequence[Question], rows: int, tokens: int, answers: int) -> batches.Batch:
    """Packs rows of (rows, tokens) into a numpy batch that scores (rows, answers) option tokens.

    A row scores its options' tokens one after another; each option's first token is read off the
    prompt's last. Rows beyond the questions are padding. All questions share their prompts, or
    none does.
    """
    batch = batches.make_batch([question.row for question in questions], rows, tokens, answers)
    parent_ids = np.full((rows, tokens), NO_PARENT, np.int32)
    for i, question in enumerate(questions):
        prompt, spans = len(question.prompt_ids), question.lengths + len(question.end_ids)
        start, spans = (prompt, spans) if question.shared else (0, prompt + spans)
        within = np.concatenate([np.arange(n) for n in spans])
        here = slice(start, start + len(within))
        batch.positions[i, here] = start + within
        segments = PROMPT_SEGMENT + question.shared + np.arange(len(spans))
        batch.segment_ids[i, here] = np.repeat(segments, spans)
        if question.shared:
            batch.loss_positions[i, np.flatnonzero(within == 0)] = prompt - 1
            parent_ids[i, here] = PROMPT_SEGMENT
    shared = any(question.shared for question in questions)
    return dataclasses.replace(batch, parent_ids=parent_ids if shared else None)


def scores(question: Question, losses: np.ndarray) -> tuple[np.ndarray, float]:
    """Computes what a model says of a question, in float64.

    Args:
        losses: (A,) token losses of the question's row (loss.token_losses).

    Returns:
        The summed log-likelihood of each option given the prompt, in nats; and the right answer's
        loss, its end included, in nats per token: the loss that training and targets have.
    """
    losses = losses.astype(np.float64)
    bounds = list(zip(question.starts, question.starts + question.lengths, strict=True))
    start, stop = bounds[question.answer]
    right = losses[start : stop + len(question.end_ids)]
    return np.array([-losses[i:j].sum() for i, j in bounds]), float(right.mean())


def letter_scores(question: Question, losses: np.ndarray) -> np.ndarray:
    """Sums each option's log-likelihood over its first tokens, as few as tell the options apart.

    Of options "A. text" those are the letters'. An option's length does not touch it.

    Args:
        losses: as for `scores`.

    Returns:
        (O,) float64, in nats.
    """
    count, longest = 1, int(question.lengths.max())
    while count < longest:
        if len({tuple(ids[:count]) for ids in question.option_ids}) == len(question.letters):
            break
        count += 1
    spans = zip(question.starts, np.minimum(question.lengths, count), strict=True)
    return np.array([-losses[i : i + n].astype(np.float64).sum() for i, n in spans])


def choice_loss(log_likelihoods: np.ndarray, answer: int) -> float:
    """Minus the log of the right option's share among the options, in nats: log O for a guess."""
    scores = np.asarray(log_likelihoods, np.float64)
    top = scores.max()
    return float(top + np.log(np.exp(scores - top).sum()) - scores[answer])


def brier(log_likelihoods: np.ndarray, answer: int) -> float:
    """Computes the squared distance of shares from the right one's 1, in [0, 2] (Brier 1950)."""
    scores = np.asarray(log_likelihoods, np.float64)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return float(np.sum((shares - (np.arange(len(shares)) == answer)) ** 2))


def margin(log_likelihoods: np.ndarray, answer: int) -> float:
    """Computes the right option's log-likelihood above the best other's, in nats; 0 without one."""
    scores = np.asarray(log_likelihoods, np.float64)
    others = np.delete(scores, answer)
    return float(scores[answer] - others.max()) if len(others) else 0.0


def choose(log_likelihoods: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """Chooses the likeliest option, by the sum and by the mean of a token; the first of equals."""
    return int(np.argmax(log_likelihoods)), int(np.argmax(log_likelihoods / lengths))


def predictions(
    model: str, questions: Sequence[Question], columns: Mapping[str, Sequence]
) -> list[dict[str, Any]]:
    """Returns the rows of evaluate/predictions.jsonl.

    Args:
        columns: log_likelihoods and loss of each question, as `scores` gives them, and
            letter_log_likelihoods.
    """
    rows = []
    named = ("log_likelihoods", "letter_log_likelihoods", "loss")
    measured = zip(*(columns[name] for name in named), strict=True)
    for question, (sums, of_letters, loss) in zip(questions, measured, strict=True):
        lengths, letters, answer = question.lengths, question.letters, question.answer
        by_sum, by_mean = choose(np.asarray(sums), lengths)
        rows.append(
            {
                "model": model,
                "example_id": question.example_id,
                "task": question.task,
                "answer": letters[answer],
                "prediction": letters[by_sum],
                "prediction_norm": letters[by_mean],
                "loss": float(loss),
                "choice_loss": choice_loss(sums, answer),
                "choice_loss_letters": choice_loss(of_letters, answer),
                "brier": brier(sums, answer),
                "margin": margin(sums, answer),
                "log_likelihoods": dict(zip(letters, map(float, sums), strict=True)),
                "letter_log_likelihoods": dict(zip(letters, map(float, of_letters), strict=True)),
                "tokens": dict(zip(letters, lengths.tolist(), strict=True)),
            }
        )
    return rows


def outcomes(predictions: Sequence[dict[str, Any]], metrics: Sequence[str]) -> np.ndarray:
    """Returns rows' metrics (intervals.METRICS), (Q, M) float64: an accuracy is 1 where right."""
    values = [[_outcome(row, metric) for metric in metrics] for row in predictions]
    return np.array(values, np.float64)


def _outcome(row: Mapping[str, Any], metric: str) -> float:
    answer = row["answer"]
    if metric == "test_loss":
        return row["loss"]
    if metric == "test_loss_without_end":
        return -row["log_likelihoods"][answer] / row["tokens"][answer]
    if metric in ("accuracy", "accuracy_norm"):
        return row[metric.replace("accuracy", "prediction")] == answer
    return row[metric]
