"""EDSR-baseline (Lim et al., CVPRW 2017): 16 residual blocks of 64 channels, no normalisation."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from cadyq.backbones.blocks import Backbone, Upsampler, mean_shift
from cadyq.quant.context import Block, Context
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site

__all__ = ["EDSR"]


class ResidualBlock(nn.Module):
    """conv, ReLU, conv, add. The quantised input is also the skip; conv2's output is quantised to 8 bit."""

    halo = 2
    residual = True

    def __init__(self, channels: int, stream: Site) -> None:
        super().__init__()
        # In a tuple: the stream belongs to the network, not to the block.
        self._stream = (stream,)
        self.conv1 = Conv2d(channels, channels, 3)
        self.conv2 = Conv2d(channels, channels, 3)
        self.site1 = Site(self.conv1, on_stream=True)
        self.site2 = Site(self.conv2, nonneg=True)
        self.site_out = Site(None, "fixed", channels=channels)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C, H, W)."""
        q = self.site1(x, ctx)
        h = nn.functional.relu(self.conv1(q))
        out: Tensor = self.site_out(self.conv2(self.site2(h, ctx)), ctx)
        return self._stream[0].sum(q, out, ctx)


class EDSR(Backbone):
    """EDSR-baseline: 1,517,571 parameters at x4."""

    name = "edsr"
    radius = 36

    def __init__(self, scale: int = 4, channels: int = 64, n_blocks: int = 16) -> None:
        super().__init__(scale, {"channels": channels, "n_blocks": n_blocks})
        self.head = Conv2d(3, channels, 3)
        self.head_site = Site(self.head, "edge", bits=16)
        stream = Site(None, "stream", channels=channels)
        self.body = nn.ModuleList(ResidualBlock(channels, stream) for _ in range(n_blocks))
        self.stream = stream
        self.body_end = Conv2d(channels, channels, 3)
        self.body_end_site = Site(self.body_end, "edge", on_stream=True)
        self.skip_site = Site(None, "skip", channels=channels)
        self.stream_up = Site(None, "stream", channels=channels)
        self.up = Upsampler(channels, scale)
        self.tail = Conv2d(channels, 3, 3)
        self.tail_site = Site(self.tail, "edge", pixels=scale**2)
        self._finish()

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        mean = mean_shift(lr)
        head = self.stream_up(self.head(self.head_site(lr - mean, ctx)), ctx)
        y = self.stream(head, ctx)
        for block in self.body:
            y = self.stream(ctx.run(cast(Block, block), y), ctx)
        y = self.body_end(self.body_end_site(y, ctx)) + self.skip_site(head, ctx)
        return ctx.finish(self._tail, self.stream_up(y, ctx), halo=3) + mean

    def _tail(self, y: Tensor, ctx: Context) -> Tensor:
        y = self.up(y, ctx)
        result: Tensor = self.tail(self.tail_site(y, ctx))
        return result
