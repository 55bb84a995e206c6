"""Weights that torch.save wrote (pytorch_model.bin), read without torch and without running them.

A pickle is a program. This interpreter can make texts, numbers, tuples, lists, dicts and tensors,
and nothing else: a pickle that names anything else is refused before that name is looked up. Both
formats of torch.save are read:

    zip      (torch 1.6 and later) NAME/data.pkl, and each storage uncompressed in NAME/data/KEY
    legacy   (before) five pickles: magic, version, machine, the object, keys of its storages; then
             each storage behind its length
"""

import collections
import dataclasses
import io
import math
import mmap
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.models import stored
from diq_jax.run import reading

MOST_PICKLE = 2**21  # bytes; a model of 800 tensors needs 100,000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
DTYPES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": stored.BFLOAT16,
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
# Globals that a pickle may name: _call knows what they do.
ADMITTED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", *DTYPES,
}  # fmt: skip
PLAIN_OPCODES = b"".join((
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE,
    pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.EMPTY_TUPLE,
    pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.APPEND, pickle.APPENDS, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET,
    pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID,
))  # fmt: skip
# What the interpreter raises for a pickle that is not whole.
DAMAGED = (
    pickle.UnpicklingError, ValueError, IndexError, KeyError, AttributeError, TypeError, EOFError,
    struct.error,
)  # fmt: skip


class Refused(Exception):
    """Reports what a pickle does that a state dict does not, as the end of a sentence."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """Stands for a global of ADMITTED, as its two words; never the object."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    """Describes a tensor as a view into a storage. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(file: pathlib.Path) -> dict[str, stored.Tensor]:
    """Opens a state dict without reading its weights; tensors may share storages and have strides.

    Raises:
        UserError: the file is damaged, of another format, or holds anything but a dict of tensors.
    """
    try:
        data = stored.map_file(file)
        if data[:4] == b"PK\3\4":
            views, places = _open_zip(file, data)
        else:
            views, places = _open_legacy(data)
        _check(views, places)
    except OSError as e:
        raise errors.UserError(f"{file} cannot be read: {e.strerror or e}.") from None
    except Refused as e:
        raise errors.UserError(f"{file} is not read: {e}.") from None

    def tensor(view):
        dtype, strides = view.storage.dtype, view.strides
        place = places[view.storage.key][0] + view.offset * dtype.itemsize
        steps = tuple(stride * dtype.itemsize for stride in strides)

        def read(part: stored.Part = ()):
            if 0 in view.shape:
                return np.zeros(view.shape, dtype)[part]
            return np.array(np.ndarray(view.shape, dtype, data, place, steps)[part], order="C")

        return stored.Tensor(view.shape, dtype.name, read)

    return {name: tensor(view) for name, view in views.items()}


def _open_zip(file, data):
    """Returns the views by name, and (offset, bytes) of each storage by key."""
    entries = {}
    for entry in _entries(file):
        if entry.filename in entries:
            raise Refused(f"its archive holds {entry.filename!r} twice")
        entries[entry.filename] = entry
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("its archive holds no data.pkl, so that it is no file of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    places = {
        name.removeprefix(f"{folder}data/"): _place(entry, data)
        for name, entry in entries.items()
        if name.startswith(f"{folder}data/")
    }

    def content(name):
        start, size = _place(entries[folder + name], data)
        if size > MOST_PICKLE:
            raise Refused(f"its {name} has {size:,} bytes; expected at most {MOST_PICKLE:,}")
        return data[start : start + size]

    if f"{folder}byteorder" in entries and content("byteorder") != b"little":
        raise Refused("it has the byte order of another kind of machine")
    return _views(_unpickle(io.BytesIO(content("data.pkl")))), places


