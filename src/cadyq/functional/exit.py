"""Exit (0 bits for a whole cell): which cells leave before the body and become plain bicubic.

The decision is a linear model on the logarithms of six LR statistics of the cell, fitted to the logarithm of the
error increase per pixel, against a threshold that rises with the model's mean around the cell: where the network
errs more, an increase weighs less. Where an exited cell meets a computed one, the two pictures are
cross-faded over a few pixels. All of it is exact arithmetic or in a fixed order, so that results are the same on
every machine; `cadyq.engine.exits` does the same faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError
from cadyq.functional.image import CELL_STATISTICS, cell_sums, statistics_of
from cadyq.functional.logarithm import logarithm
from cadyq.functional.resize import imresize_rows

__all__ = ["BandPlace", "ExitRule", "fill_exits"]

EPSILON = 1e-5


@dataclass(frozen=True)
class ExitRule:
    """Linear rule for leaving the network.

    Attributes:
        weights: one per statistic of :data:`cadyq.functional.image.CELL_STATISTICS`.
        bias: added to the weighted logarithms; the sum predicts log(error increase per pixel, squared grey levels).
        threshold: cells whose prediction is below it exit.
        fade: width of the cross-fade, LR pixels.
        slope: times the mean prediction of the cells around is added to the threshold.
        reach: how many cells away "around" ends, in rows and columns.
    """

    weights: tuple[float, ...]
    bias: float
    threshold: float
    fade: int = 2
    slope: float = 0.0
    reach: int = 3

    def __post_init__(self) -> None:
        if len(self.weights) != len(CELL_STATISTICS):
            raise ArgumentError("weights", self.weights, f"{len(CELL_STATISTICS)} numbers")
        for name in ("fade", "reach"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ArgumentError(name, value, "a whole number, not negative")

    def scores(self, levels: NDArray[Any], cell: int) -> NDArray[np.float64]:
        """Predicted log error increase of each cell of an LR picture, uint8 or uint16 (H, W, 3): (rows, cols)."""
        return self.scores_of(cell_sums(levels, cell), levels, cell)

    def scores_of(self, sums: NDArray[np.int64], levels: NDArray[Any], cell: int) -> NDArray[np.float64]:
        """`scores` from the picture's `cell_sums`."""
        found = logarithm(statistics_of(sums, levels.shape[:2], cell, levels.dtype) + EPSILON)
        score = np.full(found.shape[:2], self.bias)
        for i, weight in enumerate(self.weights):
            score = score + weight * found[..., i]
        return score

    def leaves(
        self, scores: NDArray[np.float64], rows: slice = slice(None), shift: float = 0.0
    ) -> NDArray[np.bool_]:
        """Which cells of some rows exit.

        Args:
            scores: of the picture, ``(rows, cols)``: of ``rows``, and of as many above and below as there are
                within ``reach``.
            rows: which of them are asked for.
            shift: added to the threshold (a budget knob).
        """
        limit = self.threshold + shift
        if self.slope:
            return np.asarray(scores < limit + self.slope * _means(scores, self.reach))[rows]
        return np.asarray(scores[rows] < limit)

    def to_mapping(self) -> dict[str, Any]:
        """Plain dictionary, fit for JSON."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ExitRule:
        """Inverse of :meth:`to_mapping`."""
        return cls(**{**values, "weights": tuple(values["weights"])})


def _means(scores: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Means of the cells at most ``reach`` rows and columns away; cell after cell, so that none depends on others."""
    numbers = np.stack([scores, np.ones_like(scores)])
    for axis in (1, 2):
        padded = np.pad(numbers, [(reach, reach) if i == axis else (0, 0) for i in range(3)])
        length = numbers.shape[axis]
        total = np.zeros_like(numbers)
        for start in range(2 * reach + 1):
            total = total + padded.take(range(start, start + length), axis)
        numbers = total
    return np.asarray(numbers[0] / numbers[1])


@dataclass(frozen=True)
class BandPlace:
    """Where a band of the result, and the part of the LR picture that it is made from, lie.

    Attributes:
        top: row of the LR picture with which the part begins.
        height: of the LR picture.
        first: row of cells with which the band begins.
        scale: of the network.
        cell: side of a cell in LR pixels.
        fade: width of the cross-fade in LR pixels.
    """

    top: int
    height: int
    first: int
    scale: int
    cell: int
    fade: int


def fill_exits(band: NDArray[Any], part: NDArray[Any], exits: NDArray[np.bool_], place: BandPlace) -> None:
    """Make bicubic of the cells of a band that exited, and cross-fade inside those that touch them; equation (18).

    Args:
        band: rows of the result, contiguous ``(h, W scale, 3)``; written to.
        part: rows of the LR picture, ``(rows, W, 3)``: all that the band depends on.
        exits: of all the picture, ``(rows, cols)`` of cells.
        place: where both lie.
    """
    first, height, fade = place.first, place.height, place.fade * place.scale
    side, around, full = place.cell * place.scale, np.pad(exits, 1), 2 * fade
    rows = (first * side, first * side + band.shape[0])
    plain = imresize_rows(part, place.top, height, (height * place.scale, band.shape[1]), rows)
    for row, col in np.ndindex(-(-band.shape[0] // side), exits.shape[1]):
        box = (slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side))
        near = around[first + row : first + row + 3, col : col + 3]
        if near[1, 1]:
            band[box] = plain[box]
        elif fade and near.any():
            own = fade_shares(near, band[box].shape[:2], fade)[..., None]
            mixed = plain[box].astype(np.int64) * (full - own) + band[box].astype(np.int64) * own
            band[box] = (2 * mixed + full) // (2 * full)


def fade_shares(near: NDArray[np.bool_], shape: tuple[int, ...], fade: int) -> NDArray[np.int64]:
    """Share of the network in a computed cell, of ``2 * fade``: from 1 beside exited neighbors (3, 3) to all of it."""
    full = 2 * fade
    ramps = []
    for length in shape:
        up = np.minimum(2 * np.arange(length) + 1, full)
        ramps.append((up, np.full(length, full), up[::-1]))
    result = np.full(shape, full)
    for i, j in np.argwhere(near):
        down, side = ramps[0][i][:, None], ramps[1][j][None]
        # Distance to a neighbor at a corner is the larger of the two; to one at a side only that side counts.
        ramp = np.maximum(down, side) if i != 1 and j != 1 else (down if i != 1 else side)
        result = np.minimum(result, ramp)
    return result
