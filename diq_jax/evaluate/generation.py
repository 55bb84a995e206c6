"""Multiple-choice questions answered by thinking: the model writes, and its answer is read off.

Each question is asked as the model's chat template has it, once or, with evaluate.samples, several
times; then the option with the most votes is the answer.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diq_jax import errors, evaluate_config
from diq_jax.data import batches, chat, example, token_ids, wording
from diq_jax.evaluate import extract, measure
from diq_jax.models import generate, load, sampling, tokenizer
from diq_jax.run import devices

# No stand-in for the letter: weak models copy it.
INSTRUCTION = (
    'Think step by step. End with a sentence that begins with "The answer is" and names the letter '
    "of the option that you choose."
)
MAX_SHAPES = 4  # prompt lengths to pad to: each is two compilations
WRITTEN = ("text", "tokens", "finish")  # what is kept of an answer


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Asks every model for `samples` written answers to each question, in the questions' order.

    Attributes:
        name: of its parts on disk; what measure.measure asks has one.
        rows: a prompt for each answer.
        options: letter -> text, of each question.
    """

    name: str
    rows: Sequence[generate.Prompt]
    options: Sequence[Mapping[str, str]]
    samples: int
    streams: Sequence[generate.Stream]
    generator: generate.Generator

    def tokens(self, rows: Sequence[int], columns: measure.Columns) -> int:
        """Counts the tokens read and written for rows."""
        return sum(len(self.rows[i].ids) for i in rows) + int(sum(columns["tokens"]))

    def run(
        self, model: str, weights: measure.Weights, done: Collection[int]
    ) -> Iterator[tuple[list[int], measure.Columns]]:
        """Writes the answers that are not done; yields each as it ends."""
        for stream in self.streams:
            # The shape stays that of the whole: a continued run computes what a whole one does.
            left = tuple(i for i in stream.indices if i not in done)
            stream = dataclasses.replace(stream, indices=left)
            try:
                for i, answer in generate.run(self.generator, *weights, self.rows, stream):
                    yield [i], {name: [getattr(answer, name)] for name in WRITTEN}
            except errors.UserError as e:
                raise errors.UserError(f"evaluate: model {model!r}: {e}") from None


def make_answers(
    tests: Sequence[example.Example],
    model: load.Model,
    settings: evaluate_config.Evaluate,
    date: str,
    placement: devices.Placement,
) -> Answers:
    """Lays out the prompts and how they are answered; nothing runs yet.

    Args:
        date: the day, YYYY-MM-DD, that a chat template takes for today.

    Raises:
        UserError: a prompt leaves too few of the model's positions for an answer.
    """
    tok = tokenizer.load_tokenizer(model.path, "model.path")
    layout = chat.make_layout(tok, model.cfg.vocab_size, date, "model.path")
    prompts = [
        generate.Prompt(test.example_id, sample, np.asarray(ids, np.int32))
        for test, ids in zip(tests, ask(tests, layout), strict=True)
        for sample in range(settings.samples)
    ]
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(longest.ids) + settings.max_new_tokens > model.cfg.max_positions:
        raise errors.UserError(
            f"evaluate.max_new_tokens={settings.max_new_tokens} does not fit after the "
            f"{len(longest.ids)} tokens of question {longest.prompt_id!r}: the model has "
            f"{model.cfg.max_positions} positions."
        )
    edges = batches.bucket_edges([len(prompt.ids) for prompt in prompts], MAX_SHAPES)
    edges = [min(edge, model.cfg.max_positions - settings.max_new_tokens) for edge in edges]
    new, text = settings.max_new_tokens, functools.partial(token_ids.text, tok)
    streams = generate.plan(prompts, edges, new, settings.batch_tokens, placement.rows_multiple)
    drawn = sampling.Sampling(new, settings.temperature, settings.top_p, settings.seed)
    ends = end_tokens(model, layout)
    generator = generate.make_generator(
        model.cfg, drawn, ends, settings.stop_texts, text, placement
    )
    options = [test.options or {} for test in tests]
    return Answers("answer", prompts, options, settings.samples, streams, generator)


def ask(tests: Sequence[example.Example], layout: chat.Layout) -> list[list[int]]:
    """Returns the prompts' token ids: each question with its options, and INSTRUCTION."""
    texts = (f"{wording.question_text(test)}\n\n{INSTRUCTION}" for test in tests)
    asked = zip(tests, texts, strict=True)
    return chat.prompt_ids(
        [dataclasses.replace(test, question=text, options=None) for test, text in asked], layout
    )


def from_table(table: pa.Table) -> list[example.Example]:
    """Reads the questions of prepare/tests.parquet as they were written."""
    return [
        example.Example(
            row["example_id"],
            row["question"],
            reasoning="",
            answer=row["choices"][row["answer"]],
            row={},
            task=row["task"],
            options=dict(zip(row["options"], row["choices"], strict=True)),
            answer_idx=row["options"][row["answer"]],
        )
        for row in table.to_pylist()
    ]


def end_tokens(model: load.Model, layout: chat.Layout) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the model's, the tokenizer's, and that of a turn."""
    eos = model.hf_config.get("eos_token_id")
    found = [token_ids.eos_id(layout.tokenizer), *(eos if isinstance(eos, list) else [eos])]
    found += layout.end_ids[-1:]
    return tuple(sorted({token for token in found if token is not None}))


def prediction(
    answers: Answers, question: int, written: Sequence[tuple[str, int, str]]
) -> dict[str, Any]:
    """Returns what a row of evaluate/predictions.jsonl has of a question's answers.

    The prediction is the letter with the most votes, of equals the one that was drawn first; None
    where no answer can be read.

    Args:
        written: (text, tokens, finish) of each of its samples.
    """
    read = [
        {
            "text": text,
            "letter": extract.extract(text, answers.options[question], finish == generate.LENGTH),
            "tokens": int(tokens),
            "finish": finish,
        }
        for text, tokens, finish in written
    ]
    # most_common sorts stably, so that equals stay in the order in which they came.
    votes = collections.Counter(a["letter"] for a in read if a["letter"] is not None)
    first = next(iter(votes.most_common(1)), (None,))[0]
    return {"prediction": first, "votes": dict(votes), "answers": read}


def predictions(answers: Answers, columns: measure.Columns) -> Iterator[dict[str, Any]]:
    """Yields the `prediction` of each question."""
    written = zip(*(columns[name] for name in WRITTEN), strict=True)
    for question in range(len(answers.options)):
        yield prediction(answers, question, list(itertools.islice(written, answers.samples)))


def add_answers(answers: Answers, rows: Sequence[dict], columns: measure.Columns) -> None:
    """Puts a model's answers into its rows of predictions.jsonl, in the choice's place."""
    for row, found in zip(rows, predictions(answers, columns), strict=True):
        del row["prediction_norm"]
        row |= found


def unparsable(predictions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts questions without a readable answer, and unreadable answers: both are wrong."""
    return {
        "unparsable": sum(p["prediction"] is None for p in predictions),
        "unparsable_answers": sum(a["letter"] is None for p in predictions for a in p["answers"]),
    }
