"""The report's numbers: results and scores -> tables of text, for the page and for the terminal.

A cell is formatted here and nowhere else; a difference is marked where its interval excludes 0.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import config, stats

METRICS = {  # name: (title, unit, factor, decimals)
    "test_loss": ("Test loss", "nats/token", 1, 3),
    "target_loss": ("Target loss", "nats/token", 1, 3),
    "accuracy": ("Accuracy", "%", 100, 1),
    "accuracy_norm": ("Accuracy, length-normalised", "%", 100, 1),
}
REFERENCES = ("base", "random")  # what an arm is compared with
MOST_GROUPS = 12  # rows of a table by group; the rest are summed up
MOST_PAIRS = 40  # of repeated rows that are listed
MOST_DECIMALS = 6  # of a number; smaller ones are in powers of ten
MOST_VALUES = 40  # a column with more values than this is no group


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number as text, its interval as text, and whether it is marked."""

    text: str
    interval: str = ""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first column is a name, the others are numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def plain(self) -> str:
        """Aligned text, with an ASCII minus so that numbers can be copied."""
        texts = [list(self.headers)] + [
            [f"{c.text} ({c.interval})" if c.interval else c.text for c in row] for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in texts
        )
        return "\n".join(lines).replace("−", "-")


def number(value: float | None, decimals: int, sign: bool = False) -> str:
    """Fixed decimals, thousands apart, a true minus; a dash for what is not defined.

    What needs more than MOST_DECIMALS is in powers of ten; what rounds to 0 has no sign.
    """
    if value is None or not math.isfinite(value):
        return "–"
    form = f",.{decimals}f" if decimals <= MOST_DECIMALS else ".1e"
    return f"{value:{'+' if sign else ''}z{form}}".replace("-", "−")


def decimals_for(values) -> int:
    """As many decimals as tell four digits of the spread of the values."""
    spread = float(np.ptp(values)) or abs(float(values[0])) or 1.0
    return max(0, 4 - math.ceil(math.log10(spread)))


def correlation(x, y) -> str:
    """Spearman's rho, or why there is none."""
    rho = stats.spearman(x, y) if len(x) > 1 else math.nan
    return number(rho, 2) if math.isfinite(rho) else "not defined: a constant"


def arms(results: Mapping[str, Any]) -> list[str]:
    """Base, selected, then the baselines, as far as they were evaluated."""
    models = results["models"]
    return sorted(models, key=lambda arm: {"base": 0, "selected": 1}.get(arm, 2))


def headline(results: Mapping[str, Any] | None) -> str:
    """What loss and accuracy say of the selection in this run, which is one seed."""
    models = results["models"] if results else {}
    if "selected" not in models:
        return "Not evaluated: whether this selection helps is not known."
    versus = models["selected"].get("versus", {})
    against = next((name for name in ("random", "base") if name in versus), None)
    said = [f"One seed, {results['tests']} held-out questions."]
    for metric, better in (("test_loss", "low"), ("accuracy", "high")):
        if metric in models["selected"]:
            said.append(_claim(models, metric, better, against))
    if against is None:
        said.append("The selection was compared with nothing.")
    elif against == "base":
        said.append("No random subset was trained to compare with.")
    said.append("Another seed may differ: compare_selection.py runs several.")
    return " ".join(said)


def _claim(models, metric, better, against):
    """One sentence on one metric: its levels, the paired difference, and what that shows."""
    title, unit, factor, decimals = METRICS[metric]
    names = {"selected": "selected", against: "the base model" if against == "base" else against}
    means = (
        f"{name} {number(factor * models[arm][metric]['mean'], decimals)}"
        for arm, name in names.items()
        if arm is not None
    )
    said = f"{title}: {', '.join(means)} {unit}"
    delta = models["selected"].get("versus", {}).get(against, {}).get(metric)
    if not delta:
        return f"{said}."
    found = _measure(delta, metric, sign=True)
    verdict = "no difference is shown, as the interval includes 0"
    if found.strong:
        verdict = "better" if (delta["high"] < 0) == (better == "low") else "worse"
        verdict += f" than {names[against]} in this run"
    gap = f"{found.text} {unit.replace('%', 'points')} (95 % interval {found.interval})"
    return f"{said}, paired difference {gap}: {verdict}."


