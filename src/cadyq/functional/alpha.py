"""Opacity: what color lies below pixels that nobody sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FILL_CELL", "fill_transparent"]

_LEVELS = 6
FILL_CELL = 1 << _LEVELS
"""A filled color depends on the aligned square of this side around the pixel and on its eight neighbors."""


def fill_transparent(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Replace the colors of fully transparent pixels by the opacity-weighted mean of their surroundings.

    Colors below opacity 0 mean nothing, but a network would let them bleed into visible pixels (fringes).
    They are filled from ever coarser means of premultiplied colors; visible colors stay as they are. Where
    nothing is visible within `FILL_CELL` pixels, further than a network sees, they become 0.

    Args:
        rgb: uint8 or uint16 ``(H, W, 3)``, not premultiplied.
        alpha: the same type, ``(H, W)``.
    """
    hidden = alpha == 0
    if not hidden.any():
        return rgb
    weight = alpha.astype(np.float32)[..., None]
    levels = [(rgb * weight, weight)]
    for _ in range(_LEVELS):
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    total, amount = levels[-1]
    color = np.where(amount > 0, _ratio(total, amount), _ratio(_around(total), _around(amount)))
    for total, amount in levels[-2::-1]:
        coarse = color.repeat(2, axis=0).repeat(2, axis=1)[: total.shape[0], : total.shape[1]]
        color = np.where(amount > 0, _ratio(total, amount), coarse)
    largest = np.iinfo(rgb.dtype).max
    filled = np.floor(color + 0.5).clip(0, largest).astype(rgb.dtype)
    return np.where(hidden[..., None], filled, rgb)


def _ratio(total: NDArray[np.float32], amount: NDArray[np.float32]) -> NDArray[np.float32]:
    """``total / amount``, 0 where there is nothing."""
    return np.asarray(np.divide(total, amount, out=np.zeros_like(total), where=amount > 0), np.float32)


def _halved(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of 2x2 pixels; a missing last row or column counts as zero."""
    height, width = (-(-n // 2) * 2 for n in plane.shape[:2])
    padded = np.pad(plane, ((0, height - plane.shape[0]), (0, width - plane.shape[1]), (0, 0)))
    summed: NDArray[Any] = padded.reshape(height // 2, 2, width // 2, 2, -1).sum(axis=(1, 3))
    return np.asarray(summed / 4, np.float32)


def _around(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of 3x3 pixels, nothing beyond the border."""
    padded = np.pad(plane, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:], np.float32)
