"""The float network as the target: what it makes of LR pictures, and what fewer bits do to that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.functional.resize import imresize
from cadyq.quant.context import Context, TileContext
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.loop import to_tensor
from cadyq.training.supervise import Sensitivity

__all__ = ["FloatTarget", "Report", "luma_error", "measure_tiles", "site_gains"]

Report: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

LUMA = (0.299, 0.587, 0.114)


@dataclass
class FloatTarget:
    """Crops and the float network's results.

    Errors are mean squared differences of luma in squared gray levels. They count relative to ``detail``: the true
    picture is unknown, but the network's distance from it grows with what it adds to bicubic.

    Attributes:
        crops: uint8 (N, side, side, 3).
        sr: (N, scale side, scale side, 3), gray levels, not clamped; float16, which rounds by 1/16 at most.
        detail: per crop, the mean squared luma of what the network adds to bicubic, (N,).
        seconds_per_crop: how long the float network took.
    """

    crops: NDArray[np.uint8]
    sr: NDArray[np.float16]
    detail: NDArray[np.float64]
    seconds_per_crop: float

    @classmethod
    @torch.no_grad()
    def of(cls, network: Backbone, crops: NDArray[np.uint8], report: Report) -> FloatTarget:
        """Run the float network over all crops."""
        side = crops.shape[1] * network.scale
        sr = np.empty((len(crops), side, side, 3), np.float16)
        detail, seconds = np.empty(len(crops)), []
        for i, crop in enumerate(crops):
            report("upscaling with the float network", i, len(crops))
            began = time.monotonic()
            result = network(to_tensor(crop[None]))[0].mul(255).permute(1, 2, 0).numpy()
            seconds.append(time.monotonic() - began)
            sr[i] = result
            detail[i] = np.square(_luma(result.clip(0, 255) - imresize(crop, (side, side)))).mean()
        # A crop without detail must not count without bound.
        return cls(crops, sr, np.maximum(detail, 0.05 * detail.mean() + 1e-3), float(np.median(seconds)))

    @torch.no_grad()
    def tile_errors(
        self, network: Backbone, index: int, tile: int, force: int | dict[str, int | Tensor] | None
    ) -> tuple[NDArray[np.float64], TileContext]:
        """Error of every tile of a crop, (tiles,), and the context with its records."""
        lr = to_tensor(self.crops[index : index + 1])
        ctx = TileContext(lr, tile, force_bits=force)
        sr = network(lr, ctx).clamp(0, 1)[0].mul(255).permute(1, 2, 0).numpy()
        square = np.square(_luma(sr - self.sr[index].clip(0, 255)))
        side = tile * network.scale
        cuts = [slice(start, start + side) for start in range(0, len(square), side)]
        return np.array([square[rows, cols].mean() for rows in cuts for cols in cuts], np.float64), ctx

    def compare(
        self, network: Backbone, indices: Sequence[int], tile: int, force: int | None, report: Report
    ) -> tuple[float, float]:
        """FQR, and PSNR of luma (not rounded) to the float network's results, in dB."""
        bits, errors = [], []
        for done, i in enumerate(indices):
            report("comparing with the float network", done, len(indices))
            found, ctx = self.tile_errors(network, i, tile, force)
            errors.append(found.mean())
            bits.append(float(torch.stack([r.bits for r in ctx.records if r.kind == "body"]).mean()))
        return float(np.mean(bits)), float(10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9)))


def luma_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared luma difference of two batches (N, 3, H, W) in [0, 1], in squared gray levels: (N,)."""
    weights = a.new_tensor(LUMA).view(1, 3, 1, 1)
    return ((a - b) * weights).sum(1).mul(255).square().mean((1, 2))


def _luma(rgb: NDArray[Any]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = rgb.astype(np.float32) @ np.array(LUMA, np.float32)
    return result


class _Deviations(SiteObserver):
    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        self.found.setdefault(site.name, []).append(ctx.deviation(x))


def measure_tiles(
    network: Backbone, target: FloatTarget, indices: Sequence[int], tile: int, report: Report
) -> Sensitivity:
    """Errors and selector inputs per tile with equal bits everywhere; gains of sites are left out."""
    body = sites_of(network, "body")
    assert body[0].quantizer is not None
    bits = [int(b) for b in body[0].quantizer.bits]
    spy = _Deviations()
    errors: dict[int, list[NDArray[np.float64]]] = {b: [] for b in bits}
    detail, gradients = [], []
    for done, i in enumerate(indices):
        report("measuring what bits are worth", done, len(indices))
        for b in bits:
            for site in body:
                site.observer = spy if b == bits[-1] else None
            found, ctx = target.tile_errors(network, i, tile, b)
            errors[b].append(found)
        gradients.append(ctx.gradient)
        detail.append(np.full(len(found), target.detail[i]))
    for site in body:
        site.observer = None
    return Sensitivity(
        errors={b: torch.from_numpy(np.concatenate(e)).float() for b, e in errors.items()},
        group_error=torch.from_numpy(np.concatenate(detail)).float(),
        gradient=torch.cat(gradients),
        deviations={name: torch.cat(parts) for name, parts in spy.found.items()},
        site_gain={},
    )


@torch.no_grad()
def site_gains(
    network: Backbone,
    target: FloatTarget,
    indices: Sequence[int],
    side: int,
    n_sites: int,
    errors: dict[int, Tensor],
    report: Report,
) -> dict[str, dict[int, float]]:
    """Relative error of each site alone at fewer bits, on a patch of each crop.

    Measured at the fewest bits, and against the same network with the most bits, so that no other error hides this
    one; between, in the proportion of ``errors`` (all sites together). Where only ``n_sites`` can be afforded they are
    spread over the depth, and the others get the geometric mean.
    """
    bits, names = sorted(errors), [site.name for site in sites_of(network, "body")]
    lr = to_tensor(np.stack([target.crops[i, :side, :side] for i in indices]))
    detail = torch.from_numpy(target.detail[list(indices)]).float()

    def run(force: dict[str, int | Tensor]) -> Tensor:
        ctx = Context.of(lr)
        ctx.force_bits = force
        return network(lr, ctx).clamp(0, 1)

    most: dict[str, int | Tensor] = dict.fromkeys(names, bits[-1])
    best, found = run(most), {}
    measured = np.unique(np.linspace(0, len(names) - 1, n_sites).round().astype(int))
    for done, k in enumerate(measured.tolist()):
        report("measuring sites", done, len(measured))
        error = luma_error(run({**most, names[k]: bits[0]}), best)
        found[names[k]] = max(float((error / detail).mean()), 1e-9)
    usual = float(np.exp(np.mean(np.log(list(found.values())))))
    total = {b: max(float((errors[b] - errors[bits[-1]]).mean()), 0.0) for b in bits}
    share = {b: total[b] / max(total[bits[0]], 1e-12) for b in bits}
    return {name: {b: share[b] * found.get(name, usual) for b in bits} for name in names}
