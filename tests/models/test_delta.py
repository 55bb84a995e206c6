"""Gated delta layers: the chunks are the recurrence, and segments begin anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diq_jax import errors
from diq_jax.models import config, decoder, delta

HYBRID = tiny.HF_CONFIG | {
    "model_type": "qwen3_5_text", "num_hidden_layers": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
}  # fmt: skip
SEGMENTS = np.repeat([[1, 2, 2, 3, 0], [0, 1, 1, 1, 1]], [4, 9, 3, 8, 5], axis=1)


def one_by_one(q, k, v, decay, step, segment_ids, state):
    """The recurrence as it is written, token by token."""
    out = []
    for t in range(q.shape[1]):
        if t:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            state = jnp.where(same[:, None, None, None], state, 0)
        state = state * jnp.exp(decay[:, t])[..., None, None]
        missing = v[:, t] - jnp.einsum("bhk,bhkv->bhv", k[:, t], state)
        added = k[:, t, ..., None] * (step[:, t, ..., None] * missing)[:, :, None]
        state = state + added
        out.append(jnp.einsum("bhk,bhkv->bhv", q[:, t], state))
    return jnp.stack(out, axis=1), state


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_chunks_are_the_recurrence_and_so_are_their_derivatives(monkeypatch, size):
    """29 tokens of rows whose segments begin inside of chunks and at their borders."""
    monkeypatch.setattr(delta, "CHUNK", size)
    key = jax.random.split(jax.random.key(0), 6)
    q, k = (jax.random.normal(key, (2, 29, 3, 4)) / 2 for key in key[:2])
    v, state = jax.random.normal(key[2], (2, 29, 3, 5)), jax.random.normal(key[3], (2, 3, 4, 5))
    decay, step = (jax.random.uniform(key, (2, 29, 3)) for key in key[4:])
    arguments = q, k, v, -decay, step, state

    def both(rule):
        def run(q, k, v, decay, step, state):
            return rule(q, k, v, decay, step, SEGMENTS, state)

        def total(*arguments):
            return sum(jnp.sum(jnp.sin(x)) for x in run(*arguments))

        tangent = jax.jit(lambda *x: jax.jvp(run, x, x)[1])(*arguments)
        return jax.jit(run)(*arguments), jax.jit(jax.grad(total, range(6)))(*arguments), tangent

    close(both(delta.delta_rule), both(one_by_one))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_segments_and_padding_do_not_reach_into_each_other(monkeypatch, padding):
    monkeypatch.setattr(delta, "CHUNK", 4)
    model = tiny.model(**tiny.APART["delta"])
    tokens, lengths = jnp.arange(17)[None], (6, 9, 2)

    def hidden(tokens, positions, segments):
        rows = (jnp.asarray(x, jnp.int32)[None] for x in (positions, segments))
        return decoder.apply(model.params, model.cfg, tokens, *rows)

    ends = np.cumsum(lengths)
    apart = [
        hidden(tokens[:, end - n : end], np.arange(n), np.ones(n))
        for n, end in zip(lengths, ends, strict=True)
    ]
    places = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat([1, 2, 3], lengths)
    pads = (3, 0) if padding == "left" else (0, 3)
    rows = (np.pad(x, pads) for x in (places, segments))
    packed = hidden(jnp.pad(tokens, ((0, 0), pads), constant_values=7), *rows)
    packed = packed[:, pads[0] : 17 + pads[0]]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=1e-5)


def test_no_derivative_passes_between_segments_or_back_in_time(monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", 4)
    model, segments = tiny.model(**tiny.APART["delta"]), np.repeat([[0, 1, 2, 3]], 5, axis=1)

    def at(embedding, t):
        params = model.params | {"embed": {"embedding": embedding}}
        tokens, places = jnp.arange(20)[None], jnp.tile(jnp.arange(5), 4)[None]
        return decoder.apply(params, model.cfg, tokens, places, segments)[0, t].sum()

    found = np.abs(jax.jit(jax.grad(at))(model.params["embed"]["embedding"], 13)).max(axis=1)
    assert found[10:14].min() > 1e-4
    np.testing.assert_array_equal(found[:10], 0)
    np.testing.assert_array_equal(found[14:], 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 6}, "full_attention_interval=None; it must be so many linear_atten"),
        ({"full_attention_interval": 1}, "full_attention_interval=1; it must be so many linear"),
        ({"layer_types": ["full_attention"] * 8}, "layer_types=.*; it must be so many linear"),
        ({"layer_types": ["linear_attention"] * 8}, "layer_types=.*; it must be so many linear"),
        ({"linear_num_value_heads": 3}, "=3; it must be a multiple of the 2 key heads"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0; it must be between 1 and"),
        ({"attn_output_gate": False}, "attn_output_gate=False; supported: True"),
    ],
)
def test_values_of_delta_layers_are_checked(change, message):
    cfg = config.decoder_config(HYBRID, "model.path")
    assert (cfg.period, cfg.delta.value_heads, cfg.delta.taps) == (4, 4, 4)
    with pytest.raises(errors.UserError, match=message):
        config.decoder_config(HYBRID | change, "model.path")
