"""Writes a page that holds two runs over one pool, or several studies, against each other.

    diq report --compare=runs/a,runs/b --out=a_against_b
    diq report --studies=runs/compare,runs/lab --out=studies

Of two runs: what both select, what one alone does and with which scores, rank against rank, and
the settings that differ; `diq view RUN RUN` serves the same page without writing it. Of studies,
the folders of compare_selection.py and selection_lab.py: each method's difference to random.
--out gets report.html and its pictures. The report of one run is its stage report:
diq run --stages=report.
"""

from absl import flags

from diq_jax import errors
from diq_jax.commands import cli

VERIFY = cli.define_verify()
COMPARE = flags.DEFINE_list("compare", None, "Two runs' folders, RUN,RUN.")
STUDIES = flags.DEFINE_list("studies", None, "Folders of studies.")
OUT = flags.DEFINE_string("out", None, "The folder to write, which is new.", required=True)


def main() -> None:
    """Writes the page."""
    if bool(COMPARE.value) == bool(STUDIES.value):
        raise errors.UserError("Give one of --compare=RUN,RUN and --studies=FOLDER,FOLDER.")
    named = COMPARE.value or []
    if named and len(named) != 2:
        raise errors.UserError(f"--compare must name two runs; got {','.join(named)!r}.")
    out = cli.folder(OUT)
    if out.exists():
        raise errors.UserError(f"--out: {out} exists; name another folder, or remove it.")
    if STUDIES.value:
        from diq_jax.report import page, studies

        folders = [cli.run_folder(name, "--studies") for name in STUDIES.value]
        page.write_studies(out, [studies.load(folder, "--studies") for folder in folders])
    else:
        from diq_jax.report import compare

        first, second = (cli.run_folder(run, "--compare") for run in named)
        sides = compare.load(first, second, "--compare", cli.verify(VERIFY))
        compare.write(out, sides)
        print(compare.headline(*sides))
    print(f"wrote {out / 'report.html'}")
