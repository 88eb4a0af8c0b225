"""Selectors from measured errors: what do fewer bits cost *here*?

The end-to-end gradient reaches a selector through a softmax and a straight-through estimate, and moves it slowly.
But the answer it should learn can be measured: run the same patches with few and with many bits and compare the
errors. With d_i the relative error increase of patch i when all sites use the fewest bits, and g_sb the mean
increase when site s alone uses b bits, the increase caused by b bits at site s of patch i is modelled as
c_i * g_sb, and the best bits minimise c_i * g_sb + lambda * b. Each site predicts log c_i linearly from its own
inputs (a quasi-Poisson regression, which stays unbiased for increases that come out negative), so that the rule is
exactly a linear layer followed by an argmax: the selector of the paper, with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays
from cadyq.errors import ArgumentError
from cadyq.quant.context import Context
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.loop import native_convolutions, to_tensor

__all__ = ["Sensitivity", "fit_selectors", "measure", "set_budget"]

SHARPNESS = 4.0  # scores per unit of log-sensitivity; sets only how peaked the softmax is, not the choice


@dataclass
class Sensitivity:
    """Measured sensitivities.

    Attributes:
        errors: mean squared error per bit-width, patch: bits -> (n,), squared grey levels.
        group_error: error at the most bits of the crop that each patch belongs to, (n,).
        gradient: selector inputs, (n, 2).
        deviations: per site, (n, C).
        site_gain: per site and bit-width: mean increase relative to the most bits, at that site alone.
    """

    errors: dict[int, Tensor]
    group_error: Tensor
    gradient: Tensor
    deviations: dict[str, Tensor]
    site_gain: dict[str, dict[int, float]]

    def target(self) -> Tensor:
        """Relative error increase of each patch from the most to the fewest bits, mean 1: (n,)."""
        increase = (self.errors[min(self.errors)] - self.errors[max(self.errors)]) / self.group_error
        return increase / increase.mean().clamp_min(1e-12)


class _Deviations(SiteObserver):
    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        if site.kind == "body":
            self.found.setdefault(site.name, []).append(ctx.deviation(x))


def _patches(crop: NDArray[Any], side: int) -> NDArray[Any]:
    """(H, W, 3) -> (n, side, side, 3), whole patches only."""
    rows, cols = crop.shape[0] // side, crop.shape[1] // side
    cut = crop[: rows * side, : cols * side].reshape(rows, side, cols, side, 3)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)


@torch.no_grad()
def measure(
    network: Backbone,
    crops: CropArrays,
    *,
    n_crops: int,
    n_site_crops: int = 8,
    patch: int = 48,
    seed: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Measure what fewer bits cost on ``n_crops`` random crops, and per site on ``n_site_crops`` of them."""
    sites = sites_of(network, "body")
    assert sites[0].quantizer is not None
    candidates = [int(b) for b in sites[0].quantizer.bits]
    if len(candidates) < 2:
        raise ArgumentError("network", candidates, "at least two candidate bit-widths above 0")
    order = np.random.default_rng(seed).permutation(len(crops.lr))[:n_crops]
    spy = _Deviations()
    errors: dict[int, list[Tensor]] = {b: [] for b in candidates}
    gradients, groups = [], []
    gains: dict[str, dict[int, list[float]]] = {s.name: {b: [] for b in candidates[:-1]} for s in sites}

    def run(lr: Tensor, hr: Tensor, force: int | dict[str, int | Tensor]) -> Tensor:
        ctx = Context.of(lr)
        ctx.force_bits = force
        sr = network(lr, ctx).clamp(0, 1)
        error: Tensor = (sr - hr).mul(255).square().mean((1, 2, 3))
        return error

    with native_convolutions():
        for done, index in enumerate(order):
            lr = to_tensor(_patches(crops.lr[index], patch))
            hr = to_tensor(_patches(crops.hr[index], patch * network.scale))
            gradients.append(Context.of(lr).gradient)
            for b in candidates:
                if b == candidates[-1]:
                    for site in sites:
                        site.observer = spy
                errors[b].append(run(lr, hr, b))
                for site in sites:
                    site.observer = None
            top = errors[candidates[-1]][-1]
            groups.append(top.mean().expand(len(top)))
            if done < n_site_crops:
                all_top = {s.name: candidates[-1] for s in sites}
                for site in sites:
                    for b in candidates[:-1]:
                        lowered = run(lr, hr, {**all_top, site.name: b})
                        gains[site.name][b].append(float((lowered - top).mean() / top.mean()))
            if done % 20 == 19:
                log(f"measured {done + 1}/{n_crops} crops")
    gain = {name: {b: float(np.mean(v)) for b, v in per.items()} for name, per in gains.items()}
    return Sensitivity(
        {b: torch.cat(v) for b, v in errors.items()},
        torch.cat(groups).clamp_min(1e-2),
        torch.cat(gradients),
        {name: torch.cat(v) for name, v in spy.found.items()},
        gain,
    )


