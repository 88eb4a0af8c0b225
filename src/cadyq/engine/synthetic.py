"""Random plans of residual networks and pictures for them, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import Block, Conv, ImageIn, ImageOut, Layer, Plan, Plane, Selector, Site, Step

__all__ = ["Shape", "random_picture", "random_plan"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """What a random plan looks like.

    ``act`` is "relu", "prelu" or "none" (upsampler); ``stages`` are the PixelShuffle factors; ``bits`` the
    candidates of every block site (0 only at each block's first); ``gain`` scales the values, so that large
    gains exercise saturation.
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
    return Site(name, bits, float(1.0 / clip), multiplier, low, high, selector)


def _conv(
    rng: np.random.Generator,
    c_out: int,
    k: int,
    c_in: int,
    act: str,
    target: float,
    site: Site | None,
    level: float,
) -> Conv:
    """A convolution whose results have a standard deviation of about ``target`` grid units."""
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
    return Conv(weight, factor, bias, slope, site)


def random_plan(shape: Shape, seed: int = 0) -> Plan:
    """A valid plan of the given shape; the same seed gives the same plan."""
    rng = np.random.default_rng(seed)
    c, spread = shape.channels, 2000.0 * shape.gain
    scale = int(np.prod(shape.stages))
    planes = [Plane(shape.colors, 1, 1 / 32000), Plane(c, 1, 1e-3), Plane(c, 1, 1e-3)]
    mul = np.full(shape.colors, 32000 / 255 / 2, np.float32)
    offset = rng.uniform(-8000, -4000, shape.colors).astype(np.float32)
    steps: list[Step] = [ImageIn(0, mul, (mul / np.float32(257)).astype(np.float32), offset)]
    steps.append(Layer(0, 1, _conv(rng, c, shape.head, shape.colors, shape.act, spread, None, 6000)))
    inner = tuple(b for b in shape.bits if b)
    dynamic = len(shape.bits) > 1
    for i in range(shape.blocks):
        relu = shape.act == "relu"
        first = _site(rng, f"block{i}.1", c, shape.bits, 3 * spread, False, dynamic)
        second = _site(rng, f"block{i}.2", c, inner, 3 * spread, relu, len(inner) > 1)
        convs = (
            _conv(rng, c, 3, c, shape.act, spread, first, 0),
            _conv(rng, c, 3, c, "none", spread / 8, second, 0),
        )
        steps.append(Block(1 if i == 0 else 2, 2, convs))
    site = _site(rng, "body_end", c, (8,), 4 * spread, False, False)
    planes.append(Plane(c, 1, 1e-3))
    steps.append(Layer(2, 3, _conv(rng, c, 3, c, "none", spread / 2, site, 0), residual=1))
    source, level = 3, 1
    for i, r in enumerate(shape.stages):
        site = _site(rng, f"up{i}", c, (8,), 3 * spread, False, False)
        level *= r
        planes.append(Plane(c, level, 1e-3))
        conv = _conv(rng, c * r * r, 3, c, shape.stage_act, spread, site, 0)
        steps.append(Layer(source, len(planes) - 1, conv, shuffle=r))
        source = len(planes) - 1
    site = _site(rng, "tail", c, (8,), 3 * spread, shape.stage_act == "relu", False)
    planes.append(Plane(shape.colors, level, 1e-4))
    steps.append(
        Layer(source, len(planes) - 1, _conv(rng, shape.colors, shape.tail, c, "none", 6000.0, site, 0))
    )
    value = np.tanh(np.arange(-32768, 32768) / 12000) * 0.5 + 0.5
    tables = np.rint(value * 255).astype(np.uint8), np.rint(value * 65535).astype(np.uint16)
    steps.append(ImageOut(len(planes) - 1, *tables))
    return Plan(scale, shape.tile, tuple(planes), tuple(steps)).validate()


def random_picture(height: int, width: int, seed: int = 0, dtype: type = np.uint8, colors: int = 3) -> Array:
    """A picture ``(height, width, colors)``, half noise, half almost flat."""
    rng = np.random.default_rng(seed)
    top = int(np.iinfo(dtype).max) + 1
    image: Array = rng.integers(0, top, (height, width, colors), dtype=dtype)
    image[:, width // 2 :] = image[:, width // 2 :] // 16 + top // 3
    return image
