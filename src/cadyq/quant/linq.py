"""LinQ: linear quantisation over the whole range of the feature (Krishnamoorthi 2018), no clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from cadyq.functional.quantize import quantize_clipped
from cadyq.quant.quantizer import ActQuantizer

__all__ = ["LinQ"]


class LinQ(ActQuantizer):
    """The clip is the largest magnitude of each patch's own feature, so nothing is cut off.

    Of a tile these are its own pixels, as for the deviations; what its neighbors lend it is clipped to their range.
    Unsigned where the feature cannot be negative (else one bit is lost). The range is detached.
    """

    def quantize(self, x: Tensor, choice: Tensor) -> Tensor:
        m = self.margin
        own = x.detach()[:, :, m : x.shape[2] - m, m : x.shape[3] - m]
        largest = own.abs().amax((2, 3), keepdim=True)
        if self.channel_scale is not None:
            largest = largest / self.channel_scale.view(1, -1, 1, 1)
        largest = largest.amax(1, keepdim=True)
        clip = torch.where(largest > 0, largest, torch.ones_like(largest))
        return quantize_clipped(x, self.spread(clip), self.levels(choice).to(x.dtype), self.signed)
