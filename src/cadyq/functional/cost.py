"""What a network costs: MACs, BitOPs, feature quantization rate, overhead of cutting, energy.

All of these are counts by stated formulas; none of them is a time. Areas are in low-resolution pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cadyq.errors import ArgumentError
from cadyq.functional.tiling import Grid, published_patches

__all__ = [
    "PAPER_OVERHEAD",
    "ZeroShare",
    "bitops",
    "conv_macs",
    "energy_joules",
    "fqr",
    "grid_overhead",
    "tile_overhead",
    "zero_share",
]

PAPER_OVERHEAD = 326 / 320
"""The factor 1.0188 by which CADyQ's supplement (D.2, S5, S7) multiplies patch-wise costs at every size."""

_FLOAT_BITS = 32
_INT8_MULTIPLY_PJ = 0.2
_INT32_ADD_PJ = 0.1
_FLOAT_MULTIPLY_PJ = 3.7
_FLOAT_ADD_PJ = 0.9


class ZeroShare(NamedTuple):
    """How much was not computed; to be printed beside every FQR that counts zeros.

    Attributes:
        cells_with_any: share of the cells in which at least one site got 0 bits, in [0, 1].
        cells_with_all: share of the cells in which every site got 0 bits (they left the network), in [0, 1].
        entries: share of all (cell, site) pairs with 0 bits, in [0, 1].
    """

    cells_with_any: float
    cells_with_all: float
    entries: float


def conv_macs(height: int, width: int, c_in: int, c_out: int, kernel: int, groups: int = 1) -> int:
    """Return the multiply-accumulates of a convolution with ``height`` x ``width`` outputs per channel.

    Border taps on zero padding are counted, as is usual. Raises `ArgumentError` if a number is not positive
    or ``groups`` does not divide both channel counts.
    """
    sizes = {"height": height, "width": width, "c_in": c_in, "c_out": c_out, "kernel": kernel}
    for name, value in {**sizes, "groups": groups}.items():
        if value < 1:
            raise ArgumentError(name, value, "a positive integer")
    if c_in % groups or c_out % groups:
        raise ArgumentError("groups", groups, f"a divisor of both {c_in} and {c_out} channels")
    return height * width * c_in * c_out * kernel * kernel // groups


def bitops(macs: ArrayLike, weight_bits: ArrayLike, activation_bits: ArrayLike) -> float:
    """Return BitOPs: two operations per MAC, each operand weighted by its bits / 32, summed.

    The three arguments broadcast, so that one call covers patches times sites; 32 bits stand for float.
    Source: CADyQ supplement, D.1. Raises `ArgumentError` for a negative number.
    """
    n_macs, weights, inputs = _counts(macs, weight_bits, activation_bits)
    return float(np.sum(2 * n_macs * (weights / _FLOAT_BITS) * (inputs / _FLOAT_BITS)))


def fqr(bits: ArrayLike, areas: ArrayLike | None = None) -> float:
    """Return the feature quantization rate: the mean bit-width over sites, then over patches.

    Args:
        bits: ``(patches, sites)``; one bit-width each, 0 for what was not computed.
        areas: ``(patches,)`` in pixels; with it, patches count by their area, without it equally (the paper).

    Raises:
        ArgumentError: for another shape, a negative number, or areas that add up to nothing.
    """
    widths = _bit_table(bits)
    return float(np.average(widths.mean(axis=1), weights=_weights(areas, len(widths))))


def zero_share(bits: ArrayLike, areas: ArrayLike | None = None) -> ZeroShare:
    """Return the shares of cells that got 0 bits; arguments and errors as of `fqr`."""
    zero = _bit_table(bits) == 0
    shares = np.stack([zero.any(axis=1), zero.all(axis=1), zero.mean(axis=1)])
    return ZeroShare(*np.average(shares, axis=1, weights=_weights(areas, len(zero))).tolist())


