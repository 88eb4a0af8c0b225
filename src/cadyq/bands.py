"""The mode ``tiles``: one plane with decisions per tile, computed band by band, for pictures of any size.

A band is a row of blocks over the full width. Blocks see their whole receptive field, so that with equal bits the
result is that of the whole picture, and nothing but a few bands is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cadyq.cells import Force, Inferred, Levels, SiteCost
from cadyq.engine.exits import exit_scores, fill_exits
from cadyq.functional.exit import BandPlace, ExitRule
from cadyq.functional.tiling import Grid, Strip, strips

__all__ = ["ArrayRows", "Bands", "RowSource", "part_of"]

# A block of a large picture: wide enough that the halo costs little, small enough for 2 to 3 GB. Fixed
# numbers, so that a result never depends on the memory of the machine.
_BLOCK_WIDTH = 1536
_BLOCK_PIXELS = 768 * 768

RunTiles: TypeAlias = Callable[[Levels, NDArray[np.bool_], Force], Inferred]
"""A runtime: a block ``(h, w, 3)``, which of its tiles are computed, and their bits where they are forced."""


class RowSource(Protocol):
    """The low-resolution picture, read from top to bottom."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""

    def read(self, top: int, bottom: int) -> Levels:
        """Rows ``top`` to ``bottom`` (not included), RGB ``(rows, width, 3)``."""

    def forget(self, top: int) -> None:
        """Rows above ``top`` will not be read again."""


class ArrayRows:
    """A `RowSource` over an array ``(H, W, 3)``."""

    def __init__(self, rgb: Levels) -> None:
        self._rgb = rgb
        self.shape: tuple[int, int] = (rgb.shape[0], rgb.shape[1])
        self.dtype: np.dtype[Any] = rgb.dtype

    def read(self, top: int, bottom: int) -> Levels:
        return self._rgb[top:bottom]

    def forget(self, top: int) -> None:
        pass


