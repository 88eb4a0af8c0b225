"""CARN and CARN-M (Ahn et al., ECCV 2018): residual blocks whose outputs cascade through 1x1 fusions."""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.backbones.blocks import Backbone, Upsampler, mean_shift
from cadyq.errors import ArgumentError
from cadyq.quant.context import Block, Context
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site

__all__ = ["CARN"]

N_BLOCKS = 3  # of both levels: cascading blocks in the network, residual blocks in a cascading block
SCALES = (2, 3, 4)


class ResidualBlock(nn.Module):
    """conv, ReLU, conv, add, ReLU; with groups a 1x1 convolution before the add. The skip is not quantised.

    Args:
        nonneg: the input follows a ReLU; not so where it is the entry's output.
    """

    halo = 2
    residual = True

    def __init__(self, channels: int, groups: int, nonneg: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, groups=groups)
        self.conv2 = Conv2d(channels, channels, 3, groups=groups)
        self.site1 = Site(self.conv1, nonneg=nonneg, on_stream=True)
        self.site2 = Site(self.conv2, nonneg=True)
        self.pointwise = Conv2d(channels, channels, 1) if groups > 1 else None
        if self.pointwise is not None:
            self.pointwise_site = Site(self.pointwise, "edge", nonneg=True)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C, H, W)."""
        h = self.conv2(self.site2(F.relu(self.conv1(self.site1(x, ctx))), ctx))
        if self.pointwise is not None:
            h = self.pointwise(self.pointwise_site(F.relu(h), ctx))
        return F.relu(x + h)


class Fusions(nn.Module):
    """Three 1x1 convolutions with ReLU over the planes so far: 128, 192 and 256 channels to 64."""

    def __init__(self, channels: int, nonneg: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.sites = nn.ModuleList()
        for i in range(N_BLOCKS):
            conv = Conv2d((i + 2) * channels, channels, 1)
            self.convs.append(conv)
            self.sites.append(Site(conv, "edge", nonneg=nonneg, on_stream=True))

    def forward(self, planes: list[Tensor], ctx: Context) -> Tensor:
        """Planes (N, C, H, W), oldest first -> (N, C, H, W)."""
        i = len(planes) - 2
        y: Tensor = self.convs[i](self.sites[i](torch.cat(planes, 1), ctx))
        return F.relu(y)


class Cascade(nn.Module):
    """Three residual blocks, or one used three times, each followed by a fusion."""

    def __init__(self, channels: int, groups: int, shared: bool, nonneg: bool) -> None:
        super().__init__()
        n = 1 if shared else N_BLOCKS
        # In the first cascade only the very first block's input may be negative, unless it is used again.
        self.blocks = nn.ModuleList(ResidualBlock(channels, groups, nonneg or i > 0) for i in range(n))
        self.fusions = Fusions(channels, nonneg)

    def forward(self, x: Tensor, ctx: Context, stream: Site) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        planes = [x]
        for i in range(N_BLOCKS):
            block = cast(Block, self.blocks[i % len(self.blocks)])
            planes.append(stream(ctx.run(block, x), ctx))
            x = stream(self.fusions(planes, ctx), ctx)
        return x


class CARN(Backbone):
    """CARN: 18 body sites in 9 residual blocks.

    Parameters (64 channels):

    ====================================  =========  ===========================================
    layer                                 CARN       CARN-M (``groups=4, shared=True``)
    ====================================  =========  ===========================================
    entry 3x3, 3 -> 64                        1,792      1,792
    residual blocks                         664,704     68,160 (3 of 2 x 9,280 + 4,160 for 1x1)
    1x1 fusions, 4 times 3                  148,224    148,224
    upsampler x2                            147,712     37,120
    upsampler x3                            332,352     83,520
    upsampler x4                            295,424     74,240
    exit 3x3, 64 -> 3                         1,731      1,731
    **one scale: x4**                     1,111,875    294,147
    **all scales** (``multi=True``)       1,591,939    414,787
    ====================================  =========  ===========================================

    The count of the quantised network in the CADyQ supplement, 1,595,635, is the multi-scale network
    with 18 selectors of 3 (64 + 3) = 201 parameters, 18 x 3 clips and twice 12 for the mean, here a constant.

    Args:
        scale: 2, 3 or 4; with ``multi`` the scale in use, see :meth:`use_scale`.
        groups: groups of the residual blocks' and the upsampler's convolutions; more than one adds a 1x1
            convolution to every residual block.
        shared: the three residual blocks of a cascade are one: its sites record three times per pass.
        multi: holds the upsamplers of all three scales.
    """

    name = "carn"
    radius = 21

    def __init__(
        self, scale: int = 4, channels: int = 64, groups: int = 1, shared: bool = False, multi: bool = False
    ) -> None:
        super().__init__(scale, {"channels": channels, "groups": groups, "shared": shared, "multi": multi})
        self.entry = Conv2d(3, channels, 3)
        self.entry_site = Site(self.entry, "edge")
        self.body = nn.ModuleList(Cascade(channels, groups, shared, i > 0) for i in range(N_BLOCKS))
        self.fusions = Fusions(channels, nonneg=False)
        self.stream = Site(None, "stream", channels=channels)
        self.ups = nn.ModuleDict(
            {
                str(s): Upsampler(channels, s, groups=groups, activation=nn.ReLU, nonneg=True)
                for s in (SCALES if multi else (scale,))
            }
        )
        self.exit = Conv2d(channels, 3, 3)
        self.exit_site = Site(self.exit, "edge", nonneg=True, pixels=scale**2)
        self.use_scale(scale)
        self._finish()

    def unshared(self) -> CARN:
        """The same function by a network of the scale in use alone in which every block has layers of its own.

        Used once per pass, each of them can have its own clips and selector.
        """
        groups, channels = int(self.config["groups"]), int(self.config["channels"])
        result = CARN(self.scale, channels, groups).to(self.entry.weight)
        own, shared = self.state_dict(), self.config["shared"]
        first = re.compile(r"(?<=\.blocks\.)\d+")
        result.load_state_dict(
            {name: own[first.sub("0", name) if shared else name] for name in result.state_dict()}
        )
        return result.train(self.training)

    def use_scale(self, scale: int) -> None:
        """Enlarge by ``scale`` from now on; a multi-scale network has 2, 3 and 4.

        Raises:
            ArgumentError: the network has no upsampler for this scale.
        """
        if str(scale) not in self.ups:
            raise ArgumentError("scale", scale, f"one of {', '.join(self.ups)}")
        self.scale = scale
        self.config["scale"] = scale
        self.exit_site.pixels = scale**2
        self.exit_site.macs_per_pixel = float(self.exit.macs * scale**2)

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        mean = mean_shift(lr)
        x = self.stream(self.entry(self.entry_site(lr - mean, ctx)), ctx)
        planes = [x]
        for cascade in self.body:
            planes.append(cascade(x, ctx, self.stream))
            x = self.stream(self.fusions(planes, ctx), ctx)
        return ctx.finish(self._tail, x, halo=2) + mean

    def _tail(self, x: Tensor, ctx: Context) -> Tensor:
        y = self.ups[str(self.scale)](x, ctx)
        result: Tensor = self.exit(self.exit_site(y, ctx))
        return result
