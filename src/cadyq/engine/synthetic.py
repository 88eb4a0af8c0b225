"""Random plans of residual networks and pictures for them, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cadyq.engine.plan import (
    Array,
    Bicubic,
    Block,
    Borders,
    Conv,
    ImageIn,
    ImageOut,
    Layer,
    Part,
    Plan,
    Plane,
    Requant,
    Selector,
    Site,
    Skip,
    Step,
)

__all__ = ["Shape", "random_picture", "random_plan"]


@dataclass(frozen=True)
class Shape:
    """What a random plan looks like.

    ``act`` is "relu", "prelu" or "none" (upsampler); ``stages`` are the PixelShuffle factors; ``bits`` the
    candidates of every block site (0 only at each block's first); ``gain`` scales the values, so that large
    gains exercise saturation. ``head_bits`` quantizes the picture, ``quantized_skip`` adds the first site's codes
    instead of the values, ``rectify`` ends blocks with ReLU, ``fusions`` puts a 1x1 convolution over all planes so
    far behind every block, ``distilled`` makes blocks of slices and concatenations, ``own_range`` takes each
    tile's range as its clip, ``collapsed`` replaces the upsampler by one convolution with border weights, and
    ``bicubic`` adds the enlarged picture.
    """

    channels: int = 64
    blocks: int = 16
    bits: tuple[int, ...] = (8,)
    act: str = "prelu"
    stages: tuple[int, ...] = (2, 2)
    stage_act: str = "prelu"
    head: int = 9
    tail: int = 9
    tile: int = 48
    colors: int = 3
    gain: float = 1.0
    groups: int = 1
    head_bits: int = 0
    quantized_skip: bool = False
    rectify: bool = False
    fusions: bool = False
    distilled: bool = False
    own_range: bool = False
    collapsed: bool = False
    bicubic: Literal["", "symmetric", "replicate"] = ""


def _weight(rng: np.random.Generator, c_out: int, k: int, c_in: int) -> Array:
    w = np.clip(np.rint(rng.normal(0, 40, (c_out, k, k, c_in))), -127, 127)
    return w.astype(np.int8)


def _site(
    rng: np.random.Generator,
    name: str,
    c: int,
    bits: tuple[int, ...],
    clip: float,
    unsigned: bool,
    dynamic: bool,
    kind: Literal["body", "fixed", "edge"] = "edge",
    own_range: bool = False,
) -> Site:
    """Clips near ``clip`` grid units, per-channel scales, and a selector whose choices vary with the tile."""
    scales = np.exp(rng.normal(0, 0.3, c))
    multiplier = np.zeros((len(bits), c), np.float32)
    low, high = np.zeros(len(bits), np.int32), np.zeros(len(bits), np.int32)
    for i, b in enumerate(bits):
        q = (2**b - 1 if unsigned else 2 ** (b - 1) - 1) if b else 0
        high[i], low[i] = q, 0 if unsigned else -q
        multiplier[i] = (q / (clip * rng.uniform(0.7, 1.0) * scales)).astype(np.float32)
    selector = None
    if dynamic:
        weight = rng.normal(0, 1, (len(bits), 2 + c))
        weight[:, 2:] -= weight[:, 2:].mean(axis=1, keepdims=True)
        weight[:, :2] *= 20
        selector = Selector(weight, rng.normal(0, 0.1, len(bits)), log_offset=float(rng.choice([0.0, 1e-6])))
    inverse = 1.0 / scales if own_range else None
    return Site(name, kind, 1.0, bits, float(1.0 / clip), multiplier, low, high, selector, inverse)


def _conv(
    rng: np.random.Generator,
    c_out: int,
    k: int,
    c_in: int,
    act: str,
    target: float,
    site: Site | None,
    level: float,
    groups: int = 1,
) -> Conv:
    """A convolution whose results have a standard deviation of about ``target`` grid units."""
    c_in //= groups
    weight = _weight(rng, c_out, k, c_in)
    n = 1 if site is None else len(site.bits)
    factor = np.zeros((n, c_out), np.float32)
    for i in range(n):
        code = level if site is None else max(float(site.high[i]), 1.0) / 3
        factor[i] = target / (40 * code * np.sqrt(k * k * c_in)) * rng.uniform(0.7, 1.3, c_out)
    bias = rng.normal(0, target / 8, c_out).astype(np.float32)
    slope = None
    if act == "relu":
        slope = np.zeros(c_out, np.float32)
    elif act == "prelu":
        slope = rng.uniform(-0.3, 1.2, c_out).astype(np.float32)
    if site is not None and site.inverse_scale is not None:
        # The clip is the tile's own range: close to 2 to 3 standard deviations of about 2000 units.
        factor *= (np.maximum(site.high, 1) / 6000.0).astype(np.float32)[:, None]
    return Conv(weight, factor, bias, slope, site, groups)


class _Builder:
    """Adds steps whose planes and sites are random; `random_plan` puts them in order."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.rng = shape, np.random.default_rng(seed)
        self.spread = 2000.0 * shape.gain
        self.planes: list[Plane] = []
        self.steps: list[Step] = []

    def plane(self, channels: int, level: int = 1) -> Part:
        self.planes.append(Plane(channels, level))
        return Part(len(self.planes) - 1, 0, channels)

    def body_site(self, name: str, c: int, bits: tuple[int, ...], unsigned: bool) -> Site:
        return _site(
            self.rng, name, c, bits, 3 * self.spread, unsigned, len(bits) > 1, "body", self.shape.own_range
        )

    def image_in(self) -> Part:
        dst = self.plane(self.shape.colors)
        mul = np.full(self.shape.colors, 32000 / 255 / 2, np.float32)
        offset = self.rng.uniform(-8000, -4000, self.shape.colors).astype(np.float32)
        self.steps.append(ImageIn(dst.plane, mul, (mul / np.float32(257)).astype(np.float32), offset))
        return dst

    def block(self, i: int, src: Part, dst: Part) -> None:
        """Two convolutions and a sum: with the values, or with their codes (``quantized_skip``)."""
        shape, rng, c = self.shape, self.rng, src.channels
        inner = tuple(b for b in shape.bits if b)
        first = self.body_site(f"block{i}.1", c, shape.bits, False)
        second = self.body_site(f"block{i}.2", c, inner, shape.act == "relu")
        convs = [
            _conv(rng, c, 3, c, shape.act, self.spread, first, 0, shape.groups),
            _conv(rng, c, 3, c, "none", self.spread / 8, second, 0, shape.groups),
        ]
        skip = Skip((src,))
        if shape.quantized_skip:
            ratio = np.zeros_like(first.multiplier)
            np.divide(1, first.multiplier, out=ratio, where=first.multiplier != 0)
            skip = Skip((src,), ratio, shared=True)
            gain = rng.uniform(50, 80, c).astype(np.float32)
            factor = convs[1].factor / np.float32(64)
            convs[1] = replace(convs[1], factor=factor, requant=Requant(127, gain))
        hidden = self.plane(c)
        layers = (
            Layer((src,), hidden.plane, convs[0]),
            Layer((hidden,), dst.plane, convs[1], skip, rectify=shape.rectify),
        )
        self.steps.append(Block(src.plane, dst.plane, layers))

    def distillation(self, i: int, src: Part, dst: Part) -> None:
        """Grouped convolutions, a slice that waits, a concatenation that is added, and a 1x1 convolution."""
        rng, c, kept = self.rng, src.channels, max(1, src.channels // 4)
        bits = tuple(b for b in self.shape.bits if b)
        layers: list[Layer] = []

        def conv(parts: tuple[Part, ...], c_out: int, groups: int, **options: object) -> Part:
            c_in = sum(part.channels for part in parts)
            site = self.body_site(f"block{i}.{len(layers)}", c_in, bits, False)
            to = self.plane(c_out)
            packed = _conv(rng, c_out, 3, c_in, "prelu", self.spread, site, 0, groups)
            layers.append(Layer(parts, to.plane, packed, **options))  # type: ignore[arg-type]
            return to

        whole = conv((conv((src,), c // 2, 1),), c, 2)
        waiting, rest = Part(whole.plane, 0, kept), Part(whole.plane, kept, c - kept)
        ratio = rng.uniform(0.5, 1.5, (1, c + kept)).astype(np.float32)
        total = conv((rest,), c + kept, 1, skip=Skip((src, waiting), ratio))
        site = _site(rng, f"block{i}.end", c + kept, (8,), 3 * self.spread, False, False)
        end = _conv(rng, c, 1, c + kept, "prelu", self.spread, site, 0)
        self.steps.append(Block(src.plane, dst.plane, (*layers, Layer((total,), dst.plane, end)), False))

    def layer(self, src: tuple[Part, ...], name: str, k: int, act: str, **options: object) -> Part:
        c, rng = self.shape.channels, self.rng
        c_in = sum(part.channels for part in src)
        r = int(str(options.get("shuffle", 1)))
        level = self.planes[src[0].plane].level * r
        skip = options.get("skip")
        site = _site(rng, name, c_in, (8,), (4 if skip else 3) * self.spread, False, False)
        dst = self.plane(c, level)
        conv = _conv(rng, c * r * r, k, c_in, act, self.spread / 2 if skip else self.spread, site, 0)
        self.steps.append(Layer(src, dst.plane, conv, **options))  # type: ignore[arg-type]
        return dst

    def tail(self, source: Part, scale: int) -> Part:
        shape, rng, c = self.shape, self.rng, self.shape.channels
        level = self.planes[source.plane].level
        unsigned = shape.stage_act == "relu" and level > 1
        site = _site(rng, "tail", c, (8,), 3 * self.spread, unsigned, False)
        r = scale // level
        dst = self.plane(shape.colors, scale)
        conv = _conv(rng, shape.colors * r * r, shape.tail, c, "none", 6000.0, site, 0)
        borders = None
        if shape.collapsed:
            weight = np.stack([_weight(rng, conv.c_out, shape.tail, c) for _ in range(15)])
            borders = Borders(weight, rng.normal(0, 2000, (15, conv.c_out)).astype(np.float32))
        self.steps.append(Layer((source,), dst.plane, conv, shuffle=r, borders=borders))
        return dst

    def image_out(self, src: Part, scale: int) -> None:
        value = np.tanh(np.arange(-32768, 32768) / 12000) * 0.5 + 0.5
        tables = np.rint(value * 255).astype(np.uint8), np.rint(value * 65535).astype(np.uint16)
        base = None
        if self.shape.bicubic:
            weight = self.rng.integers(-6000, 50000, (scale, 5)).astype(np.int32)
            gains = [float(np.float64(16000) / 2**33 / most) for most in (255, 65535)]
            base = Bicubic(weight, self.shape.bicubic == "symmetric", *gains)
        self.steps.append(ImageOut(src.plane, *tables, base))


def random_plan(shape: Shape, seed: int = 0) -> Plan:
    """A valid plan of the given shape; the same seed gives the same plan."""
    b = _Builder(shape, seed)
    rng, c = b.rng, shape.channels
    scale = int(np.prod(shape.stages))
    picture, head, body = b.image_in(), b.plane(c), b.plane(c)
    site = None
    if shape.head_bits:
        site = _site(rng, "head", shape.colors, (shape.head_bits,), 12000, False, False, "fixed")
    conv = _conv(rng, c, shape.head, shape.colors, shape.act, b.spread, site, 6000)
    b.steps.append(Layer((picture,), head.plane, conv))
    source, cascade = head, [head]
    for i in range(shape.blocks):
        if shape.fusions:
            body = b.plane(c)
        if shape.distilled:
            b.distillation(i, source, body)
        else:
            b.block(i, source, body)
        source = body
        if shape.fusions:
            cascade.append(source)
            source = b.layer(tuple(cascade), f"fusion{i}", 1, "relu")
    source = b.layer((source,), "body_end", 3, "none", skip=Skip((head,)))
    if not shape.collapsed:
        for i, r in enumerate(shape.stages):
            source = b.layer((source,), f"up{i}", 3, shape.stage_act, shuffle=r)
    b.image_out(b.tail(source, scale), scale)
    return Plan(scale, shape.tile, tuple(b.planes), tuple(b.steps)).validate()


def random_picture(height: int, width: int, seed: int = 0, dtype: type = np.uint8, colors: int = 3) -> Array:
    """A picture ``(height, width, colors)``, half noise, half almost flat."""
    rng = np.random.default_rng(seed)
    top = int(np.iinfo(dtype).max) + 1
    image: Array = rng.integers(0, top, (height, width, colors), dtype=dtype)
    image[:, width // 2 :] = image[:, width // 2 :] // 16 + top // 3
    return image
