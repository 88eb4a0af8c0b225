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
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import Block, Conv, ImageIn, ImageOut, Layer, Plan, Selector, Site
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.export.graph import Graph, need_onnx
from cadyq.io.files import write_atomic

__all__ = ["FORMS", "Form", "export_onnx"]

Array = NDArray[Any]
Form = Literal["dynamic", "qdq"]
FORMS: tuple[Form, ...] = ("dynamic", "qdq")
LUMA = np.array([19595, 38470, 7471], np.float64) / 65536
EXACT = 2**24  # float32 holds all integers up to here
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
        gray = g.op("Div", pixel, g.constant(np.array(257)))
        value = g.op(
            "Add", g.op("Mul", gray, self._per_channel(step.multiplier8)), self._per_channel(step.offset)
        )
        self.planes[step.dst] = value if self.ranges is not None else self._clamp16(g.op("Round", value))

    def _image_out(self, step: ImageOut, wanted: bool) -> None:
        """Equation (8), by the table for 16 bits."""
        if not wanted:
            return
        value = self._clamp16(self.g.op("Round", self.planes[step.src]))
        index = self.g.op("Cast", self.g.op("Add", value, self.g.constant(32768)), to=7)
        table = self.g.constant(step.table16.astype(np.float64) / 65535)
        self.g.op("Gather", table, index, name="sr")
        self.g.output("sr", np.float32, ["batch", 3, "sr_height", "sr_width"])

    # --- Steps ---

    def _layer(self, step: Layer) -> None:
        source = self.planes[step.src]
        codes = source if step.conv.site is None else self._codes(source, step.conv.site, None)
        value = self._conv(codes, step.conv, None)
        if step.shuffle > 1:
            value = self.g.op("DepthToSpace", value, blocksize=step.shuffle, mode="DCR")
        if step.residual is not None:
            value = self._sum(self.planes[step.residual], value)
        self.planes[step.dst] = value

    def _block(self, step: Block) -> None:
        """A chain over the whole plane; candidate 0 bits lets the source pass."""
        source = value = self.planes[step.src]
        skipped = ""
        for conv in step.convs:
            site = conv.site
            assert site is not None
            choice = self._choice(site, value)
            if choice is not None:
                bits = self.g.op("Gather", self.g.constant(np.array(site.bits), np.int64), choice)
                if site.bits[0] == 0:
                    skipped = self.g.op("Equal", choice, self.g.constant(np.array(0), np.int64))
                elif skipped:
                    bits = self.g.op("Where", skipped, self.g.constant(np.array(0), np.int64), bits)
                self._report(bits)
            elif any(len(s.bits) > 1 for s in self.plan.sites):
                batch = self.g.op("Shape", "lr", start=0, end=1)
                self._report(self.g.op("Expand", self.g.constant(np.array(site.bits), np.int64), batch))
            value = self._conv(self._codes(value, site, choice), conv, choice)
        if step.residual:
            value = self._sum(source, value)
        if skipped:
            gate = self.g.op("Unsqueeze", skipped, self.g.constant([1, 2, 3], np.int64))
            value = self.g.op("Where", gate, source, value)
        self.planes[step.dst] = value

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

    def _codes(self, value: str, site: Site, choice: str | None) -> str:
        """Equation (4); in QDQ form the codes' 8 bits saturate by themselves."""
        g = self.g
        scaled = g.op("Mul", value, self._chosen(site.multiplier, choice))
        if self.ranges is not None:
            zero = g.constant(np.array(128 if site.low[0] < 0 else 0), np.uint8)
            return self._around(scaled, g.constant(np.array(1.0)), zero)
        low, high = (self._chosen(limit[:, None], choice) for limit in (site.low, site.high))
        return g.op("Min", g.op("Max", g.op("Round", scaled), low), high)

    def _conv(self, codes: str, conv: Conv, choice: str | None) -> str:
        """Equations (5) and (7), zero padding."""
        g = self.g
        weight = conv.weight.transpose(0, 3, 1, 2)
        pads = [conv.kernel // 2] * 4
        if self.ranges is not None:
            return self._act(self._conv8(codes, conv, weight, pads), conv)
        # Integers already: rounding keeps runtimes from folding the factor into the weights, and the sums exact.
        acc = g.op("Round", self._accumulate(codes, conv, g.constant(weight), pads))
        scaled = g.op("Mul", acc, self._chosen(conv.factor, choice))
        value = g.op("Add", scaled, self._per_channel(conv.bias))
        if conv.site is not None:
            self.results.append(value)
        return self._clamp16(g.op("Round", self._act(value, conv)))

    def _accumulate(self, codes: str, conv: Conv, weight: str, pads: list[int]) -> str:
        """Equation (5), rounded once to float32: where sums may pass 2^24, the codes' high and low digits apart."""
        g = self.g
        bound = conv.accumulator_bound()
        if bound < EXACT:
            return g.op("Conv", codes, weight, pads=pads)
        base = 256.0 if conv.site is None else 16.0
        high = g.op("Floor", g.op("Mul", codes, g.constant(np.array(1 / base))))
        low = g.op("Sub", codes, g.op("Mul", high, g.constant(np.array(base))))
        top = g.op("Mul", g.op("Conv", high, weight, pads=pads), g.constant(np.array(base)))
        return g.op("Add", top, g.op("Conv", low, weight, pads=pads))

    def _conv8(self, codes: str, conv: Conv, weight: Array, pads: list[int]) -> str:
        g, factor = self.g, conv.factor[0].astype(np.float64)
        if conv.site is None:
            whole = g.constant(weight * factor[:, None, None, None])
            return g.op("Conv", codes, whole, g.constant(conv.bias), pads=pads)
        steps = g.constant(factor)
        kernel = g.op("DequantizeLinear", g.constant(weight, np.int8), steps, axis=0)
        bias = np.clip(np.rint(conv.bias / factor), -(2**31) + 1, 2**31 - 1)
        shift = g.op("DequantizeLinear", g.constant(bias, np.int32), steps, axis=0)
        value = g.op("Conv", codes, kernel, shift, pads=pads)
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
