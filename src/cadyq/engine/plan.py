"""A packed network: pure data that the reference and the native engine execute.

A plan is a list of generic steps over planes of 16-bit integers; nothing in it names a network.
``docs/numerics.md`` defines what each step computes, with the equation numbers used in ``reference.py``.

Layouts: planes are ``(H, W, C)``; convolution weights are ``(C_out, k, k, C_in)``. A PixelShuffle of factor r
reads its input channels as ``(row, column, channel)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import CheckpointError

__all__ = ["Block", "Conv", "ImageIn", "ImageOut", "Layer", "Plan", "Plane", "Selector", "Site"]

FORMAT_VERSION = 1
MAX_TILE = 256  # Keeps the integer variance below 2^63; equation (9).
MAX_CHANNELS = 1024
MAX_KERNEL = 17
MAX_BITS = 8
ACCUMULATOR_LIMIT = 2**31 - 1
VALUE_LIMIT = 2.0**31 - 2**10  # Kernels convert to int32 before they saturate; equation (7).
MULTIPLIER_LIMIT = 65000.0  # 32768 times this is below 2^31; equation (4).
FACTOR_LIMIT = 1e6

Array = NDArray[Any]


def _fail(what: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"plan: {what} is {found!r}, expected {expected}; convert the network again")


def _array(what: str, value: Array, dtype: type, shape: tuple[int, ...], limit: float | None = None) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        found = (getattr(value, "dtype", type(value).__name__), getattr(value, "shape", None))
        raise _fail(what, found, f"{np.dtype(dtype).name} of shape {shape}")
    if limit is not None and value.size and not (np.abs(value) <= limit).all():
        raise _fail(what, "out of range", f"finite values of at most {limit:g}")


@dataclass(frozen=True)
class Plane:
    """A plane of int16 values: ``channels`` per pixel, at ``level`` times the input's resolution.

    ``step`` is the real value of one unit.
    """

    channels: int
    level: int
    step: float


@dataclass(frozen=True)
class Selector:
    """Linear scores of the candidates from two gradients and C deviations; the first largest wins.

    ``weight`` is float64 ``(K, 2 + C)``, ``bias`` float64 ``(K,)``. With ``log_offset`` above 0 the inputs are
    log(v + log_offset), by the logarithm of equation (11), which is the same on every machine.
    """

    weight: Array
    bias: Array
    log_offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where a convolution's input is quantised: candidates, and how each maps int16 values to codes.

    ``bits`` has K entries; 0 means that the block is skipped (first site of a block, first entry only).
    ``multiplier`` is float32 ``(K, C)``; ``low`` and ``high`` are int32 ``(K,)`` bounds of the codes.
    ``step`` is the real value of one unit of the quantised plane, used for deviations. Equation (4).
    """

    name: str
    bits: tuple[int, ...]
    step: float
    multiplier: Array
    low: Array
    high: Array
    selector: Selector | None = None


@dataclass(frozen=True)
class Conv:
    """An integer convolution with its site, output scale, bias and activation; equations (5) to (7).

    ``weight`` is int8 ``(C_out, k, k, C_in)``; ``factor`` float32 ``(K, C_out)``; ``bias`` float32
    ``(C_out,)``, in units of the target's grid; ``slope`` float32 ``(C_out,)`` multiplies negative values,
    ``None`` is no activation. Without a site the int16 values themselves are the codes.
    """

    weight: Array
    factor: Array
    bias: Array
    slope: Array | None = None
    site: Site | None = None

    @property
    def c_out(self) -> int:
        """Output channels."""
        return int(self.weight.shape[0])

    @property
    def c_in(self) -> int:
        """Input channels."""
        return int(self.weight.shape[3])

    @property
    def kernel(self) -> int:
        """Side of the square kernel."""
        return int(self.weight.shape[1])

    def accumulator_bound(self) -> int:
        """Largest possible absolute accumulator over all candidates; equation (6)."""
        if self.site is None:
            largest = 32768
        else:
            largest = max(1, int(np.abs(self.site.low).max()), int(np.abs(self.site.high).max()))
        norms = np.abs(self.weight.astype(np.int64)).sum(axis=(1, 2, 3))
        return int(norms.max(initial=0)) * largest


@dataclass(frozen=True)
class ImageIn:
    """Image to plane: ``clamp16(rint(x * multiplier + offset))``; equation (2).

    ``multiplier8`` and ``multiplier16`` (float32 ``(C,)``) serve uint8 and uint16 images.
    """

    dst: int
    multiplier8: Array
    multiplier16: Array
    offset: Array


@dataclass(frozen=True)
class Layer:
    """One convolution over a whole plane, with an optional residual plane and PixelShuffle."""

    src: int
    dst: int
    conv: Conv
    residual: int | None = None
    shuffle: int = 1


