"""What the base model says of pool examples: loss, the prompt's worth (IFD), nearness to targets.

- **Similarity.** An example's embedding is the mean of the last hidden states (after the final
  norm) of all its tokens, prompt and completion, the token at place t = 1..T weighted by t: the
  RDS+ of arXiv 2503.01807. Its similarity is the mean of its cosines with the targets' embeddings.
  (RDS+ lets each target pick in turn; a mean is one number for each example.)
- **IFD** is perplexity given the prompt over perplexity without it, exp(L1 - L0) of mean losses, as
  in arXiv 2402.00530. The equation of arXiv 2308.12032, where the idea is from, is the ratio L1/L0
  of the losses themselves. Both are below 1 for the same examples; they order them differently.

Without its prompt a completion follows the beginning-of-sequence token, if the prompt begins with
it. Otherwise the completion's first token has nothing to be predicted from, and both losses of the
IFD leave it out: they are over the same tokens always. A completion of that one token has no IFD
(nan).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from diq_jax import errors
from diq_jax.data import batches, chat, encoded, example, token_ids, wording
from diq_jax.models import checkpoint, load, loss, tokenizer
from diq_jax.models import config as model_config
from diq_jax.run import artifacts, devices, parts, progress, stages

PARTIAL = "difficulty/partial/model-scores"  # what a killed run continues from
SCORES = "difficulty/model_scores.parquet"


def fingerprints(context: stages.Context) -> dict[str, str]:
    """Returns what the scores depend on beside artifacts: the model, and the dtype it runs in."""
    settings = context.config.model
    opened = checkpoint.open_checkpoint(settings.path, "model.path")
    tokens = tokenizer.fingerprints(settings.path, "model.path")
    return {"model.path": opened.fingerprint, **tokens, "model.dtype": settings.dtype}


def run(context: stages.Context) -> dict[str, int]:
    """Writes difficulty/model_scores.parquet, one row for each of the pool, in its order.

    - loss, perplexity: mean negative log-likelihood of the completion's tokens, in nats, and its
      exp (float64, as is ifd, since float32 ends at a loss of 88);
    - ifd and similarity: see above; task_similarity: the mean over tasks of the mean cosine with
      the targets of each;
    - answer_tokens: scored tokens; reasoning_tokens: those of the reasoning, tokenised apart
      (at a seam a token may belong to both sides), at most answer_tokens. 0 where the template
      leaves the reasoning out, and for pre-tokenised rows, which do not tell it apart.

    A killed run continues after the last finished batch and gives identical bytes: which examples
    share a batch depends on the pool alone. Of the pool's embeddings a batch at a time is held.

    Returns:
        tokens, and resumed_tokens among them.

    Raises:
        UserError: a loss or an embedding is not finite; the example is named.
    """
    cfg = context.config
    table = context.table("prepare/pool.parquet", "reasoning", *encoded.COLUMNS)
    targets = context.table("prepare/targets.parquet", "task", *encoded.COLUMNS)
    pool, tasks = encoded.from_table(table), targets["task"].to_pylist()
    model = load.load(cfg.model.path, cfg.model.dtype, context.placement)
    tok = tokenizer.load_tokenizer(cfg.model.path, "model.path")
    shorter = (without_prompt(row, token_ids.bos_id(tok)) for row in pool)
    alone = {i: row for i, row in enumerate(shorter) if row is not None}

    target_rows = encoded.from_table(targets)
    directions = target_directions(_embed(context, model, target_rows), tasks)
    given, resumed = _with_prompt(context, model, pool, directions)
    spoken, direct_rows = list(alone), list(alone.values())
    direct, resumed_direct = _direct(context, model, direct_rows)
    losses = given["loss"].astype(np.float64)
    answers = np.array([row.answer_tokens for row in pool], np.int32)
    layout = chat.make_layout(tok, model.cfg.vocab_size, cfg.data.date, "model.path")
    reasoning = reasoning_tokens(table["reasoning"].to_pylist(), layout, cfg.data.template)
    # Both losses of an IFD are over the tokens that the completion alone can score.
    ifd = np.full(len(pool), np.nan)
    if spoken:
        cut = np.array([row.answer_tokens for row in direct_rows]) < answers[spoken]
        over = np.where(cut, given["rest"][spoken], losses[spoken])
        ifd[spoken] = np.exp(over - direct["loss"].astype(np.float64))
    artifacts.write_table(
        context.path(SCORES),
        {
            "example_id": table["example_id"],
            "loss": pa.array(given["loss"]),
            "perplexity": pa.array(np.exp(losses)),
            "ifd": pa.array(ifd),
            "similarity": pa.array(given["cosines"][:, 0]),
            "task_similarity": pa.array(given["cosines"][:, 1]),
            "answer_tokens": pa.array(answers),
            "reasoning_tokens": pa.array(np.minimum(reasoning, answers)),
        },
        unknown=("ifd",),  # of a row without tokens before its answer
    )
    tokens = sum(len(r.input_ids) for r in (*pool, *direct_rows, *target_rows))
    return {"tokens": tokens, "resumed_tokens": resumed + resumed_direct}


def embeddings(hidden: jax.Array, batch: batches.Batch) -> jax.Array:
    """Returns means of hidden states (B, T, D), weights 1..T: (B, D) float32, padding rows 0."""
    weights = jnp.where(batch.segment_ids > 0, batch.positions + 1, 0).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    return jnp.einsum("bt,btd->bd", weights, hidden.astype(jnp.float32)) / total


def conditional(
    params: Any, directions: jax.Array, batch: batches.Batch, cfg: model_config.DecoderConfig
) -> dict[str, jax.Array]:
    """Computes what the pass with the prompt gives for a batch, float32.

    Returns:
        loss (B,), the mean over the completion's tokens, in nats; rest (B,), the mean without the
        first of them, 0 where there is no other; cosines (B, K) of the embedding with the unit rows
        that `directions` (K, D) are means of.
    """
    hidden = loss.hidden_states(params, cfg, batch)
    values = loss.answer_losses(params, cfg, hidden, batch)
    weights = loss.token_weights(batch, "mean")
    others = jnp.maximum(jnp.sum(batch.loss_mask[:, 1:], axis=1), 1.0)
    unit = embeddings(hidden, batch)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    return {
        "loss": jnp.sum(values * weights, axis=1),
        "rest": jnp.sum(values[:, 1:], axis=1) / others,
        "cosines": unit @ directions.T,
    }


def target_directions(found: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Turns targets' embeddings (Q, D) into (2, D): the mean unit row, and the mean over tasks.

    The product of a unit row with a mean of unit rows is its mean cosine with them.
    """
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    names = np.array(tasks)
    by_task = [unit[names == task].mean(axis=0) for task in sorted(set(tasks))]
    return np.stack([unit.mean(axis=0), np.mean(by_task, axis=0)])


