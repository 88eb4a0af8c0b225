"""Plan of the integer engine -> ONNX file of standard operators (opset 17).

Two forms:

* ``dynamic``: what the engine computes, decision by decision. Planes and codes are integers held in float32;
  where an accumulator may pass 2^24 the codes' digits are convolved apart, so results are the engine's own. Every
  element of the batch decides for itself: give a whole picture for one decision per site (mode ``image``), or a batch
  of equal patches (mode ``patches``).
* ``qdq``: for networks of fixed bits, QuantizeLinear/DequantizeLinear around every convolution with 8-bit input,
  which runtimes fuse into integer kernels. Their results are 8-bit too, on ranges seen on calibration pictures;
  layers that read a 16-bit plane stay float32.

Input ``lr``: float32 ``(batch, 3, height, width)`` in [0, 1]. Outputs: ``sr``, the same at ``scale`` times the size,
and, where bits are chosen, ``bits``: int64 ``(batch, sites)``; the sites' names are in the file's metadata.
Equation numbers are those of ``docs/numerics.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import (
    Bicubic,
    Block,
    Borders,
    Conv,
    ImageIn,
    ImageOut,
    Layer,
    Part,
    Plan,
    Selector,
    Site,
    Skip,
)
from cadyq.engine.plan_check import MULTIPLIER_LIMIT
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.export.graph import Graph, need_onnx
from cadyq.io.files import write_atomic

__all__ = ["FORMS", "Form", "export_onnx"]

Array = NDArray[Any]
Form = Literal["dynamic", "qdq"]
FORMS: tuple[Form, ...] = ("dynamic", "qdq")
LUMA = np.array([19595, 38470, 7471], np.float64) / 65536
EXACT = 2**24  # float32 holds all integers up to here
ROW_OF = (1, 0, 2)  # places of rows and columns in order: first, inner, last
SPACE = [2, 3]
AXES: list[str | int] = ["batch", 3, "height", "width"]


def export_onnx(
    plan: Plan,
    path: str | os.PathLike[str],
    form: Form = "dynamic",
    *,
    budget: float = 0.0,
    calibration: Iterable[Array] = (),
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a plan as an ONNX file.

    Args:
        plan: the packed network.
        path: where to; an existing file is replaced as a whole.
        form: ``dynamic`` or ``qdq``, see above.
        budget: added to the selectors' scores per bit.
        calibration: LR pictures, uint8 ``(h, w, 3)``, that ``qdq`` takes the ranges of results from.
        metadata: further entries of the file's metadata.

    Raises:
        ArgumentError: no calibration pictures for ``qdq``. UnsupportedError: ``qdq`` of a network that chooses bits.
        MissingExtraError: a package of the extra ``onnx`` is missing.
    """
    if form not in FORMS:
        raise ArgumentError("form", form, f"one of {FORMS}")
    ranges: dict[str, tuple[float, float]] | None = None
    if form == "qdq":
        if any(len(site.bits) > 1 for site in plan.sites):
            raise UnsupportedError(
                "this network chooses its bits, and QDQ has one bit-width per layer; use the form 'dynamic'"
            )
        if any(
            layer.conv.site is not None and layer.conv.site.inverse_scale is not None
            for layer in plan.layers()
        ):
            raise UnsupportedError(
                "LinQ takes every tile's own range, and QDQ has fixed ones; use the form 'dynamic'"
            )
        pictures = list(calibration)
        if not pictures:
            raise ArgumentError("calibration", "empty", "at least one LR picture", "give typical pictures")
        ranges = _ranges(plan, pictures)
    model = _Exporter(plan, budget, ranges).model(metadata or {})
    write_atomic(Path(path), model.SerializeToString())


def _ranges(plan: Plan, pictures: list[Array]) -> dict[str, tuple[float, float]]:
    """Smallest and largest result of every convolution with a site, by the value's name."""
    (runtime,) = need_onnx("onnxruntime")
    exporter = _Exporter(plan, 0.0, None)
    model = exporter.model({}, results=True)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, tuple[float, float]] = {}
    for picture in pictures:
        lr = picture.transpose(2, 0, 1)[None].astype(np.float32) / 255
        for name, value in zip(exporter.results, session.run(exporter.results, {"lr": lr}), strict=True):
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found


