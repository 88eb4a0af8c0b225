"""The integer engine as a runtime of `cadyq.upscale`: tiles of one picture, with forced bits and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.cells import Force, Inferred, Levels, SiteCost
from cadyq.engine.plan import MAX_TILE, Block, Layer, Plan, Step
from cadyq.engine.run import Engine

__all__ = ["MAX_TILE", "EngineRuntime", "with_budget"]

WEIGHT_BITS = 8  # plans hold int8 weights


class EngineRuntime:
    """Runs a plan tile by tile.

    Args:
        plan: the packed network.

    Attributes:
        sites: the sites that are counted, in the plan's order.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        counted = {site.name: site for site in (*plan.sites, *plan.fixed_sites)}  # one used again counts once
        self.sites = [
            SiteCost(site.name, site.kind, site.macs, WEIGHT_BITS, site.bits) for site in counted.values()
        ]
        # Packing takes a moment; neighbouring calls mostly ask for the same tile, budget and threads.
        self._engine = lru_cache(maxsize=2)(self._made)

    def _made(self, tile: int, budget: float, threads: int | None) -> Engine:
        return Engine(with_budget(dataclasses.replace(self.plan, tile=tile), budget), threads)

    def isa(self) -> str:
        """Instruction set that runs here."""
        return self._engine(self.plan.tile, 0.0, None).isa

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
        """Upscale one picture, uint8 or uint16 ``(h, w, 3)``; arguments as of `cadyq.quant.infer.run_tiles`."""
        engine = self._engine(tile, budget, threads)
        rows, cols = -(-rgb.shape[0] // tile), -(-rgb.shape[1] // tile)
        choice = self._choice(force, rows, cols)
        exited = None if active is None else ~active.reshape(rows, cols)
        found = engine.upscale(np.ascontiguousarray(rgb), choice, exited)
        table = found.bits.reshape(rows * cols, -1)
        bits = {site.name: np.ascontiguousarray(table[:, i]) for i, site in enumerate(self.plan.sites)}
        for site in self.plan.fixed_sites:
            bits[site.name] = np.full(rows * cols, site.bits[0], np.uint8)
        return Inferred(found.image[None], bits)

    def _choice(self, force: Force, rows: int, cols: int) -> NDArray[np.int8] | None:
        """Forced candidates per tile and site; -1, where no candidate has the wanted bits, lets the tile choose."""
        if force is None:
            return None
        choice = np.full((rows, cols, len(self.plan.sites)), -1, np.int8)
        for i, site in enumerate(self.plan.sites):
            wanted: Any = force.get(site.name) if isinstance(force, Mapping) else force
            if wanted is None:
                continue
            grid = np.broadcast_to(np.asarray(wanted), (rows * cols,)).reshape(rows, cols)
            for k, bits in enumerate(site.bits):
                choice[..., i][grid == bits] = k
        return choice


def with_budget(plan: Plan, budget: float) -> Plan:
    """The plan with ``budget`` times bits added to every selector's scores."""
    if budget == 0:
        return plan

    def moved(layer: Layer) -> Layer:
        site = layer.conv.site
        if site is None or site.selector is None:
            return layer
        bias = site.selector.bias + budget * np.array(site.bits, np.float64)
        selector = dataclasses.replace(site.selector, bias=bias)
        conv = dataclasses.replace(layer.conv, site=dataclasses.replace(site, selector=selector))
        return dataclasses.replace(layer, conv=conv)

    steps: list[Step] = [
        dataclasses.replace(step, layers=tuple(map(moved, step.layers))) if isinstance(step, Block) else step
        for step in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps))
