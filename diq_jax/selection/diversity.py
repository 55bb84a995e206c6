"""Diverse orders from gradients alone: farthest first, and greedy facility location.

Both read the cosines of all pairs of gradients, (n, n) float32: n^2 P multiplications and 4 n^2
bytes, 1.6 GB at methods.MOST_ROWS. There, with P = 1024 and rows around 50 centres, two busy CPU
cores took 36 s for the cosines, 2 s for farthest first and 31 s for facility location. Neither
order depends on targets or difficulty. A tie goes to the smaller example id: the order of the file
changes nothing.
"""

import heapq

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_ROWS = 1024  # rows of one product on the device


@jax.jit
def _products(block, rows):
    return jnp.matmul(block, rows.T, precision=jax.lax.Precision.HIGHEST)


def orders(rows: np.ndarray, id_order: np.ndarray) -> dict[str, np.ndarray]:
    """Computes each diverse method's scores: a row's place, (n,) int32, and what it added.

    Args:
        rows: (n, P) float32 of length 1 (or 0), in any order.
        id_order: (n,) the place of each row in the order of ids.
    """
    between, found = cosines(rows[np.argsort(id_order)]), {}
    for name, greedy, gain in (
        ("k_center", k_center, "distance"),
        ("facility_location", facility_location, "gain"),
    ):
        order, gains = greedy(between)
        places = np.empty(len(rows), np.int32)
        places[order] = np.arange(len(rows))
        found |= {name: places[id_order], f"{name}_{gain}": gains[id_order]}
    return found


def cosines(rows: np.ndarray) -> np.ndarray:
    """Computes the cosines of all pairs of rows (n, P) float32 of length 1 (or 0): (n, n)."""
    placed = jnp.asarray(rows)
    out = np.empty((len(rows), len(rows)), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        out[start:stop] = _products(placed[start:stop], placed)
    return out


def k_center(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders rows farthest first, by 1 - cosine (arXiv 1708.00489), from the one nearest the mean.

    Returns:
        (order (n,), the distance of each when it was picked (n,) float32, nan for the first).
    """
    n = len(cosines)
    order, distance = np.empty(n, np.int64), np.full(n, np.nan, np.float32)
    nearest = np.full(n, np.inf, np.float32)
    picked = int(np.argmax(cosines.sum(axis=1, dtype=np.float64)))
    for place in range(n):
        order[place] = picked
        nearest = np.minimum(nearest, 1 - cosines[picked])
        nearest[picked] = -np.inf
        if place + 1 < n:
            picked = int(np.argmax(nearest))
            distance[picked] = nearest[picked]
    return order, distance


def facility_location(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders rows greedily for f(A) = sum over rows i of the largest max(0, cosine) with A.

    f is monotone and submodular, so a budget's rows reach at least 1 - 1/e of the best f. Gains
    only fall, so a row is looked at again only where its last gain is the largest (lazily): n to
    about n^2 products of n numbers in all, and the greedy goes on to the last row.

    Returns:
        (order (n,), what each added to f when it was picked (n,) float64).
    """
    n = len(cosines)
    covered = np.zeros(n, np.float32)

    def gain(j):
        return float(np.maximum(cosines[j] - covered, 0).sum(dtype=np.float64))

    # (minus the last known gain, row, how many were picked when it was known)
    heap = [(-gain(j), j, 0) for j in range(n)]
    heapq.heapify(heap)
    order, gains = [], np.zeros(n)
    while heap:
        negative, j, known = heap[0]
        if known < len(order):
            heapq.heapreplace(heap, (-gain(j), j, len(order)))
            continue
        heapq.heappop(heap)
        order.append(j)
        gains[j] = -negative
        covered = np.maximum(covered, cosines[j])
    return np.array(order), gains
