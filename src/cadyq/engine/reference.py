"""Executes a plan in NumPy. This is the specification: native kernels are equal to it bit for bit.

Equation numbers refer to ``docs/numerics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import Block, Conv, ImageIn, ImageOut, Layer, Plan, Site
from cadyq.errors import ArgumentError

__all__ = ["Result", "check_image", "check_masks", "gradients", "run", "tile_grid"]

Array = NDArray[Any]
SQRT_HALF, LN2 = 0.7071067811865476, 0.6931471805599453
LUMA = np.array([19595, 38470, 7471], np.int64)  # BT.601 in 1/65536; equation (1).


@dataclass(frozen=True)
class Result:
    """What an engine returns.

    ``image`` is ``(scale*H, scale*W, C)`` in the input's type, zero where tiles exited.
    ``bits`` is uint8 ``(rows, columns, sites)``,
    ``choice`` int8 of the same shape: the chosen candidate's index, -1 where a tile was not computed.
    """

    image: Array
    bits: Array
    choice: Array


def tile_grid(height: int, width: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles; the last ones may be smaller."""
    return -(-height // tile), -(-width // tile)


def check_image(plan: Plan, image: Array) -> None:
    """Raise `ArgumentError` unless the image is uint8 or uint16 ``(H, W, C)`` with the plan's channels."""
    first = plan.steps[0]
    assert isinstance(first, ImageIn)
    channels = plan.planes[first.dst].channels
    ok = isinstance(image, np.ndarray) and image.dtype in (np.uint8, np.uint16) and image.ndim == 3
    if not ok or image.shape[2] != channels or 0 in image.shape:
        found = (getattr(image, "dtype", type(image).__name__), getattr(image, "shape", None))
        raise ArgumentError("image", found, f"uint8 or uint16 (H, W, {channels})")


def check_masks(plan: Plan, image: Array, choice: Array | None, exited: Array | None) -> tuple[Array, Array]:
    """Forced choices (int8, -1 = free) and exited tiles (bool), both complete; raises `ArgumentError`."""
    rows, cols = tile_grid(image.shape[0], image.shape[1], plan.tile)
    sites = plan.sites
    forced = np.full((rows, cols, len(sites)), -1, np.int8)
    if choice is not None:
        if choice.shape != forced.shape or choice.dtype.kind != "i":
            raise ArgumentError("choice", (choice.dtype, choice.shape), f"integers of shape {forced.shape}")
        limit = np.array([len(s.bits) for s in sites])
        if choice.size and ((choice < -1).any() or (choice >= limit).any()):
            raise ArgumentError(
                "choice", (int(choice.min()), int(choice.max())), "candidate indices, -1 for free"
            )
        forced[:] = choice
    gone = np.zeros((rows, cols), bool)
    if exited is not None:
        if exited.shape != gone.shape or exited.dtype != bool:
            raise ArgumentError("exited", (exited.dtype, exited.shape), f"bool of shape {gone.shape}")
        gone[:] = exited
    return forced, gone


def gradients(image: Array, tile: int) -> Array:
    """Mean absolute Sobel derivatives of the grey image in [0, 1], per tile: ``(rows, columns, 2)``; (1)."""
    height, width, channels = image.shape
    x = image.astype(np.int64)
    grey = (x * LUMA).sum(axis=2) if channels == 3 else x[:, :, 0] * 65536
    p = np.pad(grey, 1, mode="edge")
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    dx, dy = smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]
    rows, cols = tile_grid(height, width, tile)
    out = np.zeros((rows, cols, 2))
    unit = np.float64(8 * 65536) * np.float64(np.iinfo(image.dtype).max)
    for r in range(rows):
        for c in range(cols):
            area = np.s_[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile]
            n = np.float64(dx[area].size)
            out[r, c] = [np.float64(np.abs(d[area]).sum()) / (unit * n) for d in (dx, dy)]
    return out


def clamp16(x: Array) -> Array:
    """Clamp to the int16 range."""
    clamped: Array = np.clip(x, -32768, 32767)
    return clamped


