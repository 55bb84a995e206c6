r"""Says what a run needs of a TPU slice, from the TPU's own compiler, without a TPU.

    diq plan --shape=llama31_8b --topology=v5e:2x4 --mesh=1x8 --rows=4 --tokens=1024
    diq plan --config=huatuo_llama31_8b --topology=v6e:4x4 --mesh=16x1 --rows=4 --tokens=1024 \
        --programs=projected_lora,lora_step --examples=19000 --json

Nothing is executed: every program takes about a minute of one core and 1.5 GB, whatever the number
of chips, and one that does not fit is refused in seconds. The settings are those of --config, or
the defaults in bfloat16. The model is that of --config, of which only config.json is read, or with
--shape one of those below.
est ms is the compiler's estimate and the time of all collectives as rings, one after the other: a
bound that compares designs, not a measured speed. Needs libtpu, the extra `pods`.

    diq plan --measured --shape=llama31_8b --rows=4 --tokens=1024 --programs=exact,lora_step

--measured runs the programs on the devices that are here, with random weights, and gives the median
of three batches instead, and its fewest FLOPs as a share of what large matrix products reach here.
"""

import json
import re
from typing import Any

from absl import flags

from diq_jax import config, errors
from diq_jax.commands import cli
from diq_jax.pods import topology

CONFIG = cli.define_config()
SHAPE = flags.DEFINE_string(
    "shape",
    "",
    "A model: llama31_8b, llama31_70b, qwen3_8b, qwen3_32b, gemma3_27b or qwen35_27b.",
)
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips and their shape, such as v5e:2x4.")
MESH = flags.DEFINE_string(
    "mesh", "", "DATAxMODEL; empty = parallel.data and parallel.model of --config, or all x 1."
)
MEASURED = flags.DEFINE_bool("measured", False, "Run three batches here in place of compiling.")
ROWS = flags.DEFINE_integer("rows", 4, "Of a batch, on each data shard.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", 1024, "Of a row.", lower_bound=16)
PROGRAMS = flags.DEFINE_string(
    "programs",
    "",
    "Comma-separated: loss, exact, exact16, exact_lora, projected_lora, projected_lora_sparse, "
    "factored, mean_gradient, lora_step, full_step; empty = what --config runs, or exact.",
)
EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "Also gives the hours for so many rows of --tokens; 0 = no hours.", lower_bound=0
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of a table.")


def main() -> None:
    """Compiles, and prints a row for each program."""
    if MEASURED.value and TOPOLOGY.value:
        raise errors.UserError("--measured runs on the devices that are here: no --topology.")
    cli.require(*(() if MEASURED.value else (TOPOLOGY,)))
    if not (SHAPE.value or CONFIG.value):
        raise errors.UserError("--shape or --config must be given: it says which model it is.")
    slice_name = str(TOPOLOGY.value)
    if not MEASURED.value:
        topology.check(slice_name)
        topology.set_environment()
    cfg = cli.read_config(CONFIG) if CONFIG.value else _plain()
    data, model = _mesh(cfg)
    names = [name.strip() for name in PROGRAMS.value.split(",") if name.strip()]

    import jax

    from diq_jax.pods import measured, plan, programs  # seconds to import

    for name in names:
        errors.check_choice("--programs", name, programs.PROGRAMS)
    if SHAPE.value:
        errors.check_choice("--shape", SHAPE.value, plan.SHAPES)
        shape = plan.SHAPES[SHAPE.value]
    else:
        shape = plan.model_shape(cfg.model.path)
    names = names or (programs.of_run(cfg) if CONFIG.value else ["exact"])
    batch = (ROWS.value, TOKENS.value)
    if MEASURED.value:
        chips = data * model or len(jax.devices())
        made = measured.rows(cfg, shape, (data, model), batch, names)
    else:
        place = plan.open_slice(slice_name, data, model)
        chips = data * model or len(place.devices)
        made = plan.rows(cfg, shape, place, batch, names)
    found = []
    for row in made:
        if EXAMPLES.value:
            row["hours"] = _hours(row, chips)
        found.append(row)
    print(json.dumps({"rows": found}) if JSON.value else plan.table(found))


def _plain() -> config.Config:
    """The defaults with parameters in bfloat16, as they are on a TPU."""
    tree = config.default()
    tree.update({"model": {"path": "shape", "dtype": "bfloat16"}})
    return config.resolve(tree)


def _mesh(cfg: config.Config) -> tuple[int, int]:
    if not MESH.value:
        return cfg.parallel.data, cfg.parallel.model
    found = re.fullmatch(r"(\d+)x(\d+)", MESH.value)
    if not found or "0" in found.groups():
        raise errors.UserError(f"--mesh must be DATAxMODEL, such as 1x8; got {MESH.value!r}.")
    return int(found[1]), int(found[2])


def _hours(row: dict[str, Any], chips: int) -> float | None:
    speed = row["tokens_per_s_per_chip"]
    return round(EXAMPLES.value * TOKENS.value / (speed * chips) / 3600, 3) if speed else None
