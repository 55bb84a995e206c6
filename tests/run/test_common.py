"""Config, artifacts, metrics and trees."""

import bootstrap
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diq_jax import config, errors, stats, trees
from diq_jax.run import artifacts


def changed(**fields):
    c = config.default()
    c.model.path = "x"
    for name, value in fields.items():
        *sections, field = name.split("__")
        node = c
        for section in sections:
            node = node[section]
        node[field] = value
    return c


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"selection__retention_ratio": 0.0}, r"retention_ratio must be in \(0, 1\]; got 0\.0"),
        ({"selection__retention_ratio": float("nan")}, "must be finite"),
        ({"model__dtype": "float16"}, "model.dtype must be one of float32, bfloat16"),
        ({"finetune__accumulation_steps": 3}, "must divide batch_size 8"),
        ({"parallel__strategy": "pmap", "parallel__model": 2}, "parallel.model must be 1"),
        ({"difficulty__percentile": 101.0}, "percentile must be at most 100; got 101"),
        ({"selection__quadrant_order": "1,2,2,4"}, r"1, 2, 3 and 4 in some order"),
        ({"selection__source_cap": 0.0}, r"source_cap must be in \(0, 1\]"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(errors.UserError, match=message):
        config.resolve(changed(**fields))


def test_the_config_is_locked():
    with pytest.raises(AttributeError, match="retention_ratio"):
        config.default().selection.retention_rato = 0.1


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(RuntimeError), artifacts.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_the_same_bytes_every_time(tmp_path):
    columns = {"id": ["a", "b"], "x": np.array([1.5, 2.5], np.float32)}
    for name in ("a.parquet", "b.parquet"):
        artifacts.write_table(tmp_path / name, columns)
    assert artifacts.sha256(tmp_path / "a.parquet") == artifacts.sha256(tmp_path / "b.parquet")


def test_metrics_against_scipy_and_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30)).round(1)
    assert stats.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert stats.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert np.isnan(stats.pearson(x, np.ones(30)))
    # Weights (i - j)^2: observed 1 (one pair off by one). Chance: labels 1 1 2, predictions 1 2 2,
    # so 2/3 of labels are 1 and 1/3 of predictions are: 3 * (2/3 * 2/3 + 1/3 * 1/3) = 5/3.
    assert stats.quadratic_kappa([1, 1, 2], [1, 2, 2], 2) == pytest.approx(1 - 1 / (5 / 3))
    low, high = bootstrap.bootstrap_interval(x, lambda v: v.mean(axis=1), 2000, 0)
    half = 1.96 * x.std() / np.sqrt(30)
    assert low == pytest.approx(x.mean() - half, abs=0.08)
    assert high == pytest.approx(x.mean() + half, abs=0.08)


def test_krippendorff_alpha_by_hand_and_as_published():
    nan = np.nan
    # Units 1 1, 1 2, 2 2: one of three pairs disagrees, observed 2/6 (both directions, 6 ratings);
    # of 6 * 5 ordered pairs of the ratings 1 1 1 2 2 2, 18 differ: alpha = 1 - (2/6) / (18/30).
    by_hand = [[1, 1, 2], [1, 2, 2]]
    for scale in ("ordinal", "interval"):
        assert stats.krippendorff_alpha(by_hand, scale) == pytest.approx(1 - (2 / 6) / (18 / 30))
    # The reliability data of section C of the 2011 note, and what it gives for both scales.
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    assert stats.krippendorff_alpha(ratings, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert stats.krippendorff_alpha(ratings, "interval") == pytest.approx(0.849, abs=5e-4)
    assert stats.krippendorff_alpha([[1, 5], [1, 5]], "ordinal") == 1
    assert np.isnan(stats.krippendorff_alpha([[1, 1], [1, nan]], "ordinal"))


def test_partition_and_combine_are_inverse():
    tree = {"a": {"x": jnp.ones(2), "y": jnp.zeros(3)}, "b": None}
    chosen, rest = trees.partition(tree, {"a/x"}.__contains__)
    assert list(trees.named_leaves(chosen)) == ["a/x"]
    assert list(trees.named_leaves(rest)) == ["a/y"]
    both = trees.combine(chosen, rest)
    assert list(trees.named_leaves(both)) == ["a/x", "a/y"] and both["b"] is None
