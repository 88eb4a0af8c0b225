"""What makes a plan valid. Kernels rely on every bound here; equation numbers are those of ``docs/numerics.md``."""

from __future__ import annotations

import numpy as np

from cadyq.engine.plan import (
    MAX_TILE,
    Array,
    Bicubic,
    Block,
    Conv,
    ImageIn,
    ImageOut,
    Layer,
    Part,
    Plan,
    Site,
    Skip,
)
from cadyq.errors import CheckpointError

__all__ = ["check"]

MAX_CHANNELS = 1024
MAX_KERNEL = 17
MAX_BITS = 8
MAX_LAYERS = 32  # of a block
ACCUMULATOR_LIMIT = 2**31 - 1
VALUE_LIMIT = 2.0**31 - 2**10  # Kernels convert to int32 before they saturate; equation (7).
MULTIPLIER_LIMIT = 65000.0  # 32768 times this is below 2^31; equation (4).
FACTOR_LIMIT = 1e6


def _fail(what: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"plan: {what} is {found!r}, expected {expected}; convert the network again")


def _array(what: str, value: Array, dtype: type, shape: tuple[int, ...], limit: float | None = None) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        found = (getattr(value, "dtype", type(value).__name__), getattr(value, "shape", None))
        raise _fail(what, found, f"{np.dtype(dtype).name} of shape {shape}")
    if limit is not None and value.size and not (np.abs(value) <= limit).all():
        raise _fail(what, "out of range", f"finite values of at most {limit:g}")


def _check_site(site: Site, channels: int, what: str) -> None:
    n = len(site.bits)
    if not 1 <= n <= 16 or any(not 0 <= b <= MAX_BITS for b in site.bits):
        raise _fail(f"{what}: bits", site.bits, f"1 to 16 candidates of 0 to {MAX_BITS} bits")
    if not 0 < site.step < 1e6 or not 0 <= site.macs < 1e12:
        raise _fail(f"{what}: step, macs", (site.step, site.macs), "positive numbers")
    _array(f"{what}: multiplier", site.multiplier, np.float32, (n, channels), MULTIPLIER_LIMIT)
    _array(f"{what}: low", site.low, np.int32, (n,))
    _array(f"{what}: high", site.high, np.int32, (n,))
    for bits, low, high in zip(site.bits, site.low, site.high, strict=True):
        signed = 2 ** max(bits - 1, 0) - 1
        fits = -signed <= low <= 0 <= high <= signed or (low == 0 and 0 <= high <= 2**bits - 1)
        if not fits:
            raise _fail(f"{what}: code range", (int(low), int(high)), f"a range that {bits} bits can hold")
    if n > 1 and site.selector is None:
        raise _fail(f"{what}: selector", None, "one, as there are several candidates")
    if n > 1 and site.kind != "body":
        raise _fail(f"{what}: kind", site.kind, "'body', as there are several candidates")
    if site.selector is not None:
        _array(f"{what}: selector weight", site.selector.weight, np.float64, (n, 2 + channels), 1e12)
        _array(f"{what}: selector bias", site.selector.bias, np.float64, (n,), 1e12)
        if not 0 <= site.selector.log_offset <= 1:
            raise _fail(f"{what}: selector log offset", site.selector.log_offset, "0 to 1")
    if site.inverse_scale is not None:
        _array(f"{what}: inverse scale", site.inverse_scale, np.float64, (channels,), 1e9)
        if not (site.inverse_scale > 1e-9).all():
            raise _fail(f"{what}: inverse scale", float(site.inverse_scale.min()), "positive numbers")