def fit_selectors(network: Backbone, seen: Sensitivity, *, ridge: float = 1e-2) -> dict[str, float]:
    """Set every selector from measured sensitivities; :func:`set_budget` then places the thresholds.

    Returns per site the share of the target's deviance that its inputs explain.
    """
    target = seen.target()
    explained: dict[str, float] = {}
    for site in sites_of(network, "body"):
        selector = site.selector
        if selector is None:
            continue
        inputs = selector.features(seen.gradient, seen.deviations[site.name])
        slope, offset, share = _quasi_poisson(inputs, target, ridge)
        gains = site_increments(selector.bits.tolist(), seen.site_gain[site.name])
        with torch.no_grad():
            # Score of candidate k: sum over j <= k of (u - t_j), t_j = log(lambda * width_j / gain_j).
            weight, bias = torch.zeros_like(selector.linear.weight), torch.zeros_like(selector.linear.bias)
            for k in range(1, len(selector.bits)):
                weight[k] = weight[k - 1] + slope
                bias[k] = bias[k - 1] + offset + float(np.log(gains[k - 1]))
            selector.linear.weight.copy_(SHARPNESS * weight)
            selector.linear.bias.copy_(SHARPNESS * bias)
        explained[site.name] = share
    return explained


def site_increments(bits: Sequence[int], gain: dict[int, float]) -> list[float]:
    """Error saved per bit by each step up in ``bits``, made positive and decreasing (convex costs)."""
    positive = [b for b in bits if b]
    values = [max(gain.get(b, 0.0), 0.0) for b in positive]
    result = []
    for low, high, a, b in zip(positive[:-1], positive[1:], values[:-1], values[1:], strict=True):
        result.append(max(a - b, 1e-7) / (high - low))
    for i in range(1, len(result)):
        result[i] = min(result[i], 0.7 * result[i - 1])
    # A leading 0 (skip) has no measured gain here; it starts out of reach and is left to training.
    return result if bits[0] else [1e6, *result]


def _quasi_poisson(inputs: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, float, float]:
    """Weights (width,), offset and explained share of log-linear regression E[target] = exp(w x + c)."""
    x = inputs.double()
    y = target.double()
    scale = x.std(0).clamp_min(1e-6)
    z = torch.cat([x / scale, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    beta = torch.zeros(z.shape[1], dtype=torch.float64)
    penalty = torch.full_like(beta, ridge * len(x))
    penalty[-1] = 0
    for _ in range(60):  # damped Newton steps; the problem is convex
        mean = torch.exp((z @ beta).clamp(-12, 6))
        grad = z.T @ (mean - y) + penalty * beta
        hess = (
            (z * mean[:, None]).T @ z + torch.diag(penalty) + 1e-6 * torch.eye(len(beta), dtype=torch.float64)
        )
        move = torch.linalg.solve(hess, grad)
        beta = beta - move * min(1.0, 1.0 / float(move.abs().max().clamp_min(1e-9)))
        if float(move.abs().max()) < 1e-6:
            break

    def deviance(log_mean: Tensor) -> float:
        return float((torch.exp(log_mean) - y * log_mean).mean())

    null, fit = deviance(torch.zeros_like(y)), deviance((z @ beta).clamp(-12, 6))
    return (beta[:-1] / scale).float(), float(beta[-1]), null - fit


def set_budget(network: Backbone, lambda_log: float) -> None:
    """Fold a budget into the biases: every score loses ``lambda_log`` per step up (more means fewer bits)."""
    with torch.no_grad():
        for site in sites_of(network, "body"):
            if site.selector is not None:
                steps = torch.arange(len(site.selector.bits), dtype=torch.float32)
                site.selector.linear.bias.sub_(SHARPNESS * lambda_log * steps)
