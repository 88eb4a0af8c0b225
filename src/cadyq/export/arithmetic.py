"""Arithmetic of the engine as nodes of an ONNX graph; equation numbers are those of ``docs/numerics.md``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import Borders, Conv, Site
from cadyq.engine.plan_check import MULTIPLIER_LIMIT
from cadyq.export.graph import DOUBLE, FLOAT, SPACE, Graph

__all__ = ["Arithmetic"]

Array = NDArray[Any]
EXACT = 2**24  # float32 holds all integers up to here
ROW_OF = (1, 0, 2)  # places of rows and columns in order: first, inner, last


class Arithmetic:
    """Codes, convolutions and sums; ``ranges`` of results make it QDQ.

    Attributes:
        results: names of the convolutions' results so far, those of layers without a site left out.
    """

    def __init__(self, ranges: dict[str, tuple[float, float]] | None) -> None:
        self.g = Graph()
        self.ranges = ranges
        self.results: list[str] = []

    def _chosen(self, table: Array, choice: str | None) -> str:
        """Row of a table (K, C) for each element: (batch or 1, C, 1, 1)."""
        if choice is None:
            return self._per_channel(table[0])
        row = self.g.op("Gather", self.g.constant(table), choice)
        return self.g.op("Unsqueeze", row, self.g.constant(SPACE, np.int64))

    def _own_range(self, value: str, conv: Conv, choice: str | None) -> tuple[str, str]:
        """Multipliers and factors where the clip is the element's own range; equation (15)."""
        g, site = self.g, conv.site
        assert site is not None and site.inverse_scale is not None

        def wide(values: Array) -> str:
            return g.constant(np.asarray(values).reshape(1, -1, 1, 1), np.float64)

        size = g.op("ReduceMax", g.op("Cast", g.op("Abs", value), to=DOUBLE), axes=SPACE, keepdims=1)
        clip = g.op("ReduceMax", g.op("Mul", size, wide(site.inverse_scale)), axes=[1], keepdims=1)
        zero, one = g.constant(np.array(0.0), np.float64), g.constant(np.array(1.0), np.float64)
        clip = g.op("Where", g.op("Equal", clip, zero), one, clip)
        high = np.maximum(site.high, 1).astype(np.float64)[:, None]
        levels = g.op("Cast", self._chosen(high, choice), to=DOUBLE)
        gain = g.op("Div", g.op("Mul", levels, wide(site.inverse_scale)), clip)
        multiplier = g.op("Min", gain, g.constant(np.array(MULTIPLIER_LIMIT), np.float64))
        factor = g.op("Cast", self._chosen(conv.factor, choice), to=DOUBLE)
        factor = g.op("Div", g.op("Mul", factor, clip), levels)
        return g.op("Cast", multiplier, to=FLOAT), g.op("Cast", factor, to=FLOAT)

    def _codes(self, value: str, site: Site, choice: str | None, multiplier: str) -> str:
        """Equation (4); in QDQ form the codes' 8 bits saturate by themselves."""
        g = self.g
        scaled = g.op("Mul", value, multiplier)
        if self.ranges is not None:
            zero = g.constant(np.array(128 if site.low[0] < 0 else 0), np.uint8)
            return self._around(scaled, g.constant(np.array(1.0)), zero)
        low, high = (self._chosen(limit[:, None], choice) for limit in (site.low, site.high))
        return g.op("Min", g.op("Max", g.op("Round", scaled), low), high)

    def _conv(self, codes: str, conv: Conv, factor: str, borders: Borders | None) -> str:
        """Equations (5), (7) and (14), zero padding."""
        g, reach = self.g, conv.kernel // 2
        if self.ranges is not None:
            return self._finished(self._conv8(codes, conv), conv)
        if borders is None:
            return self._finished(self._scaled(codes, conv, factor, reach), conv)
        pads = g.constant([0, 0, reach, reach, 0, 0, reach, reach], np.int64)
        padded = g.op("Pad", codes, pads)
        rows = []
        for row in range(3):
            window = self._span(padded, ROW_OF[row], conv.kernel, 2)
            cells = []
            for col in range(3):
                cell = self._span(window, ROW_OF[col], conv.kernel, 3)
                kind = 4 * ROW_OF[row] + ROW_OF[col] - 1
                own = (
                    conv if kind < 0 else replace(conv, weight=borders.weight[kind], bias=borders.bias[kind])
                )
                cells.append(self._scaled(cell, own, factor, 0))
            rows.append(g.op("Concat", *cells, axis=3))
        return self._finished(g.op("Concat", *rows, axis=2), conv)

    def _span(self, padded: str, place: int, kernel: int, axis: int) -> str:
        """What the first (1), the last (2) or all inner rows or columns (0) of a result read."""
        start, end = {0: (1, -1), 1: (0, kernel), 2: (-kernel, 2**62)}[place]
        return self.g.op("Slice", padded, *(self.g.constant([i], np.int64) for i in (start, end, axis)))

    def _scaled(self, codes: str, conv: Conv, factor: str, reach: int) -> str:
        """A convolution's sums in units of the target, before activation and rounding."""
        g = self.g
        weight, given = (
            g.constant(conv.weight.transpose(0, 3, 1, 2)),
            {"pads": [reach] * 4, "group": conv.groups},
        )
        # Integers already: rounding keeps runtimes from folding the factor into the weights, and the sums exact.
        acc = g.op("Round", self._accumulate(codes, conv, weight, given))
        return g.op("Add", g.op("Mul", acc, factor), self._per_channel(conv.bias))

    def _finished(self, value: str, conv: Conv) -> str:
        """Activation, rounding, and the rounding of codes that the result itself is."""
        g = self.g
        if conv.site is not None and self.ranges is None:
            self.results.append(value)
        value = self._act(value, conv)
        if self.ranges is None or conv.requant is not None:
            value = g.op("Round", value)
        if conv.requant is not None:
            levels = float(conv.requant.levels)
            value = g.op("Clip", value, g.constant(np.array(-levels)), g.constant(np.array(levels)))
            value = g.op("Mul", value, self._per_channel(conv.requant.gain))
            value = value if self.ranges is not None else g.op("Round", value)
        return value if self.ranges is not None else self._clamp16(value)

    def _accumulate(self, codes: str, conv: Conv, weight: str, given: dict[str, Any]) -> str:
        """Equation (5), rounded once to float32: where sums may pass 2^24, the codes' high and low digits apart."""
        g = self.g
        if conv.accumulator_bound() < EXACT:
            return g.op("Conv", codes, weight, **given)
        base = 256.0 if conv.site is None else 16.0
        high = g.op("Floor", g.op("Mul", codes, g.constant(np.array(1 / base))))
        low = g.op("Sub", codes, g.op("Mul", high, g.constant(np.array(base))))
        top = g.op("Mul", g.op("Conv", high, weight, **given), g.constant(np.array(base)))
        return g.op("Add", top, g.op("Conv", low, weight, **given))

    def _conv8(self, codes: str, conv: Conv) -> str:
        """A convolution between QuantizeLinear and DequantizeLinear; float32 where its input has 16 bits."""
        g, factor = self.g, conv.factor[0].astype(np.float64)
        weight = conv.weight.transpose(0, 3, 1, 2)
        given: dict[str, Any] = {"pads": [conv.kernel // 2] * 4, "group": conv.groups}
        if conv.site is None:
            whole = g.constant(weight * factor[:, None, None, None])
            return g.op("Conv", codes, whole, g.constant(conv.bias), **given)
        steps = g.constant(factor)
        kernel = g.op("DequantizeLinear", g.constant(weight, np.int8), steps, axis=0)
        bias = np.clip(np.rint(conv.bias / factor), -(2**31) + 1, 2**31 - 1)
        shift = g.op("DequantizeLinear", g.constant(bias, np.int32), steps, axis=0)
        value = g.op("Conv", codes, kernel, shift, **given)
        assert self.ranges is not None
        low, high = list(self.ranges.values())[len(self.results)]
        self.results.append(value)
        step = max(high - low, 1e-3) / 255
        return self._around(value, g.constant(np.array(step)), g.constant(np.rint(-low / step), np.uint8))

    def _around(self, value: str, step: str, zero: str) -> str:
        return self.g.op("DequantizeLinear", self.g.op("QuantizeLinear", value, step, zero), step, zero)

    def _act(self, value: str, conv: Conv) -> str:
        if conv.slope is None:
            return value
        if not conv.slope.any():
            return self.g.op("Relu", value)
        return self.g.op("PRelu", value, self.g.constant(conv.slope[:, None, None]))

    def _sum(self, a: str, b: str) -> str:
        value = self.g.op("Add", a, b)
        return value if self.ranges is not None else self._clamp16(value)

    def _clamp16(self, value: str) -> str:
        low, high = self.g.constant(np.array(-32768)), self.g.constant(np.array(32767))
        return self.g.op("Clip", value, low, high)

    def _per_channel(self, values: Array) -> str:
        return self.g.constant(np.asarray(values).reshape(1, -1, 1, 1))
