"""The report's numbers: scores, rows and records -> tables of text."""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config, fields, stats

MOST_GROUPS = 12  # rows of a table by group; the rest are summed up
MOST_PAIRS = 40  # of repeated rows that are listed
MOST_DECIMALS = 6  # of a number; smaller ones are in powers of ten
MOST_VALUES = 40  # a column with more values than this is no group
LONGEST_VALUE = 60  # nor is one with a longer text


@dataclasses.dataclass(frozen=True)
class Cell:
    """Holds a number as text, its interval as text, and whether it is marked."""

    text: str
    interval: str = ""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first column is a name, the others are numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @classmethod
    def of_texts(cls, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
        """Makes a table of cells without intervals or marks."""
        return cls(headers, [list(map(Cell, row)) for row in rows])

    def plain(self) -> str:
        """Returns aligned text, with an ASCII minus so that numbers can be copied."""
        texts = [list(self.headers)] + [
            [f"{c.text} ({c.interval})" if c.interval else c.text for c in row] for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in texts
        )
        return "\n".join(lines).replace("−", "-")


def script_json(value: Any) -> str:
    """Writes JSON that may stand inside a script element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()


def cut(text: str, room: int) -> str:
    """Writes the first words of a text on one line of at most `room` characters."""
    line = " ".join(text[: 4 * room].split())
    return line if len(line) <= room else line[: room - 1] + "…"


def number(value: float | None, decimals: int, sign: bool = False) -> str:
    """Writes fixed decimals, thousands apart, a true minus; a dash for what is not defined.

    What needs more than MOST_DECIMALS is in powers of ten; what rounds to 0 has no sign.
    """
    if value is None or not math.isfinite(value):
        return "–"
    form = f",.{decimals}f" if decimals <= MOST_DECIMALS else ".1e"
    return f"{value:{'+' if sign else ''}z{form}}".replace("-", "−")


def interval(value: Mapping[str, float], decimals: int, factor: float = 1) -> str:
    """Writes both ends of an interval, with as many decimals as `enough` says."""
    decimals = enough(value, decimals, factor)
    low, high = (number(value[end] * factor, decimals) for end in ("low", "high"))
    return f"{low} to {high}"


def enough(value: Mapping[str, float], decimals: int, factor: float) -> int:
    """Counts decimals: more where an interval has no width, or an end beside 0 would be 0."""
    low, high = (factor * value[end] for end in ("low", "high"))
    sizes = [high - low, max(low, -high)]  # the second: how far 0 is outside
    needed = (math.ceil(-math.log10(size)) for size in sizes if 0 < size < math.inf)
    return max([decimals, *needed])


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Writes Spearman's rho, or why there is none."""
    rho = stats.spearman(x, y) if len(x) > 1 else math.nan
    return number(rho, 2) if math.isfinite(rho) else "not defined: a constant"


def group_shares(values: Sequence[str], selected: np.ndarray) -> list[tuple[str, int, int]]:
    """Counts (group, examples, selected ones); beyond the MOST_GROUPS most frequent one sum.

    Most frequent first, but numbers in their order.
    """
    pool = collections.Counter(values)
    chosen = collections.Counter(v for v, s in zip(values, selected, strict=True) if s)
    ordered = sorted(pool, key=lambda v: (-pool[v], v))
    head = ordered if len(ordered) <= MOST_GROUPS else ordered[: MOST_GROUPS - 1]
    rest = ordered[len(head) :]
    if all(v.isdecimal() for v in head):
        head = sorted(head, key=int)
    out = [(v or "(none)", pool[v], chosen[v]) for v in head]
    if rest:
        others = sum(pool[v] for v in rest), sum(chosen[v] for v in rest)
        out.append((f"{len(rest)} others", *others))
    return out


def groups(title: str, shares: Sequence[tuple[str, int, int]]) -> Table:
    """Tables pool and selection by group. A ratio of 2 is twice the group's share of the pool."""
    pool, chosen = sum(n for _, n, _ in shares), max(1, sum(k for _, _, k in shares))
    rows = []
    for name, n, k in shares:
        ratio = (k / chosen) / (n / pool) if n else None
        numbers = (n, 0), (100 * n / pool, 1), (k, 0), (100 * k / chosen, 1), (ratio, 2)
        rows.append([name, *(number(value, decimals) for value, decimals in numbers)])
    return Table.of_texts([title, "Pool", "%", "Selected", "%", "Ratio"], rows)


def repeats(pairs: Sequence[Mapping[str, Any]], chosen: Collection[str]) -> tuple[Table, Table]:
    """Tables rows that repeat each other, a target or a test: counts by kind, selected pairs.

    Args:
        pairs: the rows of selection/hygiene.parquet.
        chosen: ids of the selected examples.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        kinds.setdefault(pair["kind"], []).append(pair)
    rows = []
    for kind, found in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        inside = [pair for pair in found if pair["other_in"] == "pool"]
        ids = {pair["example_id"] for pair in found} | {pair["other"] for pair in inside}
        counts = len(inside), len(found) - len(inside), len(ids), len(ids & set(chosen))
        rows.append([kind, *(number(count, 0) for count in counts)])
    picked = [
        [*(pair[name] for name in ("example_id", "other", "other_in", "kind")),
         number(pair["similarity"], 2)]
        for pair in sorted(pairs, key=lambda pair: (-pair["similarity"], pair["example_id"]))
        if pair["example_id"] in chosen or (pair["other_in"] == "pool" and pair["other"] in chosen)
    ]  # fmt: skip
    counted = ["Kind", "Pairs in the pool", "With a target or test", "Rows", "Selected"]
    listed = ["Row", "repeats", "in", "Kind", "Similarity"]
    return Table.of_texts(counted, rows), Table.of_texts(listed, picked[:MOST_PAIRS])


def group_columns(rows: Sequence[Mapping[str, Any]], skip: Sequence[str]) -> dict[str, list[str]]:
    """Finds the columns of the rows as they came that sort them into a few groups, as text."""
    columns: dict[str, tuple[list[str], dict[str, str]]] = {}
    left_out, most = set(skip), min(MOST_VALUES, len(rows) // 3)
    for i, row in enumerate(rows):
        for name in row.keys() - left_out:
            value, (values, distinct) = row[name], columns.setdefault(name, ([], {}))
            for _ in range(i - len(values)):  # rows without the column
                values.append(distinct.setdefault("", ""))
            fits = isinstance(value, str | bool | int | None)
            text = str(value) if fits and value is not None else ""
            values.append(distinct.setdefault(text, text))
            if not fits or len(text) > LONGEST_VALUE or len(distinct) > most:
                left_out.add(name)
                del columns[name]
    whole = {
        name: values + [""] * (len(rows) - len(values))
        for name, (values, _) in sorted(columns.items())
    }
    return {name: values for name, values in whole.items() if 2 <= len(set(values)) <= most}


def difficulty(found: Mapping[str, Any]) -> Table | None:
    """Tables the classifier beside its baselines, for each perspective; None without a metric."""
    scored: dict[str, Mapping[str, Any]] = {}
    for perspective, values in found.get("perspectives", {}).items():
        scored |= {f"{perspective}: classifier": values} | {
            f"{perspective}: {name}": measured
            for name, measured in values.get("baselines", {}).items()
        }
        for other, delta in values.get("difference", {}).items():
            if "mean" in delta:
                paired = {"spearman": delta["mean"], "interval": delta}
                scored[f"{perspective}: classifier − {other}"] = paired
    plain = {
        name: {k: v for k, v in measured.items() if not isinstance(v, dict | list | str)}
        for name, measured in scored.items()
    }
    columns = list(dict.fromkeys(column for values in plain.values() for column in values))
    if not columns:
        return None

    def cell(name, column):
        ends = scored[name].get("interval") if column == "spearman" else None
        return Cell(number(plain[name].get(column), 3), interval(ends, 3) if ends else "")

    titles = {"spearman": "Spearman", "mae": "MAE (levels)", "kappa": "Kappa (quadratic)"}
    return Table(
        ["Perspective: method", *(titles.get(column, column) for column in columns)],
        [[Cell(name), *(cell(name, column) for column in columns)] for name in scored],
    )


def cost(records: Sequence[Mapping[str, Any]]) -> Table:
    """Tables seconds, rows and tokens of each finished stage, from its stage.json."""
    total = sum(record["seconds"] for record in records)
    rows = [
        [
            record["stage"],
            number(record["seconds"], 1),
            number(100 * record["seconds"] / total if total else None, 1),
            *(number(record.get(name), 0) for name in ("rows", "tokens", "tokens_per_second")),
        ]
        for record in records
    ]
    rows.append(["all", number(total, 1), "100.0", "", "", ""])
    headers = ["Stage", "Time (s)", "Share (%)", "Rows", "Tokens", "Tokens/s"]
    return Table.of_texts(headers, rows)


def versions(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Says what the stages ran on; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return {name: ", then ".join(seen) for name, seen in found.items()}


def settings(cfg: config.Config) -> list[tuple[str, str, bool]]:
    """Lists (dotted field, value, whether it is not the default) of the whole config."""
    found = []
    for name, _, declared in fields.walk(config.Config):
        value = functools.reduce(getattr, name.split("."), cfg)
        found.append((name, repr(value), value != declared.default))
    return found


def length_means(answer_tokens: np.ndarray, selected: np.ndarray) -> tuple[str, str]:
    """Writes mean answer tokens of the selection and of the pool."""
    chosen = np.mean(answer_tokens[selected]) if selected.any() else math.nan
    return number(float(chosen), 1), number(float(np.mean(answer_tokens)), 1)
