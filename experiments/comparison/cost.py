"""What selecting and training cost: FLOPs by formula, seconds as measured.

A product of (m, k) and (k, n) is 2 m k n FLOPs; norms, softmax, embeddings and padding are left
out. An example of T tokens, A of them scored, costs in a forward pass

    2 P T       the linear layers, P their weights (without embedding and head)
    2 N H C T^2 attention: N layers of H heads of C dims, two products, of which causal masking
                leaves half
    2 D V A     the vocabulary head, which meets answer positions only

and other passes are counted in forward passes of these three parts (PASSES). A backward pass costs
one more product for the inputs and one more for the weights of a layer; attention and the head are
also computed again. Forward mode along all parameters has three products (xW, x'W, xW'), along thin
ones two: measured on a CPU, 2.8 and 2.0 passes (docs/results.md).

Not counted: random projections, the greedy orders and what else the stage `selection` does; a pass
over an encoder counts 2 x its matrices x tokens, three times that where it is trained. Seconds are
those of stage.json, for all tokens at the rate of the last call where a stage was resumed.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from diq_jax import config, influence_config
from diq_jax.data import encoded as encoded_lib
from diq_jax.data import example
from diq_jax.influence import kinds
from diq_jax.models import checkpoint, encoder, lora
from diq_jax.models import config as model_config
from diq_jax.run import records
from diq_jax.selection import methods

PASSES = {  # linear layers, attention, head
    "forward": (1, 1, 1),
    "jvp": (3, 3, 3),
    "thin_jvp": (2, 3, 2),
    "gradient": (3, 4, 4),
    "thin_gradient": (2, 4, 3),
}
REMAT = (1, 1, 0)  # what recomputing the layers adds to a gradient
PRODUCERS: dict[str, str] = dict.fromkeys(  # the stage of a part
    ("store", "by_target", "color", "temp"), "influence"
)
GAUSS_NEWTON_PASSES = 5  # of one product with the Gauss-Newton matrix


def example_flops(
    cfg: model_config.DecoderConfig, tokens, answers, kind: str, remat: bool = False
) -> np.ndarray:
    """FLOPs of one pass over each example.

    Args:
        tokens, answers: (n,) of each example.
        kind: of PASSES.

    Returns:
        (n,) float64.
    """
    tokens, answers = np.asarray(tokens, np.float64), np.asarray(answers, np.float64)
    weights = sum(n * n_in * n_out for n, n_in, n_out in lora.linear_shapes(cfg).values())
    passes = np.add(PASSES[kind], REMAT if remat else 0)
    heads = cfg.num_layers // cfg.period * cfg.num_heads * cfg.head_dim
    return (
        passes[0] * 2 * weights * tokens
        + passes[1] * 2 * heads * tokens**2
        + passes[2] * 2 * cfg.model_dim * cfg.vocab_size * answers
    )


def total_flops(cfg, rows: Sequence[example.Encoded], kind: str, remat: bool = False) -> float:
    """FLOPs of one pass over all rows."""
    tokens = [len(row.input_ids) for row in rows]
    answers = [row.answer_tokens for row in rows]
    return float(example_flops(cfg, tokens, answers, kind, remat).sum())


def influence_flops(cfg, settings: influence_config.Influence, pool, targets) -> float:
    """Of the stage influence: the warm-up, the targets' gradients, and a score for each example."""
    thin = "thin_" if settings.parameters == "lora" else ""
    if settings.engine == "exact":
        kind = f"{'thin_' if settings.direction_rank else thin}jvp"
    else:
        kind = "thin_gradient" if settings.engine == "factored" else f"{thin}gradient"
    remat = settings.remat and settings.engine != "exact"
    points = max(settings.warmup.epochs, 1)
    flops = points * total_flops(cfg, pool, kind, remat)
    if not settings.direction.startswith(kinds.PEFT):
        flops += points * total_flops(cfg, targets, f"{thin}gradient")
    share = settings.warmup.fraction * settings.warmup.epochs
    flops += share * total_flops(cfg, pool, f"{thin}gradient")
    if settings.direction == "gauss_newton":
        rows = min(settings.gauss_newton.examples, len(pool)) / len(pool)
        passes = GAUSS_NEWTON_PASSES * settings.gauss_newton.iterations  # at most
        flops += rows * passes * total_flops(cfg, pool, "forward")
    return flops


def model_score_flops(cfg, pool, targets) -> float:
    """Counts difficulty/model_scores.parquet: completions with and without prompts, targets."""
    answers = np.array([row.answer_tokens for row in pool])
    alone = float(example_flops(cfg, answers, answers, "forward").sum())
    return total_flops(cfg, [*pool, *targets], "forward") + alone


def needs(method: str) -> tuple[str, ...]:
    """What has to be computed over the pool before a selection method can sort it."""
    return tuple(dict.fromkeys(PRODUCERS.get(part, part) for part in methods.parts(method)))


def selection_costs(workdir: pathlib.Path, verified: bool = True) -> dict[str, dict[str, float]]:
    """{part of `needs`: {flops, seconds}} of a workdir whose stages up to selection are done."""
    pool, targets = (
        encoded_lib.from_table(records.table(workdir, f"prepare/{name}.parquet", verified))
        for name in ("pool", "targets")
    )
    made = {name: records.finished(workdir, name) for name in ("difficulty", "influence")}
    settings = {s: records.config_of(record, workdir / s) for s, record in made.items()}
    cfg = decoder_config(settings["influence"])
    scores = made["difficulty"].get("model_scores", {})
    encoder = {
        name: made["difficulty"].get(name, 0) - scores.get(name, 0)
        for name in ("seconds", "tokens", "resumed_tokens")
    }
    return {
        "difficulty": {
            "flops": _encoder_flops(settings["difficulty"].difficulty, encoder["tokens"]),
            "seconds": _seconds(encoder),
        },
        "model_scores": {
            "flops": model_score_flops(cfg, pool, targets) if scores else 0.0,
            "seconds": _seconds(scores),
        },
        "influence": {
            "flops": influence_flops(cfg, settings["influence"].influence, pool, targets),
            "seconds": _seconds(made["influence"]),
        },
    }


def decoder_config(cfg: config.Config) -> model_config.DecoderConfig:
    source = checkpoint.open_checkpoint(cfg.model.path, "model.path")
    return model_config.decoder_config(source.config, "model.path")


def _encoder_flops(settings: config.Difficulty, tokens: int) -> float:
    if tokens == 0:  # labels came with the pool
        return 0.0
    field = "difficulty.encoder"
    cfg = encoder.encoder_config(checkpoint.open_checkpoint(settings.encoder, field).config, field)
    layer = 4 * cfg.model_dim**2 + 2 * cfg.model_dim * cfg.ffn_dim
    passes = 3 if settings.epochs else 1
    return 2.0 * passes * (settings.layers or cfg.num_layers) * layer * tokens


def _seconds(record: dict[str, Any]) -> float:
    seconds, tokens = record.get("seconds", 0.0), record.get("tokens", 0)
    done_now = tokens - record.get("resumed_tokens", 0)
    return seconds * tokens / done_now if done_now > 0 else seconds
