"""Batches: every example once, few shapes, little padding, and the right positions scored."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from diq_jax.data import batches
from diq_jax.data import example as example_lib


def encoded(example_id, length, answers):
    """Tokens 1, 2, ..., the last `answers` of them scored."""
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = np.where(np.arange(length) >= length - answers, ids, -100).astype(np.int32)
    return example_lib.Encoded(example_id, ids, labels)


def padding_share(groups, pool):
    """The share of padding among all tokens of the batches, padding rows included."""
    real = sum(len(pool[i].input_ids) for group in groups for i in group.indices)
    return 1 - real / sum(group.rows * group.tokens for group in groups)


@st.composite
def pools(draw):
    lengths = draw(st.lists(st.integers(2, 3000), min_size=1, max_size=60))
    return [encoded(f"e{i}", n, draw(st.integers(1, n - 1))) for i, n in enumerate(lengths)]


@hypothesis.settings(deadline=None)
@hypothesis.given(pools(), st.sampled_from([1, 100, 4096]), st.integers(1, 4), st.integers(1, 8))
def test_plan_takes_every_example_once(pool, batch_tokens, rows_multiple, max_shapes):
    groups = batches.plan(pool, batch_tokens, rows_multiple, max_shapes)
    taken = list(itertools.chain.from_iterable(group.indices for group in groups))
    assert sorted(taken) == list(range(len(pool)))
    shapes = {(group.rows, group.tokens, group.answers) for group in groups}
    assert len(shapes) <= max_shapes and len({tokens for _, tokens, _ in shapes}) == len(shapes)
    for group in groups:
        assert group.rows % rows_multiple == 0
        rows = group.rows // rows_multiple  # of a shard
        assert rows == 1 or rows * group.tokens <= batch_tokens
        assert max(len(pool[i].input_ids) for i in group.indices) <= group.tokens
        assert max(pool[i].answer_tokens for i in group.indices) <= group.answers <= group.tokens
    assert all(len(group.indices) == group.rows for group in groups[:-1])
    lengths = [(len(pool[i].input_ids), pool[i].example_id) for i in taken]
    assert lengths == sorted(lengths)


@hypothesis.settings(deadline=None)
@hypothesis.given(pools(), st.integers(0, 99))
def test_plan_does_not_depend_on_the_order_of_the_input(pool, seed):
    shuffled = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]

    def ids(rows):
        return [[rows[i].example_id for i in group.indices] for group in batches.plan(rows, 4096)]

    assert ids(pool) == ids(shuffled)


def test_edges_by_hand():
    # One edge: 3 x 112 = 336 tokens. Two: 2 x 48 + 112 = 208, and 48 is the least edge over 40.
    assert batches.bucket_edges([40, 40, 100], 1) == [112]
    assert batches.bucket_edges([40, 40, 100], 2) == [48, 112]
    assert batches.bucket_edges([5], 8) == [32]
    assert batches.bucket_edges([2048], 8) == [2048]
    with pytest.raises(ValueError, match="max_shapes"):
        batches.bucket_edges([5], 0)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.integers(1, 3))
def test_edges_are_the_best_of_all_choices(lengths, max_shapes):
    grid = [*range(32, 513, 16), *range(544, 1025, 32)]

    def padded(edges):
        return sum(min(edge for edge in edges if edge >= length) for length in lengths)

    last = min(edge for edge in grid if edge >= max(lengths))
    shorter = [edge for edge in grid if edge < last]
    choices = [
        [*choice, last]
        for count in range(max_shapes)
        for choice in itertools.combinations(shorter, count)
    ]
    edges = batches.bucket_edges(lengths, max_shapes)
    assert edges == sorted(set(edges)) and edges[-1] == last and len(edges) <= max_shapes
    assert padded(edges) == min(map(padded, choices))


def test_small_sets_are_not_mostly_padding():
    pool = [encoded(f"e{i}", 100, 3) for i in range(20)]
    # 2048 tokens hold 18 rows of 112: two batches of 10, and no padding rows.
    assert [group.rows for group in batches.plan(pool, 2048)] == [10, 10]
    assert [group.rows for group in batches.plan(pool[:3], 2048)] == [3]
    assert padding_share(batches.plan(pool[:3], 2048), pool) == pytest.approx(12 / 112)
    assert [group.rows for group in batches.plan(pool[:3], 2048, rows_multiple=8)] == [8]
    assert batches.plan([], 2048) == []


def test_make_batch():
    short, long = encoded("s", 3, 1), encoded("l", 4, 2)
    batch = batches.make_batch([short, long], 3, 5, 2)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 0, 0], [1, 2, 3, 4, 0], [0] * 5])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0] * 5])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5])
    np.testing.assert_array_equal(batch.loss_positions, [[1, 0], [1, 2], [0, 0]])
    np.testing.assert_array_equal(batch.loss_labels, [[3, 0], [3, 4], [0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[1, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(batch.is_padding, [False, False, True])
    types = {name: getattr(batch, name).dtype for name in ("tokens", "loss_labels", "loss_mask")}
    assert types == {"tokens": np.int32, "loss_labels": np.int32, "loss_mask": np.float32}


@hypothesis.settings(deadline=None)
@hypothesis.given(pools())
def test_a_batch_scores_exactly_the_labels(pool):
    for indices, batch in batches.iterate(batches.plan(pool, 4096), pool):
        for row, i in enumerate(indices):
            count = int(batch.loss_mask[row].sum())
            at = batch.loss_positions[row, :count]
            np.testing.assert_array_equal(batch.tokens[row, at + 1], batch.loss_labels[row, :count])
            scored = pool[i].labels[1:][pool[i].labels[1:] != -100]
            np.testing.assert_array_equal(batch.loss_labels[row, :count], scored)
            np.testing.assert_array_equal(
                batch.tokens[row][batch.segment_ids[row] == 1], pool[i].input_ids
            )
        assert batch.is_padding.sum() == len(batch.is_padding) - len(indices)
        assert not batch.loss_mask[batch.is_padding].any()


def test_the_first_label_is_never_scored():
    example = example_lib.Encoded("x", np.arange(3), np.array([0, -100, 2]))
    assert example.answer_tokens == 1
    assert batches.make_batch([example], 1, 3, 1).loss_labels.tolist() == [[2]]


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 3, 8), (2, 8, 1)])
def test_what_does_not_fit_raises(shape):
    with pytest.raises(ValueError, match="fit"):
        batches.make_batch([encoded("a", 4, 2), encoded("b", 4, 2)], *shape)


@pytest.mark.parametrize("rows", [256, None])
def test_padding_on_a_real_pool(shared_data, rows):
    # Four characters a token; with SmolLM2's own tokens the share is about half a percent lower.
    with open(shared_data / "pool" / "medical_reasoning.jsonl", encoding="utf-8") as f:
        pool = [json.loads(line) for line in f][:rows]
    pool = [
        encoded(
            row["id"],
            min(2048, 40 + len(row["question"] + row["reasoning"] + row["answer"]) // 4),
            len(row["answer"]) // 4 + 1,
        )
        for row in pool
    ]
    groups = batches.plan(pool, 2048)
    assert padding_share(groups, pool) < 0.15
    assert len({(group.rows, group.tokens, group.answers) for group in groups}) <= 8
