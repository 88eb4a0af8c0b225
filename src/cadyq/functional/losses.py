"""Losses of CADyQ's training (supplement C). Pictures are in [0, 1]; L1 is counted in grey levels 0..255."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attention_transfer", "bit_loss", "l1_gray_levels"]


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


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE between the L2-normalised spatial maps of the channel-mean of squares of two features (N, C, H, W)."""

    def attention(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.square().mean(1).flatten(1), dim=1)

    return (attention(student) - attention(teacher)).square().mean()
