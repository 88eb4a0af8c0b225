"""DAQ: channel-wise distribution-aware quantisation (Hong et al., WACV 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from cadyq.functional.quantize import gaussian_step, round_ste
from cadyq.quant.quantizer import ActQuantizer

__all__ = ["DAQ"]


class DAQ(ActQuantizer):
    """Each patch's channels are standardised, quantised with the Gaussian-optimal step, and put back.

    Codes lie at half steps (an even number of levels, none at the mean), so each channel sees at most 2^b levels.
    Every channel of every patch has its own grid, which is why no integer convolution can run it.
    """

    def quantize(self, x: Tensor, choice: Tensor) -> Tensor:
        bits = self.bits[choice]
        step = gaussian_step(bits).to(x.dtype).view(-1, 1, 1, 1)
        half = (2.0 ** (bits.to(x.dtype) - 1)).view(-1, 1, 1, 1)
        mean = x.mean((2, 3), keepdim=True)
        std = (x.var((2, 3), keepdim=True, unbiased=False) + 1e-12).sqrt()
        z = (x - mean) / std / step
        code = torch.minimum(torch.maximum(round_ste(z - 0.5), -half), half - 1) + 0.5
        return code * step * std + mean
