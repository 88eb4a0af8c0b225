"""The integer engine on a sequence of pictures: what cannot have changed is not computed again.

The result equals `EngineRuntime`'s on every picture, bit for bit. Why: a tile's result depends on the pixels
within the receptive radius of it, and on the bits of the tiles there. Let *dirty* be the tiles whose pixels (or
exit) changed, *near* those within the radius of a dirty one. If all tiles that are near but not dirty choose the
bits they had, then in every layer values differ from the old ones within the radius of dirty tiles only: tiles
further away see what they saw, choose what they chose, and keep their results. So dirty and near tiles are
computed with a ring of tiles around them that is as wide as the radius and whose bits are forced to the old ones;
a near tile that does choose other bits counts as dirty, and the step is repeated. Plans whose tiles decide more than
their bits are computed as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadyq.cells import Force, Inferred, Levels
from cadyq.engine.plan import Block, Layer, Plan
from cadyq.engine.runtime import EngineRuntime

__all__ = ["ReusingRuntime"]

_FREE = 255
"""No candidate has so many bits: the tile chooses."""

_WORTHWHILE = 0.7
"""Share of tiles to compute above which everything is computed at once."""

_PATIENCE = 8
"""Pictures for which a tile is expected to choose anew."""


@dataclass
class _Seen:
    """A picture and its result; updated in place.

    ``unsettled`` counts down for tiles that chose other bits though their own pixels had not changed. Around
    something that moves they are likely to do so again: taking them for dirty at once saves a second step.
    """

    key: tuple[object, ...]
    rgb: Levels
    active: NDArray[np.bool_]
    pixels: Levels
    bits: dict[str, NDArray[np.uint8]]
    unsettled: NDArray[np.int8]


class ReusingRuntime(EngineRuntime):
    """Runs a plan on a sequence of pictures. Call `begin` before each.

    Args:
        plan: the packed network.
        radius: receptive radius of the network in LR pixels.

    Attributes:
        n_tiles: tiles of all pictures so far.
        n_computed: how many of them were computed, halos included.
    """

    def __init__(self, plan: Plan, radius: int) -> None:
        super().__init__(plan)
        self._radius = radius
        self._can_reuse = _is_told_by_bits(plan)
        self._seen: list[_Seen] = []
        self._turn = 0
        self.n_tiles = self.n_computed = 0

    def begin(self) -> None:
        """Announce the next picture: its blocks will come in the order of the last one's."""
        self._turn = 0

    def repeat(self) -> None:
        """Count a picture that equals the last one and needs no call."""
        self.n_tiles += sum(seen.active.size for seen in self._seen)

    def run_tiles(
        self,
        rgb: Levels,
        tile: int,
        *,
        active: NDArray[np.bool_] | None = None,
        force: Force = None,
        budget: float = 0.0,
        threads: int | None = None,
    ) -> Inferred:
        """Upscale one block; arguments and result as of `EngineRuntime.run_tiles`."""
        rows, cols = -(-rgb.shape[0] // tile), -(-rgb.shape[1] // tile)
        wanted = np.ones((rows, cols), bool) if active is None else active.reshape(rows, cols)
        key = (rgb.shape, rgb.dtype, tile, budget)
        seen = self._seen[self._turn] if self._turn < len(self._seen) else None
        self.n_tiles += rows * cols
        if force is not None or seen is None or seen.key != key or not self._can_reuse:
            seen = self._whole(rgb, tile, wanted, force, budget, threads, key)
        else:
            dirty = _changed(seen.rgb, rgb, tile) | (wanted != seen.active)
            if dirty.any() and not self._update(seen, rgb, tile, wanted, dirty, budget, threads):
                seen = self._whole(rgb, tile, wanted, force, budget, threads, key)
        self._seen[self._turn : self._turn + 1] = [seen]
        self._turn += 1
        return Inferred(seen.pixels[None], seen.bits)

    def _whole(
        self,
        rgb: Levels,
        tile: int,
        active: NDArray[np.bool_],
        force: Force,
        budget: float,
        threads: int | None,
        key: tuple[object, ...],
    ) -> _Seen:
        found = super().run_tiles(
            rgb, tile, active=active.reshape(-1), force=force, budget=budget, threads=threads
        )
        self.n_computed += int(active.sum())
        # A forced result says nothing about what would have been chosen: its key fits no later picture.
        known, calm = key if force is None else (), np.zeros(active.shape, np.int8)
        return _Seen(known, rgb.copy(), active.copy(), found.pixels[0], found.bits, calm)

    def _update(
        self,
        seen: _Seen,
        rgb: Levels,
        tile: int,
        active: NDArray[np.bool_],
        changed: NDArray[np.bool_],
        budget: float,
        threads: int | None,
    ) -> bool:
        """Compute what may have changed into ``seen``; False where that is no less than everything."""
        reach = -(-self._radius // tile)
        dirty = changed | ((seen.unsettled > 0) & _grown(changed, reach))
        while True:
            near = _grown(dirty, reach)
            around = _grown(near, reach)
            if (around & active).sum() > _WORTHWHILE * active.sum():
                return False
            box = _bounds(around)
            free = near[box]
            force: Force = {
                name: np.where(free, _FREE, grid.reshape(near.shape)[box]).reshape(-1)
                for name, grid in seen.bits.items()
            }
            ys, xs = (slice(s.start * tile, s.stop * tile) for s in box)
            computed = (around & active)[box]
            found = super().run_tiles(
                rgb[ys, xs], tile, active=computed.reshape(-1), force=force, budget=budget, threads=threads
            )
            self.n_computed += int(computed.sum())
            others = np.zeros_like(near)
            for name, grid in seen.bits.items():
                others[box] |= found.bits[name].reshape(free.shape) != grid.reshape(near.shape)[box]
            others &= near
            if not (others & ~dirty).any():
                break
            dirty = dirty | others
        seen.unsettled = np.where(others & ~changed, _PATIENCE, np.maximum(seen.unsettled - 1, 0)).astype(
            np.int8
        )
        for name, grid in seen.bits.items():
            grid.reshape(near.shape)[near] = found.bits[name].reshape(free.shape)[free]
        scale = found.pixels.shape[1] // rgb[ys, xs].shape[0]
        side = tile * scale
        for row, col in np.argwhere(near):
            part = _cell(found.pixels[0], row - box[0].start, col - box[1].start, side)
            _cell(seen.pixels, row, col, side)[:] = part
        seen.rgb[...], seen.active[...] = rgb, active
        return True


def _is_told_by_bits(plan: Plan) -> bool:
    """Whether bits say all that a tile decides about itself, as the argument above needs.

    A site that is used again has one name for two choices, and one that takes the tile's own range decides more.
    """
    names = [site.name for site in plan.sites]
    layers: list[Layer] = []
    for step in plan.steps:
        layers += step.layers if isinstance(step, Block) else [step] if isinstance(step, Layer) else []
    sites = [site for layer in layers for site in (layer.conv.site, layer.skip.site if layer.skip else None)]
    return len(set(names)) == len(names) and all(s is None or s.inverse_scale is None for s in sites)


def _cell(pixels: Levels, row: int, col: int, side: int) -> Levels:
    return pixels[row * side : (row + 1) * side, col * side : (col + 1) * side]


def _changed(old: Levels, new: Levels, tile: int) -> NDArray[np.bool_]:
    """Tiles that hold a pixel that differs, ``(rows, cols)``."""
    differs = (old != new).any(axis=2)
    rows = np.logical_or.reduceat(differs, np.arange(0, differs.shape[0], tile), axis=0)
    return np.logical_or.reduceat(rows, np.arange(0, differs.shape[1], tile), axis=1)


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """The mask and all cells at most ``by`` away from it, diagonally too."""
    result = mask.copy()
    for shift in range(1, by + 1):
        result[shift:] |= mask[:-shift]
        result[:-shift] |= mask[shift:]
    tall = result.copy()
    for shift in range(1, by + 1):
        result[:, shift:] |= tall[:, :-shift]
        result[:, :-shift] |= tall[:, shift:]
    return result


def _bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
