"""The first stage: reads, checks and tokenizes pool, targets and tests, which all others read."""

import collections
import json
from typing import Any

import pyarrow as pa
from absl import logging

from diq_jax import config, errors
from diq_jax.data import chat, encoded, example, sources
from diq_jax.evaluate import generation
from diq_jax.evaluate import stage as evaluate
from diq_jax.finetune import dpo_stage as dpo
from diq_jax.models import checkpoint, hf, tokenizer
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, stages

POOL, TARGETS, TESTS = (f"prepare/{name}.parquet" for name in ("pool", "targets", "tests"))


def fingerprints(context: stages.Context) -> dict[str, str]:
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
    if cfg.model.max_tokens > shape.max_positions:
        raise errors.UserError(
            f"model.max_tokens must be at most {shape.max_positions}, the model's positions; got "
            f"{cfg.model.max_tokens}."
        )
    pool = sources.load_examples(data.pool, data.columns, data.pool_limit)
    targets = sources.load_targets(data.targets, data.targets_per_task, data.seed, data.columns)
    tests = sources.load_tests(data.tests, data.tests_per_task, data.seed)
    evaluate.groups(cfg.evaluate, {test.task for test in tests})
    layout = open_layout(cfg)
    if cfg.finetune.dpo.data:  # read again by the stage dpo: a wrong row shows now, not hours later
        dpo.load_pairs(cfg, layout)

    counts = {}

    def encode(name: str, examples: list[example.Example]) -> list[example.Encoded]:
        rows, outcomes, dropped = encoded.encode_all(
            examples, layout, data.template, cfg.model.max_tokens, cfg.model.truncation,
            where=f"data.{name}: example",
        )  # fmt: skip
        counts[name] = {k: outcomes[k] for k in ("whole", "cut", "dropped")}
        if dropped:
            counts[name]["dropped_ids"] = dropped
        if outcomes["cut"] or dropped:
            logging.warning(
                "%s: %d of %d examples are longer than model.max_tokens = %d: %d cut, %d dropped "
                "(model.truncation = %s).",
                name, outcomes["cut"] + outcomes["dropped"], len(examples), cfg.model.max_tokens,
                outcomes["cut"], outcomes["dropped"], cfg.model.truncation,
            )  # fmt: skip
        if not rows:
            raise errors.UserError(
                f"data.{name}: all {len(examples)} examples are longer than model.max_tokens = "
                f"{cfg.model.max_tokens} and model.truncation={cfg.model.truncation} drops them."
            )
        return rows

    pool_rows = encode("pool", pool)
    _write(context, POOL, pool, pool_rows, ("source", "question", "reasoning", "answer", "row"))
    target_rows = encode("targets", targets)
    _write(context, TARGETS, targets, target_rows, ("task", "question", "choices"))
    options = encoded.encode_options(tests, layout, cfg.model.max_tokens)
    if cfg.evaluate.protocol == "generate":  # asked again by the stage evaluate
        generation.ask(tests, layout)
    _write_tests(context, tests, options, layout.end_ids)
    encoded_rows = [*pool_rows, *target_rows, *(row for rows in options for row in rows)]
    return {
        "rows": len(pool_rows) + len(target_rows) + len(tests),
        "tokens": sum(len(row.input_ids) for row in encoded_rows),
        "examples": counts,
        "target_tasks": dict(collections.Counter(t.task for t in targets)),
        "test_tasks": dict(collections.Counter(t.task for t in tests)),
    }


def open_layout(cfg: config.Config) -> chat.Layout:
    """Returns how the model's tokenizer lays out a conversation, with a warning where that may
    surprise.

    Raises:
        UserError: no tokenizer that can be used, or a chat template (chat.make_layout).
    """
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    vocab_size = model_config.decoder_config(source.config, "model.path").vocab_size
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    layout = chat.make_layout(tok, vocab_size, cfg.data.date, "model.path")
    if layout.render is None:
        logging.warning(
            "%s has no chat template: prompts are 'Question: ... Answer: ...'.", cfg.model.path
        )
    elif layout.opened and chat.OPEN not in chat.TEMPLATES.get(cfg.data.template, ""):
        logging.warning(
            "%s opens %s at the end of its prompts. data.template=%s closes it at once; "
            "data.template=think puts the reasoning into it.",
            cfg.model.path, chat.OPEN, cfg.data.template,
        )  # fmt: skip
    return layout


def _write(context, name, examples, rows, columns):
    """Writes one table row for each encoded example, in the order of the file."""
    by_id = {e.example_id: e for e in examples}
    kept = [by_id[row.example_id] for row in rows]
    read = {
        "row": lambda e: json.dumps(e.row, ensure_ascii=False, allow_nan=False),
        # Where the options stand apart, the question is the stem.
        "question": lambda e: e.question if "choices" in columns else chat.question_text(e),
        "source": lambda e: str(e.row.get("source") or ""),
        "choices": _choices,
    }
    texts = {c: [read.get(c, lambda e, c=c: getattr(e, c))(e) for e in kept] for c in columns}
    if "choices" in texts:  # which may all be empty
        texts["choices"] = pa.array(texts["choices"], pa.list_(pa.string()))
    table = {"example_id": [e.example_id for e in kept], **texts, **encoded.columns(rows)}
    artifacts.write_table(context.path(name), table)


def _write_tests(context, tests, options, end_ids):
    """Writes one table row for each question: the prompt's tokens once, and each option's
    after it.
    """
    prompts, answers = [], []
    for rows in options:
        start = int((rows[0].labels == example.IGNORED).sum())
        prompts.append(rows[0].input_ids[:start])
        answers.append([row.input_ids[start:].tolist() for row in rows])
    letters = [list(test.options) for test in tests]
    right = [names.index(t.answer_idx) for t, names in zip(tests, letters, strict=True)]
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


def _choices(row: example.Example) -> list[str]:
    """Returns the texts of the options, in order."""
    return list((row.options or {}).values())