def _check_conv(conv: Conv, c_in: int, what: str) -> None:
    shape = conv.weight.shape if isinstance(conv.weight, np.ndarray) else ()
    odd = len(shape) == 4 and shape[1] % 2 == 1 and 1 <= shape[1] <= MAX_KERNEL
    if not odd or not 1 <= shape[0] <= MAX_CHANNELS:
        raise _fail(f"{what}: weight shape", shape, "(C_out, k, k, C_in / groups) with odd k")
    if conv.groups < 1 or shape[0] % conv.groups or c_in % conv.groups:
        raise _fail(f"{what}: groups", conv.groups, f"a divisor of {shape[0]} and {c_in}")
    _array(f"{what}: weight", conv.weight, np.int8, (shape[0], shape[1], shape[1], c_in // conv.groups))
    n = 1 if conv.site is None else len(conv.site.bits)
    _array(f"{what}: factor", conv.factor, np.float32, (n, shape[0]), FACTOR_LIMIT)
    _array(f"{what}: bias", conv.bias, np.float32, (shape[0],), 1e9)
    if conv.slope is not None:
        _array(f"{what}: slope", conv.slope, np.float32, (shape[0],), FACTOR_LIMIT)
    if conv.site is not None:
        _check_site(conv.site, c_in, f"{what}: site")
    if conv.requant is not None:
        _array(f"{what}: requant gain", conv.requant.gain, np.float32, (shape[0],), MULTIPLIER_LIMIT)
        if not 1 <= conv.requant.levels <= 32767:
            raise _fail(f"{what}: requant levels", conv.requant.levels, "1 to 32767")
    _check_bounds(conv, what)


def _check_bounds(conv: Conv, what: str) -> None:
    bound = conv.accumulator_bound()
    if bound > ACCUMULATOR_LIMIT:
        raise _fail(f"{what}: accumulator bound", bound, f"at most {ACCUMULATOR_LIMIT}")
    steepest = 1.0 if conv.slope is None else max(1.0, float(np.abs(conv.slope).max()))
    # With the tile's own range a, codes times a / q are at most the largest value itself; equation (15).
    scales = None if conv.site is None else conv.site.inverse_scale
    own_range = 1.0 if scales is None else 32768.0 * float(scales.max())
    value = bound * float(np.abs(conv.factor).max()) * own_range + float(np.abs(conv.bias).max())
    if value * steepest > VALUE_LIMIT:
        raise _fail(f"{what}: largest result", value * steepest, "less than 2^31 units of the target's grid")


class _Checker:
    """Walks through the steps and keeps track of the planes that hold something."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.written: set[int] = set()

    def plane(self, index: object, what: str) -> int:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.plan.planes):
            raise _fail(what, index, f"a plane from 0 to {len(self.plan.planes) - 1}")
        return index

    def parts(self, parts: tuple[Part, ...], level: int | None, what: str) -> tuple[int, int]:
        """Channels and level of a concatenation."""
        if not 1 <= len(parts) <= 64:
            raise _fail(f"{what}: parts", len(parts), "1 to 64")
        channels = 0
        for part in parts:
            plane = self.plan.planes[self.plane(part.plane, what)]
            if part.plane not in self.written:
                raise _fail("planes read before they are written", part.plane, "none")
            if part.first < 0 or part.channels < 1 or part.first + part.channels > plane.channels:
                raise _fail(f"{what}: channels", part, f"within plane {part.plane}'s {plane.channels}")
            level = plane.level if level is None else level
            if plane.level != level:
                raise _fail(f"{what}: level of plane {part.plane}", plane.level, f"{level}")
            channels += part.channels
        assert level is not None
        if channels > MAX_CHANNELS:
            raise _fail(f"{what}: channels", channels, f"at most {MAX_CHANNELS}")
        return channels, level

    def layer(self, layer: Layer, what: str) -> None:
        channels, level = self.parts(layer.src, None, f"{what}: src")
        dst = self.plan.planes[self.plane(layer.dst, f"{what}: dst")]
        _check_conv(layer.conv, channels, what)
        expected = (dst.channels * layer.shuffle**2, level * layer.shuffle)
        if not 1 <= layer.shuffle <= 8 or (layer.conv.c_out, dst.level) != expected:
            raise _fail(f"{what}: output channels and level", (layer.conv.c_out, dst.level), str(expected))
        if layer.skip is not None:
            self.skip(layer.skip, dst.channels, dst.level, what)
        if layer.borders is not None:
            conv = layer.conv
            weight = (15, *conv.weight.shape)
            _array(f"{what}: border weights", layer.borders.weight, np.int8, weight)
            _array(f"{what}: border biases", layer.borders.bias, np.float32, (15, conv.c_out), 1e9)
            for w, b in zip(layer.borders.weight, layer.borders.bias, strict=True):
                _check_bounds(Conv(w, conv.factor, b, conv.slope, conv.site), f"{what}, border")

    def skip(self, skip: Skip, channels: int, level: int, what: str) -> None:
        found, _ = self.parts(skip.parts, level, f"{what}: skip")
        if found != channels:
            raise _fail(f"{what}: skip's channels", found, str(channels))
        if skip.site is not None:
            _check_site(skip.site, channels, f"{what}: skip")
            if len(skip.site.bits) != 1 or skip.shared:
                raise _fail(f"{what}: skip's candidates", skip.site.bits, "one")
        if (skip.site is not None or skip.shared) and skip.ratio is None:
            raise _fail(f"{what}: skip's ratio", None, "one, as codes are added")
        if skip.ratio is not None and not skip.shared:
            _array(f"{what}: skip's ratio", skip.ratio, np.float32, (1, channels), MULTIPLIER_LIMIT)

    def block(self, block: Block, what: str) -> None:
        src, dst = self.plane(block.src, f"{what}: src"), self.plane(block.dst, f"{what}: dst")
        if not 1 <= len(block.layers) <= MAX_LAYERS:
            raise _fail(f"{what}: layers", len(block.layers), f"1 to {MAX_LAYERS}")
        if src not in self.written:
            raise _fail("planes read before they are written", src, "none")
        if dst in self.written and dst != src:
            raise _fail(f"{what}: dst", dst, "its source, or a plane that nothing has written")
        outside, self.written = self.written, {src}
        for i, layer in enumerate(block.layers):
            name = f"{what}, layer {i}"
            self.layer(layer, name)
            last = i + 1 == len(block.layers)
            if last != (layer.dst == dst) or (not last and layer.dst in (src, *outside)):
                raise _fail(f"{name}: dst", layer.dst, f"a plane of its own, {dst} for the last layer only")
            if layer.shuffle != 1 or self.plan.planes[layer.dst].level != 1 or layer.borders is not None:
                raise _fail(f"{name}: level", self.plan.planes[layer.dst].level, "the input's")
            self.block_site(block, i, name)
            self.written.add(layer.dst)
        self.written = outside
        if block.residual and self.plan.planes[src] != self.plan.planes[dst]:
            raise _fail(
                f"{what}: dst", self.plan.planes[dst], f"{self.plan.planes[src]}, as a tile may be skipped"
            )

    def block_site(self, block: Block, i: int, what: str) -> None:
        layer, site = block.layers[i], block.layers[i].conv.site
        if site is None:
            raise _fail(f"{what}: site", None, "one")
        if any(b == 0 for b in site.bits[1:]) or (site.bits[0] == 0 and (i > 0 or not block.residual)):
            raise _fail(f"{what}: bits", site.bits, "0 only as a residual block's first candidate")
        if layer.skip is not None and layer.skip.shared:
            first = block.layers[0]
            assert first.conv.site is not None
            shape = (len(first.conv.site.bits), self.plan.planes[layer.dst].channels)
            assert layer.skip.ratio is not None
            _array(f"{what}: skip's ratio", layer.skip.ratio, np.float32, shape, MULTIPLIER_LIMIT)
            if layer.skip.parts != first.src:
                raise _fail(f"{what}: skip", layer.skip.parts, "what the block's first site quantises")

    def image_out(self, step: ImageOut, what: str) -> None:
        plane = self.plan.planes[self.plane(step.src, f"{what}: src")]
        if step.src not in self.written:
            raise _fail("planes read before they are written", step.src, "none")
        _array(f"{what}: table8", step.table8, np.uint8, (65536,))
        _array(f"{what}: table16", step.table16, np.uint16, (65536,))
        if step.base is not None:
            first = self.plan.steps[0]
            assert isinstance(first, ImageIn)
            if plane.channels != self.plan.planes[first.dst].channels:
                raise _fail(f"{what}: channels", plane.channels, "those of the input image, which is added")
            _check_base(step.base, self.plan.scale, f"{what}: base")


def _check_base(base: Bicubic, scale: int, what: str) -> None:
    _array(f"{what}: weight", base.weight, np.int32, (scale, 5), 2**17)
    # Sums of 25 products of 16-bit samples stay below 2^53, where float64 is exact.
    if np.abs(base.weight.astype(np.int64)).sum(axis=1).max() > 2**18:
        raise _fail(f"{what}: weights", "too large", "sums below 4")
    if not (0 < base.gain8 < 1 and 0 < base.gain16 < 1):
        raise _fail(f"{what}: gains", (base.gain8, base.gain16), "0 to 1")


def check(plan: Plan) -> None:
    """Raise `CheckpointError` naming the first thing that is wrong with a plan."""
    if not 1 <= plan.scale <= 16 or not 4 <= plan.tile <= MAX_TILE:
        raise _fail("scale, tile", (plan.scale, plan.tile), f"1 to 16, 4 to {MAX_TILE}")
    for i, plane in enumerate(plan.planes):
        if not (1 <= plane.channels <= MAX_CHANNELS and 1 <= plane.level <= 16):
            raise _fail(f"plane {i}", plane, "positive channels and level")
    kinds = [type(s) for s in plan.steps]
    if len(kinds) < 2 or kinds[0] is not ImageIn or kinds[-1] is not ImageOut:
        raise _fail("steps", len(kinds), "first an image input, last an image output")
    if kinds.count(ImageIn) != 1 or kinds.count(ImageOut) != 1:
        raise _fail("image steps", (kinds.count(ImageIn), kinds.count(ImageOut)), "one of each")
    checker = _Checker(plan)
    for i, step in enumerate(plan.steps):
        what = f"step {i}"
        if isinstance(step, ImageIn):
            channels = plan.planes[checker.plane(step.dst, f"{what}: dst")].channels
            for name in ("multiplier8", "multiplier16", "offset"):
                _array(f"{what}: {name}", getattr(step, name), np.float32, (channels,), 1e6)
            checker.written.add(step.dst)
        elif isinstance(step, Layer):
            checker.layer(step, what)
            site = step.conv.site
            if site is not None and (len(site.bits) != 1 or site.kind == "body"):
                raise _fail(f"{what}: candidates", site.bits, "one; the body's sites belong in blocks")
            if site is not None and site.inverse_scale is not None:
                raise _fail(f"{what}: site", "its own range", "a clip, outside a block")
            if step.dst in checker.written:
                raise _fail(f"{what}: dst", step.dst, "a plane that nothing has written")
            if step.skip is not None and step.skip.shared:
                raise _fail(f"{what}: skip", "shared", "not outside a block")
            checker.written.add(step.dst)
        elif isinstance(step, Block):
            checker.block(step, what)
            checker.written.add(step.dst)
        else:
            checker.image_out(step, what)
    first, last = plan.steps[0], plan.steps[-1]
    assert isinstance(first, ImageIn) and isinstance(last, ImageOut)
    if plan.planes[first.dst].level != 1 or plan.planes[last.src].level != plan.scale:
        raise _fail("levels of the image planes", plan.planes[last.src].level, f"1 and {plan.scale}")