class Bands:
    """The bands of one picture; iterating over it computes them, once.

    Args:
        source: the picture.
        sites: the sites that are counted.
        run: the runtime.
        scale: of the network.
        tile: side of a tile in LR pixels.
        radius: receptive radius in LR pixels.
        rule: which tiles leave before the body, or None.
        budget: moves the rule's threshold.
        force: bits in place of the selectors' choices; arrays are ``(rows * cols,)``.
        progress: called after every block with (done, total).
        threads: for judging and filling cells that exit; None: all cores.

    Attributes:
        grid: the tiles.
        bits: per site, ``(rows, cols)``; complete when all bands were computed.
        exits: which tiles left, ``(rows, cols)``; likewise.
    """

    def __init__(
        self,
        source: RowSource,
        sites: list[SiteCost],
        run: RunTiles,
        *,
        scale: int,
        tile: int,
        radius: int,
        rule: ExitRule | None = None,
        budget: float = 0.0,
        force: Force = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        threads: int | None = None,
    ) -> None:
        self._source, self._run, self._scale, self._tile = source, run, scale, tile
        self._rule, self._budget, self._force, self._progress = rule, budget, force, progress
        self._threads = threads
        self.grid = Grid(*source.shape, tile)
        shape = (self.grid.rows, self.grid.cols)
        self.bits = {site.name: np.zeros(shape, np.uint8) for site in sites}
        self.exits = np.zeros(shape, bool)
        self._judged = self._scored = 0  # rows of tiles whose exits, and whose scores, are known
        self._scores = np.zeros(shape if rule is not None else (0, 0))
        self._down, self._across = cut_into_blocks(*source.shape, tile, radius)

    def __iter__(self) -> Iterator[Levels]:
        """Compute the bands from top to bottom, ``(rows, scale W, 3)`` each."""
        done, total = 0, len(self._down) * len(self._across)
        s, width = self._scale, self._source.shape[1]
        for down in self._down:
            self._source.forget(down.read[0])
            self._judge(-(-down.read[1] // self._tile))
            top, bottom = down.keep
            band = np.empty(((bottom - top) * s, width * s, 3), self._source.dtype)
            for side in self._across:
                band = self._block(down, side, band)
                done += 1
                self._progress(done, total)
            if self.exits[self._cells(down.keep)].any():
                assert self._rule is not None
                band = np.ascontiguousarray(band)  # it may be a part of its block
                place = BandPlace(
                    down.read[0],
                    self._source.shape[0],
                    down.keep[0] // self._tile,
                    s,
                    self._tile,
                    self._rule.fade,
                )
                fill_exits(band, self._source.read(*down.read), self.exits, place, self._threads)
            yield band
            del band  # a band can be large; the next one must not be computed beside it

    def _block(self, down: Strip, side: Strip, band: Levels) -> Levels:
        """Compute one block of a band and return the band: the block itself where there is only one."""
        outer = self._cells(down.read), self._cells(side.read)
        inner = self._cells(down.keep), self._cells(side.keep)
        if self.exits[inner].all():
            return band
        index = np.arange(self.exits.size).reshape(self.exits.shape)[outer]
        rgb = self._source.read(*down.read)[:, slice(*side.read)]
        found = self._run(rgb, ~self.exits[outer].reshape(-1), part_of(self._force, index.reshape(-1)))
        s = self._scale
        ys, xs = (
            slice((strip.keep[0] - strip.read[0]) * s, (strip.keep[1] - strip.read[0]) * s)
            for strip in (down, side)
        )
        pixels = found.pixels[0][ys, xs]
        if pixels.shape == band.shape:
            band = pixels
        else:
            band[:, side.keep[0] * s : side.keep[1] * s] = pixels
        ys, xs = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
        for name, value in found.bits.items():
            self.bits[name][inner] = value.reshape(index.shape)[ys, xs]
        return band

    def _judge(self, upto: int) -> None:
        """Find the tiles that leave before the body, down to a row of tiles; in pieces to save memory."""
        rule = self._rule
        if rule is None:
            return
        height, width = self._source.shape
        step = max(1, _BLOCK_PIXELS // (width * self._tile))
        while self._scored < min(self.grid.rows, upto + rule.reach):
            first, last = self._scored, min(self._scored + step, self.grid.rows, upto + rule.reach)
            # A gradient needs one more pixel on either side; whole tiles keep the grid.
            top = max(0, first - 1) * self._tile
            levels = self._source.read(top, min(height, (last + 1) * self._tile))
            scores = exit_scores(rule, levels, self._tile, self._threads)
            skipped = first - top // self._tile
            self._scores[first:last] = scores[skipped : skipped + last - first]
            self._scored = last
        if self._judged < upto:
            top = max(0, self._judged - rule.reach)
            rows = slice(self._judged - top, upto - top)
            around = self._scores[top : min(self.grid.rows, upto + rule.reach)]
            self.exits[self._judged : upto] = rule.leaves(around, rows, -self._budget)
            self._judged = upto

    def _cells(self, span: tuple[int, int]) -> slice:
        return slice(span[0] // self._tile, -(-span[1] // self._tile))


def part_of(force: Force, index: NDArray[Any]) -> Force:
    """Forced bits of some cells."""
    if not isinstance(force, Mapping):
        return force
    return {name: v[index] if isinstance(v, np.ndarray) else v for name, v in force.items()}


def cut_into_blocks(height: int, width: int, tile: int, halo: int) -> tuple[list[Strip], list[Strip]]:
    """Cut a picture downwards and across on the tile grid; the cuts depend on its width alone."""
    n_cols = -(-width // tile)
    n_across = -(-width // _BLOCK_WIDTH)
    rows = max(1, _BLOCK_PIXELS // (min(width, _BLOCK_WIDTH) * tile))
    return strips(height, tile, rows, halo), strips(width, tile, -(-n_cols // n_across), halo)
