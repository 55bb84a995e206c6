"""Reads what a compiled TPU program costs off its HLO text: FLOPs, cycles, collectives.

Everything counts as often as the loops around it run (`cost_analysis()` of jax counts the body of a
loop once).
"""

import collections
import dataclasses
import math
import re

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all",
)  # fmt: skip
NO_ESTIMATE = 1 << 60  # what the compiler writes where it has none


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass
class Cost:
    """Adds up what a program does on one chip.

    Attributes:
        flops: of convolutions and dots; TPUs run every matrix product as one of them.
        cycles: the compiler's estimate for all but collectives that run beside others.
        collectives: {(kind, chips of a group): [times, bytes]}; an asynchronous pair counts once.
        chains: {channel: [kind, chips, times, bytes]} of those that go on piece by piece inside the
            fusions beside them; each is one collective, however many pieces it has.
        loops: the trip count of each loop; unknown ones count once.
    """

    flops: float = 0
    cycles: float = 0
    collectives: dict[tuple[str, int], list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: [0, 0.0])
    )
    chains: dict[str, tuple[str, int, int, float]] = dataclasses.field(default_factory=dict)
    loops: list[int] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0

    def by_kind(self) -> dict[str, list[float]]:
        """Returns {kind: [times, MiB]} of the collectives."""
        found: dict[str, list[float]] = {}
        for (kind, _), (times, size) in sorted(self.collectives.items()):
            total = found.setdefault(kind, [0, 0.0])
            total[0] += times
            total[1] = round(total[1] + size / 2**20, 1)
        return found

    def link_seconds(self, bandwidth: float) -> float:
        """Returns the collectives' seconds as rings at a chip's bandwidth: a lower bound."""
        seconds = 0.0
        for (kind, chips), (_, size) in self.collectives.items():
            if chips < 2:
                continue
            share = (chips - 1) / chips
            passes = {
                "all-reduce": 2 * share,
                "all-gather": share,
                "reduce-scatter": chips - 1,  # the size is that of the scattered output
                "all-to-all": share / 2,
            }
            seconds += passes.get(kind, 1.0) * size / bandwidth
        return seconds


def read(text: str) -> Cost:
    """Reads the cost of a program from its optimized HLO."""
    computations, entry = parse(text)
    cost = Cost()
    _visit(computations, entry, 1, False, cost)
    for kind, chips, times, size in cost.chains.values():
        _add(cost, kind, chips, times, size)
    return cost


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations of a program by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            words = line.split()
            name = words[1] if words[0] == "ENTRY" else words[0]
            lines = computations[name] = []
            entry = name if words[0] == "ENTRY" else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None and " = " in line:
            lines.append(_instruction(line))
    return computations, entry


def _instruction(line):
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    kind, rest = right[:end], right[end:].strip()
    start = rest.find("(")
    stop = _closing(rest, start)
    # A constant's value stands where others have operands.
    operands, attributes = rest[start : stop + 1], rest[stop + 1 :]
    if rest[:start] == "constant":
        attributes = operands + attributes
    names = tuple(re.findall(r"%[\w.\-]+", operands))
    return Instruction(left.removeprefix("ROOT "), kind, rest[:start], names, attributes)