def grid_overhead(height: int, width: int, size: int = 96, step: int = 90) -> float:
    """Return computed over needed pixels for the released reference's patches (`published_patches`).

    1.0375 at 320x180 and 1.103 at 960x540, where the supplement always says 1.0188 (`PAPER_OVERHEAD`).
    """
    boxes = published_patches(height, width, size, step).read
    return float(_expanded_area(boxes, 0, height, width) / (height * width))


def tile_overhead(height: int, width: int, tile: int, rings: Sequence[int] = (1, 0)) -> float:
    """Return computed over needed MACs when blocks of convolutions are evaluated tile by tile.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        tile: side of a tile, in pixels.
        rings: one entry per convolution of a block, all of equal cost: the pixels beyond the tile at which it
            must be evaluated, too. (1, 0) is a residual block of two 3x3 convolutions: the hidden layer is
            needed one pixel further out. Beyond the picture's border nothing is computed.

    Raises:
        ArgumentError: if a size is not positive, or ``rings`` is empty or holds a negative number.
    """
    if not rings or min(rings) < 0:
        raise ArgumentError("rings", tuple(rings), "one non-negative number of pixels per convolution")
    boxes = Grid(height, width, tile).boxes
    computed = sum(_expanded_area(boxes, ring, height, width) for ring in rings)
    return float(computed / (len(rings) * height * width))


def energy_joules(macs: ArrayLike, weight_bits: ArrayLike, activation_bits: ArrayLike) -> float:
    """Estimate the arithmetic's energy in joules; memory traffic, which may cost more, is left out.

    A model, not a measurement: Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm, 0.9 V. An integer
    product costs 0.2 pJ at 8x8 bits and is scaled by the product of the two bit-widths (at 32x32 that gives
    3.2 pJ, Horowitz has 3.1); it is added in 32 bits for 0.1 pJ. If an operand has 32 bits, the
    MAC is float: 3.7 + 0.9 pJ. Where an operand has 0 bits nothing is computed.

    Arguments broadcast and errors are those of `bitops`.
    """
    n_macs, weights, inputs = _counts(macs, weight_bits, activation_bits)
    product = weights * inputs
    integer = _INT8_MULTIPLY_PJ * product / 64 + _INT32_ADD_PJ
    is_float = np.maximum(weights, inputs) >= _FLOAT_BITS
    per_mac = np.where(is_float, _FLOAT_MULTIPLY_PJ + _FLOAT_ADD_PJ, integer)
    return float(np.sum(n_macs * np.where(product == 0, 0.0, per_mac)) * 1e-12)


def _counts(
    macs: ArrayLike, weight_bits: ArrayLike, activation_bits: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    named = {"macs": macs, "weight_bits": weight_bits, "activation_bits": activation_bits}
    arrays = {name: np.asarray(value, np.float64) for name, value in named.items()}
    for name, array in arrays.items():
        if (array < 0).any():
            raise ArgumentError(name, array.min(), "no negative number")
    first, second, third = arrays.values()
    return first, second, third


def _bit_table(bits: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(bits, np.float64)
    if table.ndim != 2 or not table.size or (table < 0).any():
        raise ArgumentError("bits", f"an array {table.shape}", "non-negative bit-widths, (patches, sites)")
    return table


def _weights(areas: ArrayLike | None, n_patches: int) -> NDArray[np.float64] | None:
    if areas is None:
        return None
    weights = np.asarray(areas, np.float64)
    if weights.shape != (n_patches,) or (weights < 0).any() or not weights.sum():
        raise ArgumentError("areas", areas, f"{n_patches} areas, one per patch, not all zero")
    return weights


def _expanded_area(boxes: NDArray[np.int64], ring: int, height: int, width: int) -> int:
    """Add up the boxes' areas after growing them by ``ring`` pixels inside the picture."""
    y0, y1, x0, x1 = boxes.T
    tall = np.minimum(y1 + ring, height) - np.maximum(y0 - ring, 0)
    wide = np.minimum(x1 + ring, width) - np.maximum(x0 - ring, 0)
    return int((tall * wide).sum())
