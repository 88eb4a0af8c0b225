"""Mild damage as users' pictures have it: slight blur, slight noise, JPEG. Made on the fly, from a seed.

A network trained on clean bicubic pictures takes JPEG blocks for detail and sharpens them; one that has seen them
learns to leave them out. The order is a camera's: lens, sensor, file.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cadyq.errors import ArgumentError

__all__ = ["JPEG_QUALITY", "degrade", "through_jpeg"]

JPEG_QUALITY = (60, 95)
"""Lowest and highest quality, both included."""

_CLEAN_SHARE = 0.15  # of the patches: a clean picture must stay one
_BLUR_SHARE, _NOISE_SHARE, _JPEG_SHARE = 0.4, 0.5, 0.85  # of the others, drawn independently
_BLUR = (0.2, 0.8)  # standard deviation, pixels
_NOISE = (0.5, 4.0)  # standard deviation, gray levels
_MCU = 16  # pixels: the largest block of a JPEG file, with halved chroma


def degrade(lr: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Damage low-resolution patches, each in its own way.

    Args:
        lr: uint8 RGB ``(N, H, W, 3)``; not changed.
        rng: decides everything: the same state gives the same result (with the same version of Pillow).

    Returns:
        uint8 RGB ``(N, H, W, 3)``; about 15 % of the patches are returned as they are.

    Raises:
        ArgumentError: for another shape or dtype.
    """
    if lr.dtype != np.uint8 or lr.ndim != 4 or lr.shape[-1] != 3 or 0 in lr.shape:
        raise ArgumentError("lr", (lr.shape, str(lr.dtype)), "a non-empty uint8 (N, H, W, 3)")
    return np.stack([_degrade(patch, rng) for patch in lr])


def through_jpeg(
    image: NDArray[np.uint8], quality: int, subsampling: str = "4:2:0", phase: tuple[int, int] = (0, 0)
) -> NDArray[np.uint8]:
    """Return uint8 RGB ``(H, W, 3)`` as it comes back from a JPEG file.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        quality: 1 to 95, as Pillow and libjpeg count it.
        subsampling: of chroma, "4:2:0" or "4:4:4".
        phase: rows and columns, 0 to 15, by which the grid of blocks lies outside the picture.
    """
    top, left = phase
    padded = np.pad(image, ((top, 0), (left, 0), (0, 0)), "symmetric")
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file) as decoded:
        return np.asarray(decoded.convert("RGB"))[top:, left:]


def _degrade(patch: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    if rng.random() < _CLEAN_SHARE:
        return patch
    if rng.random() < _BLUR_SHARE:
        blur = ImageFilter.GaussianBlur(rng.uniform(*_BLUR))
        patch = np.asarray(Image.fromarray(patch).filter(blur))
    if rng.random() < _NOISE_SHARE:
        noise = rng.normal(0.0, rng.uniform(*_NOISE), patch.shape)
        patch = np.rint(patch + noise).clip(0, 255).astype(np.uint8)
    if rng.random() < _JPEG_SHARE:
        low, high = JPEG_QUALITY
        quality = int(rng.integers(low, high, endpoint=True))
        subsampling = "4:2:0" if rng.random() < 0.5 else "4:4:4"
        # A patch is a piece of a picture: blocks need not begin at its corner, where the padding is.
        limit = min(_MCU, *patch.shape[:2])
        row, column = rng.integers(limit, size=2).tolist()
        patch = through_jpeg(patch, quality, subsampling, (row, column))
    return patch
