"""What language models said, the annotator and the judges, and how far they agree."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diq_jax.report import tables
from diq_jax.run import artifacts, reading

if TYPE_CHECKING:
    from diq_jax.run import stages

JUDGE, VERDICTS, SUMMARY = "judge.json", ".verdicts.jsonl", ".summary.json"
TESTS = "prepare/tests.parquet"
PLACES = {"first": 1, "tie": 0, "second": -1}
MOST_APART = 8  # of the judgements that are shown


@dataclasses.dataclass(frozen=True)
class Opinions:
    """Holds what the jobs wrote, empty where they did not run.

    Attributes:
        judge, verdicts: judge.json and judge.verdicts.jsonl in the run's folder.
        annotator: the summary beside difficulty.source.
        questions: {example_id: question} of the tests.
    """

    judge: Mapping[str, Any]
    verdicts: Sequence[Mapping[str, Any]]
    annotator: Mapping[str, Any]
    questions: Mapping[str, str]


def _files(context) -> dict[str, pathlib.Path]:
    judge = context.path(JUDGE)
    places = {"judge": judge, "verdicts": judge.with_suffix(VERDICTS)}
    labels = pathlib.Path(context.config.difficulty.source)
    if labels.is_file():  # not `sample`, `columns` or a classifier's folder
        places["annotator"] = labels.with_suffix(SUMMARY)
    return {name: path for name, path in places.items() if path.is_file()}


def fingerprints(context: "stages.Context") -> dict[str, str]:
    """Returns {name: hash} of the files that no stage has made."""
    return {path.name: artifacts.sha256(path) for path in _files(context).values()}


def load(context: "stages.Context") -> Opinions:
    """Reads what is there. Raises UserError for a file that these jobs did not write."""
    files = _files(context)
    judge, annotator, verdicts = {}, {}, []
    if "judge" in files:
        kinds = {"mode": str, "answers": list, "judges": (list, dict), "agreement": dict}
        judge = reading.read_record(files["judge"], kinds)
        needed = {"all": dict} if judge["mode"] == "pairwise" else {"models": dict}
        reading.check_record(judge, str(files["judge"]), needed)
    if "verdicts" in files:
        verdicts = reading.read_jsonl(files["verdicts"])
        kinds = {"judge": str, "example_id": str, "verdict": dict}
        for row in verdicts:
            reading.check_record(row, str(files["verdicts"]), kinds)
    if "annotator" in files:
        kinds = {"model": str, "rows": int, "draws": int}
        kinds |= {"levels": dict, "kappa": dict, "apart": list}
        annotator = reading.read_record(files["annotator"], kinds)
    questions = {}
    if verdicts and context.path(TESTS).exists():
        table = context.table(TESTS, "example_id", "question")
        columns = (table[name].to_pylist() for name in ("example_id", "question"))
        questions = dict(zip(*columns, strict=True))
    return Opinions(judge, verdicts, annotator, questions)


def annotated(found: Mapping[str, Any]) -> tables.Table:
    """Tables an annotator's levels and, of several draws, their agreement."""
    draws = found["draws"] > 1
    rows = [
        [name, *(f"{n:,}" for n in counts), *[tables.number(found["kappa"][name], 3)] * draws]
        for name, counts in found["levels"].items()
    ]
    steps = (f"level {k}" for k in range(1, 1 + len(next(iter(found["levels"].values())))))
    return tables.Table.of_texts(["", *steps, *["kappa between draws"] * draws], rows)


def judged(found: Mapping[str, Any]) -> list[tables.Table]:
    """Tables judge.json: levels of each model or wins and losses, then the agreement of judges."""
    made = [_pairs(found) if found["mode"] == "pairwise" else _levels(found)]
    agreement, rows = found["agreement"], []
    for criterion, value in agreement.items():
        numbers = (tables.number(n, 3) for n in (value["alpha"], *value["kappa"].values()))
        rows.append([criterion, f"{value['units']:,}", *numbers])
    if rows:
        pairs = [f"kappa {pair}" for pair in next(iter(agreement.values()))["kappa"]]
        headers = ["agreement of judges", "judged by two", "alpha (ordinal)", *pairs]
        made.append(tables.Table.of_texts(headers, rows))
    return made


