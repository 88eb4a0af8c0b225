"""What is measured on a picture: luma, gradients, and the statistics that decide about a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError

__all__ = [
    "CELL_STATISTICS",
    "cell_statistics",
    "gradient",
    "gray",
    "laplacian",
    "luma",
    "sobel",
    "to_levels",
]

CELL_STATISTICS = (
    "mean |dx|",
    "mean |dy|",
    "mean |Laplacian|",
    "95th percentile of |Laplacian|",
    "maximum of |Laplacian|",
    "deviation of luma",
)
"""Names of the last axis of `cell_statistics`, in order."""

_LUMA = np.array([65.481, 128.553, 24.966]) / 255
_GRAY = np.array([0.299, 0.587, 0.114])


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Y of BT.601 in its "studio" range, unrounded, as the super-resolution benchmarks measure it.

    ``rgb`` is uint8 ``(..., 3)``; the result ``(...)`` lies in [16, 235]. Raises `ArgumentError` otherwise.
    """
    if rgb.dtype != np.uint8 or rgb.shape[-1:] != (3,):
        raise ArgumentError("rgb", f"{rgb.dtype}{list(rgb.shape)}", "uint8 with three channels last")
    red, green, blue = _LUMA
    return np.asarray(16 + red * rgb[..., 0] + green * rgb[..., 1] + blue * rgb[..., 2], np.float64)


def gray(rgb01: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Full-range BT.601 gray, 0.299 R + 0.587 G + 0.114 B.

    ``rgb01`` is a float ``(..., 3)`` in [0, 1]; the result is ``(...)`` in [0, 1], of the same precision.
    """
    if not np.issubdtype(rgb01.dtype, np.floating) or rgb01.shape[-1:] != (3,):
        raise ArgumentError("rgb01", f"{rgb01.dtype}{list(rgb01.shape)}", "float with three channels last")
    return rgb01 @ _GRAY.astype(rgb01.dtype)


def to_levels(
    float01: NDArray[np.floating[Any]], dtype: np.dtype[Any] | type[np.integer[Any]] = np.uint8
) -> NDArray[Any]:
    """Turn [0, 1] into 0..255 (or 65535): rounded half up, clipped. NaN becomes 0; the shape is kept."""
    largest = np.iinfo(dtype).max
    levels = np.nan_to_num(np.floor(float01 * largest + 0.5), nan=0.0).clip(0, largest)
    return np.asarray(levels, dtype)


def sobel(gray: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Return the horizontal and the vertical derivative: 3x3 Sobel times 1/8, border replicated.

    ``gray`` and both results are ``(H, W)``; a ramp that rises by 1 per pixel has the derivative 1.
    """
    padded = _padded(gray)
    smooth_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (smooth_y[:, 2:] - smooth_y[:, :-2]) / 8, (smooth_x[2:] - smooth_x[:-2]) / 8


def laplacian(gray: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the sum of the four neighbors minus four times the pixel; ``(H, W)``, border replicated."""
    padded = _padded(gray)
    cross = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return np.asarray(cross - 4 * padded[1:-1, 1:-1])


def gradient(gray: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Return (mean |dx|, mean |dy|) of `sobel`: the image gradient that the bit selectors take.

    ``gray`` is ``(H, W)`` in [0, 1]; both numbers lie in [0, 0.5]. Source: CADyQ, section 3, with the
    released reference's normalization and border.
    """
    dx, dy = sobel(gray)
    return float(np.abs(dx).mean(dtype=np.float64)), float(np.abs(dy).mean(dtype=np.float64))


def cell_statistics(rgb01: NDArray[np.floating[Any]], cell: int) -> NDArray[np.float64]:
    """Return the six statistics by which a cell of a low-resolution picture is judged.

    Derivatives are taken on the whole picture's `gray`, so a cell's edge is no border; the percentile is
    linearly interpolated; the deviation is the population's.

    Args:
        rgb01: ``(H, W, 3)``, float, in [0, 1].
        cell: side of a cell in pixels; the last row and column of cells may be smaller.

    Returns:
        ``(ceil(H / cell), ceil(W / cell), 6)``, in the order of `CELL_STATISTICS`.

    Raises:
        ArgumentError: if ``cell`` is not positive or the picture is no float RGB picture.
    """
    if rgb01.ndim != 3 or 0 in rgb01.shape:
        raise ArgumentError("rgb01.shape", rgb01.shape, "a non-empty (H, W, 3)")
    if cell < 1:
        raise ArgumentError("cell", cell, "a positive number of pixels")
    light = gray(rgb01)
    dx, dy = sobel(light)
    planes = np.abs(np.stack([dx, dy, laplacian(light), light]))
    height, width = light.shape
    result = np.empty((-(-height // cell), -(-width // cell), len(CELL_STATISTICS)))
    # All cells of equal size at once: the whole ones, and the leftovers at the bottom, right and corner.
    for y, rows, cell_height in _runs(height, cell):
        for x, columns, cell_width in _runs(width, cell):
            part = planes[:, y : y + len(rows) * cell_height, x : x + len(columns) * cell_width]
            cells = part.reshape(4, len(rows), cell_height, len(columns), cell_width).swapaxes(2, 3)
            flat = cells.reshape(4, len(rows), len(columns), -1)
            result[rows.start : rows.stop, columns.start : columns.stop] = _statistics(flat)
    return result


def _statistics(planes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Reduce (|dx|, |dy|, |Laplacian|, gray), each ``(rows, columns, pixels)``, to the six statistics."""
    dx, dy, edge, light = planes
    return np.stack(
        [
            dx.mean(axis=-1),
            dy.mean(axis=-1),
            edge.mean(axis=-1),
            np.percentile(edge, 95, axis=-1),
            edge.max(axis=-1),
            light.std(axis=-1),
        ],
        axis=-1,
    ).astype(np.float64)


def _runs(length: int, cell: int) -> list[tuple[int, range, int]]:
    """Split an axis into runs of equal cells: (first pixel, indices of the cells, size of each)."""
    whole, rest = divmod(length, cell)
    runs = [(0, range(whole), cell), (whole * cell, range(whole, whole + 1), rest)]
    return [run for run in runs if len(run[1]) and run[2]]


def _padded(gray: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    if gray.ndim != 2 or 0 in gray.shape:
        raise ArgumentError("gray.shape", gray.shape, "a non-empty (H, W)")
    return np.pad(gray, 1, mode="edge")
