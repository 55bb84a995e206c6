"""Writes a page that holds two runs over one pool against each other.

    diq report --compare=runs/a,runs/b --out=a_against_b

What both select, what one alone does and with which scores, rank against rank, and the settings
that differ: the folder gets report.html and its pictures. `diq view RUN RUN` serves the same page
without writing it. The report of one run is its stage report: diq run --stages=report.
"""

from absl import flags

from diq_jax import errors
from diq_jax.commands import cli

VERIFY = cli.define_verify()
COMPARE = flags.DEFINE_list("compare", None, "Two runs' folders, RUN,RUN.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder to write, which is new.", required=True)


def main() -> None:
    """Writes the page."""
    if len(COMPARE.value) != 2:
        raise errors.UserError(f"--compare must name two runs; got {','.join(COMPARE.value)!r}.")
    out = cli.folder(OUT)
    if out.exists():
        raise errors.UserError(f"--out: {out} exists; name another folder, or remove it.")

    from diq_jax.report import compare

    first, second = COMPARE.value
    sides = compare.load(first, second, "--compare", cli.verify(VERIFY))
    compare.write(out, sides)
    print(f"{compare.headline(*sides)}\nwrote {out / 'report.html'}")
