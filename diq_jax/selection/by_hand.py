"""Files by which people decide, as the explorer exports: an order, and edits, in JSONL."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.run import reading

DECISIONS = {"keep": 0, "never": 2}  # 1: not decided


@dataclasses.dataclass(frozen=True)
class Decision:
    """Holds what a person decided about an example: keep or never, and why ("" for none)."""

    decision: str
    reason: str = ""

    @property
    def said(self) -> str:
        """The end of the example's `why`."""
        what = "always kept" if self.decision == "keep" else "never taken"
        return f"; {what}, decided by hand" + (f": {self.reason}" if self.reason else "")


def existing(path: str, field: str) -> pathlib.Path:
    """Returns the path of a file that a field names. Raises UserError where it is missing."""
    if not pathlib.Path(path).is_file():
        raise errors.UserError(f"{field}: there is no file {path}.")
    return pathlib.Path(path)


def listed(path: str, ids: Sequence[str], field: str = "selection.method") -> np.ndarray:
    """Reads an order of examples.

    Returns:
        (n,) float32: the line of each example of the pool, from 1; inf where it is not listed.

    Raises:
        UserError: a row without example_id, an example that the pool lacks or that stands twice.
    """
    places = np.full(len(ids), np.inf, np.float32)
    for line, (i, _) in enumerate(_rows(path, ids, field), 1):
        places[i] = line
    return places


def decisions(path: str, ids: Sequence[str], field: str = "selection.edits") -> dict[str, Decision]:
    """Reads {example_id: decision}.

    Raises:
        UserError: as `listed`, or a decision that is neither keep nor never.
    """
    found = {}
    for line, (i, row) in enumerate(_rows(path, ids, field), 1):
        decision: Any = row.get("decision")  # checked below
        reason = row.get("reason") or ""
        errors.check_choice(f"{field}: {path}:{line}: decision", decision, DECISIONS)
        if not isinstance(reason, str):
            raise errors.UserError(f"{field}: {path}:{line}: reason must be text; got {reason!r}.")
        found[ids[i]] = Decision(decision, reason)
    return found


def apply(
    ranks: np.ndarray, ids: Sequence[str], decided: Mapping[str, Decision], keep: int
) -> np.ndarray:
    """Puts kept examples first and the others that are decided last, each in their order.

    Raises:
        UserError: more are kept, or fewer are left, than the budget of `keep` examples.
    """
    group = np.array([DECISIONS[decided[i].decision] if i in decided else 1 for i in ids])
    for what, count in (("keeps", np.sum(group == 0)), ("leaves", np.sum(group < 2))):
        if (count > keep) if what == "keeps" else (count < keep):
            raise errors.UserError(
                f"selection.edits {what} {count:,} examples, and the budget is {keep:,}: change "
                "selection.retention_ratio or the file."
            )
    out = np.empty_like(ranks)
    out[np.lexsort((ranks, group))] = np.arange(1, len(ranks) + 1)
    return out


def _rows(path, ids, field) -> list[tuple[int, dict[str, Any]]]:
    """Reads (place in the pool, row) of each line."""
    places, seen, found = {example: i for i, example in enumerate(ids)}, set(), []
    for line, row in enumerate(reading.read_jsonl(existing(path, field)), 1):
        where = f"{field}: {path}:{line}"
        example = row.get("example_id") if isinstance(row, dict) else None
        if not isinstance(example, str):
            raise errors.UserError(f'{where}: expected {{"example_id": ".."}}; got {row!r:.60}.')
        if example not in places:
            near = errors.nearest(example, ids)
            raise errors.UserError(f"{where}: the pool has no example {example!r}.{near}")
        if example in seen:
            raise errors.UserError(f"{where}: {example!r} stands twice.")
        seen.add(example)
        found.append((places[example], row))
    if not found:
        raise errors.UserError(f"{field}: {path} is empty.")
    return found
