"""LoRA adapters, y = x W + (x A) B * alpha / rank, on linears whose path matches; PEFT files.

An adapter is nested like the parameters, {"layers": {"attn": {"q_proj": {"a", "b", "scale"}}}},
stacked over layers. With an origin, `a0` and `b0` beside `a` and `b`, it adds x (A B - A0 B0).
"""

import math
import os
import pathlib
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diq_jax import errors, trees
from diq_jax.models import checkpoint, config, decoder, hf, stored
from diq_jax.run import artifacts, reading, sharding

PEFT_PREFIX = "base_model.model."
# Settings of PEFT that leave the adapter's function as it is. Others that are set change it, or
# trained more than A and B, such as use_dora, rank_pattern or modules_to_save.
PEFT_PLAIN = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
# Types and ranges of what is read.
PEFT_TYPES = {
    "peft_type": str, "r": int, "lora_alpha": float, "lora_dropout": float, "use_rslora": bool,
    "fan_in_fan_out": bool, "bias": (str, type(None)),
    "init_lora_weights": (bool, str, type(None)),
}  # fmt: skip
PEFT_LARGEST_RANK, PEFT_LARGEST_ALPHA = 2**16, 1e9
# Initialisations that leave the base weights as they are; PiSSA, OLoRA and others change them.
PEFT_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def linear_shapes(cfg: config.DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path of a linear layer: (N, in, out)}; of experts (N, E, in, out)."""
    leaves = trees.named_leaves(decoder.shapes(cfg)["layers"], lambda x: isinstance(x, tuple))
    return {
        f"layers/{name.removesuffix('/kernel')}": shape
        for name, shape in leaves.items()
        if name.endswith("/kernel")
    }


def init(
    key: jax.Array,
    cfg: config.DecoderConfig,
    targets: str,
    rank: int,
    alpha: float,
    zero_b: bool,
    field: str,
) -> dict:
    """Draws a fresh adapter in float32.

    A is uniform in +-sqrt(1 / in), as PEFT's; B is zero, or drawn alike when `zero_b` is false:
    with B = 0 the gradient of A vanishes, so that an influence taken there sees half of the
    adapter.

    Args:
        targets: a regex over linear_shapes(cfg); UserError naming `field` where it matches none.
    """
    linears = linear_shapes(cfg)
    chosen = trees.matching(linears, targets, field)
    tree: dict = {}
    for index, (name, (*stack, n_in, n_out)) in enumerate(linears.items()):
        if name not in chosen:
            continue
        key_a, key_b = jax.random.split(jax.random.fold_in(key, index))
        bound_a, bound_b = math.sqrt(1 / n_in), math.sqrt(1 / rank)
        a = jax.random.uniform(key_a, (*stack, n_in, rank), jnp.float32, -bound_a, bound_a)
        b = jax.random.uniform(key_b, (*stack, rank, n_out), jnp.float32, -bound_b, bound_b)
        scale = jnp.full(stack, alpha / rank, jnp.float32)
        leaves = {"a": a, "b": jnp.zeros_like(b) if zero_b else b, "scale": scale}
        tree = trees.insert(tree, {name: leaves})
    return tree


def with_origin(adapter: dict) -> dict:
    """Returns the adapter as a space around the model it is added to, which stays unchanged there.

    The gradients of A and B are those of (x A) B.
    """
    return _map_linears(lambda _, node: node | {"a0": node["a"], "b0": node["b"]}, adapter)


def _map_linears(fn: Callable[[str, dict], dict], node: dict, path: tuple[str, ...] = ()) -> dict:
    """Maps fn(path of a linear, its leaves) over an adapter."""
    if "scale" in node:
        return fn("/".join(path), node)
    return {name: _map_linears(fn, child, (*path, name)) for name, child in node.items()}


def is_factor(name: str) -> bool:
    """Returns whether a leaf of an adapter is trained: A and B are, scale and origin are not."""
    return name.endswith(("/a", "/b"))


def with_dropout(adapter: dict, keys: jax.Array, rate: jax.Array | float) -> dict:
    """Returns the adapter with dropout on its input: a key for each linear, layer and row.

    Args:
        keys: (B,), one for each row of the batch: what a row drops depends on nothing but its key.
        rate: the share dropped, in [0, 1).
    """

    def dropped(path, node):
        stack, linear = node["scale"].shape, zlib.crc32(path.encode())
        split = jax.vmap(
            lambda k: jax.random.split(jax.random.fold_in(k, linear), stack), 0, len(stack)
        )
        rates = jnp.full(stack, rate, jnp.float32)
        return node | {"dropout_keys": split(keys), "dropout_rate": rates}  # (N, B) and (N,)

    return _map_linears(dropped, adapter)


def save_peft(
    folder: str | os.PathLike,
    adapter: trees.Tree,
    cfg: config.DecoderConfig,
    alpha: float,
    dropout: float,
    base: str,
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, for PEFT's from_pretrained.

    Raises:
        UserError: a factor is not finite; then nothing is written.
    """
    if bad := trees.not_finite(adapter):
        raise errors.UserError(f"{folder} is not written: {bad[0]} is not finite.")
    folder = pathlib.Path(folder)
    name, revision = checkpoint.split_revision(base)
    tensors, modules, rank = {}, set(), 0
    for path, leaf in trees.named_leaves(adapter).items():
        linear, _, factor = path.rpartition("/")
        if factor == "scale":
            continue
        rank = leaf.shape[-1] if factor == "a" else rank
        for place, where in _peft_modules(cfg, linear, leaf.shape).items():
            modules.add(where.rpartition(".")[2])
            matrix = sharding.whole(leaf[place]).astype(np.float32)
            tensors[f"{where}.lora_{factor.upper()}.weight"] = np.ascontiguousarray(matrix.T)
    with artifacts.atomic(folder / "adapter_model.safetensors") as temporary:
        safetensors.numpy.save_file(dict(sorted(tensors.items())), temporary, {"format": "pt"})
    artifacts.write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            **({"revision": revision} if revision else {}),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        },
    )


