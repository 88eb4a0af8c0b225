"""Why a picture got the bits it got: maps per tile and layer, what selectors saw, what other budgets would cost."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadyq.engine.reference import gradients
from cadyq.errors import ImageError, MissingExtraError
from cadyq.functional.cost import bitops
from cadyq.io.files import write_atomic
from cadyq.io.images import Picture, read_image
from cadyq.report.plots import COLORS, HEAT, figure, label_values, png
from cadyq.upscale import Model, Result

__all__ = ["BUDGETS", "Explanation", "at_budgets", "explain", "write_explanation"]

Array = NDArray[Any]

BUDGETS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
MAX_DEVIATION_PIXELS = 1 << 17
"""LR pixels up to which deviations are shown: they come from the network on torch, which is slow."""

_PEAK = 255.0
_NO_EXITS = 1e6  # a budget at which no cell exits


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        model: name of the model.
        picture: the picture as it was read.
        result: the upscaled picture and its bits.
        sites: names of the body's sites, in order.
        span: smallest and largest bit-width that the model may choose: the ends of the color scale.
        gradient: mean |dx| and |dy| per tile, ``(rows, cols, 2)``, gray in [0, 1].
        deviation: root mean square over channels of the deviations per tile and site, ``(rows, cols, sites)``, in
            the feature's own units, or None (and ``why_no_deviation`` says why).
        budgets: one row per budget: ``budget``, ``fqr``, ``bitops_g``, ``seconds`` and ``psnr_to_most_bits_db``, how
            near the result is to the one with the most bits everywhere.
    """

    model: str
    picture: Picture
    result: Result
    sites: tuple[str, ...]
    span: tuple[int, int]
    gradient: Array
    deviation: Array | None
    why_no_deviation: str
    budgets: tuple[dict[str, float], ...]

    @property
    def table(self) -> Array:
        """Bits, uint8 ``(rows, cols, sites)``."""
        return np.stack([self.result.bits[name] for name in self.sites], axis=-1)

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON."""
        r = self.result
        return {
            "model": self.model,
            "image": list(self.picture.pixels.shape[:2]),
            "grid": list(r.grid),
            "tile": r.tile,
            "fqr": r.fqr,
            "fqr_area": r.fqr_area,
            "exited": r.exited,
            "bitops_g": r.bitops / 1e9,
            "sites": list(self.sites),
            "span": list(self.span),
            "bits": self.table.tolist(),
            "gradient": np.round(self.gradient, 6).tolist(),
            "deviation": None if self.deviation is None else np.round(self.deviation, 5).tolist(),
            "budgets": list(self.budgets),
        }


def explain(
    model: Model,
    image: str | os.PathLike[str],
    *,
    tile: int | None = None,
    budget: float = 0.0,
    budgets: Sequence[float] = BUDGETS,
    threads: int | None = None,
) -> Explanation:
    """Upscale a picture and collect what decided about its bits.

    Raises:
        ArgumentError: as `Model.upscale` does. ImageError: the picture cannot be read.
    """
    picture = read_image(image)
    result = model.upscale(picture, tile=tile, budget=budget, threads=threads)
    assert result.tile is not None
    sites = tuple(result.bits)
    deviation, why = _deviation(model, picture, result.tile, budget, threads)
    return Explanation(
        os.fspath(model.name),
        picture,
        result,
        sites,
        _span(model),
        gradients(picture.pixels, result.tile),
        deviation,
        why,
        at_budgets(model, picture, budgets, tile=result.tile, threads=threads),
    )


def _span(model: Model) -> tuple[int, int]:
    offered = model.candidate_bits
    low, high = min(offered, default=0), max(offered, default=8)
    return (low, high) if low < high else (high - 1, high)


def at_budgets(
    model: Model, picture: Picture, budgets: Sequence[float], *, tile: int, threads: int | None = None
) -> tuple[dict[str, float], ...]:
    """What a picture would cost at other budgets, and how far it would be from the most bits everywhere."""
    most = {s.name: max(s.candidates) for s in model.sites if s.kind == "body" and s.candidates != (32,)}
    best = model.upscale(picture, tile=tile, threads=threads, force_bits=most, budget=_NO_EXITS)
    reference = best.pixels.astype(np.float32)
    rows = []
    for budget in budgets:
        found = model.upscale(picture, tile=tile, budget=budget, threads=threads)
        mse = float(np.mean((found.pixels - reference) ** 2, dtype=np.float64))
        rows.append(
            {
                "budget": float(budget),
                "fqr": found.fqr,
                "bitops_g": found.bitops / 1e9,
                "exited": found.exited,
                "seconds": found.seconds,
                # Equal to the last bit is 100 dB, for JSON knows no infinity.
                "psnr_to_most_bits_db": min(100.0, 10 * float(np.log10(_PEAK**2 / max(mse, 1e-12)))),
            }
        )
    return tuple(rows)


def _deviation(
    model: Model, picture: Picture, tile: int, budget: float, threads: int | None
) -> tuple[Array | None, str]:
    """Per tile and site the root mean square of the channels' deviations, from the network on torch."""
    height, width = picture.pixels.shape[:2]
    if height * width > MAX_DEVIATION_PIXELS:
        return None, f"only computed up to {MAX_DEVIATION_PIXELS:,} LR pixels"
    try:
        network = model.loaded.network
    except MissingExtraError as error:
        return None, str(error)
    from cadyq.quant import infer
    from cadyq.quant.site import sites_of
    from cadyq.report.spy import DeviationSpy

    spy = DeviationSpy()
    body = sites_of(network, "body")
    for site in body:
        site.observer = spy
    try:
        with infer.threads(threads):
            infer.run_tiles(network, picture.pixels, tile, budget=budget)
    finally:
        for site in body:
            site.observer = None
    rows, cols = -(-height // tile), -(-width // tile)
    each = [spy.root_mean_square(site.name) for site in body]
    return np.stack(each, axis=-1).reshape(rows, cols, len(body)), ""


def write_explanation(found: Explanation, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``explanation.html`` (self-contained), ``.json``, and ``heat.png``, ``histogram.png``, ``inputs.png``,
    ``budgets.png``; returns their paths.

    Raises:
        ImageError: the folder cannot be written. MissingExtraError: matplotlib is not installed.
    """
    home = Path(folder)
    pictures = {
        "heat.png": _heat(found),
        "histogram.png": _histogram(found),
        "inputs.png": _inputs(found),
        "budgets.png": _budgets(found),
    }
    contents = {
        **pictures,
        "explanation.json": (json.dumps(found.to_mapping()) + "\n").encode(),
        "explanation.html": _page(found, pictures).encode(),
    }
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomic(home / name, content)
    except OSError as error:
        raise ImageError(f"{home} cannot be written: {error.strerror or error}") from error
    return [home / name for name in contents]


def _heat(found: Explanation) -> bytes:
    pixels = found.picture.pixels
    height, width = pixels.shape[:2]
    tile = found.result.tile or 1
    mean = found.table.mean(axis=2)
    shown = 3.2 * height / width
    with figure(7.2, min(max(shown, 1.4), 6.0) + 0.45, 1, 2) as (made, (left, right)):
        left.imshow(pixels, interpolation="nearest")
        left.set_title("picture", loc="left")
        right.imshow(pixels, interpolation="nearest", alpha=0.25)
        extent = (-0.5, mean.shape[1] * tile - 0.5, mean.shape[0] * tile - 0.5, -0.5)
        drawn = right.imshow(
            mean,
            cmap=HEAT,
            vmin=found.span[0],
            vmax=found.span[1],
            extent=extent,
            interpolation="nearest",
            alpha=0.85,
        )
        right.set_title(f"mean bits per tile, FQR {found.result.fqr:.2f}", loc="left")
        if mean.size <= 400:
            for (r, c), value in np.ndenumerate(mean):
                y, x = (r + 0.5) * tile, (c + 0.5) * tile
                if y < height and x < width:
                    color = "white" if value < sum(found.span) / 2 else "black"
                    right.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=5.5, color=color)
        for axes in (left, right):
            axes.set_xlim(-0.5, width - 0.5)
            axes.set_ylim(height - 0.5, -0.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
        made.colorbar(drawn, ax=right, label="bits", fraction=0.046, pad=0.02)
        return png(made)


def _histogram(found: Explanation) -> bytes:
    table = found.table.reshape(-1, len(found.sites))
    widths = [int(b) for b in np.unique(table)]
    with figure(7.2, 2.6) as (made, axes):
        bottom = np.zeros(len(found.sites))
        x = np.arange(len(found.sites))
        for k, b in enumerate(widths):
            share = 100 * (table == b).mean(axis=0)
            axes.bar(
                x,
                share,
                bottom=bottom,
                color=_color(found, b),
                edgecolor="white",
                linewidth=0.4,
                width=0.86,
                hatch=("", "///", "...", "xx", "\\\\")[k % 5],
                label=f"{b} bits",
            )
            bottom += share
        axes.set_xlim(-0.6, len(x) - 0.4)
        axes.set_ylim(0, 100)
        axes.set_xlabel("body convolution, in order")
        axes.set_ylabel("share of tiles (%)")
        axes.set_xticks(x[:: max(1, len(x) // 16)], [str(i + 1) for i in x[:: max(1, len(x) // 16)]])
        axes.legend(ncols=len(widths), loc="lower left", bbox_to_anchor=(0, 1.0))
        return png(made)


def _color(found: Explanation, bits: float) -> str:
    """Color of a bit-width on the model's scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    low, high = found.span
    return str(to_hex(matplotlib.colormaps[HEAT]((bits - low) / (high - low))))


def _inputs(found: Explanation) -> bytes:
    mean = found.table.mean(axis=2).ravel()
    strength = 255 * np.hypot(found.gradient[..., 0], found.gradient[..., 1]).ravel()
    panels: list[tuple[str, Array]] = [("gradient of the tile (gray levels, log scale)", strength)]
    if found.deviation is not None:
        middle = len(found.sites) // 2
        label = f"deviation at {found.sites[middle]} (log scale)"
        panels.append((label, found.deviation[..., middle].ravel()))
    with figure(7.2, 2.6, 1, len(panels), squeeze=False) as (made, grid):
        for axes, (label, values), color in zip(grid[0], panels, COLORS, strict=False):
            # A flat tile has gradient 0; it is drawn at the left edge instead of nowhere.
            axes.scatter(np.maximum(values, 1e-3), mean, s=12, color=color, alpha=0.6, linewidths=0)
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel("mean bits of the tile")
        return png(made)


def _budgets(found: Explanation) -> bytes:
    rows = found.budgets
    with figure(7.2, 2.6, 1, 2) as (made, (left, right)):
        fqr = [row["fqr"] for row in rows]
        panels = (
            (left, "bitops_g", "BitOPs of the body (G)", COLORS[0], "o"),
            (right, "psnr_to_most_bits_db", "PSNR to the most bits\neverywhere (dB)", COLORS[1], "s"),
        )
        for axes, key, label, color, marker in panels:
            axes.plot(fqr, [row[key] for row in rows], marker=marker, color=color)
            label_values(axes, ((row["fqr"], row[key], row["budget"]) for row in rows))
            axes.set_xlabel("FQR (mean bits); numbers are budgets")
            axes.set_ylabel(label)
            axes.margins(0.1)
        return png(made)


def _page(found: Explanation, pictures: dict[str, bytes]) -> str:
    r = found.result
    buffer = io.BytesIO()
    Image.fromarray(found.picture.pixels).save(buffer, "PNG", optimize=True)
    low, high = found.span
    palette = [_color(found, low + (high - low) * i / 64) for i in range(65)]
    data = {**found.to_mapping(), "palette": palette}
    macs_at_most = _most_bitops(found)
    facts = (
        f"{found.model}: {found.picture.pixels.shape[1]}x{found.picture.pixels.shape[0]} to "
        f"{r.pixels.shape[1]}x{r.pixels.shape[0]}, {r.grid[0]}x{r.grid[1]} tiles of {r.tile} LR pixels. "
        f"FQR {r.fqr:.2f} (by area {r.fqr_area:.2f}), {r.bitops / 1e9:.3f} G BitOPs in the body"
        f"{macs_at_most}, {r.exited:.0%} of the tiles exited to bicubic."
    )
    rows = "".join(
        f"<tr><td>{row['budget']:+g}</td><td>{row['fqr']:.2f}</td><td>{row['bitops_g']:.3f}</td>"
        f"<td>{row['exited']:.0%}</td><td>{1e3 * row['seconds']:.0f}</td>"
        f"<td>{row['psnr_to_most_bits_db']:.2f}</td></tr>"
        for row in found.budgets
    )
    missing = "" if found.deviation is not None else f"Deviations are not shown: {found.why_no_deviation}."
    replaced = {
        "@FACTS@": html.escape(facts),
        "@MISSING@": html.escape(missing),
        "@PICTURE@": _uri(buffer.getvalue()),
        "@ROWS@": rows,
        # "</" must not end the script.
        "@DATA@": json.dumps(data).replace("</", "<\\/"),
        **{f"@{name.split('.')[0].upper()}@": _uri(content) for name, content in pictures.items()},
    }
    text = files("cadyq.report").joinpath("explain.html").read_text(encoding="utf-8")
    for key, value in replaced.items():
        text = text.replace(key, value)
    return text


def _most_bitops(found: Explanation) -> str:
    """The body's BitOPs as a share of 8 bits everywhere, as a clause."""
    r = found.result
    if r.fqr_area == 0:
        return ""
    share = bitops(1, 1, r.fqr_area) / bitops(1, 1, 8)
    return f" ({share:.0%} of 8 bits everywhere)"


def _uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
