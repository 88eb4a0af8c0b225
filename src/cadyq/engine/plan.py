"""A packed network: pure data that the reference and the native engine execute.

A plan is a list of generic steps over planes of 16-bit integers; nothing in it names a network.
``docs/numerics.md`` defines what each step computes, with the equation numbers used in ``reference.py``.
`cadyq.engine.plan_check` says what makes a plan valid, `cadyq.engine.plan_arrays` how it is stored.

Layouts: planes are ``(H, W, C)``; convolution weights are ``(C_out, k, k, C_in / groups)``. A PixelShuffle of
factor r reads its input channels as ``(row, column, channel)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_TILE",
    "Array",
    "Bicubic",
    "Block",
    "Borders",
    "Conv",
    "ImageIn",
    "ImageOut",
    "Layer",
    "Part",
    "Plan",
    "Plane",
    "Requant",
    "Selector",
    "Site",
    "Skip",
    "Step",
]

MAX_TILE = 256  # Keeps the integer variance below 2^63; equation (9).

Array = NDArray[Any]
SiteKind = Literal["body", "fixed", "edge"]


@dataclass(frozen=True)
class Plane:
    """A plane of int16 values: ``channels`` per pixel, at ``level`` times the input's resolution."""

    channels: int
    level: int


@dataclass(frozen=True)
class Part:
    """``channels`` channels of a plane from ``first`` on; several parts one after another are a concatenation."""

    plane: int
    first: int
    channels: int


