"""Plan of the integer engine -> ONNX file of standard operators (opset 17).

Two forms:

* ``dynamic``: what the engine computes, decision by decision. Planes and codes are integers held in float32;
  where an accumulator may pass 2^24 the codes' digits are convolved apart, so results are the engine's own. Every
  element of the batch decides for itself: give a whole picture for one decision per site (mode ``image``), or a batch
  of equal patches (mode ``patches``).
* ``qdq``: for networks of fixed bits, QuantizeLinear/DequantizeLinear around every convolution with 8-bit input,
  which runtimes fuse into integer kernels. Their results are 8-bit too, on ranges seen on calibration pictures;
  layers that read a 16-bit plane stay float32.

Input ``lr``: float32 ``(batch, colors, height, width)`` in [0, 1]. Outputs: ``sr``, the same at ``scale`` times the
size, and, where bits are chosen, ``bits``: int64 ``(batch, sites)``; the sites' names are in the file's metadata. Where
the engine collapsed a tail, pictures measure at least 3x3, and ``qdq`` leaves the outermost LR pixel approximate.
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

from cadyq.engine.plan import (
    Block,
    ImageIn,
    ImageOut,
    Layer,
    Part,
    Plan,
    Selector,
    Site,
    Skip,
)
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.export.arithmetic import Arithmetic
from cadyq.export.enlarge import enlarged
from cadyq.export.graph import DOUBLE, INT64, SPACE, need_onnx
from cadyq.io.files import write_atomic

__all__ = ["FORMS", "Form", "export_onnx"]

Array = NDArray[Any]
Form = Literal["dynamic", "qdq"]
FORMS: tuple[Form, ...] = ("dynamic", "qdq")
LUMA = np.array([19595, 38470, 7471], np.float64) / 65536


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


class _Exporter(Arithmetic):
    """Builds the graph of one plan; ``ranges`` makes it QDQ."""

    def __init__(self, plan: Plan, budget: float, ranges: dict[str, tuple[float, float]] | None) -> None:
        super().__init__(ranges)
        self.plan, self.budget = plan, budget
        self.planes: dict[int, str] = {}
        self.bits: list[str] = []
        self._gradient = ""
        self._pixels = ""
        first = plan.steps[0]
        assert isinstance(first, ImageIn)
        self.colors = plan.planes[first.dst].channels

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
        return self.g.model([("lr", ["batch", self.colors, "height", "width"])], kept)

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
            value = self._clamp16(
                self.g.op("Add", value, self._clamp16(enlarged(self.g, self._pixels, step.base)))
            )
        index = self.g.op("Cast", self.g.op("Add", value, self.g.constant(32768)), to=INT64)
        table = self.g.constant(step.table16.astype(np.float64) / 65535)
        self.g.op("Gather", table, index, name="sr")
        self.g.output("sr", np.float32, ["batch", self.colors, "sr_height", "sr_width"])

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
        gray = "lr" if self.colors == 1 else g.op("Conv", "lr", g.constant(LUMA[None, :, None, None]))
        padded = g.op("Pad", gray, g.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), mode="edge")
        dx = np.outer([1, 2, 1], [-1, 0, 1]) / 8
        sobel = g.op("Conv", padded, g.constant(np.stack([dx, dx.T])[:, None]))
        size = g.op("Cast", g.op("Abs", sobel), to=DOUBLE)
        self._gradient = g.op("ReduceMean", size, axes=SPACE, keepdims=0)
        return self._gradient

    def _deviations(self, value: str, step: float) -> str:
        """Equation (9), (batch, C) of float64."""
        g, axes = self.g, self.g.constant(SPACE, np.int64)
        wide = g.op("Cast", value, to=DOUBLE)
        total = g.op("ReduceSum", wide, axes, keepdims=0)
        squares = g.op("ReduceSum", g.op("Mul", wide, wide), axes, keepdims=0)
        n = g.op("Cast", g.op("ReduceProd", g.op("Shape", value, start=2), keepdims=0), to=DOUBLE)
        spread = g.op("Sub", g.op("Mul", squares, n), g.op("Mul", total, total))
        one = g.constant(np.array(1.0), np.float64)
        pairs = g.op("Max", g.op("Mul", n, g.op("Sub", n, one)), one)
        deviation = g.op("Sqrt", g.op("Div", spread, pairs))
        return g.op("Mul", deviation, g.constant(np.array(step), np.float64))