def quantize(plane: Array, site: Site, k: int) -> Array:
    """Codes of an int16 plane, int64; equation (4)."""
    scaled = plane.astype(np.float32) * site.multiplier[k]
    codes: Array = np.clip(np.rint(scaled), site.low[k], site.high[k]).astype(np.int64)
    return codes


def accumulate(codes: Array, weight: Array) -> Array:
    """Valid convolution of int64 codes ``(H, W, C)``, exact; equation (5).

    float64 holds every partial sum exactly: the bound (6) is far below 2^53.
    """
    k = weight.shape[1]
    height, width = codes.shape[0] - k + 1, codes.shape[1] - k + 1
    x, w = codes.astype(np.float64), weight.astype(np.float64)
    acc = np.zeros((height * width, weight.shape[0]))
    for i in range(k):
        for j in range(k):
            acc += x[i : i + height, j : j + width].reshape(height * width, -1) @ w[:, i, j].T
    return acc.astype(np.int64).reshape(height, width, -1)


def finish(acc: Array, conv: Conv, k: int) -> Array:
    """Accumulators to int16 values on the target's grid (int64); equation (7)."""
    t = acc.astype(np.int32).astype(np.float32) * conv.factor[k]
    t = t + conv.bias
    if conv.slope is not None:
        t = np.where(t < 0, t * conv.slope, t)
    return clamp16(np.rint(t)).astype(np.int64)


def deviations(plane: Array, step: float) -> Array:
    """Unbiased standard deviations of the channels of an int16 plane from exact sums; equation (9)."""
    v = plane.reshape(-1, plane.shape[2]).astype(np.int64)
    n = v.shape[0]
    if n == 1:
        return np.zeros(v.shape[1])
    s1, s2 = v.sum(axis=0), (v * v).sum(axis=0)
    deviation: Array = np.sqrt((n * s2 - s1 * s1).astype(np.float64) / np.float64(n * (n - 1))) * np.float64(
        step
    )
    return deviation


