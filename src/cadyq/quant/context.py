"""What a forward pass tells its sites, and what the sites tell back.

A context owns the decision unit: the batch element (:class:`Context`; a training patch, an independent published
patch, or a whole image) or the tile of one large feature plane (:class:`TileContext`). Backbones do not know which:
they call ``ctx.run(block, x)`` for every block of tile-local work and ``site(x, ctx)`` before every convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Block",
    "Context",
    "SiteRecord",
    "TileContext",
    "channel_deviation",
    "deviation_implementation",
    "image_gradient",
]

LUMA = (0.299, 0.587, 0.114)


def channel_deviation(x: Tensor) -> Tensor:
    """Unbiased standard deviation per element and channel of ``x`` (n, C, H, W): (n, C), 0 where there is one pixel."""
    if x.shape[2] * x.shape[3] == 1:
        return x.new_zeros(x.shape[:2])
    return x.flatten(2).std(2)


_deviation: list[Callable[[Tensor], Tensor]] = [channel_deviation]


@contextmanager
def deviation_implementation(implementation: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, take the deviations (n, C) of unmasked features by ``implementation`` (training's kernels)."""
    _deviation.append(implementation)
    try:
        yield
    finally:
        _deviation.pop()


class Block(Protocol):
    """A stretch of layers that is computed tile by tile.

    ``halo`` is how many pixels around a tile its output depends on; ``residual`` says whether the block adds its
    branch to its input, so that it can be skipped (0 bits).
    """

    halo: int
    residual: bool

    def __call__(self, x: Tensor, ctx: Context) -> Tensor: ...


@dataclass
class SiteRecord:
    """What one site did in one pass.

    Attributes:
        name: path of the site in the network.
        kind: ``body``, ``edge``, ``fixed``, ``skip`` or ``stream``.
        bits: bit-width per patch or tile, shape (n,); 0 where the computation was left out.
        expected_bits: sum of P_k b_k, shape (n,), where a selector decided in training, else ``None``.
        macs_per_pixel: multiply-accumulates of the convolution behind the site, per pixel of the LR image.
        area: pixels of each patch or tile at LR size, shape (n,).
    """

    name: str
    kind: str
    bits: Tensor
    expected_bits: Tensor | None
    macs_per_pixel: float
    area: Tensor


def image_gradient(lr: Tensor) -> Tensor:
    """Per-pixel |dx| and |dy| of the grey picture: 3x3 Sobel divided by 8, replicate border.

    ``lr`` is (N, 3 or 1, H, W) in [0, 1]; the result is (N, 2, H, W).
    """
    if lr.shape[1] == 3:
        weights = torch.tensor(LUMA, dtype=lr.dtype, device=lr.device).view(1, 3, 1, 1)
        gray = (lr * weights).sum(1, keepdim=True)
    else:
        gray = lr.mean(1, keepdim=True)
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    smooth = torch.tensor([1.0, 2.0, 1.0], dtype=lr.dtype, device=lr.device)
    diff = torch.tensor([-1.0, 0.0, 1.0], dtype=lr.dtype, device=lr.device)
    kernels = torch.stack([smooth[:, None] * diff, diff[:, None] * smooth])[:, None] / 8
    return F.conv2d(padded, kernels).abs()