def _closing(text, start):
    """The index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _visit(computations, name, times, fused, cost):
    """Adds a computation that runs `times` times; inside a fusion only FLOPs count."""
    types = {line.name: line.type for line in computations[name]}
    # On TPUs the slice of an all-reduce that a fusion ends with is one collective.
    last = computations[name][-1]
    scattered = last.operands[0] if fused and last.op == "dynamic-slice" else ""
    for line in computations[name]:
        if line.op in ("convolution", "dot"):
            sides = [types[operand] for operand in line.operands[:2]]
            cost.flops += times * {"convolution": _convolution, "dot": _dot}[line.op](line, *sides)
        kind = line.op.removesuffix("-start")
        if kind in COLLECTIVES:
            one = kind, _chips(line.attributes), times, _moved(line, kind)
            if kind == "all-reduce" and line.name == scattered:
                one = "reduce-scatter", *one[1:3], _moved(last, "reduce-scatter")
            if "chain_id=" in line.attributes:
                channel = re.findall(r"channel_id=\d+", line.attributes)[0]
                cost.chains[channel] = min(one, cost.chains.get(channel, one), key=lambda x: x[2])
            else:
                _add(cost, *one)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line.attributes)
        if estimate and not fused and int(estimate[1]) < NO_ESTIMATE:
            cost.cycles += times * int(estimate[1])
        if line.op == "while":
            trips = _trips(computations, line, cost)
            _visit(computations, _named(line, "body"), times * trips, False, cost)
        elif line.op == "fusion":
            _visit(computations, _named(line, "calls"), times, True, cost)
        elif line.op in ("call", "async-start"):
            called = _named(line, "calls") or _named(line, "to_apply")
            _visit(computations, called, times, fused, cost)
        elif line.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
            for branch in re.findall(r"%[\w.\-]+", branches[1] if branches else ""):
                _visit(computations, branch, times, False, cost)


def _add(cost, kind, chips, times, size):
    found = cost.collectives[kind, chips]
    found[0] += times
    found[1] += times * size


def _named(line, role):
    found = re.search(rf"{role}=(%[\w.\-]+)", line.attributes)
    return found[1] if found else None


def _trips(computations, loop, cost):
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    limits = [int(known[1])] if known else []
    for line in computations.get(_named(loop, "condition"), ()) if not known else ():
        if line.op == "constant" and line.type.startswith(("s32[]", "u32[]")):
            limits += map(int, re.findall(r"^\((\d+)\)", line.attributes))
    trips = max(limits, default=0) or 1
    trips = trips if known else -(-trips // _stride(computations, loop))
    cost.unknown_loops += not limits
    cost.loops.append(trips)
    return trips


def _stride(computations, loop):
    """What a loop adds to its counter, which its condition compares: an unrolled one adds more."""
    condition = {line.name: line for line in computations[_named(loop, "condition")]}
    body = {line.name: line for line in computations[_named(loop, "body")]}
    compared = [condition[x] for line in condition.values() if line.op == "compare"
                for x in line.operands if x in condition]  # fmt: skip
    for counter in (line for line in compared if line.op == "get-tuple-element"):
        place = int(re.findall(r"index=(\d+)", counter.attributes)[0])
        last = list(body.values())[-1]
        added = body.get(last.operands[place]) if last.op == "tuple" else None
        for x in added.operands if added and added.op == "add" else ():
            if body[x].op == "constant":
                return int(re.findall(r"^\((\d+)\)", body[x].attributes)[0])
    return 1


def _shapes(kind):
    """[(dtype, dimensions)] of a type, a tuple's members one by one."""
    found = re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", kind)
    return [(d, [int(x) for x in s.split(",") if x]) for d, s in found if d in BYTES]


def _moved(line, kind):
    """The bytes that a collective gives to each chip. A started one's type also has its input."""
    sizes = [BYTES[d] * math.prod(s) for d, s in _shapes(line.type)]
    if not line.op.endswith("-start"):
        return sum(sizes)
    if kind == "all-reduce":
        return sum(sizes)
    return min(sizes, default=0) if kind == "reduce-scatter" else max(sizes, default=0)


def _chips(attributes):
    """How many chips take part in each group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", found[2]))
    return 2 if "source_target_pairs" in attributes else 0


def _dot(line, left, right):
    [contracted] = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    sizes = _shapes(left)[0][1]
    inner = math.prod(sizes[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * math.prod(_shapes(line.type)[0][1]) * inner


def _convolution(line, left, right):
    """Counts products with elements of the input alone: what is padded or dilated is free."""
    [(inputs, kernel, output)] = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    left, right, out = (_shapes(x)[0][1] for x in (left, right, line.type))
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    settings = dict(re.findall(r"(\w+)=([\w\-]+)", window[1] if window else ""))
    count = sum(c.isdigit() for c in inputs)

    def each(key, default):
        values = settings[key].split("x") if key in settings else [default] * count
        return [tuple(map(int, str(v).split("_"))) for v in values]

    size, stride, pad = each("size", 1), each("stride", 1), each("pad", "0_0")
    dilated, spread = each("lhs_dilate", 1), each("rhs_dilate", 1)
    total = 2 * out[output.index("b")] * out[output.index("f")] * right[kernel.index("i")]
    for axis in range(count):
        length, places = left[inputs.index(str(axis))], out[output.index(str(axis))]
        first = np.arange(places)[:, None] * stride[axis][0] - pad[axis][0]
        at = first + np.arange(size[axis][0])[None] * spread[axis][0]
        step = dilated[axis][0]
        total *= int(((at >= 0) & (at <= (length - 1) * step) & (at % step == 0)).sum())
    groups = re.search(r"batch_group_count=(\d+)", line.attributes)
    return total // int(groups[1]) if groups else total
