"""From a matplotlib figure to an SVG element that lives inside an HTML page, the same bytes each time."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue, vermilion and green of Okabe and Ito stay apart for every common colour blindness. Each colour becomes
# a CSS variable of the page, so that one picture serves the light and the dark theme.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636f",
    "grid": "#d8dee5",
    "forget": "#d55e00",
    "retain": "#009e73",
    "test": "#0072b2",
    "before": "#818b98",
    "after": "#6f42c1",
    "reference": "#9a6700",
}
STATES = {"before": "Before", "after": "After", "reference": "Retrained reference"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "salun-report",
    "text.parse_math": False,  # a class may be called `$`
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": True,
}
_TAG = re.compile(r"<[^>]+>")
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def draw(name: str, width: float, height: float, paint: Callable[[Figure], str]) -> str:
    """Draw one picture.

    Args:
        name: unique in the page; it keeps the ids of two pictures apart.
        width: in inches.
        height: in inches.
        paint: puts the axes on the figure and returns the alternative text.

    Returns:
        An `<svg>` element with `role="img"` and the alternative text as its label.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _style():
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
        FigureCanvasSVG(figure)
        alt = paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return _embed(buffer.getvalue().decode("utf-8"), re.sub(r"[^A-Za-z0-9]", "", name), alt)


def label(text: str, limit: int = 22) -> str:
    """Return a name fit for an axis: no control or direction characters, shortened to `limit` characters."""
    visible = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" else c for c in text)
    return visible if len(visible) <= limit else visible[: limit - 1] + "…"


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]  # keys are a Literal there
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has its own fonts
        yield


def _embed(document: str, name: str, alt: str) -> str:
    body = document[document.index("<svg") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = body[body.index(">") + 1 :]
    size = re.search(r'viewBox="([^"]+)"', document)
    assert size is not None, "matplotlib writes a viewBox"
    # text has its `>` escaped, so only real tags are rewritten, never a class name
    inner = re.sub(r">\s+<", "><", _TAG.sub(lambda tag: _adapt(tag.group(), name), body)).strip()
    return f'<svg class="plot" role="img" aria-label={quoteattr(alt)} viewBox="{size.group(1)}">{inner}'


def _adapt(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = tag.replace('xlink:href="#', f'href="#{name}-').replace("\n", " ")
    tag = re.sub(r"font-family: [^;\"]+;? ?", "", tag)
    for colour, value in COLOURS.items():
        tag = tag.replace(value, f"var(--{colour}, {value})")
    return tag
