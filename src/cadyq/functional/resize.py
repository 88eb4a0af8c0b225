"""MATLAB's bicubic ``imresize``, to the last bit: how every low-resolution benchmark picture is made.

The rules, checked against released low-resolution files: cubic kernel with a = -0.5, stretched by the
factor when shrinking (antialiasing) and plain when enlarging; the axis with the smaller factor first, rows
first when the factors are equal; integer pictures are rounded half up and clipped *between the two passes*.
Other bicubic resizers differ by up to 13 gray levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError

__all__ = ["Border", "cubic", "downscale", "imresize", "imresize_rows", "mod_crop", "resized_strips"]

Border: TypeAlias = Literal["symmetric", "replicate"]
Pixels = TypeVar("Pixels", bound=np.generic)

_KERNEL_WIDTH = 4.0
_BLOCK_BYTES = 1 << 20


def imresize(
    image: NDArray[Pixels], size: float | tuple[int, int], border: Border = "symmetric"
) -> NDArray[Pixels]:
    """Resize a picture as MATLAB's ``imresize(image, size, "bicubic")`` does.

    Args:
        image: ``(H, W)`` or ``(H, W, C)``; uint8 and uint16 are rounded half up and clipped after each of
            the two passes; float32 and float64 are neither rounded nor clipped, so their range is kept
            (up to the overshoot of the kernel).
        size: a factor (the result measures ``ceil(factor * H)`` by ``ceil(factor * W)``), or the result's
            ``(height, width)`` in pixels.
        border: what lies beyond the edge: ``"symmetric"`` mirrors it (MATLAB since R2008, DIV2K's files),
            ``"replicate"`` repeats it (older MATLAB, the released Urban100 files).

    Returns:
        The resized picture, of the input's dtype.

    Raises:
        ArgumentError: for another dtype, number of axes, border, or an impossible size.
    """
    check_picture("image", image)
    height = _target(image.shape[:2], size)[0][0]
    return imresize_rows(image, 0, image.shape[0], size, (0, height), border)


def imresize_rows(
    part: NDArray[Pixels],
    top: int,
    height: int,
    size: float | tuple[int, int],
    rows: tuple[int, int],
    border: Border = "symmetric",
) -> NDArray[Pixels]:
    """Compute some rows of `imresize`, equal to the last bit, from a part of the picture.

    Args:
        part: rows of the picture from ``top`` on, as many as the wanted rows depend on.
        top: where ``part`` begins in the picture.
        height: of the whole picture.
        size: of the whole result, as in `imresize`.
        rows: first and last (not included) row of the result that are wanted.
        border: as in `imresize`.

    Raises:
        ArgumentError: as `imresize` does, or rows of the picture are missing.
    """
    check_picture("image", part)
    if part.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise ArgumentError("image.dtype", str(part.dtype), "uint8, uint16, float32 or float64")
    if border not in get_args(Border):
        raise ArgumentError("border", border, f"one of {get_args(Border)}")
    whole = (height, part.shape[1])
    shape, factors = _target(whole, size)
    result = part
    for axis in sorted((0, 1), key=lambda axis: factors[axis]):
        weights, indices = _contributions(whole[axis], shape[axis], factors[axis], border)
        if axis == 0:
            weights, indices = weights[slice(*rows)], indices[slice(*rows)] - top
            if indices.size and (indices.min() < 0 or indices.max() >= len(part)):
                raise ArgumentError("part", part.shape, f"all rows that rows {rows} of the result depend on")
        result = np.swapaxes(_resample_rows(np.swapaxes(result, 0, axis), weights, indices), 0, axis)
    return np.ascontiguousarray(result)


def resized_strips(
    strips: Iterable[NDArray[Pixels]], height: int, size: tuple[int, int]
) -> Iterator[NDArray[Pixels]]:
    """Resize a picture that comes in strips, top to bottom; joined, the results equal `imresize`'s.

    Args:
        strips: ``(rows, W, C)`` each, ``height`` rows in all.
        height: of the whole picture.
        size: ``(height, width)`` of the whole result.
    """
    _, indices = _contributions(height, size[0], size[0] / height, "symmetric")
    first = np.minimum.accumulate(indices.min(axis=1)[::-1])[::-1]
    needed = np.maximum.accumulate(indices.max(axis=1)) + 1
    kept: list[NDArray[Pixels]] = []
    top = done = available = 0
    for strip in strips:
        kept.append(strip)
        available += len(strip)
        ready = int(np.searchsorted(needed, available, side="right"))
        if ready > done:
            part = np.concatenate(kept)
            yield imresize_rows(part, top, height, size, (done, ready))
            done = ready
            if done < size[0]:
                kept, top = [part[first[done] - top :]], int(first[done])


def mod_crop(image: NDArray[Pixels], multiple: int) -> NDArray[Pixels]:
    """Cut rows below and columns at the right until both sides are multiples of ``multiple`` pixels.

    ``image`` is ``(H, W)`` or ``(H, W, C)``; the result is a view. Raises `ArgumentError` if nothing is left.
    """
    check_picture("image", image)
    if multiple < 1:
        raise ArgumentError("multiple", multiple, "a positive integer")
    height, width = image.shape[0] // multiple * multiple, image.shape[1] // multiple * multiple
    if not height or not width:
        raise ArgumentError("image.shape", image.shape, f"at least {multiple} pixels a side")
    return image[:height, :width]


def downscale(hr: NDArray[Pixels], scale: int, border: Border = "symmetric") -> NDArray[Pixels]:
    """Make the low-resolution picture of a benchmark: `mod_crop`, then `imresize` by ``1 / scale``.

    ``hr`` is ``(H, W)`` or ``(H, W, C)``, the result ``(H // scale, W // scale[, C])`` of the same dtype.
    Raises `ArgumentError` as `mod_crop` and `imresize` do.
    """
    cropped = mod_crop(hr, scale)
    return imresize(cropped, (cropped.shape[0] // scale, cropped.shape[1] // scale), border)


def check_picture(name: str, image: NDArray[Any]) -> None:
    """Refuse an array that is not a non-empty ``(H, W)`` or ``(H, W, C)`` picture."""
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ArgumentError(f"{name}.shape", image.shape, "a non-empty (H, W) or (H, W, C)")


def _target(
    shape: tuple[int, ...], size: float | tuple[int, int]
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Turn a factor or a size into the result's size and one factor per axis."""
    height, width = shape
    if isinstance(size, tuple):
        if len(size) != 2 or min(size) < 1:
            raise ArgumentError("size", size, "(height, width) of at least one pixel each")
        return (int(size[0]), int(size[1])), (size[0] / height, size[1] / width)
    if not (math.isfinite(size) and size > 0):
        raise ArgumentError("size", size, "a positive factor or (height, width)")
    return (math.ceil(size * height), math.ceil(size * width)), (float(size), float(size))


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic kernel with a = -0.5, of distances in source pixels."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _contributions(
    n_in: int, n_out: int, factor: float, border: Border
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the weights and source indices of each output position, both ``(n_out, taps)``."""
    shrink = min(factor, 1.0)
    width = _KERNEL_WIDTH / shrink
    # MATLAB counts from one; its own expressions are kept, because ties in the rounding hang on the last bit.
    center = np.arange(1, n_out + 1) / factor + 0.5 * (1 - 1 / factor)
    indices = np.floor(center - width / 2)[:, None] + np.arange(math.ceil(width) + 2)
    weights = shrink * cubic(shrink * (center[:, None] - indices))
    weights /= weights.sum(axis=1, keepdims=True)
    source = indices.astype(np.intp) - 1
    if border == "symmetric":
        source %= 2 * n_in
        source = np.minimum(source, 2 * n_in - 1 - source)
    else:
        source = source.clip(0, n_in - 1)
    used = weights.any(axis=0)
    return weights[:, used], source[:, used]


def _resample_rows(
    image: NDArray[Pixels], weights: NDArray[np.floating[Any]], indices: NDArray[np.intp]
) -> NDArray[Pixels]:
    """Weigh and add whole rows of ``image``; the result has ``len(weights)`` rows."""
    # Contiguous rows make the gather a few large copies; a block of rows keeps the double sums in cache.
    rows = np.ascontiguousarray(image)
    tail = rows.shape[1:]
    rows = rows.reshape(rows.shape[0], -1)
    result = np.empty_like(rows, shape=(len(weights), rows.shape[1]))
    # Enlarging by 2, 4, ... has weights in 1/1024: sums of such multiples of a byte are exact in float32.
    if rows.dtype == np.uint8 and (weights * 1024 == np.rint(weights * 1024)).all():
        weights = weights.astype(np.float32)
    block = max(1, _BLOCK_BYTES // (weights.itemsize * rows.shape[1]))
    for start in range(0, len(weights), block):
        part = slice(start, start + block)
        total = np.zeros((len(weights[part]), rows.shape[1]), weights.dtype)
        # Tap after tap, as MATLAB adds them: another order changes ties at factor 1/3.
        for weight, index in zip(weights[part].T, indices[part].T, strict=True):
            total += weight[:, None] * rows[index]
        if np.issubdtype(rows.dtype, np.integer):
            total = np.floor(total + 0.5).clip(0, np.iinfo(rows.dtype).max)
        result[part] = total
    return result.reshape(len(weights), *tail)
