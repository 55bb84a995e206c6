"""TPU slices that are not here: libtpu describes them, and its compiler compiles for them."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

from diq_jax import errors


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU chip can do, as its maker says.

    Attributes:
        flops: of bfloat16 products, a second.
        hbm_gib: memory.
        link_bytes: a second, out over all links between chips.
        clock: cycles a second.
    """

    flops: float
    hbm_gib: float
    link_bytes: float
    clock: float


CHIPS = {
    "v4": Chip(275e12, 32, 300e9, 1.05e9),
    "v5e": Chip(197e12, 16, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32, 448e9, 1.75e9),
}
# No TPU is opened and nobody is asked where this machine is.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process dies on libtpu's lock file
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def check(name: str) -> Chip:
    """Returns the chip of a topology such as v5e:2x4, without importing jax.

    Raises:
        UserError: it is not written so, the kind of chip is not known, or libtpu is missing.
    """
    kind, _, shape = name.partition(":")
    ok = re.fullmatch(r"\d+(x\d+){1,2}", shape)
    errors.check("--topology", ok, "like v5e:2x4 or v5p:2x2x4 (chip:shape)", name)
    errors.check_choice("--topology: the chip", kind, CHIPS)
    if importlib.util.find_spec("libtpu") is None:
        raise errors.UserError(
            "diq plan compiles with libtpu, which is not installed (it needs no TPU): "
            f"pip install --no-deps '{wanted()}'."
        )
    return CHIPS[kind]


def wanted() -> str:
    """Returns the libtpu that the installed jax asks for, as pip reads it."""
    for requirement in importlib.metadata.requires("jax") or ():
        if requirement.startswith("libtpu"):
            return requirement.partition(";")[0].strip()
    return "libtpu"


def set_environment() -> None:
    """Sets ENVIRONMENT; before jax is imported."""
    os.environ.update(ENVIRONMENT)


def devices(name: str) -> list[Any]:
    """Returns the devices of a slice; `set_environment` must have been called.

    Raises:
        UserError: there is no such slice.
    """
    import jax
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as e:
        said = " ".join(str(e).split())[:200]
        raise errors.UserError(f"--topology: there is no slice {name!r}: {said}") from None
    return list(found.devices)
