"""What the runtimes (torch, integer engine) hand to the layers above: costs of sites, pixels and bits per cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Force", "Inferred", "Levels", "Run", "SiteCost"]

Force: TypeAlias = "int | Mapping[str, int | NDArray[Any]] | None"
"""Bit-widths in place of the selectors' choices: one for all, or by site name one or one per cell."""


Levels: TypeAlias = NDArray[Any]
"""Pixels of 8 or of 16 bits per channel, uint8 or uint16."""


class SiteCost(NamedTuple):
    """What a counted site costs.

    Attributes:
        name: path of the site in the network.
        kind: ``body`` or ``fixed``.
        macs_per_pixel: multiply-accumulates of its convolution per LR pixel.
        weight_bits: bit-width of the convolution's weights, 32 for float.
        candidates: bit-widths the site may choose, ascending; (32,) in a float network.
    """

    name: str
    kind: str
    macs_per_pixel: float
    weight_bits: int
    candidates: tuple[int, ...]


class Inferred(NamedTuple):
    """Result of one pass.

    Attributes:
        pixels: ``(n, scale h, scale w, 3)``, of the picture's type.
        bits: per counted site, one bit-width per picture or tile, uint8 ``(cells,)``.
    """

    pixels: Levels
    bits: dict[str, NDArray[np.uint8]]


class Run(Protocol):
    """Runs a quantized network over a picture in tiles, as `cadyq.quant.infer.run_tiles` does for torch."""

    def __call__(self, rgb: Levels, tile: int, *, force: Force = None) -> Inferred: ...
