"""LSQ-style learned step, for networks in which everything is quantised (FQSR, Wang et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import round_ste
from cadyq.quant.quantizer import ActQuantizer

__all__ = ["LSQ"]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


class LSQ(ActQuantizer):
    """round(clamp(x / s, -q, q)) * s with one learned step s per candidate (Esser et al., ICLR 2020).

    The step's gradient is scaled by 1 / sqrt(n q), n being the elements of one patch.
    """

    def __init__(self, channels: int, bits: Sequence[int], signed: bool = True) -> None:
        super().__init__(channels, bits, signed)
        self.step = nn.Parameter(torch.ones(len(bits)))

    def quantize(self, x: Tensor, choice: Tensor) -> Tensor:
        q = self.levels(choice).to(x.dtype)
        factor = 1.0 / float((x[0].numel() * q.mean()).sqrt())
        step = cast(Tensor, _ScaleGradient.apply(self.step, factor))[choice].view(-1, 1, 1, 1).clamp_min(1e-8)
        step = self.spread(step)
        low = -q if self.signed else torch.zeros_like(q)
        return round_ste(torch.minimum(torch.maximum(x / step, low), q)) * step