def levels(results: Mapping[str, Any], task: str | None = None) -> Table:
    """Each metric of each arm, of all questions or of one task (which has no target loss); of
    generated answers also the questions without a readable one.
    """
    found = {arm: results["models"][arm] for arm in arms(results)}
    if task is not None:
        found = {arm: values.get("tasks", {}).get(task, {}) for arm, values in found.items()}
    shown = _measured(found.values())
    headers, counted = ["Model", *map(_header, shown)], []
    if any("unparsable" in values for values in found.values()):
        headers, counted = [*headers, "Unparsable (questions)"], ["unparsable"]
    rows = []
    for arm, values in found.items():
        counts = (Cell(number(values.get(name), 0)) for name in counted)
        rows.append([Cell(arm), *(_measure(values.get(m), m) for m in shown), *counts])
    return Table(headers, rows)


def differences(results: Mapping[str, Any]) -> Table:
    """Paired differences, arm minus reference; strong where the interval excludes 0."""
    found = {}
    for reference in REFERENCES:
        for arm in arms(results):
            values = results["models"][arm].get("versus", {}).get(reference)
            if values and arm != reference:
                found[f"{arm} − {reference}"] = values
    shown = _measured(found.values())
    rows = [
        [Cell(name), *(_measure(values.get(m), m, sign=True) for m in shown)]
        for name, values in found.items()
    ]
    headers = [_header(m).replace("(%)", "(points)") for m in shown]
    return Table(["Difference", *headers], rows)