def load_peft(folder: str | os.PathLike, cfg: config.DecoderConfig, field: str) -> dict:
    """Reads a PEFT LoRA folder in float32.

    Raises:
        UserError: not a LoRA folder, a variant that changes the formula (a setting that is neither
            in PEFT_PLAIN nor in PEFT_TYPES, another of PEFT_INITS, trained biases), weights that
            are quantised or not finite, or an adapter of another model.
    """
    folder = pathlib.Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise errors.UserError(f"{field}: {folder} has no {file}; expected a PEFT LoRA folder.")
    settings = reading.read_json(folder / "adapter_config.json")
    _check_plain(settings, folder, field)
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    tensors = _peft_tensors(folder / "adapter_model.safetensors", field)
    tree: dict = {}
    for name, (*stack, n_in, n_out) in linear_shapes(cfg).items():
        modules = _peft_modules(cfg, name, (*stack, n_in, n_out)).values()
        keys = [[f"{where}.lora_{f}.weight" for where in modules] for f in "AB"]
        if keys[0][0] not in tensors:
            continue
        factors = []
        for names, shape in zip(keys, ((rank, n_in), (n_out, rank)), strict=True):
            for key in names:
                got = tensors[key].shape if key in tensors else None
                if got != shape:
                    raise errors.UserError(
                        f"{field}: {folder} is an adapter of another model: {key} should have "
                        f"shape {shape}, has {got}."
                    )
            found = np.stack([tensors.pop(key).astype(np.float32).T for key in names])
            factors.append(found.reshape(*stack, *shape[::-1]))
        leaves = {"a": factors[0], "b": factors[1], "scale": np.full(stack, scale, np.float32)}
        tree = trees.insert(tree, {name: jax.tree.map(jnp.asarray, leaves)})
    if tensors or not tree:
        extra = ", ".join(sorted(tensors)[:3]) or "no LoRA matrices"
        raise errors.UserError(f"{field}: {folder} does not fit this model: {extra}.")
    return tree


def _peft_modules(cfg, linear, shape):
    """Returns {place in the stack of a linear's leaves of `shape`: its module's name in PEFT}."""
    names = hf.tensor_names(hf.DECODER_NAMES, f"{linear}/kernel", shape, cfg.period)
    return {place: PEFT_PREFIX + name.removesuffix(".weight") for place, name in names.items()}


def _peft_tensors(file: pathlib.Path, field: str) -> dict[str, np.ndarray]:
    """Reads all tensors of an adapter's file in float32, each of them finite."""
    tensors = {}
    for name, tensor in stored.open_safetensors(file).items():
        shown = reading.shorten(name)
        if tensor.dtype not in stored.PLAIN:
            raise errors.UserError(
                f"{field}: {shown} of {file} is stored as {tensor.dtype}, and only plain"
                " floating-point weights are read."
            )
        with np.errstate(over="ignore"):  # said below
            tensors[name] = tensor.read().astype(np.float32)
        if not stored.all_finite(tensors[name]):
            raise errors.UserError(
                f"{field}: {shown} of {file} holds numbers that are NaN or infinite in float32."
            )
    return tensors


def _check_plain(settings, folder, field):
    where = f"{field}: {folder}/adapter_config.json"
    reading.check_record(settings, where, {}, PEFT_TYPES)
    known = {*PEFT_PLAIN, *PEFT_TYPES}
    # A setting that is empty or off is none, whatever it means.
    odd = [name for name, value in settings.items() if value and name not in known]
    for name, plain in (
        ("peft_type", ("LORA",)),
        ("bias", ("none", None)),
        ("init_lora_weights", PEFT_INITS),
        ("fan_in_fan_out", (False, None)),
    ):
        if settings.get(name) not in plain:
            odd.append(name)
    for name, largest in (("r", PEFT_LARGEST_RANK), ("lora_alpha", PEFT_LARGEST_ALPHA)):
        if not 0 < settings.get(name, 0) <= largest:
            odd.append(name)
    if odd:
        shown = ", ".join(f"{name[:60]}={reading.shorten(settings.get(name))}" for name in odd[:8])
        raise errors.UserError(
            f"{field}: {folder} is not a plain LoRA adapter: adapter_config.json has {shown}."
        )
