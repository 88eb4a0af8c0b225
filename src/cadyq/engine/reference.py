"""Executes a plan in NumPy. This is the specification: native kernels are equal to it bit for bit.

Equation numbers refer to ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    Site,
    Skip,
)
from cadyq.engine.plan_check import MULTIPLIER_LIMIT
from cadyq.errors import ArgumentError
from cadyq.functional.image import GRAY_65536
from cadyq.functional.logarithm import logarithm

__all__ = ["Result", "check_image", "check_masks", "gradients", "run", "tile_grid"]


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
    grey = (x * GRAY_65536).sum(axis=2) if channels == 3 else x[:, :, 0] * 65536
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


def accumulate(codes: Array, weight: Array, groups: int = 1) -> Array:
    """Valid convolution of int64 codes ``(H, W, C)``, exact; equation (5).

    float64 holds every partial sum exactly: the bound (6) is far below 2^53.
    """
    if groups > 1:
        pairs = zip(np.split(codes, groups, axis=2), np.split(weight, groups), strict=True)
        return np.concatenate([accumulate(x, w) for x, w in pairs], axis=2)
    k = weight.shape[1]
    height, width = codes.shape[0] - k + 1, codes.shape[1] - k + 1
    x, w = codes.astype(np.float64), weight.astype(np.float64)
    acc = np.zeros((height * width, weight.shape[0]))
    for i in range(k):
        for j in range(k):
            acc += x[i : i + height, j : j + width].reshape(height * width, -1) @ w[:, i, j].T
    return acc.astype(np.int64).reshape(height, width, -1)


def finish(acc: Array, conv: Conv, k: int) -> Array:
    """Accumulators to int16 values on the target's grid (int64); equations (7) and (14)."""
    t = acc.astype(np.int32).astype(np.float32) * conv.factor[k]
    t = t + conv.bias
    if conv.slope is not None:
        t = np.where(t < 0, t * conv.slope, t)
    r = np.rint(t)
    if conv.requant is not None:
        levels = np.float32(conv.requant.levels)
        r = np.rint(np.clip(r, -levels, levels).astype(np.float32) * conv.requant.gain)
    return clamp16(r).astype(np.int64)


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


def concatenated(parts: tuple[Part, ...], planes: Mapping[int, Array]) -> Array:
    """Channels of several planes one after another."""
    return np.concatenate([planes[p.plane][:, :, p.first : p.first + p.channels] for p in parts], axis=2)


def own_range(site: Site, inner: Array) -> np.float64:
    """The clip of a tile that takes its own range, in units of its plane; equation (15)."""
    assert site.inverse_scale is not None
    largest = np.abs(inner.astype(np.int64)).max(axis=(0, 1)).astype(np.float64) * site.inverse_scale
    return np.float64(largest.max() or 1.0)


def with_own_range(conv: Conv, inner: Array) -> Conv:
    """The convolution with the multipliers and factors that the tile's own range gives; equation (15)."""
    site = conv.site
    if site is None or site.inverse_scale is None:
        return conv
    clip, levels = own_range(site, inner), np.maximum(site.high, 1).astype(np.float64)[:, None]
    multiplier = np.minimum(levels * site.inverse_scale / clip, MULTIPLIER_LIMIT).astype(np.float32)
    own = replace(site, multiplier=multiplier)
    return replace(conv, factor=in_own_range(conv.factor, site, clip), site=own)


def in_own_range(factor: Array, site: Site, clip: np.float64) -> Array:
    """Factors (K, C) of codes whose clip is the tile's own range; equation (15)."""
    levels = np.maximum(site.high, 1).astype(np.float64)[:, None]
    scaled: Array = (factor.astype(np.float64) * clip / levels).astype(np.float32)
    return scaled


def skipped(skip: Skip, value: Array, site: Site | None, k: int) -> Array:
    """What is added to a result, on the target's grid (int64); equation (14)."""
    codes = value.astype(np.int64) if site is None else quantize(value, site, k)
    if skip.ratio is None:
        return codes
    return clamp16(np.rint(codes.astype(np.float32) * skip.ratio[k])).astype(np.int64)


def add_skip(layer: Layer, result: Array, addend: Array | None) -> Array:
    """Sum and rectification of a layer's result (int64)."""
    if addend is not None:
        result = clamp16(addend + result)
    return np.maximum(result, 0) if layer.rectify else result


def run_layer(layer: Layer, planes: Mapping[int, Array]) -> Array:
    """A convolution over a whole plane, zero padding."""
    src, conv, pad = concatenated(layer.src, planes), layer.conv, layer.conv.kernel // 2
    codes = src.astype(np.int64) if conv.site is None else quantize(src, conv.site, 0)
    codes = np.pad(codes, ((pad, pad), (pad, pad), (0, 0)))
    result = finish(accumulate(codes, conv.weight, conv.groups), conv, 0)
    if layer.borders is not None:
        _borders(layer.borders, codes, conv, result)
    addend = None
    if layer.skip is not None:
        addend = skipped(layer.skip, concatenated(layer.skip.parts, planes), layer.skip.site, 0)
    return add_skip(layer, shuffle(result, layer.shuffle), addend).astype(np.int16)


def _borders(borders: Borders, codes: Array, conv: Conv, result: Array) -> None:
    """Replace the results of the outermost pixels by those of their own weights; section 7."""
    height, width, margin = result.shape[0], result.shape[1], conv.kernel - 1

    def cases(n: int) -> list[tuple[int, slice]]:
        if n == 1:
            return [(3, slice(0, 1))]
        return [(0, slice(1, n - 1)), (1, slice(0, 1)), (2, slice(n - 1, n))]

    for row, ys in cases(height):
        for col, xs in cases(width):
            if (row or col) and ys.stop > ys.start and xs.stop > xs.start:
                i = 4 * row + col - 1
                window = codes[ys.start : ys.stop + margin, xs.start : xs.stop + margin]
                own = replace(conv, weight=borders.weight[i], bias=borders.bias[i])
                result[ys, xs] = finish(accumulate(window, own.weight, conv.groups), own, 0)


