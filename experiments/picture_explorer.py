"""Pictures of the views of a run's report, for docs/explorer.md.

    python experiments/picture_explorer.py --workdir=runs/quickstart --out=docs [--compare=PAGE]

Opens the report in headless Chromium and writes explorer-VIEW.png: the whole on a desktop, a row in
the reader in the dark scheme, methods side by side, and the width of a phone; with --compare, the
folder of a page that `diq report --compare` wrote, also two runs against each other.

Needs Chromium (`apt-get install chromium`) and the extra `browser`.
"""

import io
import pathlib
import shutil

import PIL.Image
from absl import flags

from diq_jax import errors
from diq_jax.commands import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The run, whose report is made.")
OUT = flags.DEFINE_string("out", None, "The folder of the pictures.")
COMPARE = flags.DEFINE_string("compare", "", "The folder of a page of two runs.")

TOP = "document.getElementById('explorer').scrollIntoView({ behavior: 'instant' })"
READ = "document.querySelectorAll('#lines .line')[4].click()"
METHODS = (
    "document.querySelector('#methods-fold summary')?.click();"
    "document.getElementById('methods-fold')?.scrollIntoView({ behavior: 'instant' })"
)
DESKTOP, PHONE = (1400, 900), (390, 800)
# {picture: (page's width and height, whether it is dark, what is done)}
VIEWS = {
    "all": (DESKTOP, False, TOP),
    "reader": (DESKTOP, True, f"{TOP}; {READ}"),
    "methods": (DESKTOP, False, METHODS),
    "phone": (PHONE, False, TOP),
}


def main() -> None:
    """Takes the pictures."""
    from playwright import sync_api

    cli.require(WORKDIR, OUT)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        raise errors.UserError("there is no Chromium: apt-get install chromium.")
    page = cli.folder(WORKDIR) / "report/report.html"
    taken = [(page, name, view) for name, view in VIEWS.items()]
    if COMPARE.value:
        taken.append((pathlib.Path(COMPARE.value) / "report.html", "two", VIEWS["all"]))
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for path, name, ((width, height), dark, act) in taken:
            opened = started.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
            )
            opened.goto(path.resolve().as_uri())
            opened.wait_for_selector("#explorer[data-ready=yes]")
            opened.evaluate(f"() => {{ {act}; }}")
            opened.wait_for_timeout(500)
            image = PIL.Image.open(io.BytesIO(opened.screenshot()))
            # Few colors, of which the rare ones of a legend are not lost.
            few = PIL.Image.Quantize.MAXCOVERAGE
            small = image.convert("RGB").quantize(256, few, dither=PIL.Image.Dither.NONE)
            small.save(cli.folder(OUT) / f"explorer-{name}.png", optimize=True)
            opened.close()
        started.close()


if __name__ == "__main__":
    cli.run(main)
