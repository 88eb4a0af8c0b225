"""What `cadyq.functional.exit` specifies, by native code where there is some; equal bit for bit."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.functional import exit as plain
from cadyq.functional.exit import BandPlace, ExitRule
from cadyq.functional.resize import cubic
from cadyq.native import load_native

__all__ = ["exit_scores", "fill_exits"]

_WEIGHT_UNIT = 1024  # factors 2, 4, ... have weights in 1/1024, and only those are exact in integers


def exit_scores(
    rule: ExitRule, levels: NDArray[Any], cell: int, threads: int | None = None
) -> NDArray[np.float64]:
    """As `ExitRule.scores`."""
    native = load_native("_engine")
    if native is None:
        return rule.scores(levels, cell)
    shape = (-(-levels.shape[0] // cell), -(-levels.shape[1] // cell), 7)
    sums = np.empty(shape, np.int64)
    run = native.cell_sums8 if levels.dtype == np.uint8 else native.cell_sums16
    run(np.ascontiguousarray(levels), cell, sums, _threads(threads))
    return rule.scores_of(sums, levels, cell)


def fill_exits(
    band: NDArray[Any],
    part: NDArray[Any],
    exits: NDArray[np.bool_],
    place: BandPlace,
    threads: int | None = None,
) -> None:
    """As `cadyq.functional.exit.fill_exits`."""
    native, weights = load_native("_engine"), _phases(place.scale)
    if native is None or weights is None:
        plain.fill_exits(band, part, exits, place)
        return
    first, n_rows = place.first, -(-band.shape[0] // (place.cell * place.scale))
    around = np.pad(exits, 1)[first : first + n_rows + 2].astype(np.uint8)
    run = native.fill_exits8 if band.dtype == np.uint8 else native.fill_exits16
    numbers = (place.top, place.height, first, place.cell, place.fade, _threads(threads))
    run(band, np.ascontiguousarray(part), weights, around, *numbers)


@lru_cache(maxsize=8)
def _phases(scale: int) -> NDArray[np.float32] | None:
    """Bicubic weights of a result's pixel by its phase, neighbors -2 to 2; None where 1/1024 is no unit of them."""
    at = (np.arange(scale) + 0.5) / scale - 0.5
    weights = cubic(at[:, None] - np.arange(-2, 3)) * _WEIGHT_UNIT
    return weights.astype(np.float32) if (weights == np.rint(weights)).all() else None


def _threads(threads: int | None) -> int:
    return threads or os.cpu_count() or 1