@dataclass
class Context:
    """Every batch element decides for itself: training patches, published patches, whole images.

    Attributes:
        gradient: mean |dx| and |dy| of each element's LR picture, shape (n, 2), in [0, 1] units.
        area: LR pixels of each element, shape (n,).
        mask: 1 inside the picture and 0 beyond its border, shape (n, 1, h, w), or ``None`` (all inside).
        margin: pixels at each edge of a feature that do not count for its statistics (the halo).
        soft: keep straight-through gradients for the selectors (training).
        force_bits: ignore selectors and use this candidate everywhere (its value in bits), or a mapping from site
            name to one bit-width or to a tensor (n,) of bit-widths.
        budget: shift of the selectors' scores in favour of fewer (negative) or more (positive) bits.
        records: filled by the sites, in the order of the forward pass.
        band_pixels: LR pixels above which :meth:`finish` works in horizontal bands (0: never).
        is_traced: the pass is recorded to become a plan, in which all planes lie on 16-bit grids anyway.
    """

    gradient: Tensor
    area: Tensor
    mask: Tensor | None = None
    margin: int = 0
    soft: bool = False
    force_bits: int | dict[str, int | Tensor] | None = None
    budget: float = 0.0
    records: list[SiteRecord] = field(default_factory=list)
    band_pixels: int = 0
    is_traced: bool = False
    keep: Tensor | None = None  # 1 where the current block is computed, 0 where it is skipped; (n,)
    block_outputs: list[Tensor] | None = None  # collected for attention transfer when it is a list

    @classmethod
    def of(cls, lr: Tensor, *, soft: bool = False) -> Context:
        """Context of a batch of LR pictures (N, 3, H, W) in [0, 1], each deciding for itself."""
        n, _, h, w = lr.shape
        area = torch.full((n,), float(h * w), device=lr.device)
        return cls(image_gradient(lr).mean((2, 3)), area, soft=soft)

    def run(self, block: Block, x: Tensor) -> Tensor:
        """Compute a block; where its first site chose 0 bits, the stream passes untouched."""
        self._take_keep()
        y = block(x, self)
        keep = self._take_keep()
        if keep is not None:
            gate = keep.view(-1, 1, 1, 1)
            # lerp in this form keeps an untouched stream bit-identical: 0 * (y - x) is 0.
            y = y if bool((gate.detach() == 1).all()) and not gate.requires_grad else x + gate * (y - x)
        if self.block_outputs is not None:
            self.block_outputs.append(y)
        return y

    def _take_keep(self) -> Tensor | None:
        keep, self.keep = self.keep, None
        return keep

    def finish(self, tail: Callable[[Tensor, Context], Tensor], x: Tensor, halo: int) -> Tensor:
        """``tail(x, self)``: the layers behind the body, in bands of rows where the picture is large.

        At the output's size a single feature plane weighs more than the whole body. ``x`` is (n, C, h, w);
        the result of ``tail`` depends on ``halo`` rows around, and all bands together equal one pass.
        """
        n, _, height, width = x.shape
        rows = max(1, self.band_pixels // width) if self.band_pixels else height
        if n > 1 or rows >= height:
            return tail(x, self)
        parts: list[Tensor] = []
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = max(top - halo, 0), min(bottom + halo, height)
            known = len(self.records)
            y = tail(x[:, :, first:last], self)
            if parts:  # every site has reported already
                del self.records[known:]
            factor = y.shape[2] // (last - first)
            parts.append(y[:, :, (top - first) * factor : (bottom - first) * factor].clone())
        return torch.cat(parts, 2)

    def deviation(self, x: Tensor) -> Tensor:
        """Unbiased standard deviation per element and channel over the pixels that count, detached: (n, C)."""
        x = x.detach()
        m = self.margin
        if m:
            x = x[:, :, m:-m, m:-m]
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, m:-m, m:-m] if m else mask
            if bool((mask == 1).all()):
                mask = None
        if mask is None:
            return _deviation[-1](x)
        count = mask.sum((2, 3))
        mean = (x * mask).sum((2, 3)) / count
        square = ((x - mean[:, :, None, None]) ** 2 * mask).sum((2, 3))
        return torch.sqrt(square / (count - 1).clamp_min(1))

    def forced(self, name: str) -> int | Tensor | None:
        """Bit-width that replaces the selector's choice at this site, if any."""
        if isinstance(self.force_bits, dict):
            return self.force_bits.get(name)
        return self.force_bits


