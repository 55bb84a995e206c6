"""The first stage: reads, checks and tokenizes pool, targets and tests, which all others read."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from absl import logging

from diq_jax import config, errors
from diq_jax.data import chat, encoded, example, sources, wording
from diq_jax.evaluate import generation
from diq_jax.evaluate import stage as evaluate
from diq_jax.finetune import dpo_stage as dpo
from diq_jax.models import checkpoint, hf, tokenizer
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, progress, stages

POOL, TARGETS, TESTS = (f"prepare/{name}.parquet" for name in ("pool", "targets", "tests"))
POOL_COLUMNS = ("source", "question", "reasoning", "answer", "row", "letter", "context")
GROUP_ROWS, ENCODED_ROWS = 8192, 1024  # of a row group, and of one call of the tokenizer
ONE_TEXT = ("text",)  # the name of the only option of a test without options


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Fingerprints the model, its tokenizer and the rows' files."""
    cfg = context.config
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    tokens = tokenizer.fingerprints(cfg.model.path, "model.path")
    return {"model.path": source.fingerprint, **tokens} | {
        f"data.{name}": sources.fingerprint(getattr(cfg.data, name), f"data.{name}", name)
        for name in ("pool", "targets", "tests")
    }


def check(context: stages.Context) -> None:
    """Raises UserError where a file that the stage reads is missing."""
    data = context.config.data
    for name in ("pool", "targets", "tests"):
        sources.check(getattr(data, name), f"data.{name}", name)
    checkpoint.open_checkpoint(context.config.model.path, "model.path")


def run(context: stages.Context) -> dict[str, Any]:
    """Reads, checks and tokenises pool, targets and tests: what all later stages read."""
    cfg, data = context.config, context.config.data
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    shape = model_config.decoder_config(source.config, "model.path")
    hf.check_decoder(source, shape, "model.path")
    most, tokens = shape.max_positions, cfg.model.max_tokens
    expected = f"at most {most}, the model's positions"
    errors.check("model.max_tokens", tokens <= most, expected, tokens)
    targets = sources.load_targets(
        data.targets, data.targets_per_task, data.seed, data.columns, turns=data.turns
    )
    tests = sources.load_tests(
        data.tests, data.tests_per_task, data.seed, texts=True, columns=data.columns
    )
    evaluate.groups(cfg.evaluate, {test.task for test in tests})
    check_tests(tests, cfg.evaluate.protocol)
    layout = open_layout(cfg)
    if cfg.finetune.dpo.data:  # read again by the stage dpo: a wrong row shows now, not hours later
        dpo.load_pairs(cfg, layout)

    written = Written(cfg, layout)
    pool = sources.stream_examples(data.pool, data.columns, data.pool_limit, turns=data.turns)
    artifacts.write_tables(context.path(POOL), written.tables("pool", pool, POOL_COLUMNS))
    target_tables = written.tables("targets", targets, ("task", "question", "choices"))
    artifacts.write_tables(context.path(TARGETS), target_tables)
    if cfg.evaluate.protocol == "generate":  # asked again by the stage evaluate
        generation.ask(tests, layout)
    test_tokens = _write_tests(context, tests, encode_tests(tests, layout, cfg), layout.end_ids)
    return {
        "rows": written.rows + len(tests),
        "tokens": written.tokens + test_tokens,
        "examples": written.counts,
        "target_tasks": dict(collections.Counter(t.task for t in targets)),
        "test_tasks": dict(collections.Counter(t.task for t in tests)),
    }


def check_tests(tests: Sequence[example.Example], protocol: str) -> None:
    """Raises UserError where only some tests have options, or none does where the protocol asks."""
    texts = [test for test in tests if test.options is None]
    if texts and (protocol == "generate" or len(texts) < len(tests)):
        other = next((test for test in tests if test.options is not None), None)
        why = (
            f"test {other.example_id!r} has some: accuracy is of options, and of texts there is "
            "the loss alone; test them in runs of their own"
            if other
            else "evaluate.protocol=generate compares options: set it to options, for the loss"
        )
        raise errors.UserError(f"data.tests: test {texts[0].example_id!r} has no options; {why}.")


