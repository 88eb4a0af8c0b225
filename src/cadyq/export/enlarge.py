"""The enlarged picture that some networks add their result to."""

from __future__ import annotations

import numpy as np

from cadyq.engine.plan import Bicubic
from cadyq.export.graph import DOUBLE, FLOAT, Graph

__all__ = ["enlarged"]


def enlarged(g: Graph, pixels: str, base: Bicubic) -> str:
    """Equation (16) of 8-bit pixels, before it is clamped: sums of integers in float64, exact."""
    total = g.op("Cast", pixels, to=DOUBLE)
    for axis in (2, 3):
        total = _along(g, total, base, axis)
    value = g.op("Round", g.op("Mul", total, g.constant(np.array(base.gain8), np.float64)))
    return g.op("Cast", value, to=FLOAT)


def _along(g: Graph, value: str, base: Bicubic, axis: int) -> str:
    """One axis: every phase is a sum of 5 neighbors."""

    def number(i: int) -> str:
        return g.constant(np.array(i), np.int64)

    def at(i: int) -> str:
        return g.constant([i], np.int64)

    size = g.op("Squeeze", g.op("Shape", value, start=axis, end=axis + 1))
    last = g.op("Sub", size, number(1))
    index = g.op("Range", number(-2), g.op("Add", size, number(2)), number(1))
    if base.symmetric:
        period = g.op("Mul", size, number(2))
        index = g.op("Mod", index, period)
        index = g.op("Min", index, g.op("Sub", g.op("Sub", period, number(1)), index))
    else:
        index = g.op("Min", g.op("Max", index, number(0)), last)
    padded = g.op("Gather", value, index, axis=axis)
    taps = [g.op("Slice", padded, at(i), at(i - 4) if i < 4 else at(2**62), at(axis)) for i in range(5)]
    phases = []
    for row in base.weight:
        parts = [
            g.op("Mul", tap, g.constant(np.array(float(w)), np.float64))
            for w, tap in zip(row, taps, strict=True)
        ]
        phases.append(g.op("Unsqueeze", g.op("Sum", *parts), at(axis + 1)))
    stacked = g.op("Concat", *phases, axis=axis + 1)
    if axis == 3:
        return g.op("Reshape", stacked, g.constant([0, 0, 0, -1], np.int64))
    width = g.op("Shape", value, start=3, end=4)
    return g.op("Reshape", stacked, g.op("Concat", g.constant([0, 0, -1], np.int64), width, axis=0))
