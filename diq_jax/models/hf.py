"""Parameters from Hugging Face names and back: stacked over layers, kernels turned to (in, out)."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from diq_jax import errors, trees
from diq_jax.models import checkpoint, config, decoder, stored
from diq_jax.run import reading, sharding

if TYPE_CHECKING:
    from diq_jax.models import encoder

Params = dict[str, Any]  # nested dicts of arrays

# Path in the tree -> tensor name; {i} is the layer, {e} the expert. Kernels are stored
# (out, in) on their side.
DECODER_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
} | {
    f"layers/{group}/{module}/{leaf}": f"model.layers.{{i}}.{theirs}.{module}.{name}"
    for group, theirs, modules in (
        ("attn", "self_attn", ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")),
        ("mlp", "mlp", ("gate_proj", "up_proj", "gate_up_proj", "down_proj")),
    )
    for module in modules
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))
}
DECODER_NAMES |= {
    f"layers/attn/{norm}/scale": f"model.layers.{{i}}.self_attn.{norm}.weight"
    for norm in ("q_norm", "k_norm")
}
DECODER_NAMES |= {"layers/mlp/router/kernel": "model.layers.{i}.mlp.gate.weight"} | {
    f"layers/mlp/experts/{module}/kernel": f"model.layers.{{i}}.mlp.experts.{{e}}.{module}.weight"
    for module in ("gate_proj", "up_proj", "down_proj")
}
DECODER_NAMES |= {
    f"layers/delta/{ours}": f"model.layers.{{i}}.linear_attn.{theirs}"
    for ours, theirs in (
        *((f"{x}_proj/kernel", f"in_proj_{x}.weight") for x in ("qkv", "z", "a", "b")),
        ("a_proj/bias", "dt_bias"), ("decay/scale", "A_log"), ("conv/taps", "conv1d.weight"),
        ("out_norm/scale", "norm.weight"), ("o_proj/kernel", "out_proj.weight"),
    )
}  # fmt: skip
# With norms after attention and MLP, alone (OLMo) or beside those before them (Gemma).
POST_NORM_NAMES = DECODER_NAMES | {
    "layers/attn_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}

# Tensors of other heads, buffers that are recomputed, and the pooler, which nothing here reads.
IGNORED = re.compile(r"rotary_emb\.inv_freq|position_ids$|^pooler\.|^cls\.|^classifier\.|^mtp\.")
TURNED = ("/kernel", "/taps")  # leaves whose axes are in the other order on their side


def load_decoder(
    source: checkpoint.Checkpoint,
    cfg: config.DecoderConfig,
    dtype: DTypeLike,
    field: str,
    place: Callable | None = None,
) -> Params:
    """Loads a decoder; `place(path, shape, read)` makes each leaf of parts read((slices)) gives.

    Raises:
        UserError: as `check_decoder`; or a weight is not finite in `dtype`.
    """
    names = check_decoder(source, cfg, field)
    return _load(source, decoder.shapes(cfg), names, dtype, field, place)


def load_encoder(
    source: checkpoint.Checkpoint, cfg: "encoder.EncoderConfig", dtype: DTypeLike, field: str
) -> Params:
    """Loads an encoder, whether its tensors carry a prefix such as `bert.` or not."""
    from diq_jax.models import encoder

    names = check_encoder(source, cfg, field)
    return _load(source, encoder.shapes(cfg), names, dtype, field, None)


def check_decoder(
    source: checkpoint.Checkpoint, cfg: config.DecoderConfig, field: str
) -> dict[str, list[str]]:
    """Holds the tensors of a decoder against its config, without reading one.

    Returns:
        {path in the tree: the tensor of each layer, or the one tensor}.

    Raises:
        UserError: missing, unused, misshaped and quantised tensors, all in one message.
    """
    ignored = {checkpoint.HEAD} if cfg.tied_head else set()
    shapes = decoder.shapes(cfg)
    return _check(source, shapes, _decoder_names(shapes), "", {}, ignored, field)


def check_encoder(
    source: checkpoint.Checkpoint, cfg: "encoder.EncoderConfig", field: str
) -> dict[str, list[str]]:
    """Holds the tensors of an encoder against its config. See `check_decoder`."""
    from diq_jax.models import encoder

    prefix = encoder.PREFIXES[cfg.family]
    prefix = prefix if any(name.startswith(prefix) for name in source.tensors) else ""
    # What converters of the first BERT checkpoints called a norm's gain and bias.
    old = {
        name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): name
        for name in source.tensors
    }
    heads = {name for name in source.tensors if encoder.HEADS.match(name)}
    shapes = encoder.shapes(cfg)
    return _check(source, shapes, _encoder_names(shapes), prefix, old, heads, field)


def decoder_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, array) of a decoder, as transformers names and turns them."""
    return _tensors(params, _decoder_names(params))


