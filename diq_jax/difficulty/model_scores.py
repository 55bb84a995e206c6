"""What the base model says of each pool example: its loss, what the prompt is worth to it (IFD),
and how near it lies to the targets. Two forward passes over the pool, one over the targets.

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

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from diq_jax import errors
from diq_jax.data import batches, chat, encoded, example
from diq_jax.models import checkpoint, load, loss, tokenizer
from diq_jax.run import artifacts, devices, progress, stages

PARTIAL = "difficulty/partial/model-scores"  # what a killed run continues from
SCORES = "difficulty/model_scores.parquet"


@flax.struct.dataclass
class Conditional:
    """What the pass with the prompt gives for a batch, float32.

    Attributes:
        loss: (B,), the mean over the completion's tokens, in nats.
        rest: (B,), the mean without the first of them; 0 where there is no other.
        cosines: (B, K), mean cosines of the embedding (target_directions).
    """

    loss: jax.Array
    rest: jax.Array
    cosines: jax.Array


def fingerprints(context: stages.Context) -> dict[str, str]:
    """What the scores depend on beside artifacts: the model, and the dtype that it runs in."""
    settings = context.config.model
    opened = checkpoint.open_checkpoint(settings.path, "model.path")
    tokens = tokenizer.fingerprints(settings.path, "model.path")
    return {"model.path": opened.fingerprint, **tokens, "model.dtype": settings.dtype}


def run(context: stages.Context) -> dict[str, int]:
    """Writes difficulty/model_scores.parquet, one row for each of the pool, in its order:

    - loss, perplexity: mean negative log-likelihood of the completion's tokens, in nats, and its
      exp (float64, as is ifd, since float32 ends at a loss of 88);
    - ifd and similarity: see above; task_similarity: the mean over tasks of the mean cosine with
      the targets of each;
    - answer_tokens: scored tokens; reasoning_tokens: those of the reasoning, tokenised apart
      (at a seam a token may belong to both sides), at most answer_tokens. 0 where the template
      leaves the reasoning out, and for pre-tokenised rows, which do not tell it apart.

    A killed run continues after the last finished batch and gives identical bytes: which examples
    share a batch depends on the pool alone, and the targets' embeddings are computed again. Of the
    pool's embeddings no more than a batch is ever held.

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
    alone = [without_prompt(row, tok.bos_token_id) for row in pool]

    directions = target_directions(_embed(context, model, encoded.from_table(targets)), tasks)
    with_prompt = _with_prompt(context, model, pool, directions)
    direct = _direct(context, model, [row for row in alone if row is not None])
    losses = np.array([with_prompt.entries[row.example_id]["loss"] for row in pool])
    cosines = np.array([with_prompt.entries[row.example_id]["cosines"] for row in pool], np.float32)
    answers = np.array([row.answer_tokens for row in pool], np.int32)
    layout = chat.make_layout(tok, model.cfg.vocab_size, cfg.data.date, "model.path")
    reasoning = reasoning_tokens(table["reasoning"].to_pylist(), layout, cfg.data.template)
    artifacts.write_table(
        context.path(SCORES),
        {
            "example_id": table["example_id"],
            "loss": pa.array(losses.astype(np.float32)),
            "perplexity": pa.array(np.exp(losses)),
            "ifd": pa.array(_ifd(pool, alone, with_prompt.entries, direct.entries)),
            "similarity": pa.array(cosines[:, 0]),
            "task_similarity": pa.array(cosines[:, 1]),
            "answer_tokens": pa.array(answers),
            "reasoning_tokens": pa.array(np.minimum(reasoning, answers)),
        },
        unknown=("ifd",),  # of a row without tokens before its answer
    )
    rows = [*pool, *(row for row in alone if row is not None)]
    return {
        "tokens": sum(len(row.input_ids) for row in rows)
        + sum(len(ids) for ids in targets["input_ids"].to_pylist()),
        "resumed_tokens": with_prompt.resumed_tokens + direct.resumed_tokens,
    }


def embeddings(hidden, batch):
    """The mean of hidden states (B, T, D) with weight 1 on an example's first token, T on its last:
    (B, D) float32, 0 for a padding row.
    """
    weights = jnp.where(batch.segment_ids > 0, batch.positions + 1, 0).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    return jnp.einsum("bt,btd->bd", weights, hidden.astype(jnp.float32)) / total


def conditional(params, directions, batch, cfg) -> Conditional:
    """Losses given the prompt, and products of the unit embedding with `directions` (K, D)."""
    hidden = loss.hidden_states(params, cfg, batch)
    values = loss.answer_losses(params, cfg, hidden, batch)
    weights = loss.token_weights(batch, "mean")
    others = jnp.maximum(jnp.sum(batch.loss_mask[:, 1:], axis=1), 1.0)
    unit = embeddings(hidden, batch)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    return Conditional(
        jnp.sum(values * weights, axis=1),
        jnp.sum(values[:, 1:], axis=1) / others,
        unit @ directions.T,
    )