def _window(plane: Array, y0: int, x0: int, y1: int, x1: int) -> Array:
    """Part of a plane that may reach beyond it; zero outside."""
    height, width = plane.shape[:2]
    inside = plane[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
    pads = ((max(-y0, 0), max(y1 - height, 0)), (max(-x0, 0), max(x1 - width, 0)), (0, 0))
    return np.pad(inside, pads)


def _middle(value: Array, margin: int) -> Array:
    return value[margin : value.shape[0] - margin, margin : value.shape[1] - margin]


def run_tile(
    block: Block, src: Array, box: tuple[int, int, int, int], gradient: Array, forced: Array
) -> tuple[Array | None, list[int]]:
    """One tile of a block: its new values, or None if skipped, and the chosen candidates; section 5."""
    y0, x0, y1, x1 = box
    height, width = src.shape[:2]
    reach = block.reach()
    halo = reach[block.src]
    # Values of the tile and around it, by plane: as far as they are needed.
    values = {block.src: _window(src, y0 - halo, x0 - halo, y1 + halo, x1 + halo)}
    chosen: list[int] = []
    first, first_site, clip = 0, block.layers[0].conv.site, None
    for i, layer in enumerate(block.layers):
        conv, last = layer.conv, i + 1 == len(block.layers)
        assert conv.site is not None
        out = 0 if last else reach.get(layer.dst, 0)
        around = {
            p.plane: _middle(values[p.plane], reach[p.plane] - out - conv.kernel // 2) for p in layer.src
        }
        value = concatenated(layer.src, around)
        inner = _middle(value, out + conv.kernel // 2)
        k = 0
        if conv.site.kind == "body":
            wish = int(forced[len(chosen)])
            k = wish if wish >= 0 else select(conv.site, gradient, inner)
            chosen.append(k)
        if conv.site.bits[k] == 0:
            return None, chosen + [-1] * (len(forced) - 1)
        conv = with_own_range(conv, inner)
        assert conv.site is not None
        if i == 0:
            first, first_site = k, conv.site
            clip = None if conv.site.inverse_scale is None else own_range(conv.site, inner)
        result = finish(accumulate(quantize(value, conv.site, k), conv.weight, conv.groups), conv, k)
        addend = None
        if layer.skip is not None:
            skip = layer.skip
            near = {p.plane: _middle(values[p.plane], reach[p.plane] - out) for p in skip.parts}
            value = concatenated(skip.parts, near)
            if skip.shared and skip.ratio is not None and clip is not None and first_site is not None:
                skip = replace(skip, ratio=in_own_range(skip.ratio, first_site, clip))
            addend = skipped(skip, value, *((first_site, first) if skip.shared else (skip.site, 0)))
        result = add_skip(layer, result, addend)
        ys, xs = np.arange(y0 - out, y1 + out), np.arange(x0 - out, x1 + out)
        result[(ys < 0) | (ys >= height)] = 0
        result[:, (xs < 0) | (xs >= width)] = 0
        values[layer.dst] = result.astype(np.int16)
    return values[block.dst], chosen


def bicubic(base: Bicubic, image: Array) -> Array:
    """The enlarged image on the last plane's grid (int64); equation (16)."""
    scale = base.weight.shape[0]

    def enlarged(x: Array, axis: int) -> Array:
        n = x.shape[axis]
        index = np.arange(-2, n + 2)
        if base.symmetric:
            index = index % (2 * n)
            index = np.minimum(index, 2 * n - 1 - index)
        else:
            index = np.clip(index, 0, n - 1)
        taps = [np.take(x, index[i : i + n], axis) for i in range(5)]
        phases = [sum(int(w) * tap for w, tap in zip(row, taps, strict=True)) for row in base.weight]
        return np.stack(phases, axis + 1).reshape(*x.shape[:axis], n * scale, *x.shape[axis + 1 :])

    total = enlarged(enlarged(image.astype(np.int64), 0), 1)
    gain = base.gain8 if image.dtype == np.uint8 else base.gain16
    return clamp16(np.rint(total.astype(np.float64) * gain)).astype(np.int64)


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
            sites = [layer.conv.site for layer in step.layers]
            body = [site for site in sites if site is not None and site.kind == "body"]
            here = slice(first_site, first_site + len(body))
            for r, c in np.argwhere(~gone):
                y0, x0 = r * plan.tile, c * plan.tile
                box = (y0, x0, min(y0 + plan.tile, height), min(x0 + plan.tile, width))
                value_or_none, chosen = run_tile(step, src, box, gradient[r, c], forced[r, c, here])
                if value_or_none is not None:
                    dst[box[0] : box[2], box[1] : box[3]] = value_or_none
                    bits[r, c, here] = [site.bits[k] for site, k in zip(body, chosen, strict=True)]
                picked[r, c, here] = chosen
            planes[step.dst] = dst
            first_site += len(body)
        elif isinstance(step, ImageOut):
            value = planes[step.src].astype(np.int64)
            if step.base is not None:
                value = clamp16(value + bicubic(step.base, image))
            table = step.table8 if image.dtype == np.uint8 else step.table16
            out = table[value + 32768]
            side = plan.tile * plan.scale
            for r, c in np.argwhere(gone):
                out[r * side : (r + 1) * side, c * side : (c + 1) * side] = 0
            return Result(out, bits, picked)
    raise AssertionError("a validated plan ends with an image output")