def encoder_tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, array) of an encoder, as transformers names and turns them."""
    return _tensors(params, _encoder_names(params))


def save_decoder(
    folder: str | os.PathLike, params: Params, hf_config: dict[str, Any], max_shard_bytes: int
) -> None:
    """Writes a folder that transformers' AutoModelForCausalLM loads."""
    dtype = str(params["embed"]["embedding"].dtype)
    settings = {**hf_config, "dtype": dtype, "torch_dtype": dtype}
    checkpoint.save_checkpoint(folder, settings, decoder_tensors(params), max_shard_bytes)


def _decoder_names(tree):
    return POST_NORM_NAMES if "mlp_post_norm" in tree["layers"] else DECODER_NAMES


def _encoder_names(tree):
    from diq_jax.models import encoder

    return encoder.MODERNBERT_NAMES if "final_norm" in tree else encoder.NAMES


def _check(source, shapes, names, prefix, stored_as, ignored, field):
    """Checks as `check_decoder`; `stored_as` gives the name in the file where it is another."""
    wanted = trees.named_leaves(shapes, lambda x: isinstance(x, tuple))
    available = set(source.tensors)
    problems, used, found = [], set(ignored), {}
    for path, shape in wanted.items():
        found[path] = []
        part = shape[len(_stack(path, shape)) :]
        part = part[::-1] if path.endswith(TURNED) else part
        for name in tensor_names(names, path, shape, _period(shapes)).values():
            name = stored_as.get(prefix + name, prefix + name)
            found[path].append(name)
            used.add(name)
            if name not in available:
                untied = " (config.json does not tie it)" if name == checkpoint.HEAD else ""
                problems.append(f"missing {name}{untied}")
            elif source.dtype(name) not in stored.PLAIN:
                problems.append(
                    f"{name} is stored as {source.dtype(name)}, and only plain floating-point"
                    " weights are read"
                )
            elif source.shape(name) != part:
                problems.append(f"{name} has shape {source.shape(name)}, expected {part}")
    unused = sorted(n for n in available - used if not IGNORED.search(n.removeprefix(prefix)))
    problems += [f"unused {reading.shorten(name)[1:-1]}" for name in unused]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise errors.UserError(
            f"{field}: the tensors of {source.path} do not fit its config.json: "
            f"{'; '.join(problems[:8])}{more}."
        )
    return found


def _load(source, shapes, names, dtype, field, place):
    place = place or (lambda path, shape, read: jnp.asarray(read((slice(None),) * len(shape))))

    def leaf(path, shape):
        stack = _stack(path, shape)
        turned = path.endswith(TURNED)

        def read(part):
            chosen = np.asarray(np.reshape(names[path], stack)[part[: len(stack)]])
            inside = part[len(stack) :]
            sizes = [len(range(n)[s]) for n, s in zip(shape[len(stack) :], inside, strict=True)]
            into = np.empty((chosen.size, *sizes), jnp.dtype(dtype))
            for array, name in zip(into, chosen.flat, strict=True):
                with np.errstate(over="ignore", invalid="ignore"):  # said below
                    read_part = source.read(name, inside[::-1] if turned else inside)
                    array[...] = read_part.T if turned else read_part
                if not stored.all_finite(array):
                    raise errors.UserError(
                        f"{field}: {name} of {source.path} holds numbers that are NaN or infinite"
                        f" in {into.dtype}."
                    )
            return into.reshape(*chosen.shape, *sizes)

        return place(path, shape, read)

    return trees.map_named(leaf, shapes, lambda x: isinstance(x, tuple))


def tensor_names(
    names: dict[str, str], path: str, shape: Sequence[int], period: int
) -> dict[tuple, str]:
    """Returns {place: tensor name} of a leaf: () of one, (layer,), or (layer, expert).

    Args:
        period: of layers, as families.Delta has it; 1 where all are alike.
    """
    found = {}
    for place in np.ndindex(_stack(path, shape)):
        i, e = (*place, 0, 0)[:2]
        if path.startswith("layers/attn/"):
            i = (i + 1) * period - 1
        elif path.startswith("layers/delta/"):
            i += i // (period - 1)
        found[place] = names[path].format(i=i, e=e, next=i + 1)
    return found


def _stack(path, shape):
    """Returns the leading axes of a leaf along which tensors are stacked."""
    return tuple(shape[: path.startswith("layers/") + path.startswith("layers/mlp/experts/")])


def _period(tree):
    """Returns the period of the layers of a tree of arrays or shapes."""
    if "delta" not in tree["layers"]:
        return 1
    layers = tree["layers"]
    leaves = layers["mlp_norm"]["scale"], layers["attn"]["o_proj"]["kernel"]
    whole, some = (getattr(leaf, "shape", leaf)[0] for leaf in leaves)
    return whole // some


def _tensors(params, names):
    for path, leaf in trees.named_leaves(params).items():
        for place, name in tensor_names(names, path, leaf.shape, _period(params)).items():
            array = sharding.whole(leaf[place])
            yield name, np.ascontiguousarray(array.T if path.endswith(TURNED) else array)
