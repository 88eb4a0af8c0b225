"""Selectors from measured errors: what do fewer bits cost *here*?

The end-to-end gradient reaches a selector through a softmax and a straight-through estimate, and moves it slowly.
But the answer it should learn can be measured: run the same tiles with few and with many bits and compare the
errors. With d_i the relative error increase of tile i when all sites use the fewest bits, and g_sb the mean
increase when site s alone uses b bits, the increase caused by b bits at site s of tile i is modelled as
c_i * g_sb, and the best bits minimise c_i * g_sb + lambda * b. Each site predicts log c_i linearly from its own
inputs (a quasi-Poisson regression, which stays unbiased for increases that come out negative), so that the rule is
exactly a linear layer followed by an argmax: the selector of the paper, with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.cells import Force, Run
from cadyq.data.crops import CropArrays
from cadyq.errors import ArgumentError
from cadyq.functional.image import luma
from cadyq.quant.context import Context, TileContext
from cadyq.quant.infer import run_tiles
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.budget import find_budget
from cadyq.training.loop import native_convolutions, to_tensor

__all__ = ["Sensitivity", "chosen_bits", "fit_selectors", "measure", "reach", "set_budget", "tile_errors"]

RELATIVE = 0.25
"""Power of a crop's own error by which its tiles' increases are divided.

A picture's PSNR asks for 1, but a crop is not a picture: a photo's crops differ in error more than photos do, and no
tile knows its photo. Validation photos at equal FQR: SRResNet x4 (calibrated) 32.77 dB with 1, 32.83 with 0.5, 32.86
with 0.25 (there with a ridge of 0.1 and 0.03 bits more), 32.85 with 0; IDN x4 32.44, 32.45, 32.45, 32.44.
"""
_LEAST_ERROR = 1e-2  # squared gray levels; a crop without any error would count without bound
SHARPNESS = 4.0  # scores per unit of log-sensitivity; sets only how peaked the softmax is, not the choice


@dataclass
class Sensitivity:
    """Measured sensitivities.

    Attributes:
        errors: mean squared luma error per bit-width and tile: bits -> (n,), squared gray levels.
        group_error: error at the most bits of the crop that each tile belongs to, (n,).
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
        """Error increase of each tile from the most to the fewest bits, by its crop's error, mean 1: (n,).

        Where fewer bits lose nothing on average, what is left is noise, and all tiles are alike: 1.
        """
        increase = self.errors[min(self.errors)] - self.errors[max(self.errors)]
        increase = increase / self.group_error**RELATIVE
        mean = increase.mean()
        return increase / mean if float(mean) > 0 else torch.ones_like(increase)


class _Deviations(SiteObserver):
    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        if site.kind == "body":
            self.found.setdefault(site.name, []).append(ctx.deviation(x))


def tile_errors(sr: NDArray[np.uint8], hr: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Mean squared luma error of every whole ``side`` x ``side`` tile of uint8 (H, W, 3) pictures, (tiles,)."""
    square = (luma(sr) - luma(hr)) ** 2
    rows, cols = square.shape[0] // side, square.shape[1] // side
    tiles = square[: rows * side, : cols * side].reshape(rows, side, cols, side)
    means: NDArray[np.float64] = tiles.mean((1, 3)).ravel()
    return means


@torch.no_grad()
def measure(
    network: Backbone,
    crops: CropArrays,
    *,
    n_crops: int,
    n_site_crops: int = 8,
    tile: int = 48,
    seed: int = 0,
    run: Run | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Measure what fewer bits cost on ``n_crops`` random crops, and per site on ``n_site_crops`` of them.

    ``run`` runs this network; by default torch does, but the integer engine does it faster.
    """
    run = run or partial(run_tiles, network)
    sites = sites_of(network, "body")
    assert sites[0].quantizer is not None
    candidates = [int(b) for b in sites[0].quantizer.bits]
    if len(candidates) < 2:
        raise ArgumentError("network", candidates, "at least two candidate bit-widths above 0")
    top = candidates[-1]

    def errors(index: int, force: Force) -> NDArray[np.float64]:
        sr = run(np.asarray(crops.lr[index]), tile, force=force).pixels[0]
        return tile_errors(sr, np.asarray(crops.hr[index]), tile * network.scale)

    order = np.random.default_rng(seed).permutation(len(crops.lr))[:n_crops].tolist()
    found: dict[int, list[NDArray[np.float64]]] = {b: [] for b in candidates}
    gradients, spy = [], _Deviations()
    with native_convolutions():
        for done, index in enumerate(order):
            for b in candidates:
                found[b].append(errors(index, b))
            gradients.append(_see(network, crops.lr[index : index + 1], tile, top, spy))
            if done % 20 == 19:
                log(f"measured {done + 1}/{n_crops} crops")
        gain: dict[str, dict[int, float]] = {}
        for site in sites:
            log(f"measured {len(gain)}/{len(sites)} sites")
            per_bits = gain.setdefault(site.name, {})
            for b in candidates[:-1]:
                force: Force = {s.name: b if s is site else top for s in sites}
                lost = [
                    (errors(index, force) - best).mean() / max(best.mean(), _LEAST_ERROR)
                    for index, best in zip(order[:n_site_crops], found[top], strict=False)
                ]
                # Noise must not make a site look free: at least half a standard error.
                per_bits[b] = float(max(np.mean(lost), 0.5 * np.std(lost) / len(lost) ** 0.5))
    groups = np.concatenate([np.full(len(e), e.mean()) for e in found[top]])
    return Sensitivity(
        {b: torch.from_numpy(np.concatenate(e)).float() for b, e in found.items()},
        torch.from_numpy(groups).float().clamp_min(_LEAST_ERROR),
        torch.cat(gradients),
        {name: torch.cat(parts) for name, parts in spy.found.items()},
        gain,
    )


def _see(network: Backbone, lr: NDArray[np.uint8], tile: int, bits: int, spy: _Deviations) -> Tensor:
    """Let ``spy`` see what the selectors see of a crop (1, h, w, 3) in tiles; return the tiles' gradients."""
    x = to_tensor(lr)
    ctx = TileContext(x, tile, force_bits=bits)
    sites = sites_of(network, "body")
    for site in sites:
        site.observer = spy
    try:
        network(x, ctx)
    finally:
        for site in sites:
            site.observer = None
    # Whole tiles only, as `tile_errors` counts them.
    whole = (lr.shape[1] // tile, lr.shape[2] // tile)
    if whole != (ctx.rows, ctx.cols):
        raise ArgumentError("tile", tile, f"a divisor of the crops' sides {lr.shape[1:3]}")
    return ctx.gradient


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


@torch.no_grad()
def reach(network: Backbone, seen: Sensitivity, fqr: float) -> float:
    """Set the budget with which the measured tiles get ``fqr`` bits on average; return the mean they get."""
    sites = [s for s in sites_of(network, "body") if s.selector is not None]
    present = [0.0]

    def bits_at(knob: float) -> float:
        set_budget(network, present[0] - knob)
        present[0] = knob
        return float(np.mean([float(chosen_bits(site, seen).mean()) for site in sites]))

    knob, found = find_budget(bits_at, fqr)
    bits_at(knob)
    return found


def chosen_bits(site: Site, seen: Sensitivity) -> Tensor:
    """Bits that a site's selector chooses for the measured tiles, (n,)."""
    assert site.selector is not None
    scores = site.selector(seen.gradient, seen.deviations[site.name])
    return site.selector.bits[scores.argmax(1)].float()