def _levels(found):
    """Levels of each model, by all judges and by each, then the paired differences."""
    criteria = [name for name in next(iter(found["models"].values())) if name != "judges"]

    def row(name, means, sign=False):
        return [tables.Cell(name), *(_mean(means[c], sign) for c in criteria)]

    rows = []
    for model, means in found["models"].items():
        own = means["judges"] if len(means["judges"]) > 1 else {}
        rows += [row(model, means), *(row(f"{model}, by {name}", own[name]) for name in own)]
    rows += [row(gap, means, sign=True) for gap, means in found["differences"].items()]
    return tables.Table(["level, 1 to 5", *criteria], rows)


def _pairs(found):
    """Wins, ties and losses of the first model; a verdict counts where both orders agree."""
    counts, rows = ("wins", "ties", "losses"), []
    by_judge = found["judges"] if len(found["judges"]) > 1 else {}
    for name, values in [("", found["all"]), *by_judge.items()]:
        for criterion, value in values.items():
            differ = value["disagree"]
            plain = [f"{criterion}, by {name}" if name else criterion]
            plain += [f"{value[count]:,}" for count in counts]
            net, bias = (_mean(value[k], sign=True) for k in ("net", "position_bias"))
            p, share = f"{value['p']:.3g}", tables.number(differ and 100 * differ, 0)
            rows.append([*map(tables.Cell, plain), net, tables.Cell(p), bias, tables.Cell(share)])
    headers = [*counts, "net", "p", "position bias", "orders differ (%)"]
    return tables.Table([" against ".join(found["answers"]), *headers], rows)


def _mean(value, sign=False):
    if value["mean"] is None:
        return tables.Cell("–")
    return tables.Cell(tables.number(value["mean"], 2, sign), tables.interval(value, 2))


def voices(verdicts: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, int]]:
    """Sorts judgements into {(example_id, model, criterion): {who said it: level}}.

    Of a pairwise judgement the level is 1 where the first model wins, 0 at a tie and -1 where the
    second does, and each order is a voice of its own.
    """
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for row in verdicts:
        said = {row["judge"]: (row["verdict"], 1)}
        if "swapped" in row:
            said[f"{row['judge']}, orders swapped"] = row["swapped"], -1
        for who, (given, sign) in said.items():
            for criterion, value in given.items():
                if f"{criterion}_reason" in given:
                    level = value if isinstance(value, int) else sign * PLACES[value]
                    place = row["example_id"], row.get("model", ""), criterion
                    found.setdefault(place, {})[who] = level
    return found


def confusion(verdicts: Sequence[Mapping[str, Any]]) -> tables.Table | None:
    """Counts levels of the first two voices against each other; None where there is one."""
    found = list(voices(verdicts).values())
    names = list(dict.fromkeys(itertools.chain.from_iterable(found)))[:2]
    both = [tuple(said[name] for name in names) for said in found if set(names) <= set(said)]
    if len(names) < 2 or not both:
        return None
    levels = range(min(map(min, both)), max(map(max, both)) + 1)
    rows = [[f"{names[0]}: {i}", *(f"{both.count((i, j)):,}" for j in levels)] for i in levels]
    return tables.Table.of_texts(["", *(f"{names[1]}: {j}" for j in levels)], rows)


def apart(opinions: Opinions) -> tables.Table | None:
    """Tables the judgements that are farthest apart, with what each voice said; None without."""
    found = voices(opinions.verdicts)
    wide = [place for place, said in found.items() if len(set(said.values())) > 1]
    wide.sort(key=lambda place: (min(found[place].values()) - max(found[place].values()), place))
    rows = []
    for name, model, criterion in wide[:MOST_APART]:
        said = "; ".join(f"{w} {level}" for w, level in found[name, model, criterion].items())
        question = tables.cut(opinions.questions.get(name, ""), 120)
        rows.append([" · ".join(filter(None, (name, model, question))), criterion, said])
    headers = ["Judged", "criterion", "levels"]
    return tables.Table.of_texts(headers, rows) if rows else None
