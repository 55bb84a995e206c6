"""A trained classifier's folder: `diq train-classifier` makes it, difficulty.source takes it.

config.json, model.safetensors and the tokenizer's files are those of the encoder, up to the last
layer that is used; transformers' AutoModel loads them. difficulty.safetensors holds the heads and
the words, difficulty.json the rest.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from diq_jax import config, errors, trees
from diq_jax.difficulty import labels
from diq_jax.models import checkpoint, encoder, hf, stored
from diq_jax.run import artifacts, reading

RECORD, HEADS = "difficulty.json", "difficulty.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Trained:
    """Holds what a folder has beside the encoder.

    Attributes:
        model: {"heads"} and, if they were used, "words", numpy.
        max_tokens: of an encoder input.
        temperatures: {perspective: temperature} of those that had labels.
    """

    model: dict
    max_tokens: int
    temperatures: dict[str, float]


def is_folder(source: str) -> bool:
    """Tells whether difficulty.source is a folder, not labelled rows."""
    return pathlib.Path(source).expanduser().is_dir()


def save(
    folder: pathlib.Path,
    model: Mapping,
    hf_config: Mapping,
    tokenizer: Any,
    max_tokens: int,
    temperatures: Mapping[str, float],
) -> None:
    """Writes the folder; difficulty.json comes last, so that a killed run leaves none that passes.

    Args:
        model: {"encoder", "heads"} and "words" if used, as folds.fit makes it.
        hf_config: the pretrained encoder's config.json.
    """
    artifacts.remove(folder / RECORD)
    layers = jax.tree.leaves(model["encoder"]["layers"])[0].shape[0]
    settings = {**hf_config, "num_hidden_layers": layers, "architectures": ["BertModel"]}
    tensors = hf.encoder_tensors(model["encoder"])
    checkpoint.save_checkpoint(folder, settings, tensors, MAX_SHARD_BYTES)
    tokenizer.save_pretrained(folder)
    artifacts.sync_tree(folder)
    ours = {name: tree for name, tree in model.items() if name != "encoder"}
    with artifacts.atomic(folder / HEADS) as temporary:
        arrays = trees.named_leaves(jax.tree.map(np.asarray, ours))
        safetensors.numpy.save_file(arrays, temporary)
    record = {"max_tokens": max_tokens, "temperatures": dict(temperatures)}
    artifacts.write_json(folder / RECORD, record)


def load(source: str) -> Trained:
    """Reads the folder. Raises UserError where it is no such folder, or is damaged."""
    folder = _folder(source)
    record = reading.read_record(folder / RECORD, {"max_tokens": int, "temperatures": dict})
    for perspective, value in record["temperatures"].items():
        errors.check_choice(f"{folder / RECORD}: temperatures", perspective, config.PERSPECTIVES)
        ok = isinstance(value, float) and 0 < value < np.inf
        errors.check(f"{folder / RECORD}: {perspective}", ok, "a temperature above 0", value)
    opened = checkpoint.open_checkpoint(folder, labels.FIELD)
    cfg = encoder.encoder_config(opened.config, labels.FIELD)
    tensors = stored.open_safetensors(folder / HEADS)
    _check_tensors(folder / HEADS, tensors, cfg.num_layers * cfg.model_dim)
    model = trees.insert({}, {name: tensor.read() for name, tensor in tensors.items()})
    return Trained(model, record["max_tokens"], record["temperatures"])


def _check_tensors(path, tensors, features):
    if "heads/thresholds" in tensors:
        raise errors.UserError(
            f"{path} holds an ordinal head, which this version of diq_jax does not have: train the "
            "classifier again."
        )
    scores = (len(config.PERSPECTIVES), labels.LEVELS)
    expected = {"heads/kernel": (features, *scores), "heads/bias": scores}
    if "words/idf" in tensors:
        terms = tensors["words/idf"].shape[0]
        expected |= {"words/idf": (terms,), "words/kernel": (terms, *scores)}
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (shape, "float32"):
            got = "none" if found is None else f"{found.dtype} {found.shape}"
            raise errors.UserError(f"{path}: {name} must be float32 {shape}; got {got}.")
    if extra := set(tensors) - set(expected) - {"words/terms"}:
        raise errors.UserError(f"{path}: {min(extra)!r} belongs to no difficulty classifier.")
    if ("words/idf" in tensors) != ("words/terms" in tensors):
        raise errors.UserError(f"{path}: words/terms and words/idf must both be there, or neither.")


def fingerprint(source: str) -> str:
    """Returns a hash of all that the scores depend on."""
    folder = _folder(source)
    names = [RECORD, HEADS, *(n for n in ("tokenizer.json", "vocab.txt") if (folder / n).exists())]
    digests = [checkpoint.open_checkpoint(folder, labels.FIELD).fingerprint]
    digests += [artifacts.sha256(folder / name) for name in names]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _folder(source) -> pathlib.Path:
    folder = pathlib.Path(source).expanduser()
    missing = [name for name in (RECORD, HEADS) if not (folder / name).is_file()]
    if missing:
        raise errors.UserError(
            f"{labels.FIELD}: the folder {source} has no {missing[0]}; expected labelled rows, "
            "or a folder that `diq train-classifier` has made."
        )
    return folder


def known(temperatures: Mapping[str, float]) -> np.ndarray:
    """Returns (3,) bool: the perspectives that had labels."""
    return np.array([p in temperatures for p in config.PERSPECTIVES])