def target_directions(found: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Targets' embeddings (Q, D) -> (2, D): the mean of their unit rows, and the mean over tasks of
    each task's. The product of a unit row with a mean of unit rows is its mean cosine with them.
    """
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    names = np.array(tasks)
    by_task = [unit[names == task].mean(axis=0) for task in sorted(set(tasks))]
    return np.stack([unit.mean(axis=0), np.mean(by_task, axis=0)])


def without_prompt(row: example.Encoded, bos: int | None) -> example.Encoded | None:
    """The completion alone, after the beginning-of-sequence token `bos` where the row begins with
    it; None where that leaves nothing to score.
    """
    first = 1 + int(np.flatnonzero(row.labels[1:] != example.IGNORED)[0])
    ids, labels = row.input_ids[first:], row.labels[first:]
    if int(row.input_ids[0]) == bos:
        ids = np.concatenate([row.input_ids[:1], ids])
        labels = np.concatenate([np.array([example.IGNORED], np.int32), labels])
    result = example.Encoded(row.example_id, ids, labels)
    return result if result.answer_tokens else None


def reasoning_tokens(texts: Sequence[str], layout: chat.Layout, template: str) -> np.ndarray:
    """(n,) int32: the tokens of each text, as inside of another; 0 where the template has no
    {reasoning}.
    """
    if "{reasoning}" not in chat.TEMPLATES.get(template, template):
        return np.zeros(len(texts), np.int32)
    return np.array(chat.count_tokens(texts, layout), np.int32)


def _ifd(pool, alone, with_prompt, direct) -> np.ndarray:
    """(n,) float64; both losses are over the tokens that the completion alone can score."""
    out = np.full(len(pool), np.nan)
    for i, (row, short) in enumerate(zip(pool, alone, strict=True)):
        if short is not None:
            over = "loss" if short.answer_tokens == row.answer_tokens else "rest"
            given, without = with_prompt[row.example_id][over], direct[row.example_id]["loss"]
            out[i] = np.exp(given - without)
    return out


def _embed(context, model, targets) -> np.ndarray:
    """(Q, D) float32."""

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


@dataclasses.dataclass(frozen=True)
class Pass:
    """The journal's entry of each example id, and the tokens that an earlier call read."""

    entries: Mapping[str, Mapping[str, Any]]
    resumed_tokens: int


def _with_prompt(context, model, pool, directions) -> Pass:
    placement = context.placement
    step = placement.compile(functools.partial(conditional, cfg=model.cfg), rows=True)
    placed = placement.replicate(directions)

    def entry(out, k):
        cosines = out.cosines[k].tolist()
        return {"loss": float(out.loss[k]), "rest": float(out.rest[k]), "cosines": cosines}

    return _journaled(context, "given", pool, lambda b: step(model.params, placed, b), entry)


def _direct(context, model, alone) -> Pass:
    losses = functools.partial(loss.example_losses, cfg=model.cfg, reduction="mean")
    step = context.placement.compile(lambda params, batch: losses(params, batch=batch), rows=True)

    def entry(out, k):
        return {"loss": float(out[k])}

    return _journaled(context, "alone", alone, lambda b: step(model.params, b), entry)


def _journaled(context, name, rows, step: Callable, entry: Callable) -> Pass:
    """Runs a pass; entry(outputs, place in the batch) is what is kept of an example."""
    with artifacts.Journal(context.path(f"{PARTIAL}/{name}.jsonl")) as journal:
        done = {kept["id"] for kept in journal.entries}
        for group, out in _run(context, f"model scores, {name}", rows, step, done):
            made = [{"id": rows[i].example_id, **entry(out, k)} for k, i in enumerate(group)]
            for kept in made:
                values = [kept["loss"], kept.get("rest", 0), *kept.get("cosines", ())]
                _check_finite(context, f"loss or embedding of example {kept['id']!r}", values)
            journal.extend(made)
        entries = {kept["id"]: kept for kept in journal.entries}
    return Pass(entries, sum(len(row.input_ids) for row in rows if row.example_id in done))


def _run(context, name, rows, step, done):
    """Yields (indices, outputs as numpy arrays) of the batches that hold a row which is not done;
    the next is dispatched before the last is fetched.
    """
    placement = context.placement
    planned = batches.plan(rows, context.config.influence.batch_tokens, placement.rows_multiple)
    groups = [g for g in planned if any(rows[i].example_id not in done for i in g.indices)]
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
