"""A trained classifier as a folder: what `diq train-classifier` makes and
difficulty.source takes.

config.json, model.safetensors and the tokenizer's files are those of the encoder, up to the last
layer that is used; transformers' AutoModel loads them. difficulty.safetensors holds the heads and
the words, difficulty.json the rest.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy

from diq_jax import config, errors, trees
from diq_jax.difficulty import labels
from diq_jax.models import checkpoint, hf
from diq_jax.run import artifacts, reading

RECORD, HEADS = "difficulty.json", "difficulty.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a folder holds beside the encoder.

    Attributes:
        model: {"heads"} and, if they were used, "words", numpy.
        max_tokens: of an encoder input.
        temperatures: {perspective: temperature} of those that had labels.
    """

    model: dict
    max_tokens: int
    temperatures: dict[str, float]


def is_folder(source: str) -> bool:
    """Whether difficulty.source is a folder, not labelled rows."""
    return pathlib.Path(source).expanduser().is_dir()


def save(
    folder: pathlib.Path,
    model: Mapping,
    hf_config: Mapping,
    tokenizer,
    max_tokens: int,
    temperatures: Mapping[str, float],
) -> None:
    """Writes the folder; difficulty.json comes last, so that a killed run leaves none that passes
    for one.

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
    """Raises UserError where the folder is no such one."""
    folder = _folder(source)
    record = reading.read_record(folder / RECORD, {"max_tokens": int, "temperatures": dict})
    model = trees.insert({}, safetensors.numpy.load_file(folder / HEADS))
    return Trained(model, record["max_tokens"], record["temperatures"])


def fingerprint(source: str) -> str:
    """A hash of all that the scores depend on."""
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
    """(3,) bool: the perspectives that had labels."""
    return np.array([p in temperatures for p in config.PERSPECTIVES])
