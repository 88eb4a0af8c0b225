"""How plots look: legible in print, and for readers who do not see all colors. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.errors import MissingExtraError
from cadyq.io.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "HEAT", "MARKERS", "curve_style", "figure", "label_values", "png", "save"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's palette (jfly.uni-koeln.de/color, 2008), the strongest first; every curve has its own marker, too."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HEAT = "cividis"
"""Color map of bit-widths; its lightness rises evenly."""

_STYLE: Any = {
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "cadyq",
}


@contextmanager
def figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure of so many inches and its axes, in our style, without a display.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "matplotlib is not installed, and plots need it; install it with: pip install 'cadyq[report]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(made)
        yield made, made.subplots(rows, cols, **options)


def png(made: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(made: Figure, folder: Path, name: str) -> list[str]:
    """Write ``NAME.png`` and, for print, ``NAME.pdf``; returns the files' names."""
    write_atomic(folder / f"{name}.png", png(made))
    buffer = io.BytesIO()
    made.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    write_atomic(folder / f"{name}.pdf", buffer.getvalue())
    return [f"{name}.png", f"{name}.pdf"]


def curve_style(i: int) -> dict[str, Any]:
    """Color and marker of the i-th curve; both together come again after 64 curves."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}


def label_values(axes: Any, points: Iterable[tuple[float, float, float]]) -> None:
    """Write the values of (x, y, value) below their points; those that share a point on the plot share a label."""
    shared: dict[tuple[float, float], list[float]] = {}
    for x, y, value in points:
        shared.setdefault((round(x, 2), round(y, 3)), []).append(value)
    for at, values in shared.items():
        text = ", ".join(f"{value:+g}" if value else "0" for value in sorted(values))
        axes.annotate(text, at, xytext=(3, -9), textcoords="offset points", fontsize=7, color="#444444")
