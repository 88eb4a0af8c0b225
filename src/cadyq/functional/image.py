"""What is measured on a picture: luma, gradients, and the statistics that decide about a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError

__all__ = [
    "CELL_STATISTICS",
    "GRAY_65536",
    "cell_statistics",
    "cell_sums",
    "gradient",
    "gray",
    "laplacian",
    "luma",
    "sobel",
    "statistics_of",
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
GRAY_65536 = np.array([19595, 38470, 7471], np.int64)
"""BT.601 gray in 1/65536; equation (1)."""


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


def cell_sums(levels: NDArray[np.integer[Any]], cell: int) -> NDArray[np.int64]:
    """Return what `cell_statistics` is made of: whole numbers, so that no machine finds others; equation (17).

    The gray levels are 0..65280 for uint8 and 0..65535 for uint16.

    Args:
        levels: ``(H, W, 3)``, uint8 or uint16.
        cell: side of a cell in pixels; the last row and column of cells may be smaller.

    Returns:
        ``(ceil(H / cell), ceil(W / cell), 7)``: sums of eight times `sobel`'s |dx| and |dy|, of |Laplacian|, the
        latter's order statistic (the one that 95 % of its values do not exceed) and maximum, and sums of the gray
        levels and of their squares.

    Raises:
        ArgumentError: if ``cell`` is not positive or the picture is not RGB of 8 or 16 bits.
    """
    if (
        levels.dtype not in (np.uint8, np.uint16)
        or levels.ndim != 3
        or levels.shape[2] != 3
        or not levels.size
    ):
        found = f"{levels.dtype}{list(levels.shape)}"
        raise ArgumentError("levels", found, "uint8 or uint16 (H, W, 3), not empty")
    if cell < 1:
        raise ArgumentError("cell", cell, "a positive number of pixels")
    light = (levels.astype(np.int64) @ GRAY_65536) >> (8 if levels.dtype == np.uint8 else 16)
    exact = light.astype(np.float64)  # as all that follows is: eighths of small whole numbers
    dx, dy = sobel(exact)
    planes = np.abs(np.stack([8 * dx, 8 * dy, laplacian(exact), exact])).astype(np.int64)
    height, width = light.shape
    result = np.empty((-(-height // cell), -(-width // cell), 7), np.int64)
    # All cells of equal size at once: the whole ones, and the leftovers at the bottom, right and corner.
    for y, rows, cell_height in _runs(height, cell):
        for x, columns, cell_width in _runs(width, cell):
            part = planes[:, y : y + len(rows) * cell_height, x : x + len(columns) * cell_width]
            cells = part.reshape(4, len(rows), cell_height, len(columns), cell_width).swapaxes(2, 3)
            flat = cells.reshape(4, len(rows), len(columns), -1)
            rank = 19 * (flat.shape[3] - 1) // 20
            numbers = [
                *flat[:3].sum(axis=3),
                np.partition(flat[2], rank, axis=2)[..., rank],
                flat[2].max(axis=2),
                flat[3].sum(axis=2),
                (flat[3] ** 2).sum(axis=2),
            ]
            result[rows.start : rows.stop, columns.start : columns.stop] = np.stack(numbers, axis=-1)
    return result


def statistics_of(
    sums: NDArray[np.int64], shape: tuple[int, int], cell: int, dtype: np.dtype[Any]
) -> NDArray[np.float64]:
    """Return the six statistics of `CELL_STATISTICS` from `cell_sums` of a picture of a shape and type.

    Gray and derivatives are those of a picture in [0, 1]; the deviation is the population's.
    """
    sides = (np.minimum(cell, n - np.arange(0, n, cell)) for n in shape)
    n = np.multiply.outer(*sides).astype(np.float64)
    unit = 65280.0 if dtype == np.uint8 else 65535.0
    dx, dy, edge, most, largest, total, squares = np.moveaxis(sums, -1, 0).astype(np.float64)
    spread = np.maximum(n * squares - total * total, 0.0)
    return np.stack(
        [
            dx / (8 * unit * n),
            dy / (8 * unit * n),
            edge / (unit * n),
            most / unit,
            largest / unit,
            np.sqrt(spread) / (unit * n),
        ],
        axis=-1,
    )


def cell_statistics(levels: NDArray[np.integer[Any]], cell: int) -> NDArray[np.float64]:
    """Return the six statistics by which a cell of a low-resolution picture is judged.

    Derivatives are taken on the whole picture, so a cell's edge is no border.

    Args:
        levels, cell: as of `cell_sums`, which raises for what they cannot be.

    Returns:
        ``(ceil(H / cell), ceil(W / cell), 6)``, in the order of `CELL_STATISTICS`.
    """
    return statistics_of(cell_sums(levels, cell), levels.shape[:2], cell, levels.dtype)


def _runs(length: int, cell: int) -> list[tuple[int, range, int]]:
    """Split an axis into runs of equal cells: (first pixel, indices of the cells, size of each)."""
    whole, rest = divmod(length, cell)
    runs = [(0, range(whole), cell), (whole * cell, range(whole, whole + 1), rest)]
    return [run for run in runs if len(run[1]) and run[2]]


def _padded(gray: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    if gray.ndim != 2 or 0 in gray.shape:
        raise ArgumentError("gray.shape", gray.shape, "a non-empty (H, W)")
    return np.pad(gray, 1, mode="edge")
