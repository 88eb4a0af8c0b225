"""How close a super-resolved picture comes to the original, by the benchmark protocol.

Both measures look at the unrounded Y of BT.601 (`cadyq.functional.image.luma`) of 8-bit pictures, after
``shave`` pixels (usually the scale) are cut from every side.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cadyq.errors import ArgumentError
from cadyq.functional.image import luma

__all__ = ["paired_bootstrap", "psnr_y", "ssim_y"]

_PEAK = 255.0
_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_STRIP = 128


def psnr_y(sr: NDArray[np.uint8], hr: NDArray[np.uint8], shave: int) -> float:
    """Return the PSNR of the Y channel in dB; infinite for equal pictures.

    Args:
        sr: the result, uint8 ``(H, W, 3)``.
        hr: the original, of the same shape.
        shave: pixels cut from every side.

    Raises:
        ArgumentError: if the shapes differ, or nothing is left after shaving.
    """
    error = _shaved_luma("sr", sr, hr, shave, 1) - _shaved_luma("hr", hr, sr, shave, 1)
    mse = float(np.mean(error * error))
    return math.inf if mse == 0 else 10 * math.log10(_PEAK * _PEAK / mse)


def ssim_y(sr: NDArray[np.uint8], hr: NDArray[np.uint8], shave: int) -> float:
    """Return the mean SSIM of the Y channel, in [-1, 1].

    An 11x11 Gaussian window (sigma 1.5), only where it lies fully inside; K1 = 0.01, K2 = 0.03, range 255.
    Source: Wang et al., IEEE TIP 2004, and the authors' ``ssim.m``.

    Args:
        sr: the result, uint8 ``(H, W, 3)``.
        hr: the original, of the same shape.
        shave: pixels cut from every side.

    Raises:
        ArgumentError: if the shapes differ, or less than 11x11 pixels are left after shaving.
    """
    x = _shaved_luma("sr", sr, hr, shave, _WINDOW)
    y = _shaved_luma("hr", hr, sr, shave, _WINDOW)
    n_rows = len(x) - _WINDOW + 1
    total: float = 0.0
    # Strip by strip: the five filtered planes of a 4K picture need not be in memory at once.
    for start in range(0, n_rows, _STRIP):
        rows = slice(start, min(start + _STRIP, n_rows) + _WINDOW - 1)
        total += float(_ssim_map(x[rows], y[rows]).sum())
    return float(total / (n_rows * (x.shape[1] - _WINDOW + 1)))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of ``a - b`` and the ends of its 95 % percentile-bootstrap interval.

    Args:
        a: one figure per picture, say the PSNR in dB of one network.
        b: the same pictures' figures of another network, in the same order.
        n_resamples: how often the pictures are drawn anew, with replacement.
        seed: of the drawing; equal seeds give equal intervals.

    Raises:
        ArgumentError: if ``a`` and ``b`` differ in length, are empty, or hold infinities or NaN.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ArgumentError("a, b", (first.shape, second.shape), "two equally long, non-empty lists")
    if n_resamples < 1:
        raise ArgumentError("n_resamples", n_resamples, "a positive integer")
    difference = first - second
    if not np.isfinite(difference).all():
        raise ArgumentError("a - b", difference, "finite figures", "leave out pictures with infinite PSNR")
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(difference, difference.size).mean() for _ in range(n_resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _shaved_luma(
    name: str, image: NDArray[np.uint8], other: NDArray[np.uint8], shave: int, smallest: int
) -> NDArray[np.float64]:
    if image.ndim != 3 or image.shape != other.shape:
        raise ArgumentError(f"{name}.shape", image.shape, f"(H, W, 3), equal to the other's {other.shape}")
    if shave < 0:
        raise ArgumentError("shave", shave, "zero or more pixels")
    height, width = image.shape[0] - 2 * shave, image.shape[1] - 2 * shave
    if min(height, width) < smallest:
        raise ArgumentError(
            f"{name}.shape", image.shape, f"at least {smallest}x{smallest} pixels after shaving {shave}"
        )
    return luma(image[shave : shave + height, shave : shave + width])


def _ssim_map(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    below = (mean_x * mean_x + mean_y * mean_y + _C1) * (var_x + var_y + _C2)
    return above / below


def _blur(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean at every position where the whole window fits; each axis loses 10 pixels."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    taps /= taps.sum()
    height, width = (n - _WINDOW + 1 for n in plane.shape)
    rows = sum(tap * plane[k : k + height] for k, tap in enumerate(taps))
    return np.asarray(sum(tap * rows[:, k : k + width] for k, tap in enumerate(taps)))