@dataclass(frozen=True)
class Selector:
    """Linear scores of the candidates from two gradients and C deviations; the first largest wins.

    ``weight`` is float64 ``(K, 2 + C)``, ``bias`` float64 ``(K,)``. With ``log_offset`` above 0 the inputs are
    log(v + log_offset), by the logarithm of equation (10a), which is the same on every machine.
    """

    weight: Array
    bias: Array
    log_offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where a convolution's input is quantised: candidates, and how each maps int16 values to codes.

    ``kind`` is ``body`` (the bits of every tile are reported), ``fixed`` (counted, always the same) or ``edge``;
    ``macs`` are the multiply-accumulates behind it per pixel of the input image.
    ``bits`` has K entries; 0 means that the block is skipped (first site of a block, first entry only).
    ``multiplier`` is float32 ``(K, C)``; ``low`` and ``high`` are int32 ``(K,)`` bounds of the codes; equation (4).
    ``step`` is the real value of one unit of the quantised plane, used for deviations.
    With ``inverse_scale`` (float64 ``(C,)``) the clip is the tile's own range, and takes the place of
    ``multiplier``; equation (15).
    """

    name: str
    kind: SiteKind
    macs: float
    bits: tuple[int, ...]
    step: float
    multiplier: Array
    low: Array
    high: Array
    selector: Selector | None = None
    inverse_scale: Array | None = None


@dataclass(frozen=True)
class Requant:
    """Results that are codes themselves before they become values: equation (14).

    ``levels`` is the largest code, ``gain`` float32 ``(C_out,)`` the value of one code in units of the target.
    """

    levels: int
    gain: Array


@dataclass(frozen=True)
class Conv:
    """An integer convolution with its site, output scale, bias and activation; equations (5) to (7).

    ``weight`` is int8 ``(C_out, k, k, C_in / groups)``; ``factor`` float32 ``(K, C_out)``; ``bias`` float32
    ``(C_out,)``, in units of the target's grid; ``slope`` float32 ``(C_out,)`` multiplies negative values,
    ``None`` is no activation. Without a site the int16 values themselves are the codes.
    """

    weight: Array
    factor: Array
    bias: Array
    slope: Array | None = None
    site: Site | None = None
    groups: int = 1
    requant: Requant | None = None

    @property
    def c_out(self) -> int:
        """Output channels."""
        return int(self.weight.shape[0])

    @property
    def c_in(self) -> int:
        """Input channels."""
        return int(self.weight.shape[3]) * self.groups

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
class Borders:
    """Other weights and biases of the outermost pixels, where a collapsed chain meets the picture's border.

    ``weight`` is int8 ``(15, C_out, k, k, C_in)``, ``bias`` float32 ``(15, C_out)``; entry ``4 * row + column - 1``,
    with 0 inside, 1 in the first, 2 in the last row or column, and 3 where it is the only one. Section 7.
    """

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Skip:
    """What is added to a convolution's result; equation (14).

    ``ratio`` (float32 ``(K, C)``) brings values, or the codes of ``site``, to the target's grid; ``None``: they are
    on it. With ``shared`` the codes are those of the block's first site, with the candidate chosen there; where that
    takes the tile's own range, it multiplies ``ratio`` as it does a convolution's factors.
    """

    parts: tuple[Part, ...]
    ratio: Array | None = None
    site: Site | None = None
    shared: bool = False


@dataclass(frozen=True)
class Layer:
    """One convolution: of a whole plane, or within a block of the surroundings of a tile.

    In this order: PixelShuffle by ``shuffle``, ``skip`` added, negative values replaced by 0 if ``rectify``.
    """

    src: tuple[Part, ...]
    dst: int
    conv: Conv
    skip: Skip | None = None
    shuffle: int = 1
    rectify: bool = False
    borders: Borders | None = None


@dataclass(frozen=True)
class Block:
    """Layers computed tile by tile, halo included, with the tile's own candidates.

    They read ``src`` and each other, and the last one writes ``dst``; all other planes exist only within the tile.
    With ``residual`` a tile may be skipped: ``src``'s values pass. ``src == dst`` updates a plane.
    """

    src: int
    dst: int
    layers: tuple[Layer, ...]
    residual: bool = True

    def reach(self) -> dict[int, int]:
        """Pixels around a tile that are needed of every plane of the block."""
        # Written as -1, the result is told apart from a source that is the same plane.
        need: dict[int, int] = {-1: 0}
        for i, layer in reversed(list(enumerate(self.layers))):
            out = need.get(-1 if i + 1 == len(self.layers) else layer.dst, 0)
            for part in layer.src:
                need[part.plane] = max(need.get(part.plane, 0), out + layer.conv.kernel // 2)
            for part in layer.skip.parts if layer.skip is not None else ():
                need[part.plane] = max(need.get(part.plane, 0), out)
        return need


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
class Bicubic:
    """The image enlarged, to be added to the last plane; equation (16).

    ``weight`` is int32 ``(scale, 5)``: phase, then neighbors -2 to 2, in 1/65536. ``symmetric`` mirrors the image at
    its border, otherwise its outermost pixels are repeated. ``gain8`` and ``gain16`` lead to the plane's units.
    """

    weight: Array
    symmetric: bool
    gain8: float
    gain16: float


@dataclass(frozen=True)
class ImageOut:
    """Plane to image through tables over all int16 values (index ``value + 32768``); equation (8)."""

    src: int
    table8: Array
    table16: Array
    base: Bicubic | None = None


Step = ImageIn | Layer | Block | ImageOut


@dataclass(frozen=True)
class Plan:
    """A network: planes, steps in order, output scale, and the tile side in input pixels."""

    scale: int
    tile: int
    planes: tuple[Plane, ...]
    steps: tuple[Step, ...]

    def layers(self) -> Iterator[Layer]:
        """All layers, those of blocks included, in order."""
        for step in self.steps:
            if isinstance(step, Layer):
                yield step
            elif isinstance(step, Block):
                yield from step.layers

    @property
    def sites(self) -> tuple[Site, ...]:
        """The body's sites in order: the columns of the engine's table of bits."""
        found = (layer.conv.site for layer in self.layers())
        return tuple(site for site in found if site is not None and site.kind == "body")

    @property
    def fixed_sites(self) -> tuple[Site, ...]:
        """The sites that cost, but do not choose."""
        found = (layer.conv.site for layer in self.layers())
        return tuple(site for site in found if site is not None and site.kind == "fixed")

    def validate(self) -> Plan:
        """Return the plan itself, or raise `CheckpointError` naming what is wrong with it."""
        from cadyq.engine.plan_check import check

        check(self)
        return self
