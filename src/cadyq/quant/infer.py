"""Inference of a (fake-quantised) network on uint8 or uint16 pictures: NumPy in, NumPy out, torch in between.

Nothing here cuts or joins pictures; `cadyq.upscale` does, and knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cadyq.cells import Force, Inferred, Levels, SiteCost
from cadyq.functional.image import to_levels
from cadyq.quant.context import Context, SiteRecord, TileContext
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import sites_of

__all__ = ["run_batch", "run_tiles", "site_costs", "threads"]

# At the output's size a plane of 64 channels takes 4 KiB per LR pixel, and a few are alive at once.
_BAND_PIXELS = 1 << 16


def site_costs(network: nn.Module) -> list[SiteCost]:
    """List the sites that FQR (``body``) and BitOPs (``body``, ``fixed``) count, in order of definition."""
    result = []
    for site in sites_of(network, "body", "fixed"):
        conv = site.conv
        if conv is None:
            continue
        assert isinstance(conv, Conv2d)
        chooser = site.selector if site.selector is not None else site.quantizer
        candidates = tuple(chooser.bits.tolist()) if chooser is not None else (32,)
        result.append(SiteCost(site.name, site.kind, site.macs_per_pixel, conv.weight_bits or 32, candidates))
    return result


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch compute with this many threads for a while (None: leave it as it is)."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def run_batch(network: nn.Module, rgb: Levels, *, force: Force = None, budget: float = 0.0) -> Inferred:
    """Upscale a batch of equal-sized pictures, each of which decides for itself.

    Args:
        network: a backbone in evaluation mode, converted or not.
        rgb: uint8 or uint16 ``(n, h, w, 3)``; the result has the same type.
        force: bit-widths instead of the selectors' choices; see `Context.force_bits`. Arrays are ``(n,)``.
        budget: added to the selectors' scores per bit.
    """
    lr = _tensor(network, rgb)
    ctx = Context.of(lr)
    ctx.force_bits, ctx.budget, ctx.band_pixels = _force(force), budget, _BAND_PIXELS
    return _finished(network, network(lr, ctx), ctx.records, rgb.dtype)


@torch.inference_mode()
def run_tiles(
    network: nn.Module,
    rgb: Levels,
    tile: int,
    *,
    active: NDArray[np.bool_] | None = None,
    force: Force = None,
    budget: float = 0.0,
) -> Inferred:
    """Upscale one picture with decisions per tile; arguments as of `run_batch`, cells in reading order.

    Args:
        network: a backbone in evaluation mode, converted or not.
        rgb: uint8 or uint16 ``(h, w, 3)``.
        tile: side of a tile, LR pixels.
        active: which tiles are computed, ``(cells,)``; the rest passes the body untouched with 0 bits.
        force: bit-widths instead of the selectors' choices. Arrays are ``(cells,)``.
        budget: added to the selectors' scores per bit.
    """
    lr = _tensor(network, rgb[None])
    ctx = TileContext(
        lr,
        tile,
        active=None if active is None or active.all() else torch.from_numpy(active.copy()),
        force_bits=_force(force),
        budget=budget,
        band_pixels=_BAND_PIXELS,
    )
    return _finished(network, network(lr, ctx), ctx.records, rgb.dtype)


def _tensor(network: nn.Module, rgb: Levels) -> Tensor:
    like = next(network.parameters())
    largest = int(np.iinfo(rgb.dtype).max)
    # torch knows few operations on uint16; every level is exact in float32.
    planes = np.ascontiguousarray(rgb.transpose(0, 3, 1, 2))
    lr = torch.from_numpy(planes if largest == 255 else planes.astype(np.float32))
    return lr.to(like.device, like.dtype) / largest


def _force(force: Force) -> int | dict[str, int | Tensor] | None:
    if force is None or isinstance(force, int):
        return force
    return {
        k: v if isinstance(v, int) else torch.from_numpy(np.asarray(v, np.int64)) for k, v in force.items()
    }


def _finished(network: nn.Module, sr: Tensor, records: list[SiteRecord], dtype: np.dtype[Any]) -> Inferred:
    counted = {cost.name for cost in site_costs(network)}
    bits = {r.name: r.bits.cpu().numpy().astype(np.uint8) for r in records if r.name in counted}
    return Inferred(to_levels(sr.cpu().numpy(), dtype).transpose(0, 2, 3, 1), bits)
