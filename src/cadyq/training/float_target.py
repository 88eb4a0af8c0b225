"""The float network as the target: what it makes of LR pictures, and what fewer bits do to that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.cells import Force, Inferred, Run
from cadyq.functional.resize import imresize
from cadyq.quant.context import Context, TileContext, channel_deviation
from cadyq.quant.site import Site, SiteObserver, sites_of
from cadyq.training.loop import to_tensor
from cadyq.training.supervise import Sensitivity

__all__ = ["FloatTarget", "Report", "luma_error", "site_gains"]


class Report(Protocol):
    """Called with what is being done, how much of it is done, and how much there is."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


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
        tile: side of the tiles that bits are chosen for, LR pixels.
        gradients: per crop, what selectors see of the picture, (tiles, 2).
        deviations: per site of the body and crop, what its selector sees of the features, (tiles, C).
    """

    crops: NDArray[np.uint8]
    sr: NDArray[np.float16]
    detail: NDArray[np.float64]
    tile: int
    gradients: list[Tensor]
    deviations: dict[str, list[Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, network: Backbone, crops: NDArray[np.uint8], tile: int, report: Report) -> FloatTarget:
        """Run the float network over all crops."""
        side = crops.shape[1] * network.scale
        sr = np.empty((len(crops), side, side, 3), np.float16)
        detail, spy = np.empty(len(crops)), _Deviations(tile)
        body = sites_of(network, "body")
        for site in body:
            site.observer = spy
        for i, crop in enumerate(crops):
            report("upscaling with the float network", i, len(crops))
            result = network(to_tensor(crop[None]))[0].mul(255).permute(1, 2, 0).numpy()
            sr[i] = result
            detail[i] = np.square(_luma(result.clip(0, 255) - imresize(crop, (side, side)))).mean()
        for site in body:
            site.observer = None
        gradients = [TileContext(to_tensor(crop[None]), tile).gradient for crop in crops]
        # A crop without detail must not count without bound.
        detail = np.maximum(detail, 0.05 * detail.mean() + 1e-3)
        return cls(crops, sr, detail, tile, gradients, spy.found)

    def tile_errors(self, run: Run, index: int, force: Force) -> tuple[NDArray[np.float64], Inferred]:
        """Error of every tile of a crop, (tiles,), and the result."""
        found = run(_fine(self.crops[index]), self.tile, force=force)
        square = np.square(_luma(_gray_levels(found) - self.sr[index].clip(0, 255)))
        side = self.tile * (len(square) // self.crops.shape[1])
        cuts = [slice(start, start + side) for start in range(0, len(square), side)]
        return np.array([square[rows, cols].mean() for rows in cuts for cols in cuts], np.float64), found

    def compare(
        self, run: Run, sites: Sequence[str], indices: Sequence[int], force: Force, report: Report
    ) -> tuple[float, float]:
        """Mean bits of ``sites``, and PSNR of luma (not rounded) to the float network's results, in dB."""
        bits, errors = [], []
        for done, i in enumerate(indices):
            report("comparing with the float network", done, len(indices))
            error, found = self.tile_errors(run, i, force)
            errors.append(error.mean())
            bits.append(np.mean([found.bits[name].mean() for name in sites]))
        return float(np.mean(bits)), float(10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9)))

    def sensitivity(
        self, run: Run, bits: Sequence[int], indices: Sequence[int], report: Report
    ) -> Sensitivity:
        """Errors per tile with equal bits everywhere, and what selectors see; gains of sites are left out."""
        errors: dict[int, list[NDArray[np.float64]]] = {b: [] for b in bits}
        for done, i in enumerate(indices):
            report("measuring what bits are worth", done, len(indices))
            for b in bits:
                errors[b].append(self.tile_errors(run, i, b)[0])
        detail = [np.full(len(e), self.detail[i]) for e, i in zip(errors[bits[0]], indices, strict=True)]
        return Sensitivity(
            errors={b: torch.from_numpy(np.concatenate(e)).float() for b, e in errors.items()},
            group_error=torch.from_numpy(np.concatenate(detail)).float(),
            gradient=torch.cat([self.gradients[i] for i in indices]),
            deviations={name: torch.cat([d[i] for i in indices]) for name, d in self.deviations.items()},
            site_gain={},
        )


def luma_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared luma difference of two batches (N, 3, H, W) in [0, 1], in squared gray levels: (N,)."""
    weights = a.new_tensor(LUMA).view(1, 3, 1, 1)
    return ((a - b) * weights).sum(1).mul(255).square().mean((1, 2))


def _luma(rgb: NDArray[Any]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = rgb.astype(np.float32) @ np.array(LUMA, np.float32)
    return result


def _fine(rgb: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The same colors in 16 bits, so that the result is not rounded to 8."""
    return rgb.astype(np.uint16) * np.uint16(257)


def _gray_levels(found: Inferred) -> NDArray[np.float32]:
    result: NDArray[np.float32] = found.pixels[0].astype(np.float32) / np.float32(257)
    return result


class _Deviations(SiteObserver):
    """Deviations of the features of a whole crop, tile by tile."""

    def __init__(self, tile: int) -> None:
        self.tile = tile
        self.found: dict[str, list[Tensor]] = {}

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        tiles = [part for rows in x.split(self.tile, 2) for part in rows.split(self.tile, 3)]
        deviations = torch.cat([channel_deviation(part) for part in tiles])
        self.found.setdefault(site.name, []).append(deviations)


def site_gains(
    run: Run,
    sites: Sequence[str],
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
    bits = sorted(errors)
    patches = [_fine(target.crops[i, :side, :side]) for i in indices]

    def upscaled(force: dict[str, int]) -> list[NDArray[np.float32]]:
        return [_luma(_gray_levels(run(patch, target.tile, force=force))) for patch in patches]

    most = dict.fromkeys(sites, bits[-1])
    best, found = upscaled(most), {}
    measured = np.unique(np.linspace(0, len(sites) - 1, n_sites).round().astype(int))
    for done, k in enumerate(measured.tolist()):
        report("measuring sites", done, len(measured))
        fewer = upscaled({**most, sites[k]: bits[0]})
        lost = [
            np.square(a - b).mean() / target.detail[i] for a, b, i in zip(fewer, best, indices, strict=True)
        ]
        found[sites[k]] = max(float(np.mean(lost)), 1e-9)
    usual = float(np.exp(np.mean(np.log(list(found.values())))))
    total = {b: max(float((errors[b] - errors[bits[-1]]).mean()), 0.0) for b in bits}
    share = {b: total[b] / max(total[bits[0]], 1e-12) for b in bits}
    return {name: {b: share[b] * found.get(name, usual) for b in bits} for name in sites}
