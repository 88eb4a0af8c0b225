"""The loss of one step, as a module: what several processes average the gradients of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cadyq.backbones import Backbone
from cadyq.functional.losses import attention_map, attention_transfer, bit_loss, l1_gray_levels
from cadyq.quant.context import Context, deviation_implementation
from cadyq.quant.layers import conv2d_implementation
from cadyq.quant.pams import mixture_implementation
from cadyq.training import fastconv, fastquant
from cadyq.training.device import Device
from cadyq.training.recipe import Recipe

__all__ = ["StepLoss", "native_convolutions"]


@contextmanager
def native_convolutions() -> Iterator[None]:
    """Within the block, convolutions, PAMS and deviations use the native training kernels where they are built."""
    with (
        fastconv.use(),
        conv2d_implementation(fastconv.conv2d_like),
        mixture_implementation(fastquant.mixture),
        deviation_implementation(fastquant.deviation),
    ):
        yield


class StepLoss(nn.Module):
    """L1 + bit loss + L1 to the teacher + attention transfer (supplement C), in gray levels."""

    def __init__(self, network: Backbone, teacher: Backbone | None, recipe: Recipe, device: Device) -> None:
        super().__init__()
        self.network = network
        # In tuples: neither the teacher's parameters nor the compiled double are ours to train.
        self._teacher = (teacher,)
        self._call = (torch.compile(network) if device.compile else network,)
        self.recipe = recipe
        self.device = device

    def forward(
        self, lr: Tensor, hr: Tensor, force: Mapping[str, int | Tensor] | None, soft: bool, bit_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and its parts (detached) by name.

        Args:
            lr: patches (N, 3, h, w) in [0, 1]; ``hr`` (N, 3, H, W) likewise.
            force: bits per site, instead of the selectors' choice.
            soft: keep the selectors' straight-through gradients.
            bit_weight: weight of the bit loss, a sum over patches and sites.
        """
        (teacher,), (call,) = self._teacher, self._call
        ctx = Context.of(lr, soft=soft)
        ctx.force_bits = None if force is None else dict(force)
        with native_convolutions():
            # The teacher comes first, while nothing of the network's is kept for its gradients.
            taught = None if teacher is None else self._taught(teacher, lr)
            if taught is not None and taught.maps:
                ctx.block_outputs = []
            with self.device.autocast(self.network):
                sr = call(lr, ctx)
            sr = sr.to(hr.dtype)
            loss = l1_gray_levels(sr, hr)
            report = {"l1": loss.detach()}
            if taught is not None:
                loss = loss + self._distillation(taught, sr, ctx, report)
        soft_records = [r for r in ctx.records if r.expected_bits is not None]
        if soft_records:
            bits = [r.bits for r in soft_records]
            if bit_weight:
                expected = [r.expected_bits for r in soft_records if r.expected_bits is not None]
                loss = loss + bit_weight * bit_loss(bits, expected)
            report["fqr"] = torch.stack(bits).mean()
        return loss, report

    def _taught(self, teacher: Backbone, lr: Tensor) -> _Taught:
        ctx = Context.of(lr)
        if self.recipe.w_attention_end or self.recipe.w_attention:
            ctx.block_outputs = []
        with torch.no_grad():
            with self.device.autocast(teacher):
                picture = teacher(lr, ctx)
            return _Taught(picture, [attention_map(x) for x in ctx.block_outputs or []])

    def _distillation(self, taught: _Taught, sr: Tensor, ctx: Context, report: dict[str, Any]) -> Tensor:
        recipe = self.recipe
        loss = sr.new_zeros(())
        if recipe.w_teacher:
            distance = l1_gray_levels(sr, taught.picture.to(sr.dtype))
            loss = loss + recipe.w_teacher * distance
            report["teacher"] = distance.detach()
        if ctx.block_outputs:
            maps = [
                attention_transfer(mine, its)
                for mine, its in zip(ctx.block_outputs, taught.maps, strict=True)
            ]
            loss = loss + recipe.w_attention_end * maps[-1] + recipe.w_attention * torch.stack(maps).sum()
        return loss


class _Taught(NamedTuple):
    picture: Tensor  # (N, 3, H, W) in [0, 1]
    maps: list[Tensor]  # of the blocks' outputs, where attention is transferred
