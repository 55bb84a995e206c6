"""What the TPU's own compiler says of the programs, without a TPU: `make pods`, in its own venv.

The name keeps it out of the other tests: it needs libtpu, and about half a minute a program.
"""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SLICES = (
    "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:16x16", "v6e:2x4", "v6e:4x4",
    "v6e:8x8", "v6e:16x16", "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8",
    "v5p:8x8x8",
)  # fmt: skip
MESHES = f"""
from diq_jax.pods import topology
topology.set_environment()
from diq_jax.run import sharding
for name in {SLICES}:
    topology.check(name)
    found = topology.devices(name)
    for model in (1, 2, 4, 8, 16, 32):
        if len(found) % model == 0:
            mesh = sharding.make_mesh(found, len(found) // model, model)
            assert mesh.devices.shape == (len(found) // model, model), (name, model)
print("all")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=400
    )


def plan(programs: str, shape: str, topology: str, mesh: str, rows: int) -> list[dict]:
    flags = [f"--shape={shape}", f"--topology={topology}", f"--mesh={mesh}", f"--rows={rows}"]
    flags += ["--tokens=1024", f"--programs={programs}", "--json"]
    ended = run("-m", "diq_jax", "plan", *flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)["rows"]


def test_every_slice_holds_a_mesh():
    ended = run("-c", MESHES)
    assert ended.stdout == "all\n", ended.stderr[-2000:]


@pytest.mark.parametrize(
    ("program", "shape", "topology", "mesh"),
    [
        ("exact", "llama31_70b", "v5e:2x4", "1x8"),  # parameters and a direction: 33 GiB
        ("full_step", "llama31_8b", "v5e:2x2", "1x4"),  # 18 bytes a parameter: 34 GiB
    ],
)
def test_what_cannot_fit_is_refused(program, shape, topology, mesh):
    [row] = plan(program, shape, topology, mesh, rows=1)
    assert not row["fits"] and row["gib_per_chip"] > 16 and "of HBM" in row["error"]


def test_what_fits_stays_as_small():
    """GiB a chip, milliseconds by the compiler's estimate and collectives, each with 5 % of room:
    the compiler gives the same numbers every time.
    """
    most = {
        "exact": (3.83, 204, 525),
        "exact16": (2.23, 185, 1100),
        "lora_step": (4.67, 285, 951),
        "factored": (4.43, 279, 1209),
    }
    rows = plan(",".join(most), "llama31_8b", "v5e:2x4", "1x8", rows=4)
    for row, limits in zip(rows, most.values(), strict=True):
        collectives = sum(count for count, _ in row["collectives"].values())
        found = row["gib_per_chip"], row["est_ms"], collectives
        assert row["fits"] and all(x <= 1.05 * y for x, y in zip(found, limits, strict=True)), row
