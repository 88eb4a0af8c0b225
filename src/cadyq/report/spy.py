"""Sees the deviations that selectors see."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cadyq.quant.context import Context
from cadyq.quant.site import Site, SiteObserver

__all__ = ["DeviationSpy"]


class DeviationSpy(SiteObserver):
    """Collects every site's deviations per tile and channel."""

    def __init__(self) -> None:
        self._found: dict[str, list[torch.Tensor]] = {}

    def observe(self, site: Site, x: torch.Tensor, ctx: Context) -> None:
        """Take the deviations of ``x`` (n, C, H, W)."""
        self._found.setdefault(site.name, []).append(ctx.deviation(x))

    def root_mean_square(self, name: str) -> NDArray[np.float64]:
        """Over channels, per tile in reading order: ``(tiles,)``."""
        each = torch.cat(self._found[name]).double()
        return np.asarray(each.square().mean(1).sqrt().numpy())
