"""What two or more backbones share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.quant.context import Context
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site, bind_sites

__all__ = [
    "DIV2K_MEAN",
    "Backbone",
    "Bicubic",
    "BicubicKind",
    "Upsampler",
    "bicubic_upscale",
    "fold_batch_norm",
    "mean_shift",
]

BicubicKind = Literal["matlab", "torch"]

# Mean RGB of DIV2K in [0, 1] (supplement C: subtracted from all pictures).
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class Backbone(nn.Module):
    """Base of the networks: RGB in [0, 1] to RGB in [0, 1], ``scale`` times larger.

    Attributes:
        name: key in :data:`cadyq.backbones.BACKBONES`.
        scale: enlargement factor.
        config: constructor arguments, as stored in checkpoints.
        radius: receptive radius in LR pixels, rounded up; the halo that strips of a huge picture need.
    """

    name: ClassVar[str]
    radius: int

    def __init__(self, scale: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.scale = scale
        self.config = {"scale": scale, **config}

    def _finish(self) -> None:
        """Last line of every constructor: sites learn their names."""
        bind_sites(self)

    if TYPE_CHECKING:

        def __call__(self, lr: Tensor, ctx: Context | None = None) -> Tensor: ...

    def forward(self, lr: Tensor, ctx: Context | None = None) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, scale H, scale W), not clamped."""
        return self._forward(lr, Context.of(lr) if ctx is None else ctx)

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def n_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())


class Upsampler(nn.Module):
    """Convolution, PixelShuffle and activation, once per factor (2, 3, or 2 twice for 4).

    ``activation`` makes a fresh module per stage, or is ``None``; ``nonneg``: the input cannot be negative;
    ``first_bits`` is the bit-width of the first stage's input where edges are quantised.
    """

    def __init__(
        self,
        channels: int,
        scale: int,
        *,
        groups: int = 1,
        activation: Any = None,
        bias: bool = True,
        nonneg: bool = False,
        first_bits: int = 8,
    ) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"scale is {scale}, expected 2, 3 or 4")
        factors = [2] * int(math.log2(scale)) if scale != 3 else [3]
        self.convs = nn.ModuleList()
        self.acts = nn.ModuleList()
        self.sites = nn.ModuleList()
        self.factors = factors
        pixels = 1
        relu = isinstance(activation, type) and issubclass(activation, nn.ReLU)
        for i, factor in enumerate(factors):
            conv = Conv2d(channels, channels * factor**2, 3, groups=groups, bias=bias)
            self.convs.append(conv)
            self.sites.append(
                Site(conv, "edge", pixels=pixels, nonneg=relu if i else nonneg, bits=8 if i else first_bits)
            )
            self.acts.append(activation() if activation is not None else nn.Identity())
            pixels *= factor**2
        self.pixels = pixels

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(N, C, H, W) -> (N, C, scale H, scale W)."""
        stages = zip(self.sites, self.convs, self.acts, self.factors, strict=True)
        for site, conv, act, factor in stages:
            assert isinstance(conv, Conv2d)
            x = act(conv.shuffled(site(x, ctx), factor))
        return x


def mean_shift(like: Tensor) -> Tensor:
    """DIV2K's mean RGB as (1, 3, 1, 1), with the type and device of ``like``."""
    return torch.tensor(DIV2K_MEAN, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


@torch.no_grad()
def fold_batch_norm(conv: Conv2d, norm: nn.Module) -> None:
    """Multiply a batch norm's running statistics into the convolution before it, in float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(gain)
    new_bias = (bias - norm.running_mean.double()) * gain + norm.bias.double()
    conv.weight.copy_(conv.weight.double() * gain[:, None, None, None])
    if conv.bias is None:
        conv.bias = nn.Parameter(new_bias.to(conv.weight.dtype))
    else:
        conv.bias.copy_(new_bias)


class Bicubic(nn.Module):
    """Bicubic enlargement as a layer, so that what traces a network meets it as one; see `bicubic_upscale`."""

    def __init__(self, scale: int, kind: BicubicKind = "matlab") -> None:
        super().__init__()
        if kind not in ("matlab", "torch"):
            raise ValueError(f"bicubic is {kind!r}, expected 'matlab' or 'torch'")
        self.scale = scale
        self.kind: BicubicKind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, scale H, scale W)."""
        return bicubic_upscale(x, self.scale, self.kind)


def bicubic_upscale(x: Tensor, scale: int, kind: BicubicKind = "matlab") -> Tensor:
    """Bicubic enlargement (N, C, H, W) -> (N, C, scale H, scale W); differentiable, no clamping or rounding.

    ``matlab`` is Keys' kernel with a = -0.5 and a symmetric border (MATLAB's ``imresize`` since R2007b; older
    versions repeat the border pixel). ``torch`` has a = -0.75 and repeats the border pixel. Neither is
    antialiased: an enlargement needs no wider kernel.
    """
    if kind == "torch":
        return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    for dim in (2, 3):
        x = _upscale_axis(x, dim, scale)
    return x


def _upscale_axis(x: Tensor, dim: int, scale: int) -> Tensor:
    """MATLAB's bicubic along one axis: output ``scale * i + r`` is a sum of 5 neighbors of ``i``."""
    size = x.shape[dim]
    index = torch.arange(-2, size + 2, device=x.device) % (2 * size)
    padded = x.index_select(dim, torch.minimum(index, 2 * size - 1 - index))
    phases = []
    for r in range(scale):
        center = (r + 0.5) / scale - 0.5
        taps = [(_keys(center - k), padded.narrow(dim, k + 2, size)) for k in range(-2, 3)]
        phases.append(torch.stack([w * tap for w, tap in taps if w != 0]).sum(0))
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def _keys(t: float) -> float:
    """Keys' cubic convolution kernel with a = -0.5."""
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0
