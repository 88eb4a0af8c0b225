"""PAMS: linear quantisation with a learned clip (Li et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import quantize_clipped
from cadyq.quant.quantizer import ActQuantizer

__all__ = ["PAMS"]


class PAMS(ActQuantizer):
    """round(clamp(x, -a, a) / a * q) / q * a with one learned clip a per candidate.

    ``clip`` has shape (K,), in units of the feature (divided by the channel scales); it starts from calibration.
    """

    def __init__(self, channels: int, bits: Sequence[int], signed: bool = True) -> None:
        super().__init__(channels, bits, signed)
        self.clip = nn.Parameter(torch.ones(len(bits)))

    def quantize(self, x: Tensor, choice: Tensor) -> Tensor:
        clip = self.clip[choice].view(-1, 1, 1, 1).clamp_min(1e-8)
        return quantize_clipped(x, self.spread(clip), self.levels(choice).to(x.dtype), self.signed)
