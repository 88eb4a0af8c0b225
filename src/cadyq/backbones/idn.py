"""IDN (Hui et al., CVPR 2018): 4 information distillation blocks of 64 channels, 17x17 deconvolution."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.backbones.blocks import Backbone, Bicubic, BicubicKind, bicubic_upscale
from cadyq.quant.context import Block, Context
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.site import Site

__all__ = ["IDN", "BicubicKind", "bicubic_upscale", "rgb_to_ycbcr", "ycbcr_to_rgb"]

SLOPE = 0.05
# BT.601 studio range as MATLAB's rgb2ycbcr: rows are Y, Cb, Cr for R, G, B in [0, 1]; grey levels.
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
OFFSET = (16.0, 128.0, 128.0)


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """RGB (N, 3, H, W) in [0, 1] -> Y, Cb, Cr / 255 (BT.601, Y in [16, 235] / 255), not rounded."""
    matrix, offset = _ycbcr(rgb)
    return F.conv2d(rgb, matrix[:, :, None, None], offset)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Inverse of :func:`rgb_to_ycbcr`; colors outside the RGB cube are not clamped."""
    matrix, offset = _ycbcr(ycbcr)
    inverse = torch.linalg.inv(matrix)
    return F.conv2d(ycbcr - offset.view(1, 3, 1, 1), inverse[:, :, None, None])


def _ycbcr(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_tensor(YCBCR) / 255, like.new_tensor(OFFSET) / 255


class DBlock(nn.Module):
    """Enhancement unit (two chains of three 3x3 convolutions) and 1x1 compression.

    The first ``channels / s`` channels behind the third convolution are kept and, concatenated to the block's
    input, added to the sixth's output; the others go on. The block's input itself is not quantised for that.
    """

    halo = 6
    residual = False

    def __init__(self, channels: int, d: int, s: int) -> None:
        super().__init__()
        kept = channels // s
        self.kept = kept
        self.convs = nn.ModuleList(
            [
                Conv2d(channels, channels - d, 3),
                Conv2d(channels - d, channels - 2 * d, 3, groups=4),
                Conv2d(channels - 2 * d, channels, 3),
                Conv2d(channels - kept, channels, 3),
                Conv2d(channels, channels - d, 3, groups=4),
                Conv2d(channels - d, channels + kept, 3),
            ]
        )
        self.sites = nn.ModuleList(
            Site(conv, on_stream=i == 0) for i, conv in enumerate(self.convs) if isinstance(conv, Conv2d)
        )
        self.compress = Conv2d(channels + kept, channels, 1)
        self.compress_site = Site(self.compress, "edge")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C, H, W)."""
        h = x
        for i, (site, conv) in enumerate(zip(self.sites, self.convs, strict=True)):
            if i == 3:
                kept, h = h[:, : self.kept], h[:, self.kept :]
            h = F.leaky_relu(conv(site(h, ctx)), SLOPE)
        h = self.compress_site.sum(h, torch.cat((x, kept), 1), ctx)
        return F.leaky_relu(self.compress(self.compress_site(h, ctx)), SLOPE)


class IDN(Backbone):
    """IDN: 590,915 parameters for RGB at every scale, 552,769 for Y only.

    Args:
        scale: 2, 3 or 4.
        n_blocks: number of distillation blocks.
        d: channels by which the convolutions of a block narrow.
        s: a block keeps ``channels / s`` channels of its first half.
        bicubic: picture to which the residual is added, see :func:`bicubic_upscale`: ``torch`` in the
            released CADyQ networks, ``matlab`` in the authors' weights for Y.
        luma: the network has one input and one output channel, Y / 255. RGB is converted to Y, Cb and Cr
            (:func:`rgb_to_ycbcr`), Cb and Cr are enlarged with ``bicubic``, and the result is RGB; a picture
            of one channel is taken to be Y / 255 and stays so.
    """

    name = "idn"
    radius = 30

    def __init__(
        self,
        scale: int = 4,
        channels: int = 64,
        n_blocks: int = 4,
        d: int = 16,
        s: int = 4,
        bicubic: BicubicKind = "matlab",
        luma: bool = False,
    ) -> None:
        if scale not in (2, 3, 4):
            raise ValueError(f"scale is {scale}, expected 2, 3 or 4")
        shape = {"channels": channels, "n_blocks": n_blocks, "d": d, "s": s}
        super().__init__(scale, {**shape, "bicubic": bicubic, "luma": luma})
        self.base = Bicubic(scale, bicubic)
        self.luma = luma
        colors = 1 if luma else 3
        self.head1 = Conv2d(colors, channels, 3)
        self.head1_site = Site(self.head1, "fixed", nonneg=True)
        self.head2 = Conv2d(channels, channels, 3)
        self.head2_site = Site(self.head2, "fixed")
        self.body = nn.ModuleList(DBlock(channels, d, s) for _ in range(n_blocks))
        self.stream = Site(None, "stream", channels=channels)
        # What is cut off at the top and left was found by aligning the authors' weights at all three scales:
        # one pixel more or less costs several dB. The rest falls off at the bottom and right.
        self.up = ConvTranspose2d(channels, colors, 17, scale, padding=9 - scale)
        self.up_site = Site(self.up, "edge", on_stream=True)
        self._finish()

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        if not self.luma or lr.shape[1] == 1:
            return self._upscale(lr, ctx)
        ycbcr = rgb_to_ycbcr(lr)
        chroma = self.base(ycbcr[:, 1:])
        return ycbcr_to_rgb(torch.cat((self._upscale(ycbcr[:, :1], ctx), chroma), 1))

    def _upscale(self, x: Tensor, ctx: Context) -> Tensor:
        """(N, 3 or 1, H, W) -> (N, 3 or 1, scale H, scale W): bicubic plus the network's residual."""
        y = F.leaky_relu(self.head1(self.head1_site(x, ctx)), SLOPE)
        y = self.stream(F.leaky_relu(self.head2(self.head2_site(y, ctx)), SLOPE), ctx)
        for block in self.body:
            y = self.stream(ctx.run(cast(Block, block), y), ctx)
        residual: Tensor = self.up(self.up_site(y, ctx))
        height, width = self.scale * x.shape[2], self.scale * x.shape[3]
        base: Tensor = self.base(x)
        return base + residual[:, :, :height, :width]