class _Exporter:
    """Builds the graph of one plan; ``ranges`` makes it QDQ."""

    def __init__(self, plan: Plan, budget: float, ranges: dict[str, tuple[float, float]] | None) -> None:
        self.plan, self.budget, self.ranges = plan, budget, ranges
        self.g = Graph()
        self.planes: dict[int, str] = {}
        self.bits: list[str] = []
        self.results: list[str] = []
        self._gradient = ""
        self._pixels = ""

    def model(self, metadata: dict[str, str], results: bool = False) -> Any:
        """The model; with ``results`` its outputs are those of the convolutions instead."""
        for step in self.plan.steps:
            if isinstance(step, ImageIn):
                self._image_in(step)
            elif isinstance(step, Layer):
                self._layer(step)
            elif isinstance(step, Block):
                self._block(step)
            elif isinstance(step, ImageOut):
                self._image_out(step, wanted=not results)
            else:
                raise UnsupportedError(f"a plan's {type(step).__name__} has no ONNX form yet")
        if results:
            for name in self.results:
                self.g.output(name, np.float32, ["batch", "channels", None, None])  # type: ignore[list-item]
        elif self.bits:
            self.g.op("Concat", *self.bits, name="bits", axis=1)
            self.g.output("bits", np.int64, ["batch", len(self.plan.sites)])
        sites = json.dumps([site.name for site in self.plan.sites])
        kept = {"scale": str(self.plan.scale), "sites": sites, **metadata}
        return self.g.model([("lr", AXES)], kept)

    # --- Picture in and out ---

    def _image_in(self, step: ImageIn) -> None:
        """Equation (2), from [0, 1]: what was a pixel of 8 or 16 bits becomes that pixel, exactly."""
        g = self.g
        pixel = g.op("Round", g.op("Mul", "lr", g.constant(np.array(65535))))
        self._pixels = g.op("Div", pixel, g.constant(np.array(257)))
        scaled = g.op("Mul", self._pixels, self._per_channel(step.multiplier8))
        value = g.op("Add", scaled, self._per_channel(step.offset))
        self.planes[step.dst] = value if self.ranges is not None else self._clamp16(g.op("Round", value))

    def _image_out(self, step: ImageOut, wanted: bool) -> None:
        """Equation (8), by the table for 16 bits."""
        if not wanted:
            return
        value = self._clamp16(self.g.op("Round", self.planes[step.src]))
        if step.base is not None:
            value = self._clamp16(self.g.op("Add", value, self._bicubic(step.base)))
        index = self.g.op("Cast", self.g.op("Add", value, self.g.constant(32768)), to=7)
        table = self.g.constant(step.table16.astype(np.float64) / 65535)
        self.g.op("Gather", table, index, name="sr")
        self.g.output("sr", np.float32, ["batch", 3, "sr_height", "sr_width"])

    def _bicubic(self, base: Bicubic) -> str:
        """Equation (16): sums of integers in float64, exact."""
        g = self.g
        total = g.op("Cast", self._pixels, to=11)
        for axis in SPACE:
            total = self._enlarged(total, base, axis)
        value = g.op("Round", g.op("Mul", total, g.constant(np.array(base.gain8), np.float64)))
        return self._clamp16(g.op("Cast", value, to=1))

    def _enlarged(self, value: str, base: Bicubic, axis: int) -> str:
        """One axis: every phase is a sum of 5 neighbors."""
        g = self.g

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

    # --- Steps ---

    def _layer(self, step: Layer) -> None:
        self.planes[step.dst] = self._computed(step, self.planes, None, "")

    def _computed(self, layer: Layer, planes: dict[int, str], choice: str | None, shared: str) -> str:
        """A layer's result: codes, convolution, PixelShuffle, sum, rectification."""
        g, conv = self.g, layer.conv
        value = self._parts(layer.src, planes)
        if conv.site is not None and conv.site.inverse_scale is not None:
            multiplier, factor = self._own_range(value, conv, choice)
        else:
            multiplier = "" if conv.site is None else self._chosen(conv.site.multiplier, choice)
            factor = self._chosen(conv.factor, choice)
        codes = value if conv.site is None else self._codes(value, conv.site, choice, multiplier)
        result = self._conv(codes, conv, factor, layer.borders)
        if layer.shuffle > 1:
            result = g.op("DepthToSpace", result, blocksize=layer.shuffle, mode="DCR")
        if layer.skip is not None:
            addend = shared if layer.skip.shared else ""
            result = self._sum(self._skip(layer.skip, planes, addend), result)
        return g.op("Relu", result) if layer.rectify else result

    def _parts(self, parts: tuple[Part, ...], planes: dict[int, str]) -> str:
        """Channels of several planes one after another."""
        pieces = []
        for part in parts:
            piece = planes[part.plane]
            if (part.first, part.channels) != (0, self.plan.planes[part.plane].channels):
                ends = [self.g.constant([i], np.int64) for i in (part.first, part.first + part.channels, 1)]
                piece = self.g.op("Slice", piece, *ends)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else self.g.op("Concat", *pieces, axis=1)

    def _skip(self, skip: Skip, planes: dict[int, str], shared: str) -> str:
        """What is added to a result; equation (14). ``shared``: "codes choice" of the block's first site."""
        if skip.shared:
            codes, _, choice = shared.partition(" ")
        else:
            codes, choice = self._parts(skip.parts, planes), ""
            if skip.site is not None:
                codes = self._codes(codes, skip.site, None, self._chosen(skip.site.multiplier, None))
        if skip.ratio is None:
            return codes
        scaled = self.g.op("Mul", codes, self._chosen(skip.ratio, choice or None))
        return scaled if self.ranges is not None else self._clamp16(self.g.op("Round", scaled))

    def _block(self, step: Block) -> None:
        """Layers over the whole plane; candidate 0 bits lets the source pass."""
        g, source = self.g, self.planes[step.src]
        values, skipped, shared = {step.src: source}, "", ""
        for i, layer in enumerate(step.layers):
            site = layer.conv.site
            assert site is not None
            choice = None
            if site.kind == "body":
                choice = self._choice(site, self._parts(layer.src, values))
                skipped = self._count(site, choice, skipped)
            if i == 0:
                first = self._parts(layer.src, values)
                codes = self._codes(first, site, choice, self._chosen(site.multiplier, choice))
                shared = f"{codes} {choice or ''}"
            values[layer.dst] = self._computed(layer, values, choice, shared)
        value = values[step.dst]
        if skipped:
            gate = g.op("Unsqueeze", skipped, g.constant([1, 2, 3], np.int64))
            value = g.op("Where", gate, source, value)
        self.planes[step.dst] = value

    def _count(self, site: Site, choice: str | None, skipped: str) -> str:
        """Report a site's bits; the answer is whether its block is skipped, "" if it cannot be."""
        g, table = self.g, self.g.constant(np.array(site.bits), np.int64)
        if choice is None:
            if any(len(s.bits) > 1 for s in self.plan.sites):
                self._report(g.op("Expand", table, g.op("Shape", "lr", start=0, end=1)))
            return skipped
        bits = g.op("Gather", table, choice)
        if skipped:
            bits = g.op("Where", skipped, g.constant(np.array(0), np.int64), bits)
        elif site.bits[0] == 0:
            skipped = g.op("Equal", choice, g.constant(np.array(0), np.int64))
        self._report(bits)
        return skipped

    def _report(self, bits: str) -> None:
        self.bits.append(self.g.op("Unsqueeze", bits, self.g.constant([1], np.int64)))

    # --- Choice ---

    def _choice(self, site: Site, value: str) -> str | None:
        """Index of the chosen candidate of each element, int64 (batch,); equations (9) and (10)."""
        if site.selector is None:
            return None
        g, selector = self.g, site.selector
        x = g.op("Concat", self._gradients(), self._deviations(value, site.step), axis=1)
        if selector.log_offset > 0:
            x = g.op("Log", g.op("Add", x, g.constant(selector.log_offset, np.float64)))
        scores = g.op("MatMul", x, g.constant(selector.weight.T, np.float64))
        bias = g.constant(self._bias(selector, site), np.float64)
        return g.op("ArgMax", g.op("Add", scores, bias), axis=1, keepdims=0)

    def _bias(self, selector: Selector, site: Site) -> Array:
        bias: Array = selector.bias + self.budget * np.array(site.bits, np.float64)
        return bias

    def _gradients(self) -> str:
        """Equation (1), (batch, 2) of float64."""
        if self._gradient:
            return self._gradient
        g = self.g
        gray = g.op("Conv", "lr", g.constant(LUMA[None, :, None, None]))
        padded = g.op("Pad", gray, g.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), mode="edge")
        dx = np.outer([1, 2, 1], [-1, 0, 1]) / 8
        sobel = g.op("Conv", padded, g.constant(np.stack([dx, dx.T])[:, None]))
        size = g.op("Cast", g.op("Abs", sobel), to=11)
        self._gradient = g.op("ReduceMean", size, axes=SPACE, keepdims=0)
        return self._gradient

    def _deviations(self, value: str, step: float) -> str:
        """Equation (9), (batch, C) of float64."""
        g, axes = self.g, self.g.constant(SPACE, np.int64)
        wide = g.op("Cast", value, to=11)
        total = g.op("ReduceSum", wide, axes, keepdims=0)
        squares = g.op("ReduceSum", g.op("Mul", wide, wide), axes, keepdims=0)
        n = g.op("Cast", g.op("ReduceProd", g.op("Shape", value, start=2), keepdims=0), to=11)
        spread = g.op("Sub", g.op("Mul", squares, n), g.op("Mul", total, total))
        one = g.constant(np.array(1.0), np.float64)
        pairs = g.op("Max", g.op("Mul", n, g.op("Sub", n, one)), one)
        deviation = g.op("Sqrt", g.op("Div", spread, pairs))
        return g.op("Mul", deviation, g.constant(np.array(step), np.float64))

    # --- Arithmetic ---

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

        size = g.op("ReduceMax", g.op("Cast", g.op("Abs", value), to=11), axes=SPACE, keepdims=1)
        clip = g.op("ReduceMax", g.op("Mul", size, wide(site.inverse_scale)), axes=[1], keepdims=1)
        zero, one = g.constant(np.array(0.0), np.float64), g.constant(np.array(1.0), np.float64)
        clip = g.op("Where", g.op("Equal", clip, zero), one, clip)
        high = np.maximum(site.high, 1).astype(np.float64)[:, None]
        levels = g.op("Cast", self._chosen(high, choice), to=11)
        gain = g.op("Div", g.op("Mul", levels, wide(site.inverse_scale)), clip)
        multiplier = g.op("Min", gain, g.constant(np.array(MULTIPLIER_LIMIT), np.float64))
        factor = g.op("Cast", self._chosen(conv.factor, choice), to=11)
        factor = g.op("Div", g.op("Mul", factor, clip), levels)
        return g.op("Cast", multiplier, to=1), g.op("Cast", factor, to=1)

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
