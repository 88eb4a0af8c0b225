"""Common shell of the activation quantisers: candidates, choice per patch, straight-through mixture.

A quantiser quantises each patch (or tile) of a batch with the candidate chosen for it. In training the forward
value is the chosen candidate's, and the gradient is that of the mixture sum_k P_k Q_k(x) (CADyQ, equation 6),
computed by going through the candidates once more in the backward pass instead of storing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cadyq.functional.quantize import candidate_index, n_levels

__all__ = ["ActQuantizer"]


class ActQuantizer(nn.Module):
    """Base of all activation quantisers.

    Args:
        channels: channels of the feature.
        bits: candidate bit-widths, ascending, each 1 to 16.
        signed: whether codes are symmetric around 0; unsigned needs a feature that cannot be negative.

    Attributes:
        bits: candidates, shape (K,).
        channel_scale: optional per-channel scales (C,) that multiply the clip: every channel has its own range, and
            after division by the scales (which the weights take over) all share one integer grid.
        margin: pixels at each edge that belong to a tile's neighbors; the site sets it before each call.
    """

    margin = 0

    bits: Tensor
    channel_scale: Tensor | None

    def __init__(self, channels: int, bits: Sequence[int], signed: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.signed = signed
        self.register_buffer("bits", torch.tensor(list(bits), dtype=torch.long))
        self.register_buffer("channel_scale", None)

    def index_of(self, bits: int | Tensor, like: Tensor) -> Tensor:
        """Index of the candidate with this bit-width, for every patch; ``like`` gives shape and device."""
        return candidate_index(self.bits, bits, like)

    def quantize(self, x: Tensor, choice: Tensor) -> Tensor:
        """Quantise ``x`` (n, C, H, W) with candidate ``choice`` (n,)."""
        raise NotImplementedError

    def levels(self, choice: Tensor) -> Tensor:
        """Largest code of the chosen candidates, shape (n, 1, 1, 1)."""
        return (
            n_levels(self.bits[choice].double(), self.signed).to(torch.get_default_dtype()).view(-1, 1, 1, 1)
        )

    def spread(self, clip: Tensor) -> Tensor:
        """Clip per channel: a * scale_c, (n, C, 1, 1), or the clip itself (n, 1, 1, 1) without channel scales."""
        return clip if self.channel_scale is None else clip * self.channel_scale.view(1, -1, 1, 1)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, choice: Tensor, probs: Tensor | None) -> Tensor: ...

    def forward(self, x: Tensor, choice: Tensor, probs: Tensor | None) -> Tensor:
        """Quantised feature; with ``probs`` (n, K) gradients are those of the mixture."""
        if probs is None:
            return self.quantize(x, choice)
        parameters = tuple(self.parameters())
        return cast(Tensor, _Mixture.apply(self, choice, x, probs, *parameters))


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, quantizer: ActQuantizer, choice: Tensor, x: Tensor, probs: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.quantizer = quantizer
        ctx.save_for_backward(x, probs)
        with torch.no_grad():
            return quantizer.quantize(x, choice)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        quantizer: ActQuantizer = ctx.quantizer
        x, probs = ctx.saved_tensors
        grad = grads[0]
        parameters = tuple(quantizer.parameters())
        grad_x = torch.zeros_like(x)
        grad_p = torch.zeros_like(probs)
        grad_params = [torch.zeros_like(p) for p in parameters]
        for k in range(probs.shape[1]):
            choice = torch.full((x.shape[0],), k, dtype=torch.long, device=x.device)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                y = quantizer.quantize(leaf, choice)
            grad_p[:, k] = (grad * y.detach()).flatten(1).sum(1)
            weighted = grad * probs[:, k].view(-1, 1, 1, 1)
            partial = torch.autograd.grad(y, (leaf, *parameters), weighted, allow_unused=True)
            grad_x += partial[0]
            for total, value in zip(grad_params, partial[1:], strict=True):
                if value is not None:
                    total += value
        return None, None, grad_x, grad_p, *grad_params
