"""One network, many budgets: where the knob must stand for given mean bits, and how to make one place the zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays
from cadyq.quant.site import sites_of
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
    """Pairs (FQR, budget), as measured: one for every target within reach, ascending.

    The crops are spread over all of ``crops``, which must not be pictures that anything is reported on.
    """
    some = spread(crops, n_crops)
    seen: dict[float, float] = {}

    def bits_at(knob: float) -> float:
        if knob not in seen:
            seen[knob] = mean_bits(network, some, n_crops, tile=tile, budget=knob)
        return seen[knob]

    pairs = {}
    for target in targets:
        knob, found = find_budget(bits_at, target)
        if abs(found - target) <= 0.1:
            pairs[round(found, 4)] = round(knob, 5)
    return sorted(pairs.items())


@torch.no_grad()
def place_budget(
    network: Backbone, crops: CropArrays, target_fqr: float, *, n_crops: int, tile: int = 48
) -> float:
    """Shift every selector's biases so that the mean bits at budget 0 are ``target_fqr``; return the shift.

    A budget adds ``budget * bits`` to the scores, and so does a bias: what the knob found is made the default.
    """
    some = spread(crops, n_crops)
    knob, _ = find_budget(lambda b: mean_bits(network, some, n_crops, tile=tile, budget=b), target_fqr)
    for site in sites_of(network, "body"):
        if site.selector is not None:
            bits = site.selector.bits.to(site.selector.linear.bias.dtype)
            site.selector.linear.bias.add_(knob * bits)
    return knob


def spread(crops: CropArrays, n: int) -> CropArrays:
    """``n`` crops at equal distances."""
    step = max(1, len(crops.lr) // n)
    return CropArrays(crops.lr[::step][:n], crops.hr[::step][:n])