def without_prompt(row: example.Encoded, bos: int | None) -> example.Encoded | None:
    """Returns the completion alone, after `bos` if the row has it; None if nothing is left."""
    first = 1 + int(np.flatnonzero(row.labels[1:] != example.IGNORED)[0])
    ids, labels = row.input_ids[first:], row.labels[first:]
    if int(row.input_ids[0]) == bos:
        ids = np.concatenate([row.input_ids[:1], ids])
        labels = np.concatenate([np.array([example.IGNORED], np.int32), labels])
    result = example.Encoded(row.example_id, ids, labels)
    return result if result.answer_tokens else None


def reasoning_tokens(texts: Sequence[str], layout: chat.Layout, template: str) -> np.ndarray:
    """Counts each text's tokens, (n,) int32, as inside of another; 0 without {reasoning}."""
    if "{reasoning}" not in wording.TEMPLATES.get(template, template):
        return np.zeros(len(texts), np.int32)
    return np.array(chat.count_tokens(texts, layout), np.int32)


def _embed(context, model, targets) -> np.ndarray:
    """Computes the embeddings of rows, (Q, D) float32."""

    def embed(params, batch):
        return embeddings(loss.hidden_states(params, model.cfg, batch), batch)

    step = context.placement.compile(embed, rows=True)
    out = np.zeros((len(targets), model.cfg.model_dim), np.float32)
    name = "target embeddings"
    for group, found in _run(context, name, targets, lambda b: step(model.params, b), set()):
        out[list(group)] = found[: len(group)]
    for row, vector in zip(targets, out, strict=True):
        _check_finite(context, f"embedding of target {row.example_id!r}", vector)
    return out


def _with_prompt(context, model, pool, directions):
    placement = context.placement
    step = placement.compile(functools.partial(conditional, cfg=model.cfg), rows=True)
    placed = placement.replicate(directions)
    return _finish(context, "given", pool, lambda batch: step(model.params, placed, batch))


def _direct(context, model, alone):
    losses = functools.partial(loss.example_losses, cfg=model.cfg, reduction="mean")
    step = context.placement.compile(lambda params, batch: losses(params, batch=batch), rows=True)
    return _finish(context, "alone", alone, lambda batch: {"loss": step(model.params, batch)})


def _finish(context, name, rows, step: Callable) -> tuple[dict[str, np.ndarray], int]:
    """Runs a pass: ({column: (n, ..) float32}, the tokens that an earlier call read)."""
    finished = parts.Parts(context.path(f"{PARTIAL}/{name}"))
    resumed = sum(len(rows[i].input_ids) for i in finished.done)
    for group, out in _run(context, f"model scores, {name}", rows, step, finished.done):
        columns = {column: values[: len(group)] for column, values in out.items()}
        for k, i in enumerate(group):
            values = np.concatenate([np.atleast_1d(column[k]) for column in columns.values()])
            _check_finite(context, f"loss or embedding of example {rows[i].example_id!r}", values)
        # A batch cut otherwise than before may hold rows that are done.
        new = [k for k, i in enumerate(group) if i not in finished.done]
        finished.add([group[k] for k in new], {name: x[new] for name, x in columns.items()})
    return finished.columns(), resumed


def _run(context, name, rows, step, done):
    """Yields (indices, outputs in numpy) of batches with rows not done, one dispatched ahead."""
    placement = context.placement
    planned = batches.plan(rows, context.config.influence.batch_tokens, placement.rows_multiple)
    groups = [group for group in planned if not done.issuperset(group.indices)]
    left = sum(len(group.indices) for group in groups)

    def started():
        for indices, batch in batches.iterate(groups, rows):
            yield indices, step(placement.batch(batch))

    with progress.Progress(name, len(rows), resumed=len(rows) - left) as bar:
        for indices, out in devices.one_behind(started()):
            yield indices, jax.device_get(out)
            bar.update(len(indices), sum(len(rows[i].input_ids) for i in indices))


def _check_finite(context, what, values):
    if not np.isfinite(values).all():
        raise errors.UserError(
            f"The {what} is not finite; check the example and the weights; model.dtype is "
            f"{context.config.model.dtype}."
        )
