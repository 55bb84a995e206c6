"""The one style of all figures, and a figure as PNG, SVG and the data that it shows.

The palette is Okabe and Ito's, which colour-blind readers can tell apart; the colours that must
change with the page's scheme (text, grid) become CSS variables in the SVG.
"""

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import pyarrow as pa
from pyarrow import csv

SUFFIXES = ("png", "svg", "csv")
INK, LINE, MUTED = "#1f2429", "#d9dde1", "#7a828c"
SELECTED, POOL = "#d55e00", "#8a939c"
ARMS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
THRESHOLD = {"color": MUTED, "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 1}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.color": INK,
    "text.parse_math": False,  # a source named "$x$" is a name
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """Holds a figure as a PNG file, as SVG text for an HTML page, and its numbers as CSV."""

    png: bytes
    svg: str
    csv: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """Returns the contents of its files, by SUFFIXES."""
        made = self.png, self.standalone.encode(), self.csv
        return dict(zip(SUFFIXES, made, strict=True))

    @property
    def standalone(self) -> str:
        """Returns the SVG as a file of its own, in the colours of the PNG, on white."""
        text = self.svg.replace("var(--ink)", INK).replace("var(--line)", LINE)
        return text.replace("<svg ", '<svg style="background: white" ', 1)


def render(shown: Mapping[str, Any], draw: Callable, *args: Any) -> Picture:
    """Draws `draw(*args)`; the same arguments give the same bytes.

    Args:
        shown: columns, of one length, of what it shows. What is None or NaN is empty in the file.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": draw.__name__}), _missing_glyphs_pass():
        figure = draw(*args)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150)
        figure.set_layout_engine("none")  # the layout is found; again would take as long again
        figure.savefig(svg, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Group ids repeat from figure to figure, and an id must be unique in a page.
    text = re.sub(r' id="[\w.]+_\d{1,5}"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    table, data = (
        pa.table({k: pa.array(v, from_pandas=True) for k, v in shown.items()}),
        io.BytesIO(),
    )
    csv.write_csv(table, data)
    return Picture(
        png.getvalue(),
        text.replace(INK, "var(--ink)").replace(LINE, "var(--line)"),
        data.getvalue(),
    )


@contextlib.contextmanager
def _missing_glyphs_pass():
    """Ignores a name in a script that the PNG's font lacks: boxes there, well in the page."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
