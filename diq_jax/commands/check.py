r"""Checks a pool alone, without a model: rows that repeat each other, a target or a test.

    diq check --pool=pool.jsonl --against='tasks/*/*.jsonl' \
        --output=pairs.jsonl

Prints the pairs by kind and the first of each kind side by side; writes them all as JSONL
(example_id, other, other_in, kind, similarity), where other_in is pool or a task of --against. The
kinds stand in diq_jax/selection/hygiene.py; all but paraphrase, which needs an encoder, are looked
for.
"""

import collections
import shutil
import time
from typing import TYPE_CHECKING

from absl import flags

from diq_jax import fields, selection_config

if TYPE_CHECKING:
    from diq_jax.selection import hygiene

POOL = flags.DEFINE_string("pool", None, "As data.pool.", required=True)
COLUMNS = flags.DEFINE_string("columns", "", "As data.columns.")
AGAINST = flags.DEFINE_string(
    "against", "", "As data.tests, or like the pool; empty = the pool alone."
)
OUTPUT = flags.DEFINE_string("output", "", "The JSONL file to write; empty = none.")
SHOW = flags.DEFINE_integer("show", 3, "Pairs of each kind to print.", lower_bound=0)
THRESHOLDS = [
    "near_similarity", "excerpt_containment", "shingle_words", "ngram_words", "boilerplate_texts"
]  # fmt: skip
for _name in THRESHOLDS:
    _default = getattr(selection_config.Selection, _name)
    _define = flags.DEFINE_integer if isinstance(_default, int) else flags.DEFINE_float
    _define(_name, _default, f"As selection.{_name}.")


def read_rows() -> "tuple[list[hygiene.ComparedRow], list[hygiene.ComparedRow]]":
    """Returns the hygiene.ComparedRows of the pool and of --against, whose place is their task."""
    from diq_jax.data import example, sources
    from diq_jax.selection import hygiene

    def row(e: example.Example, place: str, completion: str) -> hygiene.ComparedRow:
        asked = hygiene.ask(e.question, (e.options or {}).values())
        return hygiene.ComparedRow(e.example_id, place, asked, completion)

    pool = [
        row(e, "pool", f"{e.reasoning}\n{e.answer}".strip())
        for e in sources.load_examples(POOL.value, COLUMNS.value, 0, "--pool")
    ]
    if not AGAINST.value:
        return pool, []
    against = [
        row(e, e.task, "")
        for e in sources.load_targets(AGAINST.value, 0, 0, COLUMNS.value, "--against", "tests")
    ]
    return pool, against


def side_by_side(left: str, right: str, width: int) -> str:
    """Puts the beginnings of two texts into two columns, four lines at most."""
    half = (width - 3) // 2
    left, right = (" ".join(text.split()) for text in (left, right))
    cut = [(left[i : i + half], right[i : i + half]) for i in range(0, 4 * half, half)]
    return "\n".join(f"{a:<{half}} | {b}" for a, b in cut if a or b)


def main() -> None:
    """Finds the pairs, prints and writes them."""
    from diq_jax.run import artifacts
    from diq_jax.selection import hygiene

    given = {name: flags.FLAGS[name].value for name in THRESHOLDS}
    settings = fields.build(selection_config.Selection, given)
    pool, against = read_rows()
    started = time.perf_counter()
    pairs = hygiene.find(pool, against, settings, None)
    seconds = time.perf_counter() - started

    by_kind = collections.Counter((p.kind, p.other_in == "pool") for p in pairs)
    print(f"{'pairs':<10}{'in the pool':>12}{'against':>10}")
    for kind in hygiene.KINDS[:-1]:
        print(f"{kind:<10}{by_kind[kind, True]:>12,}{by_kind[kind, False]:>10,}")
    print(
        f"{len(pool):,} pool rows, {len(against):,} against: "
        f"{len({p.example_id for p in pairs}):,} rows in a pair, {len(hygiene.dropped(pairs)):,} "
        f"that hygiene=remove would leave out; {seconds:.1f} s"
    )
    asked = {(row.place, row.example_id): row.question for row in (*pool, *against)}
    width = shutil.get_terminal_size().columns
    for kind in hygiene.KINDS:
        for p in [p for p in pairs if p.kind == kind][: SHOW.value]:
            print(f"\n{kind} {p.similarity:.2f}: {p.example_id} | {p.other_in} {p.other}")
            print(side_by_side(asked["pool", p.example_id], asked[p.other_in, p.other], width))
    if OUTPUT.value:
        artifacts.write_jsonl(OUTPUT.value, [pair._asdict() for pair in pairs])
        print(f"\nwrote {OUTPUT.value}")
