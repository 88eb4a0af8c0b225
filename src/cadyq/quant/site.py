"""Named places where features are quantised. In a float network a site is the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import quantize_grid
from cadyq.quant.context import Context, SiteRecord
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.quantizer import ActQuantizer
from cadyq.quant.selector import BitSelector

__all__ = ["Site", "SiteKind", "bind_sites", "sites_of"]

SiteKind = Literal["body", "fixed", "edge", "skip", "stream"]


class Site(nn.Module):
    """A place in a backbone's forward where the feature may be quantised.

    Args:
        conv: the convolution that receives the feature, or ``None`` (skips, streams).
        kind: ``body``: dynamic in CADyQ; ``fixed``: 8 bit wherever the body is quantised; ``edge``: float in the
            paper's networks, 8 bit with integer edges and when fully quantised; ``skip``: a shortcut, quantised
            only when everything is; ``stream``: a plane that an integer network stores on a 16-bit grid.
        channels: channels of the feature; taken from ``conv`` if given.
        nonneg: the feature cannot be negative (it follows a ReLU), so that an unsigned range loses nothing.
        pixels: pixels of this feature per pixel of the LR picture (4 behind one PixelShuffle(2)).
        bits: bit-width where the site is quantised but not dynamic, 8 or 16. 16 is for the picture itself and for
            planes whose few large values would leave too little for the many small ones: the convolution then takes
            the plane's own 16-bit grid.
        on_stream: the feature is a stream plane, and already lies on that plane's grid where there is one.
    """

    grid: Tensor

    def __init__(
        self,
        conv: Conv2d | ConvTranspose2d | None,
        kind: SiteKind = "body",
        *,
        channels: int | None = None,
        nonneg: bool = False,
        pixels: int = 1,
        bits: int = 8,
        on_stream: bool = False,
    ) -> None:
        super().__init__()
        if conv is None and channels is None:
            raise ValueError("a site without a convolution needs the number of channels")
        self.name = ""
        self.kind: SiteKind = kind
        self.channels = conv.in_channels if conv is not None else int(channels or 0)
        self.nonneg = nonneg
        self.pixels = pixels
        self.static_bits = bits
        self.on_stream = on_stream
        self.macs_per_pixel = float(conv.macs * pixels) if conv is not None else 0.0
        # In a tuple: the convolution belongs to the backbone, not to the site.
        self._conv = (conv,)
        self.quantizer: ActQuantizer | None = None
        self.selector: BitSelector | None = None
        self.grid_bits = 16
        self.has_grid = False  # whether grid is above 0, known without asking a device
        self.register_buffer("grid", torch.zeros(()), persistent=False)
        self.observer: SiteObserver | None = None

    @property
    def conv(self) -> Conv2d | ConvTranspose2d | None:
        """The convolution behind this site."""
        return self._conv[0]

    def set_grid(self, step: float) -> None:
        """Store the feature on a 16-bit grid with this step before anything else looks at it (0: float)."""
        self.grid = torch.as_tensor(step, dtype=self.grid.dtype, device=self.grid.device)
        self.has_grid = step > 0

    def sum(self, a: Tensor, b: Tensor, ctx: Context) -> Tensor:
        """``a + b``, which this site reads next, of values that do not lie on its grid yet.

        An integer network rounds both to the grid before it adds them (docs/numerics.md, equation 14); rounding the
        sum alone gives another value every other time.
        """
        if self.has_grid and not ctx.is_traced:
            a, b = (quantize_grid(x, self.grid, self.grid_bits) for x in (a, b))
        return a + b

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, ctx: Context) -> Tensor: ...

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Quantise ``x`` (n, C, H, W) with the bits chosen for each patch or tile, and record them."""
        if self.observer is not None:
            self.observer.observe(self, x, ctx)
        if self.has_grid:
            x = quantize_grid(x, self.grid, self.grid_bits)
        if self.kind == "stream":
            return x
        if ctx.mask is not None:
            x = x * ctx.mask
        if self.quantizer is None:
            bits = torch.full_like(ctx.area, float(self.grid_bits) if self.has_grid else 32.0)
            self._record(ctx, bits, None)
            return x
        self.quantizer.margin = ctx.margin
        if self.selector is None:
            return self._fixed(x, ctx, self.quantizer)
        return self._dynamic(x, ctx, self.quantizer, self.selector)

    def _fixed(self, x: Tensor, ctx: Context, quantizer: ActQuantizer) -> Tensor:
        choice = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        forced = ctx.forced(self.name) if self.kind == "body" else None
        if forced is not None and len(quantizer.bits) > 1:
            choice = quantizer.index_of(forced, choice)
        bits = quantizer.bits[choice].to(ctx.area.dtype)
        if x.shape[0] != ctx.area.shape[0]:  # a static site on the whole plane of a tiled picture
            bits = bits[:1].expand_as(ctx.area)
        if ctx.keep is not None:
            bits = bits * ctx.keep.detach()
        self._record(ctx, bits, None)
        return quantizer(x, choice, None)

    def _dynamic(self, x: Tensor, ctx: Context, quantizer: ActQuantizer, selector: BitSelector) -> Tensor:
        forced = ctx.forced(self.name)
        n = x.shape[0]
        probs: Tensor | None = None
        if forced is None or ctx.soft:
            probs = selector(ctx.gradient, ctx.deviation(x), ctx.budget)
        if forced is not None:
            choice = selector.index_of(forced, torch.zeros(n, dtype=torch.long, device=x.device))
        else:
            assert probs is not None
            choice = probs.argmax(1)
        bits = selector.bits[choice].to(x.dtype)
        expected: Tensor | None = None
        if ctx.soft and probs is not None:
            expected = (probs * selector.bits).sum(1)
        if selector.has_zero:
            # The first site of a block decides whether the block is computed at all.
            hard = (choice > 0).to(x.dtype)
            ctx.keep = hard
            if ctx.soft and probs is not None:
                alive = 1 - probs[:, 0]
                ctx.keep = hard + alive - alive.detach()
                probs = probs[:, 1:] / alive.clamp_min(1e-6)[:, None]
            choice = (choice - 1).clamp_min(0)
        elif ctx.keep is not None:
            bits = bits * ctx.keep.detach()
            if expected is not None:
                expected = expected * ctx.keep
        self._record(ctx, bits, expected)
        return quantizer(x, choice, probs if ctx.soft else None)

    def _record(self, ctx: Context, bits: Tensor, expected: Tensor | None) -> None:
        ctx.records.append(SiteRecord(self.name, self.kind, bits, expected, self.macs_per_pixel, ctx.area))


class SiteObserver:
    """Sees every feature before its site touches it; calibration derives from this."""

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        """Look at the feature ``x`` (n, C, H, W) that ``site`` is about to quantise."""
        raise NotImplementedError


def sites_of(network: nn.Module, *kinds: SiteKind) -> list[Site]:
    """Sites of a network in order of definition, of the given kinds (all if none is given)."""
    found = [module for module in network.modules() if isinstance(module, Site)]
    return [site for site in found if not kinds or site.kind in kinds]


def bind_sites(network: nn.Module) -> None:
    """Give every site its path as name; backbones call this at the end of their constructor."""
    for name, module in network.named_modules():
        if isinstance(module, Site):
            module.name = name
