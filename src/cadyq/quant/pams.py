"""PAMS: linear quantisation with a learned clip (Li et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import n_levels, quantize_clipped
from cadyq.quant.quantizer import ActQuantizer

__all__ = ["PAMS", "mixture_implementation"]

# (x, probs, clip, levels, choice, channel scales, signed=...) -> quantised x with the mixture's gradient.
Mixture = Callable[..., Tensor]
_implementation: list[Mixture | None] = [None]


@contextmanager
def mixture_implementation(implementation: Mixture) -> Iterator[None]:
    """Within the block, quantise through ``implementation`` (training's native kernels), with and without gradients."""
    _implementation.append(implementation)
    try:
        yield
    finally:
        _implementation.pop()


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

    def forward(self, x: Tensor, choice: Tensor, probs: Tensor | None) -> Tensor:
        """As the base class; in training through the native kernel where one is installed."""
        native = _implementation[-1]
        if native is None:
            return super().forward(x, choice, probs)
        if probs is None:
            probs = nn.functional.one_hot(choice, len(self.bits)).to(x.dtype)
        levels = n_levels(self.bits.to(x.dtype), self.signed)
        scale = self.channel_scale if self.channel_scale is not None else x.new_ones(x.shape[1])
        return native(x, probs, self.clip.clamp_min(1e-8), levels, choice, scale, signed=self.signed)
