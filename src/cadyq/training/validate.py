"""PSNR and mean bits on crops, the way a model will be used: whole crops, bits decided per tile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays
from cadyq.functional.fidelity import psnr_y
from cadyq.quant.context import Context, TileContext
from cadyq.quant.site import sites_of
from cadyq.training.loss import native_convolutions

__all__ = ["Validation", "mean_bits", "picture_of", "validate"]


class Validation(NamedTuple):
    """Means over crops.

    Attributes:
        psnr_db: Y-PSNR, with ``scale`` pixels shaved.
        fqr: bits over body sites, then tiles, then crops; 32 for a float network.
        n_images: how many crops.
    """

    psnr_db: float
    fqr: float
    n_images: int


@torch.no_grad()
def validate(
    network: Backbone, crops: CropArrays, n: int, *, tile: int = 48, budget: float = 0.0
) -> Validation:
    """Measure on the first ``n`` crops; ``tile`` and ``budget`` matter where there are selectors."""
    quality, bits = [], []
    for i in range(min(n, len(crops.lr))):
        sr, fqr = _run(network, crops.lr[i], tile, budget)
        quality.append(psnr_y(picture_of(sr), np.asarray(crops.hr[i]), network.scale))
        bits.append(fqr)
    return Validation(float(np.mean(quality)), float(np.mean(bits)), len(quality))


@torch.no_grad()
def mean_bits(network: Backbone, crops: CropArrays, n: int, *, tile: int = 48, budget: float = 0.0) -> float:
    """Only the FQR of `validate`."""
    return float(np.mean([_run(network, crops.lr[i], tile, budget)[1] for i in range(min(n, len(crops.lr)))]))


def picture_of(sr: Tensor) -> NDArray[np.uint8]:
    """(1, 3, H, W) in [0, 1] -> uint8 (H, W, 3)."""
    rounded = (sr[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
    picture: NDArray[np.uint8] = rounded.permute(1, 2, 0).cpu().numpy()
    return picture


def _run(network: Backbone, lr: NDArray[np.uint8], tile: int, budget: float) -> tuple[Tensor, float]:
    device = next(network.parameters()).device
    x = torch.from_numpy(np.array(lr[None])).to(device).permute(0, 3, 1, 2).float() / 255
    dynamic = any(site.selector is not None for site in sites_of(network, "body"))
    ctx = TileContext(x, tile, budget=budget) if dynamic else Context.of(x)
    with native_convolutions():
        sr = network(x, ctx)
    return sr, float(torch.stack([r.bits for r in ctx.records if r.kind == "body"]).float().mean())