def logarithm(x: Array) -> Array:
    """Natural logarithm of positive float64 values in a fixed order of operations; equation (11).

    The libraries' own may differ in the last bit from machine to machine, and with it a choice.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < SQRT_HALF
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    exponent = exponent - small
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.full_like(t, 1.0 / 21.0)
    for k in range(19, 0, -2):
        series = series * square + 1.0 / k
    result: Array = exponent * LN2 + (t + t) * series
    return result


def select(site: Site, gradient: Array, plane: Array) -> int:
    """Index of the chosen candidate; sums run from left to right; equation (10)."""
    if site.selector is None:
        return 0
    x = np.concatenate([gradient, deviations(plane, site.step)])
    if site.selector.log_offset > 0:
        x = logarithm(x + site.selector.log_offset)
    terms = np.concatenate([site.selector.bias[:, None], site.selector.weight * x], axis=1)
    return int(np.argmax(np.add.accumulate(terms, axis=1)[:, -1]))


def shuffle(plane: Array, r: int) -> Array:
    """PixelShuffle with input channels ordered (row, column, channel)."""
    height, width, channels = plane.shape
    c = channels // (r * r)
    return plane.reshape(height, width, r, r, c).transpose(0, 2, 1, 3, 4).reshape(height * r, width * r, c)


def run_layer(step: Layer, planes: dict[int, Array]) -> Array:
    """A convolution over a whole plane, zero padding."""
    src, pad = planes[step.src], step.conv.kernel // 2
    codes = src.astype(np.int64) if step.conv.site is None else quantize(src, step.conv.site, 0)
    codes = np.pad(codes, ((pad, pad), (pad, pad), (0, 0)))
    out = shuffle(finish(accumulate(codes, step.conv.weight), step.conv, 0), step.shuffle)
    if step.residual is not None:
        out = clamp16(planes[step.residual].astype(np.int64) + out)
    return out.astype(np.int16)


def _window(plane: Array, y0: int, x0: int, y1: int, x1: int) -> Array:
    """Part of a plane that may reach beyond it; zero outside."""
    height, width = plane.shape[:2]
    inside = plane[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
    pads = ((max(-y0, 0), max(y1 - height, 0)), (max(-x0, 0), max(x1 - width, 0)), (0, 0))
    return np.pad(inside, pads)


def run_tile(
    block: Block, src: Array, box: tuple[int, int, int, int], gradient: Array, forced: Array
) -> tuple[Array | None, list[int]]:
    """One tile of a block: its new values, or None if skipped, and the chosen candidates; section 5."""
    y0, x0, y1, x1 = box
    height, width = src.shape[:2]
    halo = sum(c.kernel // 2 for c in block.convs)
    value = _window(src, y0 - halo, x0 - halo, y1 + halo, x1 + halo)
    chosen: list[int] = []
    for i, conv in enumerate(block.convs):
        assert conv.site is not None
        inner = value[halo : value.shape[0] - halo, halo : value.shape[1] - halo]
        k = int(forced[i]) if forced[i] >= 0 else select(conv.site, gradient, inner)
        if conv.site.bits[k] == 0:
            return None, [k] + [-1] * (len(block.convs) - 1)
        chosen.append(k)
        value = finish(accumulate(quantize(value, conv.site, k), conv.weight), conv, k)
        halo -= conv.kernel // 2
        ys, xs = np.arange(y0 - halo, y1 + halo), np.arange(x0 - halo, x1 + halo)
        value[(ys < 0) | (ys >= height)] = 0
        value[:, (xs < 0) | (xs >= width)] = 0
    if block.residual:
        value = clamp16(src[y0:y1, x0:x1].astype(np.int64) + value)
    return value.astype(np.int16), chosen


def run(plan: Plan, image: Array, choice: Array | None = None, exited: Array | None = None) -> Result:
    """Execute a plan on an image.

    ``choice`` forces candidates (int8 ``(rows, columns, sites)``, -1 leaves the choice to the selector);
    ``exited`` (bool ``(rows, columns)``) marks tiles that no block computes and that stay zero in the
    image, for the caller to fill. Raises `ArgumentError`.
    """
    check_image(plan, image)
    forced, gone = check_masks(plan, image, choice, exited)
    height, width = image.shape[:2]
    gradient = gradients(image, plan.tile)
    picked = np.full(forced.shape, -1, np.int8)
    bits = np.zeros(forced.shape, np.uint8)
    planes: dict[int, Array] = {}
    first_site = 0
    for step in plan.steps:
        if isinstance(step, ImageIn):
            multiplier = step.multiplier8 if image.dtype == np.uint8 else step.multiplier16
            value = image.astype(np.float32) * multiplier + step.offset
            planes[step.dst] = clamp16(np.rint(value)).astype(np.int16)
        elif isinstance(step, Layer):
            planes[step.dst] = run_layer(step, planes)
        elif isinstance(step, Block):
            src = planes[step.src]
            dst = (
                src.copy()
                if step.residual
                else np.zeros((height, width, plan.planes[step.dst].channels), np.int16)
            )
            here = slice(first_site, first_site + len(step.convs))
            for r, c in np.argwhere(~gone):
                y0, x0 = r * plan.tile, c * plan.tile
                box = (y0, x0, min(y0 + plan.tile, height), min(x0 + plan.tile, width))
                value_or_none, chosen = run_tile(step, src, box, gradient[r, c], forced[r, c, here])
                if value_or_none is not None:
                    dst[box[0] : box[2], box[1] : box[3]] = value_or_none
                    site_bits = [
                        conv.site.bits[k] for conv, k in zip(step.convs, chosen, strict=True) if conv.site
                    ]
                    bits[r, c, here] = site_bits
                picked[r, c, here] = chosen
            planes[step.dst] = dst
            first_site += len(step.convs)
        elif isinstance(step, ImageOut):
            table = step.table8 if image.dtype == np.uint8 else step.table16
            out = table[planes[step.src].astype(np.int64) + 32768]
            side = plan.tile * plan.scale
            for r, c in np.argwhere(gone):
                out[r * side : (r + 1) * side, c * side : (c + 1) * side] = 0
            return Result(out, bits, picked)
    raise AssertionError("a validated plan ends with an image output")
