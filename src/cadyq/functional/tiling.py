"""How a picture is cut: the fixed grid of tiles, the published overlapping patches, and strips.

Boxes are half-open, in low-resolution pixels, one row ``(y0, y1, x0, x1)`` each, in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError

__all__ = ["Grid", "Patches", "Strip", "published_patches", "strips"]


@dataclass(frozen=True)
class Grid:
    """A fixed grid of ``tile`` x ``tile`` pixels over a picture; the last row and column may be smaller.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        tile: side of a tile, in pixels.

    Raises:
        ArgumentError: if one of them is not positive.
    """

    height: int
    width: int
    tile: int

    def __post_init__(self) -> None:
        _check_positive(height=self.height, width=self.width, tile=self.tile)

    @property
    def rows(self) -> int:
        """Number of rows of tiles."""
        return -(-self.height // self.tile)

    @property
    def cols(self) -> int:
        """Number of columns of tiles."""
        return -(-self.width // self.tile)

    @property
    def boxes(self) -> NDArray[np.int64]:
        """The tiles, ``(rows * cols, 4)``; they cover every pixel exactly once."""
        return _product(self._spans(self.height), self._spans(self.width))

    @property
    def areas(self) -> NDArray[np.int64]:
        """Pixels of each tile, ``(rows * cols,)``; the sum is ``height * width``."""
        return _areas(self.boxes)

    def _spans(self, length: int) -> NDArray[np.int64]:
        start = np.arange(0, length, self.tile, dtype=np.int64)
        return np.stack([start, np.minimum(start + self.tile, length)], axis=1)


class Patches(NamedTuple):
    """Overlapping patches that are computed independently, and what is kept of each.

    Attributes:
        read: the patches, ``(n, 4)``.
        paste: the part of each that goes into the result, ``(n, 4)``; these cover every pixel exactly once.
    """

    read: NDArray[np.int64]
    paste: NDArray[np.int64]


class Strip(NamedTuple):
    """A horizontal band of a picture.

    Attributes:
        read: rows ``(y0, y1)`` to compute from, halo included.
        keep: rows ``(y0, y1)`` of the result that this strip yields.
    """

    read: tuple[int, int]
    keep: tuple[int, int]


def published_patches(height: int, width: int, size: int = 96, step: int = 90) -> Patches:
    """Return the patches of CADyQ's released reference.

    Patches start every ``step`` pixels as long as a whole one fits; the last of an axis takes all that is
    left, so it may measure up to ``size + step - 1`` pixels. Half of the overlap is cut from inner sides.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        size: side of a patch, in pixels.
        step: distance of two patches, in pixels, at most ``size``.

    Raises:
        ArgumentError: if one of them is not positive, or ``step`` exceeds ``size``.
    """
    _check_positive(height=height, width=width, size=size, step=step)
    if step > size:
        raise ArgumentError("step", step, f"at most the size, {size}", "else pixels would be left out")
    (read_y, paste_y), (read_x, paste_x) = (_published_spans(n, size, step) for n in (height, width))
    return Patches(_product(read_y, read_x), _product(paste_y, paste_x))


def strips(height: int, tile: int, rows: int, halo: int) -> list[Strip]:
    """Cut a picture too large for memory into bands that begin and end on the tile grid.

    Args:
        height: of the picture, in pixels.
        tile: side of a tile, in pixels.
        rows: rows of tiles that one strip yields.
        halo: pixels a result depends on beyond its own row (the receptive radius). It is rounded up to whole
            tiles, so that every strip sees the picture's own tiles, undivided.

    Raises:
        ArgumentError: if ``height``, ``tile`` or ``rows`` is not positive, or ``halo`` is negative.
    """
    _check_positive(height=height, tile=tile, rows=rows)
    if halo < 0:
        raise ArgumentError("halo", halo, "zero or more pixels")
    margin = -(-halo // tile) * tile
    result = []
    for top in range(0, height, rows * tile):
        bottom = min(top + rows * tile, height)
        result.append(Strip((max(top - margin, 0), min(bottom + margin, height)), (top, bottom)))
    return result


def _published_spans(length: int, size: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n = max(1, (length - size) // step + 1)
    start = np.arange(n, dtype=np.int64) * step
    read = np.stack([start, start + size], axis=1)
    read[-1, 1] = length
    paste = read.copy()
    cuts = start[1:] + (size - step) // 2
    paste[1:, 0] = paste[:-1, 1] = cuts
    return read, paste


def _product(vertical: NDArray[np.int64], horizontal: NDArray[np.int64]) -> NDArray[np.int64]:
    """Combine the spans of both axes to boxes, in reading order."""
    return np.hstack([np.repeat(vertical, len(horizontal), axis=0), np.tile(horizontal, (len(vertical), 1))])


def _areas(boxes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray((boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]))


def _check_positive(**lengths: int) -> None:
    for name, value in lengths.items():
        if value < 1:
            raise ArgumentError(name, value, "a positive integer")
