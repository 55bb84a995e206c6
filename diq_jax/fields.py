"""How the configuration is declared: a frozen dataclass a section, whose fields say all of them.

Checks, the settings that a stage records and --help come from here.
"""

import dataclasses
import importlib
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeGuard, TypeVar

from diq_jax import errors

T = TypeVar("T")


class Span(NamedTuple):
    """Gives the range of a number: both ends included, unless they are said to be open."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        return f"in {'[('[self.above]}{self.least}, {self.most}{'])'[self.below]}"

    def check(self, name: str, value: float) -> None:
        """Raises UserError where the value lies outside."""
        open_end = (self.above and value == self.least) or (self.below and value == self.most)
        if self.least <= value <= self.most and not open_end:
            return
        end = f"at least {self.least}" if value < self.least else f"at most {self.most}"
        expected = self if self.above or self.below else end
        raise errors.UserError(f"{name} must be {expected}; got {value!r}.")


# Beyond these an int32 or a float32 would overflow, or one array would ask for more memory than
# machines have.
SEED = Span(0, 2**31 - 1)  # int32, and jax keeps 32 bits of a key; seeds are also counted up from
COUNT = Span(0, 2**31 - 1)  # of rows or steps; 0 = no limit
AT_LEAST_ONE = Span(1, 2**31 - 1)
TOKENS = Span(1, 2**24)  # of a batch, on a device
EPOCHS = Span(1, 10_000)
BATCH = Span(1, 2**16)  # rows of one step
RANK = Span(1, 2**14)
DEVICES = Span(1, 2**20)
BYTES = Span(1, 2**40)
POSITIVE = Span(1e-12, 3e38)  # a learning rate, a scale: neither 0 nor infinite as float32
SHARE = Span(0, 1, above=True)
UNIT = Span(0, 1)


def or_none(span: Span) -> Span:
    """Returns the same range with 0, which turns the field off or leaves the choice to us."""
    return span._replace(least=0)


class Declared(NamedTuple):
    """Holds what a field declares beside its type and default."""

    says: str
    span: Span | None
    listed: tuple[str, ...] | str  # the choices, or the table whose names they are
    regex: bool
    decides: tuple[str, ...] | None  # the stages; None = those of its section
    urls: bool  # whether it may name a place that run/remote.py reads

    @property
    def choices(self) -> dict[str, str]:
        """Returns {text that the field may be: its meaning, "" where no table gives one}."""
        if isinstance(self.listed, str):
            return {name: row.says for name, row in table(self.listed).items()}
        return dict.fromkeys(self.listed, "")


def table(name: str) -> Mapping[str, Any]:
    """Returns the table of a room that a dotted name below diq_jax names.

    Its rows are attributes that hold `says`, a sentence, and `conflicts`, a function like
    Section.conflicts. A room registers its kinds in this way with the ground, which imports no
    room; the module must be quick to import, as --help reads it.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"diq_jax.{module}"), attribute)


def field(
    default: Any,
    says: str,
    span: Span | None = None,
    *,
    choices: Iterable[str] | str = (),
    regex: bool = False,
    decides: Iterable[str] | None = None,
    harmless: bool = False,
    urls: bool = False,
) -> Any:
    """Declares a config field.

    Args:
        says: one sentence, or a few, for --help.
        span: the range of a number.
        choices: the texts that it may be, or the name of the table that holds them (`table`), such
            as "influence.kinds.ENGINES".
        regex: whether it is a regular expression.
        decides: the stages whose results it can change, where these are not those of its section.
        harmless: it changes no result: speed, memory or what is shown.
        urls: it may be a URL; that of any other field is refused.
    """
    listed = choices if isinstance(choices, str) else tuple(choices)
    decided = () if harmless else None if decides is None else tuple(decides)
    declared = Declared(says, span, listed, regex, decided, urls)
    return dataclasses.field(default=default, metadata={"declared": declared})


@dataclasses.dataclass(frozen=True)
class Section:
    """Holds a part of the configuration.

    Attributes:
        section: its dotted name.
        decides: the stages whose results its fields can change, unless a field says otherwise.
    """

    section: ClassVar[str]
    decides: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, section: str, decides: tuple[str, ...] = ()) -> None:
        cls.section, cls.decides = section, decides

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            if not _is_section(declared.type):
                name = f"{self.section}.{declared.name}"
                _check(name, getattr(self, declared.name), declared.metadata["declared"])
        for wrong, sentence in itertools.chain(self.conflicts(), self._conflicts_of_choices()):
            if wrong:
                raise errors.UserError(sentence)

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields (whether it is so, the sentence) for values that do not go together."""
        yield from ()

    def _conflicts_of_choices(self) -> Iterator[tuple[bool, str]]:
        """Yields the conflicts of the rows that the fields' values name in their tables."""
        for found in dataclasses.fields(self):
            listed = found.metadata["declared"].listed if "declared" in found.metadata else ()
            if isinstance(listed, str):
                rows = table(listed)
                name = errors.find_choice(getattr(self, found.name), rows)
                assert name is not None  # _check has refused other values
                yield from rows[name].conflicts(self)