def _measured(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any has: generated answers have no length-normalised accuracy."""
    names = set().union(*found)
    return [metric for metric in METRICS if metric in names]


def averages(results: Mapping[str, Any]) -> Table | None:
    """Accuracies averaged over groups of benchmarks, and their paired differences; None without."""
    models = {arm: results["models"][arm] for arm in arms(results)}
    found = models[arms(results)[0]].get("averages")
    if not found:
        return None
    shown = [m for m in ("accuracy", "accuracy_norm") if any(m in v for v in found.values())]
    columns = [(group, metric) for metric in shown for group in found]

    def row(name, values, sign=False):
        cells = (_measure(values[group].get(metric), metric, sign) for group, metric in columns)
        return [Cell(name), *cells]

    rows = [row(arm, values["averages"]) for arm, values in models.items()]
    for reference in REFERENCES:
        for arm, values in models.items():
            gaps = values.get("versus", {}).get(reference, {}).get("averages")
            if gaps and arm != reference:
                rows.append(row(f"{arm} − {reference}", gaps, sign=True))
    marks = {"accuracy": "%", "accuracy_norm": "%, length-normalised"}
    headers = [f"{_group_title(results, group, found)} ({marks[m]})" for group, m in columns]
    return Table(["Mean over tasks", *headers], rows)


def _group_title(results, group, found):
    """The group and how many of its tasks were tested: fewer make another average."""
    tested = found[group]["tasks"]
    size = results.get("group_sizes", {}).get(group, tested)
    return f"{group}, {tested} tasks" if tested == size else f"{group}, {tested} of {size} tasks"


def panels(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, dict]], bool]]:
    """For figures.comparison: two levels, and the paired difference to random, or else to base."""
    models = {arm: results["models"][arm] for arm in arms(results)}

    def dots(metric, reference=None):
        for arm, values in models.items():
            values = values.get("versus", {}).get(reference) if reference else values
            if values and metric in values:
                factor = METRICS[metric][2]
                yield arm, {end: factor * values[metric][end] for end in ("mean", "low", "high")}

    reference = "random" if "random" in models else "base"
    accuracy = list(dots("accuracy_norm"))
    found = [
        ("Test loss (nats/token)", list(dots("test_loss")), False),
        ("Accuracy, length-norm. (%)", accuracy, False),
        ("Accuracy (%)", [] if accuracy else list(dots("accuracy")), False),
        (f"Test loss − {reference}", list(dots("test_loss", reference)), True),
    ]
    return [panel for panel in found if panel[1]]


def task_names(results: Mapping[str, Any]) -> dict[str, int]:
    """{task: questions}, in order."""
    first = results["models"][arms(results)[0]].get("tasks", {})
    return {task: values["questions"] for task, values in sorted(first.items())}


def _header(metric):
    title, unit, _, _ = METRICS[metric]
    return f"{title} ({unit})"


def _measure(value, metric, sign=False):
    _, _, factor, decimals = METRICS[metric]
    if not value:
        return Cell("–")
    outside = sign and (value["low"] > 0 or value["high"] < 0)
    decimals = _enough(value, decimals, factor)
    text = number(value["mean"] * factor, decimals, sign)
    return Cell(text, _ends(value, decimals, factor), outside)


def _ends(value, decimals, factor):
    decimals = _enough(value, decimals, factor)
    low, high = (number(value[end] * factor, decimals) for end in ("low", "high"))
    return f"{low} to {high}"


def _enough(value, decimals, factor):
    """At least `decimals`; more where an interval would have no width, or an end beside 0 be 0."""
    low, high = (factor * value[end] for end in ("low", "high"))
    sizes = [high - low, max(low, -high)]  # the second: how far 0 is outside
    needed = (math.ceil(-math.log10(size)) for size in sizes if 0 < size < math.inf)
    return max([decimals, *needed])


def group_shares(values: Sequence[str], selected) -> list[tuple[str, int, int]]:
    """(group, examples, selected ones); beyond the MOST_GROUPS most frequent one sum.

    Most frequent first, but numbers in their order.
    """
    pool = collections.Counter(values)
    chosen = collections.Counter(v for v, s in zip(values, selected, strict=True) if s)
    ordered = sorted(pool, key=lambda v: (-pool[v], v))
    head = ordered if len(ordered) <= MOST_GROUPS else ordered[: MOST_GROUPS - 1]
    if all(v.isdecimal() for v in head):
        head = sorted(head, key=int)
    out = [(v or "(none)", pool[v], chosen[v]) for v in head]
    rest = ordered[len(head) :]
    if rest:
        sums = (sum(count[v] for v in rest) for count in (pool, chosen))
        out.append((f"{len(rest)} others", *sums))
    return out


def groups(title: str, shares: Sequence[tuple[str, int, int]]) -> Table:
    """Pool and selection by group. A ratio of 2 is twice the group's share of the pool."""
    pool, chosen = sum(n for _, n, _ in shares), sum(k for _, _, k in shares)
    rows = []
    for name, n, k in shares:
        before, after = n / pool, k / max(1, chosen)
        cells = (
            number(n, 0),
            number(100 * before, 1),
            number(k, 0),
            number(100 * after, 1),
            number(after / before if n else None, 2),
        )
        rows.append([Cell(name), *map(Cell, cells)])
    return Table([title, "Pool", "%", "Selected", "%", "Ratio"], rows)


def repeats(pairs: Sequence[Mapping[str, Any]], chosen: Collection[str]) -> tuple[Table, Table]:
    """Rows of the pool that repeat each other, a target or a test: counts by kind, and the pairs
    that hold a selected row.

    Args:
        pairs: the rows of selection/hygiene.parquet.
        chosen: ids of the selected examples.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        kinds.setdefault(pair["kind"], []).append(pair)
    rows = []
    for kind, of in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        inside = [pair for pair in of if pair["other_in"] == "pool"]
        ids = {pair["example_id"] for pair in of} | {pair["other"] for pair in inside}
        counts = len(inside), len(of) - len(inside), len(ids), len(ids & set(chosen))
        rows.append([Cell(kind), *(Cell(number(count, 0)) for count in counts)])
    picked = [
        [*(Cell(pair[name]) for name in ("example_id", "other", "other_in", "kind")),
         Cell(number(pair["similarity"], 2))]
        for pair in sorted(pairs, key=lambda pair: (-pair["similarity"], pair["example_id"]))
        if pair["example_id"] in chosen or (pair["other_in"] == "pool" and pair["other"] in chosen)
    ]  # fmt: skip
    return (
        Table(["Kind", "Pairs in the pool", "With a target or test", "Rows", "Selected"], rows),
        Table(["Row", "repeats", "in", "Kind", "Similarity"], picked[:MOST_PAIRS]),
    )


def group_columns(rows: Sequence[Mapping[str, Any]], skip: Sequence[str]) -> dict[str, list[str]]:
    """The columns of the rows as they came that sort them into a few groups, as text."""
    out = {}
    for name in sorted({key for row in rows for key in row} - set(skip)):
        values = [row.get(name) for row in rows]
        if not all(v is None or isinstance(v, str | bool | int) for v in values):
            continue
        texts = ["" if v is None else str(v) for v in values]
        distinct = set(texts)
        few = 2 <= len(distinct) <= min(MOST_VALUES, len(rows) // 3)
        if few and max(map(len, distinct)) <= 60:
            out[name] = texts
    return out


def difficulty(found: Mapping[str, Any] | None) -> Table | None:
    """The classifier beside its baselines, for each perspective; None where there is no metric."""
    rows, columns = [], {}
    for perspective, values in (found or {}).get("perspectives", {}).items():
        scored = {"classifier": values, **values.get("baselines", {})}
        for other, delta in values.get("difference", {}).items():
            if "mean" in delta:
                paired = {"spearman": delta["mean"], "interval": delta}
                scored[f"classifier − {other}"] = paired
        for name, measured in scored.items():
            plain = {k: v for k, v in measured.items() if not isinstance(v, dict | list | str)}
            columns |= dict.fromkeys(plain)
            interval = measured.get("interval")
            ends = {"spearman": _ends(interval, 3, 1)} if interval else {}
            rows.append((f"{perspective}: {name}", plain, ends))
    names = {"spearman": "Spearman", "mae": "MAE (levels)", "kappa": "Kappa (quadratic)"}
    if not columns:
        return None
    return Table(
        ["Perspective: method", *(names.get(c, c) for c in columns)],
        [
            [Cell(name), *(Cell(number(plain.get(c), 3), ends.get(c, "")) for c in columns)]
            for name, plain, ends in rows
        ],
    )


def cost(records: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds, rows and tokens of each finished stage, from its stage.json."""
    total = sum(record["seconds"] for record in records)
    rows = []
    for record in records:
        cells = (
            number(record["seconds"], 1),
            number(100 * record["seconds"] / total if total else None, 1),
            number(record.get("rows"), 0),
            number(record.get("tokens"), 0),
            number(record.get("tokens_per_second"), 0),
        )
        rows.append([Cell(record["stage"]), *map(Cell, cells)])
    rows.append([Cell("all"), Cell(number(total, 1)), Cell("100.0"), *[Cell("")] * 3])
    return Table(["Stage", "Time (s)", "Share (%)", "Rows", "Tokens", "Tokens/s"], rows)


def versions(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the stages ran on; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            found.setdefault(name, {})[version] = None
    return {name: ", then ".join(seen) for name, seen in found.items()}


def settings(cfg: config.Config) -> list[tuple[str, str, bool]]:
    """(dotted field, value, whether it is not the default) of the whole config."""

    def walk(section, prefix):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}", repr(value), value != field.default

    return list(walk(cfg, ""))


def length_means(answer_tokens, selected) -> tuple[str, str]:
    """Mean answer tokens of the selection and of the pool."""
    chosen = np.mean(answer_tokens[selected]) if selected.any() else math.nan
    return number(float(chosen), 1), number(float(np.mean(answer_tokens)), 1)