def _entries(file: pathlib.Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    # What damaged directories make it raise.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
        raise Refused(f"it is not a whole file of torch.save ({e})") from None


def _place(entry: zipfile.ZipInfo, data: mmap.mmap) -> tuple[int, int]:
    """Returns (offset, bytes) of an entry's content, which torch stores as it is."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Refused(f"its archive compresses or encrypts {entry.filename!r}, as torch never does")
    header = data[entry.header_offset : entry.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise Refused(f"its archive has no entry where it lists {entry.filename!r}")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + entry.file_size > len(data):
        raise Refused(f"it ends after {len(data):,} bytes, within {entry.filename!r}")
    return start, entry.file_size


def _open_legacy(data):
    """Does as `_open_zip`, for the format before torch 1.6."""
    stream = io.BytesIO(data[:MOST_PICKLE])
    try:
        known = _unpickle(stream) == LEGACY_MAGIC
    except Refused:
        known = False
    if not known:
        raise Refused("it is no file of torch.save: it begins neither as its zip nor as its pickle")
    if _unpickle(stream) != LEGACY_VERSION:
        raise Refused(f"it is of another version than {LEGACY_VERSION} of torch's first format")
    machine = _unpickle(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("it has the byte order of another kind of machine")
    views, keys = _views(_unpickle(stream)), _unpickle(stream)
    sizes = {view.storage.key: view.storage for view in views.values()}
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise Refused("its list of storages is damaged")
    places, at = {}, stream.tell()
    for key in keys:
        if key not in sizes:
            raise Refused(f"it lists a storage {reading.shorten(key)} that no tensor has")
        count, dtype = int.from_bytes(data[at : at + 8], "little"), sizes[key].dtype
        if at + 8 + count * dtype.itemsize > len(data):
            raise Refused(f"it ends after {len(data):,} bytes, within the storage {key!r}")
        places[key] = at + 8, count * dtype.itemsize
        at += 8 + count * dtype.itemsize
    return views, places


def _views(value) -> dict[str, _View]:
    if not isinstance(value, dict):
        raise Refused("it holds no dict of tensors")
    for name, view in value.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            kind = type(view).__name__
            raise Refused(
                f"{reading.shorten(name)} is a {kind}; expected a dict of names and tensors"
            )
    return value


def _check(views: dict[str, _View], places: dict[str, tuple[int, int]]) -> None:
    """Refuses a view that leaves its storage, and a storage that the file does not hold whole."""
    dtypes: dict[str, np.dtype] = {}
    for name, view in views.items():
        storage, shown = view.storage, reading.shorten(name)
        if dtypes.setdefault(storage.key, storage.dtype) != storage.dtype:
            raise Refused(f"the storage of {shown} has two types")
        needed = storage.count * storage.dtype.itemsize
        if storage.key not in places or places[storage.key][1] < needed:
            raise Refused(f"the storage of {shown} is missing or shorter than {needed:,} bytes")
        steps = zip(view.shape, view.strides, strict=True)
        last = view.offset + sum((size - 1) * stride for size, stride in steps)
        # A stride of 0 would make any size of few bytes.
        too_large = math.prod(view.shape) > storage.count or last >= storage.count
        if too_large and 0 not in view.shape:
            raise Refused(f"{shown} reaches beyond its storage of {storage.count:,} numbers")


def _storage(identity: Any) -> _Storage:
    """Returns the storage of a persistent id: ("storage", type, key, device, count[, None])."""
    match identity:
        case ("storage", _Name(text), str(key), str(), int(count), *rest) if text in DTYPES:
            if count >= 0 and rest in ([], [None]):
                return _Storage(key, DTYPES[text], count)
    raise Refused("its pickle refers to something that is no storage of a plain type")


def _call(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("collections OrderedDict"), ():
            return collections.OrderedDict()
        case _Name("torch._utils _rebuild_parameter"), (_View() as view, *_):
            return view
        case _Name("torch._utils _rebuild_tensor_v2"), (
            _Storage() as storage, int(offset), tuple(shape), tuple(strides), *_
        ):  # fmt: skip
            whole = all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides))
            if whole and len(shape) == len(strides) <= 32:
                return _View(storage, offset, shape, strides)
    raise Refused("its pickle calls a function in a way that no state dict does")


def _refuse(opcode: str) -> Callable[[Any], None]:
    def refuse(_):
        raise Refused(f"its pickle uses the opcode {opcode}, as no state dict does")

    return refuse


class _StateDict(pickle._Unpickler):
    """Interprets a pickle that needs no object but tensors and the collections that hold them.

    Of the interpreter of the standard library it keeps what moves plain values. A global never
    becomes the object that it names: it stays two words, which `_call` knows or refuses.
    """

    # Of the interpreter, which does not declare them.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def persistent_load(self, pid: Any) -> "_Storage":
        return _storage(pid)

    def find_class(self, module: str, name: str) -> "_Name":
        if (text := f"{module} {name}") not in ADMITTED:
            raise Refused(
                f"its pickle names {reading.shorten(f'{module}.{name}')}, and only tensors of plain"
                " types are read from a pickle"
            )
        return _Name(text)

    def reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, arguments))

    def build(self):
        self.stack.pop()  # what a state dict says of its modules' versions
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise Refused("its pickle sets the state of an object, as no state dict does")

    def setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set([key, value])

    def setitems(self):
        self.set(self.pop_mark())

    def set(self, items):
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused(f"its pickle uses a {type(target).__name__} as a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple of tuples of tuples can take forever.
            if not isinstance(key, str | int):
                raise Refused("its pickle has a dict whose keys are neither texts nor numbers")
            target[key] = value

    dispatch: dict[int, Callable[[Any], None]] = {  # noqa: RUF012 (pickle declares it so)
        ord(opcode.code): _refuse(opcode.name) for opcode in pickletools.opcodes
    }
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in PLAIN_OPCODES}
    dispatch |= {
        pickle.REDUCE[0]: reduce, pickle.BUILD[0]: build,
        pickle.SETITEM[0]: setitem, pickle.SETITEMS[0]: setitems,
    }  # fmt: skip


def _unpickle(stream: io.BytesIO) -> Any:
    """Interprets one pickle and leaves the stream behind it.

    Raises:
        Refused: a damaged pickle, or one that does anything that a state dict does not need.
    """
    try:
        return _StateDict(stream).load()
    except DAMAGED as e:
        raise Refused(f"its pickle is damaged ({type(e).__name__})") from None