def _is_section(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _check(name: str, value: Any, declared: Declared) -> None:
    if declared.span:
        declared.span.check(name, value)
    if declared.choices:
        errors.check_choice(name, value, declared.choices)
    if declared.regex:
        errors.check(name, bool(value), "a regex", value)
        errors.check_regex(name, value)
    elif isinstance(value, str) and not declared.urls:
        errors.check_local(name, value)


def walk(cls: type) -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yields (dotted name, its section, field) of all fields below a class of sections."""
    for found in dataclasses.fields(cls):
        if _is_section(found.type):
            yield from walk(found.type)
        else:
            yield f"{cls.section}.{found.name}", cls, found


def decided_by(cls: type, stage: str) -> frozenset[str]:
    """Returns the dotted names of the fields that can change a stage's result."""
    names = set()
    for name, owner, found in walk(cls):
        decides = found.metadata["declared"].decides
        if stage in (owner.decides if decides is None else decides):
            names.add(name)
    return frozenset(names)


def defaults(cls: type) -> dict[str, Any]:
    """Returns every field with its default, in nested dicts."""
    return {
        found.name: defaults(found.type) if _is_section(found.type) else found.default
        for found in dataclasses.fields(cls)
    }


def build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Makes the checked dataclass of nested dicts; fields that are left out have their defaults.

    Raises:
        UserError: a field that does not exist (with the nearest that does), of the wrong type, out
            of range, or at odds with another.
    """
    return _construct(cls, typed(cls, values, prefix))


def _construct(cls, values):
    kinds = {found.name: found.type for found in dataclasses.fields(cls)}
    arguments = {
        name: _construct(kinds[name], value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return cls(**arguments)


def typed(cls: type, values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of a section, whole numbers converted where a field is real.

    Raises:
        UserError: a field that does not exist, or of the wrong type.
    """
    if not isinstance(values, dict):
        raise errors.UserError(f"config field {prefix[:-1]} must be a section with fields.")
    kinds = {found.name: found.type for found in dataclasses.fields(cls)}
    for name in values:
        if name not in kinds:
            near = errors.nearest(str(name), kinds)
            raise errors.UserError(f"config field {prefix}{name} does not exist.{near}")
    found = {}
    for name, kind in kinds.items():
        where = f"{prefix}{name}"
        if _is_section(kind):
            found[name] = typed(kind, values.get(name), f"{where}.")
        elif name in values:
            found[name] = _typed_value(kind, values[name], where)
    return found


def _typed_value(kind: Any, value: Any, where: str) -> Any:
    if type(value) is int and abs(value) >= 2**63:  # too long to convert, even to print
        raise errors.UserError(f"{where} must be a number below 2**63 in size.")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise errors.UserError(f"{where} must be of type {kind.__name__}; got {value!r}.")
    if kind is float and not math.isfinite(value):
        raise errors.UserError(f"{where} must be finite; got {value}.")
    return value


def describe(cls: type, only: str = "") -> str:
    """Writes the lines of --help: every field of the sections that begin with `only`, grouped.

    Raises:
        UserError: there is no such section.
    """
    lines, last = [], None
    sections = list(dict.fromkeys(owner.section for _, owner, _ in walk(cls)))
    if only and not any(_below(name, only) for name in sections):
        errors.check_choice("--help", only, sections)
    for name, owner, found in walk(cls):
        if only and not _below(owner.section, only):
            continue
        if owner.section != last:
            last = owner.section
            lines += ["", f"{last}:"]
        shown = str(found.default) or '""'
        lines.append(f"  --config.{name}={shown}")
        said = _sentence(found)
        lines.append(textwrap.fill(said, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines[1:])


def _sentence(found: dataclasses.Field) -> str:
    """Writes what a field says, with its type and range."""
    declared = found.metadata["declared"]
    kind = {int: "whole number", float: "number", bool: "True or False", str: "text"}[found.type]
    if declared.choices:
        said = [f"{n}: {says}" if says else n for n, says in declared.choices.items()]
        kind = ("; " if isinstance(declared.listed, str) else ", ").join(said)
    elif declared.regex:
        kind = "regex"
    elif declared.span:
        kind += f" {declared.span}"
    return f"{declared.says} ({kind})"


def _below(name: str, section: str) -> bool:
    return f"{name}.".startswith(f"{section.removesuffix('.')}.")
