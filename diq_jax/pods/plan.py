"""Compiles a run's programs for a TPU slice: whether they fit, their time, their collectives."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from diq_jax import config, errors
from diq_jax.pods import hlo, programs, topology

GIB = 2**30

# Published config.json values; everything a program's shape depends on.
_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 5e5, "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "hidden_act": "silu",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama31_8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama31_70b": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3_8b": _QWEN | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3_32b": _QWEN | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "gemma3_27b": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 5376,
        "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 168,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
    "qwen35_27b": {
        "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 5120,
        "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
        "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144, "hidden_act": "silu", "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        },
    },
}  # fmt: skip


def model_shape(path: str) -> dict[str, Any]:
    """Reads the config.json of model.path; of a hub id that file alone is downloaded.

    Raises:
        UserError: there is none.
    """
    import huggingface_hub

    from diq_jax.models import checkpoint, multimodal
    from diq_jax.run import reading

    if not re.fullmatch(checkpoint.HUB_ID, path) or pathlib.Path(path).exists():
        return checkpoint.open_checkpoint(path, "model.path").config
    name, _, revision = path.partition("@")
    try:
        file = huggingface_hub.hf_hub_download(name, checkpoint.CONFIG, revision=revision or None)
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as e:
        raise errors.UserError(
            f"model.path: config.json of {path!r} cannot be had from the hub ({type(e).__name__}); "
            f"give --shape, one of {', '.join(SHAPES)}."
        ) from None
    return multimodal.language_part(reading.read_record(pathlib.Path(file), {}), {}, path)[0]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for.

    Attributes:
        data, model: the mesh.
    """

    chip: topology.Chip
    devices: list[Any]
    data: int
    model: int


def open_slice(name: str, data: int, model: int) -> Slice:
    """Opens a topology and takes its first data x model chips; data 0 = all that `model` leaves.

    Raises:
        UserError: there is no such topology, or it has fewer chips.
    """
    chip, found = topology.check(name), topology.devices(name)
    data = data or max(len(found) // model, 1)
    if data * model > len(found):
        raise errors.UserError(
            f"--mesh={data}x{model} needs {data * model} chips; {name} has {len(found)}."
        )
    return Slice(chip, found[: data * model], data, model)


def rows(
    cfg: config.Config,
    hf_config: dict[str, Any],
    place: Slice,
    batch: tuple[int, int],
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yields the row of each program (docs/pods.md), as the compiler is done with it.

    Args:
        hf_config: the model's config.json.
        batch: rows and tokens on each data shard.
        names: keys of programs.PROGRAMS.

    Raises:
        UserError: the model is not supported, or the mesh does not divide it.
    """
    from diq_jax.models import config as model_config
    from diq_jax.run import devices, sharding

    shape = model_config.decoder_config(hf_config, "--shape")
    mesh = sharding.make_mesh(place.devices, place.data, place.model)
    job = programs.make_job(cfg, shape, mesh, round(place.chip.hbm_gib * GIB), *batch)
    for name in names:
        with devices.matmul_precision(cfg.model.dtype):
            made = programs.make(name, job)
            parts = [_compile(program, place.chip) for program in made]
        size = job.batch.tokens.shape[0], job.tokens, job.answers
        flops = programs.ideal_flops(name, job.model.cfg, *size)
        yield _row(name, parts, flops, job, place)


@dataclasses.dataclass(frozen=True)
class Part:
    """What the compiler says of one function; `cost` is None where it refuses."""

    gib: float | None
    seconds: float
    cost: hlo.Cost | None
    error: str = ""


def _compile(program, chip):
    import jax

    started = time.perf_counter()
    lowered = program.jitted.trace(*program.arguments).lower(lowering_platforms=("tpu",))
    beside = _gib(program.beside)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        seconds, said = time.perf_counter() - started, " ".join(str(e).split())
        forms = (
            r"Used ([\d.]+)([KMGT]) of ([\d.]+)[KMGT] hbm",
            r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)[KMGT]\)",
        )
        used = next(filter(None, (re.search(form, said) for form in forms)), None)
        if used is None:
            return Part(None, seconds, None, said[:300])
        gib = float(used[1]) * 1024 ** ("KMGT".index(used[2]) - 2) + beside
        return Part(gib, seconds, None, f"needs {gib:.1f} GiB of {used[3]} GiB of HBM")
    seconds = time.perf_counter() - started
    found = compiled.memory_analysis()
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    gib = (size + found.temp_size_in_bytes + found.generated_code_size_in_bytes) / GIB + beside
    error = f"needs {gib:.1f} GiB of {chip.hbm_gib} GiB of HBM" if gib > chip.hbm_gib else ""
    return Part(gib, seconds, hlo.read(compiled.as_text()), error)


def _gib(tree):
    """What a chip holds of a tree of placed shapes."""
    import jax

    return (
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
        / GIB
    )


def _row(name, parts, ideal, job, place):
    error = next((part.error for part in parts if part.error), "")
    row: dict[str, Any] = {
        "program": name,
        "fits": not error,
        "gib_per_chip": max((round(p.gib, 2) for p in parts if p.gib is not None), default=None),
        "hbm_gib": place.chip.hbm_gib,
        "flops_over_ideal": None,
        "est_ms": None,
        "link_ms": None,
        "tokens_per_s_per_chip": None,
        "collectives": {},
        "compile_s": round(sum(part.seconds for part in parts), 1),
        "error": error,
    }
    costs = [part.cost for part in parts if part.cost]
    if len(costs) < len(parts):
        return row
    if unknown := sum(cost.unknown_loops for cost in costs):
        logging.warning("%s: %d loops of unknown length count once.", name, unknown)
    chips = place.data * place.model
    link = sum(cost.link_seconds(place.chip.link_bytes) for cost in costs)
    seconds = sum(cost.cycles for cost in costs) / place.chip.clock + link
    tokens = job.rows * job.tokens * place.data
    row["flops_over_ideal"] = round(sum(cost.flops for cost in costs) * chips / ideal, 2)
    row["est_ms"], row["link_ms"] = round(1e3 * seconds, 1), round(1e3 * link, 1)
    row["tokens_per_s_per_chip"] = round(tokens / chips / seconds)
    for cost in costs:
        for kind, (times, size) in cost.by_kind().items():
            total = row["collectives"].setdefault(kind, [0, 0.0])
            total[0], total[1] = total[0] + times, round(total[1] + size, 1)
    return row


def table(found: Sequence[dict[str, Any]]) -> str:
    """Lays rows out for reading."""
    timed = any("measured_ms" in row for row in found)
    head = ("program", "fits", "GiB", "of", "of matmul" if timed else "FLOPs/ideal",
            "ms" if timed else "est ms", "link ms", "tok/s/chip")  # fmt: skip
    lines: list[tuple[str, ...]] = [(*head, "collectives", "compile s")]
    for row in found:
        count = sum(times for times, _ in row["collectives"].values())
        size = sum(size for _, size in row["collectives"].values())
        values = (
            row["program"], "yes" if row["fits"] else "no", row["gib_per_chip"],
            row["hbm_gib"], row.get("matmul_share", row["flops_over_ideal"]),
            row.get("measured_ms", row["est_ms"]),
            row["link_ms"],
            row["tokens_per_s_per_chip"], f"{count:,} ({size:,.0f} MiB)", row["compile_s"],
        )  # fmt: skip
        lines.append(tuple("-" if v is None else str(v) for v in values))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
