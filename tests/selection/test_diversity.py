"""Greedy orders over cosines: by hand on five points, and against brute force."""

import itertools

import numpy as np
import pytest

from diq_jax.data import gradient_store
from diq_jax.selection import diversity

# Unit vectors of the plane at these angles, in degrees.
ANGLES = np.array([0.0, 10.0, 20.0, 90.0, 180.0])


def plane(angles):
    rows = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    return diversity.cosines(rows.astype(np.float32))


def random_cosines(seed, n):
    rows = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return diversity.cosines(gradient_store.unit(rows))


def coverage(cosines, rows):
    return np.maximum(cosines[list(rows)], 0).max(axis=0).sum()


def test_cosines_come_in_blocks_and_take_a_row_of_zeros(monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK_ROWS", 2)
    rows = np.array([[1, 0], [0, 0], [3, 4]], np.float32)
    got = diversity.cosines(gradient_store.unit(rows))
    np.testing.assert_allclose(got, [[1, 0, 0.6], [0, 0, 0], [0.6, 0, 1]], atol=1e-6)


def test_k_center_by_hand():
    # The sum of the five is (1 + .985 + .940 + 0 - 1, 0 + .174 + .342 + 1 + 0) = (1.925, 1.516), at
    # 38.2 degrees: nearest to 20. Farthest from 20 is 180 (160 away); then 90 (70 from 20); then 0
    # (20 from 20), and 10.
    total = np.exp(1j * np.radians(ANGLES)).sum()
    assert np.degrees(np.angle(total)) == pytest.approx(38.2, abs=0.1)
    order, distance = diversity.k_center(plane(ANGLES))
    np.testing.assert_array_equal(order, [2, 4, 3, 0, 1])
    expected = [1 - np.cos(np.radians(a)) for a in (20, 10, np.nan, 70, 160)]
    np.testing.assert_allclose(distance, expected, atol=1e-6)


def test_facility_location_by_hand():
    # Coverage of one row alone, negative cosines as 0:
    #   0: 1 + cos 10 + cos 20 + 0        = 2.925      10: 2 cos 10 + 1 + cos 80 = 3.143
    #   20: cos 20 + cos 10 + 1 + cos 70  = 3.267      90: cos 80 + cos 70 + 1   = 1.516
    #   180: 1 alone                      = 1
    # After 20: 180 adds 1; then 90 adds 1 - cos 70 = 0.658 where 0 and 10 add 1 - cos 20 = 0.060.
    order, gains = diversity.facility_location(plane(ANGLES))
    np.testing.assert_array_equal(order[:3], [2, 4, 3])
    np.testing.assert_allclose(gains[[2, 4, 3]], [3.267, 1.0, 0.658], atol=1e-3)
    assert gains.sum() == pytest.approx(5, abs=1e-5)  # all rows cover themselves in the end


@pytest.mark.parametrize("seed", range(5))
def test_lazy_is_the_plain_greedy(seed):
    cosines = random_cosines(seed, 12)
    covered, plain = np.zeros(12, np.float32), []
    for _ in range(12):
        found = np.maximum(cosines - covered[None], 0).sum(axis=1, dtype=np.float64)
        found[plain] = -1
        plain.append(int(np.argmax(found)))
        covered = np.maximum(covered, cosines[plain[-1]])
    order, gains = diversity.facility_location(cosines)
    np.testing.assert_array_equal(order, plain)
    for k in range(1, 13):
        assert gains[order[:k]].sum() == pytest.approx(coverage(cosines, order[:k]), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_greedy_orders_keep_their_bounds(seed, keep):
    """Facility location reaches 1 - 1/e of the best, farthest-first twice the best radius."""
    cosines = random_cosines(seed, 9)
    subsets = list(itertools.combinations(range(9), keep))
    order, _ = diversity.facility_location(cosines)
    best = max(coverage(cosines, rows) for rows in subsets)
    assert coverage(cosines, order[:keep]) >= (1 - 1 / np.e) * best

    # The bound of farthest-first is for a metric: the chord, which orders as 1 - cosine does.
    chords = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    radius = {rows: chords[list(rows)].min(axis=0).max() for rows in subsets}
    centers = tuple(sorted(diversity.k_center(cosines)[0][:keep]))
    assert radius[centers] <= 2 * min(radius.values()) + 1e-6


def test_ties_go_to_the_lower_index():
    for greedy in (diversity.k_center, diversity.facility_location):
        order, _ = greedy(np.ones((4, 4), np.float32))
        np.testing.assert_array_equal(order, [0, 1, 2, 3])
