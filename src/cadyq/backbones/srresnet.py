"""SRResNet (Ledig et al., CVPR 2017): 16 residual blocks with batch norm and PReLU, 9x9 head and tail."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cadyq.backbones.blocks import Backbone, Upsampler, fold_batch_norm, mean_shift
from cadyq.quant.context import Block, Context
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site

__all__ = ["SRResNet"]


class ResidualBlock(nn.Module):
    """conv, norm, PReLU, conv, norm, add. The skip is the unquantised input."""

    halo = 2
    residual = True

    def __init__(self, channels: int, slopes: int, bias: bool, norm: bool, eps: float) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, bias=bias)
        self.norm1 = nn.BatchNorm2d(channels, eps) if norm else nn.Identity()
        self.act = nn.PReLU(slopes)
        self.conv2 = Conv2d(channels, channels, 3, bias=bias)
        self.norm2 = nn.BatchNorm2d(channels, eps) if norm else nn.Identity()
        self.site1 = Site(self.conv1, on_stream=True)
        self.site2 = Site(self.conv2)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C, H, W)."""
        h = self.act(self.norm1(self.conv1(self.site1(x, ctx))))
        out: Tensor = self.norm2(self.conv2(self.site2(h, ctx)))
        return x + out


class SRResNet(Backbone):
    """SRResNet in the two forms in which it is met.

    Args:
        scale: 2, 3 or 4.
        keras: biases on all convolutions, one PReLU slope per channel, batch norm eps 1e-3, tanh at the end,
            no mean subtraction (1,554,883 parameters at x4, 4,224 of them batch norm statistics); otherwise
            biases only on the 9x9 convolutions, one slope per layer, mean subtraction (1,546,838, the
            released reference's form).
        norm: with batch norm; ``False`` is the folded form, in which all body convolutions have biases.
    """

    name = "srresnet"
    radius = 44

    def __init__(
        self, scale: int = 4, channels: int = 64, n_blocks: int = 16, keras: bool = False, norm: bool = True
    ) -> None:
        config = {"channels": channels, "n_blocks": n_blocks, "keras": keras, "norm": norm}
        super().__init__(scale, config)
        slopes = channels if keras else 1
        bias, eps = keras or not norm, 1e-3 if keras else 1e-5
        self.keras = keras
        self.head = Conv2d(3, channels, 9)
        self.head_act = nn.PReLU(slopes)
        self.head_site = Site(self.head, "edge", nonneg=keras, bits=16)
        self.body = nn.ModuleList(ResidualBlock(channels, slopes, bias, norm, eps) for _ in range(n_blocks))
        self.stream = Site(None, "stream", channels=channels)
        self.body_end = Conv2d(channels, channels, 3, bias=bias)
        self.body_end_norm = nn.BatchNorm2d(channels, eps) if norm else nn.Identity()
        self.body_end_site = Site(self.body_end, "edge", on_stream=True)
        self.skip_site = Site(None, "skip", channels=channels)
        self.stream_up = Site(None, "stream", channels=channels)
        self.up = Upsampler(channels, scale, activation=lambda: nn.PReLU(slopes), bias=keras, first_bits=16)
        self.tail = Conv2d(channels, 3, 9)
        self.tail_site = Site(self.tail, "edge", pixels=scale**2)
        self._finish()

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        x = lr if self.keras else lr - mean_shift(lr)
        head = self.stream_up(self.head_act(self.head(self.head_site(x, ctx))), ctx)
        y = self.stream(head, ctx)
        for block in self.body:
            y = self.stream(ctx.run(cast(Block, block), y), ctx)
        y = self.body_end_norm(self.body_end(self.body_end_site(y, ctx))) + self.skip_site(head, ctx)
        y = ctx.finish(self._tail, self.stream_up(y, ctx), halo=3)
        return (torch.tanh(y) + 1) / 2 if self.keras else y + mean_shift(lr)

    def _tail(self, y: Tensor, ctx: Context) -> Tensor:
        y = self.up(y, ctx)
        result: Tensor = self.tail(self.tail_site(y, ctx))
        return result

    @torch.no_grad()
    def folded(self) -> SRResNet:
        """A copy without batch norm: the running statistics are multiplied into the convolutions."""
        if not self.config["norm"]:
            return self
        config = {**self.config, "norm": False}
        first = next(self.parameters())
        other = SRResNet(**config).to(first.device, first.dtype)
        state = {k: v for k, v in self.state_dict().items() if "norm" not in k}
        missing = other.load_state_dict(state, strict=False).missing_keys
        unexpected = [key for key in missing if not key.endswith(".bias")]
        assert not unexpected, unexpected
        for key in missing:  # without this, the random biases of a fresh layer would be folded in
            other.get_parameter(key).zero_()
        for mine, theirs in zip(self.body, other.body, strict=True):
            assert isinstance(mine, ResidualBlock) and isinstance(theirs, ResidualBlock)
            fold_batch_norm(theirs.conv1, mine.norm1)
            fold_batch_norm(theirs.conv2, mine.norm2)
        fold_batch_norm(other.body_end, self.body_end_norm)
        return other.train(self.training)