@dataclass(frozen=True)
class Block:
    """A chain of convolutions computed tile by tile, halo included, with the tile's own candidates.

    With ``residual`` the chain's result is added to the source plane. ``src == dst`` updates a plane.
    """

    src: int
    dst: int
    convs: tuple[Conv, ...]
    residual: bool = True


@dataclass(frozen=True)
class ImageOut:
    """Plane to image through tables over all int16 values (index ``value + 32768``); equation (8)."""

    src: int
    table8: Array
    table16: Array


Step = ImageIn | Layer | Block | ImageOut


@dataclass(frozen=True)
class Plan:
    """A network: planes, steps in order, output scale, and the tile side in input pixels."""

    scale: int
    tile: int
    planes: tuple[Plane, ...]
    steps: tuple[Step, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites inside blocks, in order: the columns of the engine's table of bits."""
        return tuple(
            c.site for s in self.steps if isinstance(s, Block) for c in s.convs if c.site is not None
        )

    def validate(self) -> Plan:
        """Return the plan itself, or raise `CheckpointError` naming what is wrong with it."""
        _validate(self)
        return self

    def to_arrays(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Arrays by name, and metadata that JSON can hold; `from_arrays` is the inverse."""
        arrays: dict[str, Array] = {}
        steps = [_dump_step(s, f"{i}", arrays) for i, s in enumerate(self.steps)]
        planes = [{"channels": p.channels, "level": p.level, "step": p.step} for p in self.planes]
        meta = {
            "version": FORMAT_VERSION,
            "scale": self.scale,
            "tile": self.tile,
            "planes": planes,
            "steps": steps,
        }
        return arrays, meta

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> Plan:
        """Build and validate a plan; raises `CheckpointError` for anything missing, foreign or malformed."""
        version = meta.get("version") if isinstance(meta, Mapping) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(f"plan: format version is {version!r}, this release reads {FORMAT_VERSION}")
        try:
            planes = tuple(
                Plane(int(p["channels"]), int(p["level"]), float(p["step"])) for p in meta["planes"]
            )
            steps = tuple(_load_step(s, f"{i}", arrays) for i, s in enumerate(meta["steps"]))
            plan = Plan(int(meta["scale"]), int(meta["tile"]), planes, steps)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"plan: damaged ({type(error).__name__}: {error}); convert again"
            ) from error
        return plan.validate()


def _dump_site(site: Site, key: str, arrays: dict[str, Array]) -> dict[str, Any]:
    arrays[f"{key}.multiplier"], arrays[f"{key}.low"], arrays[f"{key}.high"] = (
        site.multiplier,
        site.low,
        site.high,
    )
    if site.selector is not None:
        arrays[f"{key}.selector.weight"] = site.selector.weight
        arrays[f"{key}.selector.bias"] = site.selector.bias
    return {
        "name": site.name,
        "bits": list(site.bits),
        "step": site.step,
        "selector": site.selector is not None,
        "log_offset": 0.0 if site.selector is None else site.selector.log_offset,
    }


def _dump_conv(conv: Conv, key: str, arrays: dict[str, Array]) -> dict[str, Any]:
    arrays[f"{key}.weight"], arrays[f"{key}.factor"], arrays[f"{key}.bias"] = (
        conv.weight,
        conv.factor,
        conv.bias,
    )
    if conv.slope is not None:
        arrays[f"{key}.slope"] = conv.slope
    site = None if conv.site is None else _dump_site(conv.site, f"{key}.site", arrays)
    return {"slope": conv.slope is not None, "site": site}


def _dump_step(step: Step, key: str, arrays: dict[str, Array]) -> dict[str, Any]:
    if isinstance(step, ImageIn):
        for name in ("multiplier8", "multiplier16", "offset"):
            arrays[f"{key}.{name}"] = getattr(step, name)
        return {"kind": "image_in", "dst": step.dst}
    if isinstance(step, Layer):
        conv = _dump_conv(step.conv, f"{key}.conv", arrays)
        return {
            "kind": "layer", "src": step.src, "dst": step.dst, "conv": conv,
            "residual": step.residual, "shuffle": step.shuffle,
        }  # fmt: skip
    if isinstance(step, Block):
        convs = [_dump_conv(c, f"{key}.conv{i}", arrays) for i, c in enumerate(step.convs)]
        return {"kind": "block", "src": step.src, "dst": step.dst, "convs": convs, "residual": step.residual}
    arrays[f"{key}.table8"], arrays[f"{key}.table16"] = step.table8, step.table16
    return {"kind": "image_out", "src": step.src}


def _load_site(meta: Mapping[str, Any], key: str, arrays: Mapping[str, Array]) -> Site:
    selector = None
    if meta["selector"]:
        selector = Selector(
            arrays[f"{key}.selector.weight"], arrays[f"{key}.selector.bias"], float(meta["log_offset"])
        )
    bits = tuple(int(b) for b in meta["bits"])
    mul, low, high = (arrays[f"{key}.{n}"] for n in ("multiplier", "low", "high"))
    return Site(str(meta["name"]), bits, float(meta["step"]), mul, low, high, selector)


def _load_conv(meta: Mapping[str, Any], key: str, arrays: Mapping[str, Array]) -> Conv:
    slope = arrays[f"{key}.slope"] if meta["slope"] else None
    site = None if meta["site"] is None else _load_site(meta["site"], f"{key}.site", arrays)
    return Conv(arrays[f"{key}.weight"], arrays[f"{key}.factor"], arrays[f"{key}.bias"], slope, site)


def _load_step(meta: Mapping[str, Any], key: str, arrays: Mapping[str, Array]) -> Step:
    kind = meta["kind"]
    if kind == "image_in":
        mul8, mul16, offset = (arrays[f"{key}.{n}"] for n in ("multiplier8", "multiplier16", "offset"))
        return ImageIn(int(meta["dst"]), mul8, mul16, offset)
    if kind == "layer":
        conv = _load_conv(meta["conv"], f"{key}.conv", arrays)
        residual = None if meta["residual"] is None else int(meta["residual"])
        return Layer(int(meta["src"]), int(meta["dst"]), conv, residual, int(meta["shuffle"]))
    if kind == "block":
        convs = tuple(_load_conv(c, f"{key}.conv{i}", arrays) for i, c in enumerate(meta["convs"]))
        return Block(int(meta["src"]), int(meta["dst"]), convs, bool(meta["residual"]))
    if kind == "image_out":
        return ImageOut(int(meta["src"]), arrays[f"{key}.table8"], arrays[f"{key}.table16"])
    raise _fail("a step's kind", kind, "image_in, layer, block or image_out")


def _validate_site(site: Site, channels: int, what: str) -> None:
    n = len(site.bits)
    if not 1 <= n <= 16 or any(not 0 <= b <= MAX_BITS for b in site.bits):
        raise _fail(f"{what}: bits", site.bits, f"1 to 16 candidates of 0 to {MAX_BITS} bits")
    if not 0 < site.step < 1e6:
        raise _fail(f"{what}: step", site.step, "a positive number")
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
    if site.selector is not None:
        _array(f"{what}: selector weight", site.selector.weight, np.float64, (n, 2 + channels), 1e12)
        _array(f"{what}: selector bias", site.selector.bias, np.float64, (n,), 1e12)
        if not 0 <= site.selector.log_offset <= 1:
            raise _fail(f"{what}: selector log offset", site.selector.log_offset, "0 to 1")


def _validate_conv(conv: Conv, c_in: int, what: str) -> None:
    shape = conv.weight.shape if isinstance(conv.weight, np.ndarray) else ()
    odd = len(shape) == 4 and shape[1] % 2 == 1 and 1 <= shape[1] <= MAX_KERNEL
    if not odd or not 1 <= shape[0] <= MAX_CHANNELS:
        raise _fail(f"{what}: weight shape", shape, "(C_out, k, k, C_in) with odd k")
    _array(f"{what}: weight", conv.weight, np.int8, (shape[0], shape[1], shape[1], c_in))
    n = 1 if conv.site is None else len(conv.site.bits)
    _array(f"{what}: factor", conv.factor, np.float32, (n, shape[0]), FACTOR_LIMIT)
    _array(f"{what}: bias", conv.bias, np.float32, (shape[0],), 1e9)
    if conv.slope is not None:
        _array(f"{what}: slope", conv.slope, np.float32, (shape[0],), FACTOR_LIMIT)
    if conv.site is not None:
        _validate_site(conv.site, c_in, f"{what}: site")
    if conv.accumulator_bound() > ACCUMULATOR_LIMIT:
        raise _fail(f"{what}: accumulator bound", conv.accumulator_bound(), f"at most {ACCUMULATOR_LIMIT}")
    steepest = 1.0 if conv.slope is None else max(1.0, float(np.abs(conv.slope).max()))
    value = conv.accumulator_bound() * float(np.abs(conv.factor).max()) + float(np.abs(conv.bias).max())
    if value * steepest > VALUE_LIMIT:
        raise _fail(f"{what}: largest result", value * steepest, "less than 2^31 units of the target's grid")


def _validate_block(block: Block, plan: Plan, what: str) -> None:
    src, dst = plan.planes[block.src], plan.planes[block.dst]
    if not 1 <= len(block.convs) <= 8:
        raise _fail(f"{what}: convolutions", len(block.convs), "1 to 8")
    channels = src.channels
    for i, conv in enumerate(block.convs):
        _validate_conv(conv, channels, f"{what}, convolution {i}")
        site = conv.site
        if site is None:
            raise _fail(f"{what}, convolution {i}: site", None, "one")
        if any(b == 0 for b in site.bits[1:]) or (site.bits[0] == 0 and (i > 0 or not block.residual)):
            raise _fail(
                f"{what}, convolution {i}: bits", site.bits, "0 only as a residual block's first candidate"
            )
        channels = conv.c_out
    if (channels, src.level) != (dst.channels, dst.level) or src.level != 1:
        raise _fail(
            f"{what}: result", (channels, src.level), f"plane {block.dst}'s {(dst.channels, dst.level)}"
        )
    if block.residual and src.channels != dst.channels:
        raise _fail(f"{what}: channels", dst.channels, f"{src.channels}, as its source is added")


def _steps_checked(plan: Plan) -> Iterator[tuple[int, int | None]]:
    """Yield (written plane, read plane) for each step after checking its own fields."""
    for i, step in enumerate(plan.steps):
        what = f"step {i}"
        for name in ("src", "dst", "residual"):
            index = getattr(step, name, None)
            if isinstance(index, int) and not isinstance(index, bool) and not 0 <= index < len(plan.planes):
                raise _fail(f"{what}: {name}", index, f"a plane from 0 to {len(plan.planes) - 1}")
        if isinstance(step, ImageIn):
            channels = plan.planes[step.dst].channels
            for name in ("multiplier8", "multiplier16", "offset"):
                _array(f"{what}: {name}", getattr(step, name), np.float32, (channels,), 1e6)
            yield step.dst, None
        elif isinstance(step, Layer):
            src, dst = plan.planes[step.src], plan.planes[step.dst]
            _validate_conv(step.conv, src.channels, what)
            if step.conv.site is not None and len(step.conv.site.bits) != 1:
                raise _fail(f"{what}: candidates", step.conv.site.bits, "one; dynamic sites belong in blocks")
            expected = (dst.channels * step.shuffle**2, src.level * step.shuffle)
            if not 1 <= step.shuffle <= 8 or (step.conv.c_out, dst.level) != expected:
                raise _fail(f"{what}: output channels and level", (step.conv.c_out, dst.level), str(expected))
            if step.src == step.dst:
                raise _fail(f"{what}: dst", step.dst, "another plane than src")
            if step.residual is not None and plan.planes[step.residual] != dst:
                raise _fail(f"{what}: residual", step.residual, f"a plane like {step.dst}, step included")
            yield step.dst, step.src
        elif isinstance(step, Block):
            _validate_block(step, plan, what)
            yield step.dst, step.src
        else:
            _array(f"{what}: table8", step.table8, np.uint8, (65536,))
            _array(f"{what}: table16", step.table16, np.uint16, (65536,))
            yield -1, step.src


def _validate(plan: Plan) -> None:
    if not 1 <= plan.scale <= 16 or not 4 <= plan.tile <= MAX_TILE:
        raise _fail("scale, tile", (plan.scale, plan.tile), f"1 to 16, 4 to {MAX_TILE}")
    for i, plane in enumerate(plan.planes):
        if not (1 <= plane.channels <= MAX_CHANNELS and 1 <= plane.level <= 16 and 0 < plane.step < 1e6):
            raise _fail(f"plane {i}", plane, "positive channels, level and step")
    kinds = [type(s) for s in plan.steps]
    if len(kinds) < 2 or kinds[0] is not ImageIn or kinds[-1] is not ImageOut:
        raise _fail("steps", len(kinds), "first an image input, last an image output")
    if kinds.count(ImageIn) != 1 or kinds.count(ImageOut) != 1:
        raise _fail("image steps", (kinds.count(ImageIn), kinds.count(ImageOut)), "one of each")
    written: set[int] = set()
    for step, (dst, src) in zip(plan.steps, _steps_checked(plan), strict=True):
        reads = {src, getattr(step, "residual", None) if isinstance(step, Layer) else None} - {None}
        if not reads <= written:
            raise _fail("planes read before they are written", sorted(map(str, reads - written)), "none")
        written.add(dst)
    first, last = plan.steps[0], plan.steps[-1]
    assert isinstance(first, ImageIn) and isinstance(last, ImageOut)
    if plan.planes[first.dst].level != 1 or plan.planes[last.src].level != plan.scale:
        raise _fail("levels of the image planes", plan.planes[last.src].level, f"1 and {plan.scale}")
