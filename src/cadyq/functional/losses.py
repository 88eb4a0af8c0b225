"""Losses of CADyQ's training (supplement C). Pictures are in [0, 1]; L1 is counted in grey levels 0..255."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attention_map", "attention_transfer", "bit_loss", "l1_gray_levels"]


def l1_gray_levels(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference of two pictures in [0, 1], in grey levels (0..255).

    The weights of the other terms assume this unit; in [0, 1] they would be 255 times too strong.
    """
    return (sr - hr).abs().mean() * 255.0


def bit_loss(bits: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Sum over sites and patches of b / stopgrad(E[b]) with b straight-through (CADyQ, equation 8).

    ``bits`` and ``expected`` hold, per site, the chosen and the expected bit-widths of the patches, (n,). The value
    is about patches x sites, the gradient that of the sum of log E[b].
    """
    total = expected[0].new_zeros(())
    for hard, soft in zip(bits, expected, strict=True):
        straight = hard + soft - soft.detach()
        total = total + (straight / soft.detach().clamp_min(1e-6)).sum()
    return total


class _MeanSquare(torch.autograd.Function):
    # What autograd makes of x.square().mean(1), in one pass each way: it would write two more copies of the feature.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        norm: Tensor = torch.linalg.vector_norm(x, dim=1)
        return norm.square_().div_(x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return x * (grads[0] * (2 / x.shape[1])).unsqueeze(1)


def attention_map(x: Tensor) -> Tensor:
    """Where a feature (N, C, H, W) is strong: the channel-mean of squares, L2-normalised per element, (N, H * W)."""
    mean_square: Tensor = _MeanSquare.apply(x)
    return torch.nn.functional.normalize(mean_square.flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher_map: Tensor) -> Tensor:
    """MSE between the `attention_map` of a feature (N, C, H, W) and that of the teacher's."""
    return (attention_map(student) - teacher_map).square().mean()
