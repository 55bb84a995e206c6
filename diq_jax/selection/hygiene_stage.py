"""Hygiene on a run's files: the texts that `prepare` wrote -> hygiene.parquet, rows to drop."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from diq_jax import errors
from diq_jax.models import checkpoint, encoder, hf, tokenizer
from diq_jax.run import artifacts, progress, stages
from diq_jax.selection import hygiene, select

FIELD, POOL = "difficulty.encoder", "prepare/pool.parquet"
WIDTH_STEP = 32  # padded widths are its multiples: each costs one compilation
BATCH_TOKENS = 4096  # padded tokens of one batch


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Fingerprints the encoder and how much it reads, where paraphrases are looked for."""
    cfg = context.config
    if cfg.selection.hygiene == "off" or cfg.selection.paraphrase_similarity == 0:
        return {}
    return {
        FIELD: checkpoint.open_checkpoint(cfg.difficulty.encoder, FIELD).fingerprint,
        **tokenizer.fingerprints(cfg.difficulty.encoder, FIELD),
        "difficulty.max_tokens": str(cfg.difficulty.max_tokens),
    }


def run(context: stages.Context) -> tuple[list[str], dict[str, Any]]:
    """Writes selection/hygiene.parquet: example_id, other, other_in, kind, similarity.

    Returns:
        Why each row is to rank last, "" where it is not: "" throughout unless
        selection.hygiene=remove; and the counts for stage.json: hygiene
        {pairs by kind, rows in a pair, removed, without_text}.

    Raises:
        UserError: fewer rows stay than the budget asks for.
    """
    settings = context.config.selection
    if settings.hygiene == "off":
        ids = context.table(POOL, "example_id")["example_id"].to_pylist()
        return [""] * len(ids), {}
    names = ("question", "reasoning", "answer")
    rows = _rows(context, "pool", names, lambda q, thought, a: (q, f"{thought}\n{a}".strip()))
    ids = [row.example_id for row in rows]
    removed = [""] * len(ids)
    against = [
        row
        for place in ("targets", "tests")
        for row in _rows(context, place, ("question", "choices"), lambda *x: (hygiene.ask(*x), ""))
    ]
    embed = _embedder(context) if settings.paraphrase_similarity else None
    pairs = hygiene.find(rows, against, settings, embed)
    kinds = {name: pa.string() for name in hygiene.Repeat._fields} | {"similarity": pa.float64()}
    artifacts.write_table(
        context.path("selection/hygiene.parquet"),
        {n: pa.array([getattr(pair, n) for pair in pairs], kind) for n, kind in kinds.items()},
    )
    if settings.hygiene == "remove":
        out = hygiene.dropped(pairs)
        removed = [_reason(out.get(id_)) for id_ in ids]
        _check_budget(settings.retention_ratio, len(ids), len(out))
    counts = collections.Counter(pair.kind for pair in pairs)
    return removed, {
        "hygiene": {
            "pairs": {kind: counts[kind] for kind in hygiene.KINDS},
            "rows": len({pair.example_id for pair in pairs}),
            "removed": sum(map(bool, removed)),
            "without_text": sum(not row.question.strip() for row in rows),
        }
    }


def _reason(pair):
    if pair is None:
        return ""
    place = "" if pair.other_in == "pool" else f" of the {pair.other_in}"
    return f"removed: {pair.kind} overlap with {pair.other}{place}"


def _check_budget(retention_ratio, total, removed):
    keep = select.budget(retention_ratio, total)
    if keep > total - removed:
        raise errors.UserError(
            f"selection.hygiene=remove leaves {total - removed} of {total} rows, fewer than the "
            f"{keep} that selection.retention_ratio={retention_ratio} asks for: lower that, or set "
            "hygiene to report."
        )


def _rows(context, place: str, names: Sequence[str], row: Callable) -> list[hygiene.ComparedRow]:
    """Reads rows of prepare/: `row` makes question and completion of the columns `names`."""
    table = context.table(f"prepare/{place}.parquet", "example_id", *names)
    columns = (table[name].to_pylist() for name in ("example_id", *names))
    return [
        hygiene.ComparedRow(id_, place, *row(*texts)) for id_, *texts in zip(*columns, strict=True)
    ]


def _embedder(context) -> Callable[[Sequence[str]], np.ndarray]:
    """Makes a function from texts to the mean of the encoder's last hidden states, (n, D) float32.

    It reads the first difficulty.max_tokens tokens, and uses all layers.
    """
    settings = context.config.difficulty
    opened = checkpoint.open_checkpoint(settings.encoder, FIELD)
    cfg = encoder.encoder_config(opened.config, FIELD)
    most, tokens = cfg.max_positions, settings.max_tokens
    expected = f"at most {most}, the positions of {settings.encoder}"
    errors.check("difficulty.max_tokens", tokens <= most, expected, tokens)
    params = jax.device_put(hf.load_encoder(opened, cfg, np.float32, FIELD))
    encode = tokenizer.load_tokenizer(settings.encoder, FIELD)

    def embed(texts):
        tokens = encode(list(texts), truncation=True, max_length=settings.max_tokens)["input_ids"]
        out = np.zeros((len(texts), cfg.model_dim), np.float32)
        with progress.Progress("paraphrases", len(texts)) as bar:
            for rows, width, size in _batches([len(row) for row in tokens], settings.max_tokens):
                padded, mask = np.zeros((2, size, width), np.int32)
                for k, i in enumerate(rows):
                    padded[k, : len(tokens[i])] = tokens[i]
                    mask[k, : len(tokens[i])] = 1
                out[rows] = np.asarray(_pooled(params, cfg, padded, mask))[: len(rows)]
                bar.update(len(rows), int(mask.sum()))
        return out

    return embed


def _batches(lengths, max_tokens):
    """Yields rows of one padded width, that width, and how many rows a batch of it has."""
    by_width: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        width = min(max_tokens, -(-length // WIDTH_STEP) * WIDTH_STEP)
        by_width.setdefault(width, []).append(i)
    for width, rows in by_width.items():
        size = max(1, BATCH_TOKENS // width)
        yield from ((rows[i : i + size], width, size) for i in range(0, len(rows), size))


@functools.partial(jax.jit, static_argnums=1)
def _pooled(params, cfg, tokens, mask):
    return encoder.mean_pool(encoder.apply(params, cfg, tokens, mask), mask)
