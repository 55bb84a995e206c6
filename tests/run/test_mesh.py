"""A mesh on every TPU slice, from what libtpu says of its chips; moves between processes."""

import dataclasses
import itertools
import os
import socket

import forks
import pytest

from diq_jax.run import sharding

# The shapes that Google Cloud rents; v5p and v4 are three-dimensional, with one device a chip.
SLICES = {
    "TPU v5 lite": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "TPU v6 lite": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "TPU v5": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "8x8x8"),
    "TPU v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What mesh_utils reads of a device."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    process_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(kind: str, shape: str) -> list[Chip]:
    sizes = [int(n) for n in shape.split("x")]
    sizes += [1] * (3 - len(sizes))
    places = itertools.product(*(range(n) for n in reversed(sizes)))
    return [Chip(i, place[::-1], kind) for i, place in enumerate(places)]


@pytest.mark.parametrize("kind", SLICES)
def test_every_slice_holds_a_mesh_of_every_model_axis(kind):
    for shape in SLICES[kind]:
        found = chips(kind, shape)
        for model in (1, 2, 4, 8, 16, 32):
            if len(found) % model:
                continue
            grid = sharding.device_grid(found, len(found) // model, model)
            assert grid.shape == (len(found) // model, model), (shape, model)
            assert {chip.id for chip in grid.flat} == set(range(len(found)))


MOVES = """
import jax, numpy as np
from diq_jax.run import processes, sharding
processes.join()
mesh = sharding.make_mesh(jax.devices(), 2, 1)
rows, whole = (jax.sharding.NamedSharding(mesh, jax.P(axis)) for axis in ("data", None))
values = np.arange(6.0).reshape(2, 3)
split = sharding.put(values, rows)
assert sharding.put(split, rows) is split
for moved in (sharding.put(split, whole), sharding.put(sharding.put(split, whole), rows)):
    assert (sharding.whole(moved) == values).all()
print("equal")
"""


def test_between_processes_an_array_moves_only_where_it_has_to():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [forks.Running(["-c", MOVES], env | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    for out, err in [running.communicate(timeout=100) for running in both]:
        assert out.splitlines()[-1:] == ["equal"], err[-2000:]
