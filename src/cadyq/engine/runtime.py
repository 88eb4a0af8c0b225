"""The integer engine as a runtime of `cadyq.upscale`: tiles of one picture, with forced bits and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.cells import Force, Inferred, Levels, SiteCost
from cadyq.engine.plan import MAX_TILE, Block, Conv, Plan, Site, Step
from cadyq.engine.run import Engine

__all__ = ["MAX_TILE", "EngineRuntime", "with_budget"]

WEIGHT_BITS = 8  # plans hold int8 weights


class EngineRuntime:
    """Runs a plan tile by tile.

    Args:
        plan: the packed network.
        macs: multiply-accumulates per LR pixel of the plan's sites.

    Attributes:
        sites: the sites that are counted, in the plan's order.
    """

    def __init__(self, plan: Plan, macs: tuple[float, ...]) -> None:
        self.plan = plan
        self.sites = [
            SiteCost(site.name, "body", cost, WEIGHT_BITS, site.bits)
            for site, cost in zip(plan.sites, macs, strict=True)
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
        bits = {site.name: np.ascontiguousarray(table[:, i]) for i, site in enumerate(self.sites)}
        return Inferred(found.image[None], bits)

    def _choice(self, force: Force, rows: int, cols: int) -> NDArray[np.int8] | None:
        if force is None:
            return None
        choice = np.full((rows, cols, len(self.sites)), -1, np.int8)
        for i, site in enumerate(self.sites):
            wanted: Any = force.get(site.name) if isinstance(force, Mapping) else force
            if wanted is None:
                continue
            grid = np.broadcast_to(np.asarray(wanted), (rows * cols,)).reshape(rows, cols)
            for k, bits in enumerate(site.candidates):
                choice[..., i][grid == bits] = k
        return choice


def with_budget(plan: Plan, budget: float) -> Plan:
    """The plan with ``budget`` times bits added to every selector's scores."""
    if budget == 0:
        return plan

    def site_of(site: Site | None) -> Site | None:
        if site is None or site.selector is None:
            return site
        bias = site.selector.bias + budget * np.array(site.bits, np.float64)
        return dataclasses.replace(site, selector=dataclasses.replace(site.selector, bias=bias))

    def conv_of(conv: Conv) -> Conv:
        return dataclasses.replace(conv, site=site_of(conv.site))

    steps: list[Step] = [
        dataclasses.replace(step, convs=tuple(conv_of(c) for c in step.convs))
        if isinstance(step, Block)
        else step
        for step in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps))
