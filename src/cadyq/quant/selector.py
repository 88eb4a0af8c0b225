"""Bit selectors: from what a patch looks like to a probability per candidate bit-width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import candidate_index

__all__ = ["LOG_OFFSET", "SELECTOR_INPUTS", "BitSelector", "SelectorInput"]

# Far above what float32 makes of an exact zero, a fortieth of a grey level of gradient.
LOG_OFFSET = 1e-4

SelectorInput = Literal["both", "gradient", "channel", "layer", "gradient+layer"]
# The ablations of supplement B.1: what the selector sees.
SELECTOR_INPUTS: dict[SelectorInput, tuple[bool, str]] = {
    "both": (True, "channel"),
    "gradient": (True, ""),
    "channel": (False, "channel"),
    "layer": (False, "layer"),
    "gradient+layer": (True, "layer"),
}


class BitSelector(nn.Module):
    """One linear layer and a softmax over the candidates (CADyQ, section 3.3).

    The input is the mean |dx|, |dy| of the LR patch (in [0, 1] units) and the standard deviation of each channel
    of the feature. With ``log_features`` each input v becomes (log(v + 1e-4) - center) / spread: sensitivities are
    ratios, and the fixed centre and spread (from calibration) put pictures of all contrasts and features of all
    ranges on one footing. Without it the inputs are used as they are, the gradient multiplied by
    ``gradient_gain`` (1e3 in the released reference for EDSR, SRResNet and IDN).

    Weights start at 1, biases at 0 except the last, at 1: everything starts at the largest candidate.

    Args:
        channels: channels of the feature.
        bits: candidates, ascending; a leading 0 skips the block and is allowed only at a block's first site.
        inputs: which inputs are used, see :data:`SELECTOR_INPUTS`.
    """

    bits: Tensor
    center: Tensor
    spread: Tensor

    def __init__(
        self,
        channels: int,
        bits: Sequence[int],
        inputs: SelectorInput = "both",
        *,
        log_features: bool = True,
        gradient_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.inputs: SelectorInput = inputs
        use_gradient, deviation = SELECTOR_INPUTS[inputs]
        width = 2 * use_gradient + {"channel": channels, "layer": 1, "": 0}[deviation]
        self.linear = nn.Linear(width, len(bits))
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[-1] = 1.0
        self.log_features = log_features
        self.gradient_gain = gradient_gain
        self.register_buffer("bits", torch.tensor(list(bits), dtype=torch.long))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    @property
    def has_zero(self) -> bool:
        """Whether the first candidate is 0 bits (skip the block)."""
        return int(self.bits[0]) == 0

    def index_of(self, bits: int | Tensor, like: Tensor) -> Tensor:
        """Index of the candidate with this bit-width, for every patch; ``like`` gives shape and device."""
        return candidate_index(self.bits, bits, like)

    def features(self, gradient: Tensor, deviation: Tensor) -> Tensor:
        """Input vector (n, width) from the gradient (n, 2) and the channels' deviations (n, C)."""
        use_gradient, kind = SELECTOR_INPUTS[self.inputs]
        parts = []
        if use_gradient:
            parts.append(gradient if self.log_features else gradient * self.gradient_gain)
        if kind == "channel":
            parts.append(deviation)
        elif kind == "layer":
            parts.append(deviation.square().mean(1, keepdim=True).sqrt())
        vector = torch.cat(parts, 1)
        if self.log_features:
            vector = (torch.log(vector + LOG_OFFSET) - self.center) / self.spread
        return vector

    def forward(self, gradient: Tensor, deviation: Tensor, budget: float = 0.0) -> Tensor:
        """Probabilities (n, K); ``budget`` adds budget * bits to the scores before the softmax."""
        scores: Tensor = self.linear(self.features(gradient, deviation))
        if budget:
            scores = scores + budget * self.bits.to(scores.dtype)
        return scores.softmax(1)
