"""A mesh on every TPU slice, from what libtpu says of its chips; nothing is compiled."""

import dataclasses
import itertools

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
