"""One network, many budgets: where the knob must stand for given mean bits, and how to make one place the zero.

The knob adds ``budget * bits`` to every selector's scores. What selectors see depends but little on what those before
them chose, so that scores of one pass say well where the knob must stand; the next pass there says what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays
from cadyq.quant.context import Context
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.validate import mean_bits

__all__ = ["budget_table", "find_budget", "place_budget"]

_TOLERANCE = 0.02  # bits
_STEPS = 12


def find_budget(bits_at: Callable[[float], float], target: float, width: float = 4.0) -> tuple[float, float]:
    """Knob at which a non-decreasing ``bits_at(knob)`` comes nearest to ``target``, and what it gives there.

    Bisection after a bracket of doubling width; where the target is out of reach, the nearest end.
    """
    best = (0.0, bits_at(0.0))
    if abs(best[1] - target) <= _TOLERANCE:
        return best
    sign = 1.0 if best[1] < target else -1.0
    near, far = 0.0, sign * width
    for _ in range(4):
        found = bits_at(far)
        best = min(best, (far, found), key=lambda pair: abs(pair[1] - target))
        if (found - target) * sign >= 0:
            break
        near, far = far, 2 * far
    for _ in range(_STEPS):
        if abs(best[1] - target) <= _TOLERANCE:
            break
        middle = (near + far) / 2
        found = bits_at(middle)
        best = min(best, (middle, found), key=lambda pair: abs(pair[1] - target))
        if (found - target) * sign >= 0:
            far = middle
        else:
            near = middle
    return best


def budget_table(
    network: Backbone, crops: CropArrays, targets: Sequence[float], *, n_crops: int, tile: int = 48
) -> list[tuple[float, float]]:
    """Pairs (FQR, budget), as measured: where the knob is 0, and near every target within reach; ascending.

    The crops are spread over all of ``crops``, which must not be pictures that anything is reported on.
    """
    some = spread(crops, n_crops)
    found, scores = _pass(network, some, 0.0, tile)
    pairs = {round(found, 4): 0.0}
    for target in targets:
        # One pass each: whatever mean it has, the pair is a measured one.
        knob, _ = find_budget(scores.mean_bits, target)
        if abs(scores.mean_bits(knob) - target) <= 0.1:
            found, scores = _pass(network, some, knob, tile)
            pairs[round(found, 4)] = round(knob, 5)
    return sorted(pairs.items())


@torch.no_grad()
def place_budget(
    network: Backbone, crops: CropArrays, target_fqr: float, *, n_crops: int, tile: int = 48
) -> float:
    """Shift every selector's biases so that the mean bits at budget 0 are ``target_fqr``; return the shift.

    A budget adds ``budget * bits`` to the scores, and so does a bias: what the knob found is made the default.
    """
    knob, _ = _seek(network, spread(crops, n_crops), target_fqr, tile)
    for site in sites_of(network, "body"):
        if site.selector is not None:
            bits = site.selector.bits.to(site.selector.linear.bias.dtype)
            site.selector.linear.bias.add_(knob * bits)
    return knob


class _Scores(SiteObserver):
    """Every selector's scores without a budget, per tile (n, K), and the bits they stand for."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.bits: dict[str, Tensor] = {}

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        if site.selector is not None:
            inputs = site.selector.features(ctx.gradient, ctx.deviation(x))
            self.found.setdefault(site.name, []).append(site.selector.linear(inputs))
            self.bits[site.name] = site.selector.bits

    def mean_bits(self, budget: float) -> float:
        """Mean bits if all scores stay as they are."""
        means = []
        for name, parts in self.found.items():
            bits = self.bits[name].float()
            means.append(float(bits[(torch.cat(parts) + budget * bits).argmax(1)].mean()))
        return float(np.mean(means))


def _seek(network: Backbone, crops: CropArrays, target: float, tile: int) -> tuple[float, float]:
    """The knob nearest to ``target`` of at most four that were tried, beginning with 0, and its mean bits."""
    tried, knob = [], 0.0
    for _ in range(4):
        found, scores = _pass(network, crops, knob, tile)
        tried.append((knob, found))
        if abs(found - target) <= _TOLERANCE:
            break
        knob, _ = find_budget(scores.mean_bits, target)
    return min(tried, key=lambda pair: abs(pair[1] - target))


@torch.no_grad()
def _pass(network: Backbone, crops: CropArrays, knob: float, tile: int) -> tuple[float, _Scores]:
    """Mean bits over all crops with this knob, and the scores that led to them."""
    scores = _Scores()
    sites = sites_of(network, "body")
    for site in sites:
        site.observer = scores
    try:
        found = mean_bits(network, crops, len(crops.lr), tile=tile, budget=knob)
    finally:
        for site in sites:
            site.observer = None
    return found, scores


def spread(crops: CropArrays, n: int) -> CropArrays:
    """``n`` crops at equal distances."""
    step = max(1, len(crops.lr) // n)
    return CropArrays(crops.lr[::step][:n], crops.hr[::step][:n])