def encode_tests(
    tests: Sequence[example.Example], layout: chat.Layout, cfg: config.Config
) -> list[list[example.Encoded]]:
    """Encodes each test's prompt with each of its options; with its answer, where it has none."""
    if tests and tests[0].options is None:
        rows, _, dropped = encoded.encode_all(
            tests, layout, cfg.data.template, cfg.model.max_tokens, "prompt", "data.tests: example"
        )
        if dropped:
            raise errors.UserError(
                f"model.max_tokens = {cfg.model.max_tokens} has no room for the answer of "
                f"data.tests: example {dropped[0]!r}."
            )
        stop = -len(layout.end_ids) or None  # the end stands apart, as that of options
        return [
            [dataclasses.replace(row, input_ids=row.input_ids[:stop], labels=row.labels[:stop])]
            for row in rows
        ]
    return encoded.encode_options(tests, layout, cfg.model.max_tokens)


class Written:
    """Counts what becomes of examples while they are encoded and written, a row group at a time."""

    def __init__(self, cfg: config.Config, layout: chat.Layout) -> None:
        self.rows = self.tokens = 0
        self.counts: dict[str, Any] = {}
        self._cfg, self._layout, self._marks = cfg, layout, encoded.turn_marks(layout)
        self._marked: list[str] = []  # ids of those that hold a mark

    def tables(
        self, name: str, examples: Iterable[example.Example], columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Yields the tables of a file, with a table row for each encoded example, in order.

        Raises:
            UserError: `model.truncation` drops all of them.
        """
        outcomes: collections.Counter = collections.Counter()
        dropped: list[str] = []
        kept = 0
        with progress.Progress(f"prepare {name}", None) as bar:
            for group in _chunks(examples, GROUP_ROWS):
                parts = []
                for chunk in _chunks(group, ENCODED_ROWS):
                    rows = self._encode(name, chunk, outcomes, dropped)
                    bar.update(len(chunk), sum(len(row.input_ids) for row in rows))
                    parts.append(_table(chunk, rows, columns))
                if len(table := pa.concat_tables(parts)) or not kept:
                    kept += len(table)
                    yield table.combine_chunks()
            self.tokens += bar.tokens
        self.rows += kept
        self._close(name, outcomes, dropped, kept)

    def _encode(self, name, chunk, outcomes, dropped):
        cfg = self._cfg
        rows, found, left_out = encoded.encode_all(
            chunk, self._layout, cfg.data.template, cfg.model.max_tokens, cfg.model.truncation,
            where=f"data.{name}: example",
        )  # fmt: skip
        outcomes.update(found)
        dropped += left_out
        if self._marks:
            texts = ((e.example_id, encoded.texts_of(e, cfg.data.template)) for e in chunk)
            self._marked += [id_ for id_, text in texts if self._marks.search(text)]
        return rows

    def _close(self, name, outcomes, dropped, kept):
        model, total = self._cfg.model, sum(outcomes.values())
        self.counts[name] = {k: outcomes[k] for k in ("whole", "cut", "dropped")}
        if dropped:
            self.counts[name]["dropped_ids"] = dropped
        if outcomes["cut"] or dropped:
            logging.warning(
                "%s: %d of %d examples are longer than model.max_tokens = %d: %d cut, %d dropped "
                "(model.truncation = %s).",
                name, outcomes["cut"] + outcomes["dropped"], total, model.max_tokens,
                outcomes["cut"], outcomes["dropped"], model.truncation,
            )  # fmt: skip
        if self._marked:
            logging.warning(
                "%s: %d of %d examples, such as %r, hold the text of a token that begins or ends a "
                "turn: it is read as that token.",
                name, len(self._marked), total, self._marked[0],
            )  # fmt: skip
            self._marked.clear()
        if not kept:
            raise errors.UserError(
                f"data.{name}: all {total} examples are longer than model.max_tokens = "
                f"{model.max_tokens} and model.truncation={model.truncation} drops them."
            )


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def open_layout(cfg: config.Config) -> chat.Layout:
    """Returns how the model's tokenizer lays out a conversation; warns where that surprises.

    Raises:
        UserError: no tokenizer that can be used, or a chat template (chat.make_layout).
    """
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    vocab_size = model_config.decoder_config(source.config, "model.path").vocab_size
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, vocab_size, cfg.data.date, "model.path")
    if layout.template is None:
        logging.warning(
            "%s has no chat template: prompts are 'Question: ... Answer: ...'.", cfg.model.path
        )
    if not layout.end_ids:
        logging.warning("%s has no token that ends an answer: none is scored.", cfg.model.path)
    if layout.opened and chat.OPEN not in wording.TEMPLATES.get(cfg.data.template, ""):
        logging.warning(
            "%s opens %s at the end of its prompts. data.template=%s closes it at once; "
            "data.template=think puts the reasoning into it.",
            cfg.model.path, chat.OPEN, cfg.data.template,
        )  # fmt: skip
    return layout


def _table(examples, rows, columns) -> pa.Table:
    """Makes a table with a row for each encoded example."""
    by_id = {e.example_id: e for e in examples}
    kept = [by_id[row.example_id] for row in rows]
    read = {
        "row": lambda e: json.dumps(e.row, ensure_ascii=False, allow_nan=False),
        # Where the options stand apart, the question is the stem.
        "question": lambda e: e.question if "choices" in columns else wording.asked_text(e),
        "source": lambda e: str(e.row.get("source") or ""),
        "choices": _choices,
        "letter": lambda e: e.answer_idx if e.answer == (e.options or {}).get(e.answer_idx) else "",
        # With the question, which the column of questions has behind the rest.
        "context": lambda e: json.dumps(_turns(e), ensure_ascii=False) if e.context else "",
    }
    texts = {c: [read.get(c, lambda e, c=c: getattr(e, c))(e) for e in kept] for c in columns}
    kinds = {c: pa.list_(pa.string()) if c == "choices" else pa.string() for c in columns}
    made = {c: pa.array(values, kinds[c]) for c, values in texts.items()}
    ids = pa.array([e.example_id for e in kept], pa.string())
    return pa.table({"example_id": ids, **made, **encoded.columns(rows)})


def _turns(row: example.Example) -> list[Mapping[str, str]]:
    return [*row.context, {"role": "user", "content": wording.question_text(row)}]


def _write_tests(context, tests, options, end_ids) -> int:
    """Writes one table row for each question: the prompt's tokens once, and each option's after it.

    Returns:
        The number of tokens.
    """
    prompts, answers = [], []
    for rows in options:
        start = int((rows[0].labels == example.IGNORED).sum())
        prompts.append(rows[0].input_ids[:start])
        answers.append([row.input_ids[start:].tolist() for row in rows])
    # A text is the one option of its question: what is measured is its loss.
    letters = [list(test.options or ONE_TEXT) for test in tests]
    right = [names.index(t.answer_idx or names[0]) for t, names in zip(tests, letters, strict=True)]
    artifacts.write_table(
        context.path(TESTS),
        {
            "example_id": [test.example_id for test in tests],
            "task": [test.task for test in tests],
            "subject": [str(test.row.get("subject") or "") for test in tests],
            "question": [test.question for test in tests],
            "choices": pa.array([_choices(test) for test in tests], pa.list_(pa.string())),
            "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
            "options": pa.array(letters, pa.list_(pa.string())),
            "option_ids": pa.array(answers, pa.list_(pa.list_(pa.int32()))),
            "answer": pa.array(right, pa.int32()),
            "end_ids": pa.array([end_ids] * len(tests), pa.list_(pa.int32())),
        },
    )
    return sum(len(row.input_ids) for rows in options for row in rows)


def _choices(row: example.Example) -> list[str]:
    """Returns the texts of the options, in order."""
    return list((row.options or {}).values())