class TileContext(Context):
    """One feature plane for the whole picture; blocks are computed tile by tile, all tiles as one batch.

    Every tile reads its halo from the plane and quantises it with its own step; beyond the picture's border
    features are zero. Tiles in the last row and column may be smaller; they are padded to equal size and masked.
    """

    def __init__(
        self,
        lr: Tensor,
        tile: int,
        *,
        max_batch_pixels: int = 1 << 17,
        active: Tensor | None = None,
        force_bits: int | dict[str, int | Tensor] | None = None,
        budget: float = 0.0,
        band_pixels: int = 0,
    ) -> None:
        if lr.shape[0] != 1:
            raise ValueError("TileContext takes one picture at a time")
        self.tile = tile
        self.height, self.width = int(lr.shape[2]), int(lr.shape[3])
        self.rows, self.cols = -(-self.height // tile), -(-self.width // tile)
        self.max_batch_pixels = max_batch_pixels
        ones = lr.new_ones(1, 1, self.height, self.width)
        tiles = self._gather(ones, 0)
        area = tiles.sum((1, 2, 3))
        gradient = self._gather(image_gradient(lr), 0).sum((2, 3)) / area[:, None]
        super().__init__(gradient, area, force_bits=force_bits, budget=budget, band_pixels=band_pixels)
        # Tiles that left the network (exit) are not computed at all; their sites count as 0 bits.
        self.active = active
        self._ones = ones

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the picture."""
        return self.rows * self.cols

    def _gather(self, plane: Tensor, halo: int) -> Tensor:
        """(1, C, H, W) -> (tiles, C, T + 2 halo, T + 2 halo), zero beyond the picture."""
        t, channels = self.tile, plane.shape[1]
        bottom, right = self.rows * t - self.height + halo, self.cols * t - self.width + halo
        padded = F.pad(plane, (halo, right, halo, bottom))
        size = t + 2 * halo
        windows = padded.unfold(2, size, t).unfold(3, size, t)
        return windows[0].permute(1, 2, 0, 3, 4).reshape(-1, channels, size, size)

    def _scatter(self, tiles: Tensor) -> Tensor:
        t, channels = self.tile, tiles.shape[1]
        grid = tiles.view(self.rows, self.cols, channels, t, t).permute(2, 0, 3, 1, 4)
        plane = grid.reshape(1, channels, self.rows * t, self.cols * t)
        return plane[:, :, : self.height, : self.width].contiguous()

    def run(self, block: Block, x: Tensor) -> Tensor:
        """Compute a block for every active tile of the plane, in batches of equal tiles."""
        halo, t = block.halo, self.tile
        size = t + 2 * halo
        source, masks = self._gather(x, halo), self._gather(self._ones, halo)
        index = torch.arange(self.n_tiles, device=x.device)
        if self.active is not None:
            index = index[self.active]
        result: Tensor | None = None
        step = max(1, self.max_batch_pixels // (size * size))
        batches: list[Context] = []
        for part in index.split(step):
            inner = Context(
                self.gradient[part],
                self.area[part],
                mask=masks[part],
                margin=halo,
                force_bits=self._part_of_force(part),
                budget=self.budget,
            )
            y = inner.run(block, source[part])[:, :, halo : halo + t, halo : halo + t]
            if result is None:
                result = y.new_zeros(self.n_tiles, y.shape[1], t, t)
                if len(index) < self.n_tiles and y.shape[1] == x.shape[1]:
                    result.copy_(source[:, :, halo : halo + t, halo : halo + t])
            result[part] = y
            batches.append(inner)
        if result is None:  # every tile left the network
            return x
        self._merge(batches, index)
        return self._scatter(result)

    def _part_of_force(self, part: Tensor) -> int | dict[str, int | Tensor] | None:
        if not isinstance(self.force_bits, dict):
            return self.force_bits
        return {k: v[part] if isinstance(v, Tensor) else v for k, v in self.force_bits.items()}

    def _merge(self, batches: Sequence[Context], index: Tensor) -> None:
        """Join the records of all batches into one per site over all tiles."""
        for group in zip(*(inner.records for inner in batches), strict=True):
            bits = torch.zeros_like(self.area)
            bits[index] = torch.cat([record.bits for record in group]).to(bits.dtype)
            first = group[0]
            self.records.append(
                SiteRecord(first.name, first.kind, bits, None, first.macs_per_pixel, self.area)
            )
