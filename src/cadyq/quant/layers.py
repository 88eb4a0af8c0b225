"""Convolution that can quantise its own weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.functional.quantize import quantize_weight

__all__ = ["Conv2d", "ConvTranspose2d", "conv2d_implementation"]

Implementation = Callable[["Conv2d", Tensor, Tensor, int], Tensor]


def _torch_conv(conv: Conv2d, x: Tensor, weight: Tensor, _factor: int) -> Tensor:
    # The factor is 1: a PixelShuffle is a step of its own here, which hooks and traces see (`Conv2d.shuffled`).
    return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


_implementation: list[Implementation] = [_torch_conv]


class conv2d_implementation:
    """Context manager: compute all :class:`Conv2d` through ``implementation(conv, x, weight, factor)``.

    A PixelShuffle by ``factor`` follows (1: none). Training puts its native kernels in here; the layer itself knows
    only torch, which is the default.
    """

    def __init__(self, implementation: Implementation = _torch_conv) -> None:
        self.implementation = implementation

    def __enter__(self) -> None:
        _implementation.append(self.implementation)

    def __exit__(self, *_: object) -> None:
        _implementation.pop()


class _InputScales(nn.Module):
    """``in_scale``: per-channel scales of the input grid, (C_in,), folded into the weights before rounding."""

    weight_bits: int | None
    in_scale: Tensor | None

    def outputs_first(self) -> Tensor:
        """The weights as (C_out, C_in / groups, F, F)."""
        raise NotImplementedError

    def weight_scale(self) -> Tensor:
        """``in_scale`` as it multiplies the weights with outputs first: (C_out or 1, C_in / groups, 1, 1)."""
        assert self.in_scale is not None
        return self.in_scale.view(1, -1, 1, 1)

    def scaled_weight(self) -> Tensor:
        """What is rounded to codes: weights, outputs first, times the scales, in float64."""
        weight = self.outputs_first().double()
        return weight if self.in_scale is None else weight * self.weight_scale().double()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # ``in_scale`` is absent from float networks; take it over whenever a checkpoint has it.
        value = state_dict.get(prefix + "in_scale")
        if value is not None and self.in_scale is None:
            self.in_scale = torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv2d(_InputScales, nn.Conv2d):
    """``nn.Conv2d`` with padding F // 2 by default and optional weight quantisation.

    Attributes:
        weight_bits: bit-width of the weights, or ``None`` (float).
        per_channel: one weight range per output channel instead of per tensor.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, groups: int = 1, bias: bool = True
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=bias
        )
        self.weight_bits: int | None = None
        self.per_channel = True
        self.register_buffer("in_scale", None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output pixel."""
        kernel = self.kernel_size[0] * self.kernel_size[1]
        return self.in_channels * self.out_channels * kernel // self.groups

    def effective_weight(self) -> Tensor:
        """The weights as the convolution uses them, quantised if ``weight_bits`` is set."""
        if self.weight_bits is None:
            return self.weight
        scale = self.weight_scale() if self.in_scale is not None else None
        return quantize_weight(self.weight, self.weight_bits, self.per_channel, scale)

    def outputs_first(self) -> Tensor:
        """The weights as they are."""
        return self.weight

    def weight_scale(self) -> Tensor:
        """As the base class; with groups, every output has the scales of its own inputs."""
        assert self.in_scale is not None
        scale = self.in_scale.view(self.groups, -1)
        if self.groups > 1:
            scale = scale.repeat_interleave(self.out_channels // self.groups, 0)
        return scale[:, :, None, None]

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return _implementation[-1](self, x, self.effective_weight(), 1)

    def shuffled(self, x: Tensor, factor: int) -> Tensor:
        """The result after a PixelShuffle: in one pass where training's kernels are used, else seen by hooks as two."""
        if _implementation[-1] is _torch_conv:
            return F.pixel_shuffle(self(x), factor)
        return _implementation[-1](self, x, self.effective_weight(), factor)


class ConvTranspose2d(_InputScales, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` without groups and with optional weight quantisation, one range per output channel.

    Attributes:
        weight_bits: bit-width of the weights, or ``None`` (float).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        *,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        nn.ConvTranspose2d.__init__(
            self, in_channels, out_channels, kernel, stride, padding=padding, bias=bias
        )
        self.weight_bits: int | None = None
        self.register_buffer("in_scale", None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per input pixel."""
        return self.in_channels * self.out_channels * self.kernel_size[0] * self.kernel_size[1]

    def outputs_first(self) -> Tensor:
        """The weights with their first two axes exchanged."""
        return self.weight.transpose(0, 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.weight_bits is None:
            return super().forward(x, output_size)
        scale = self.weight_scale() if self.in_scale is not None else None
        weight = quantize_weight(self.outputs_first(), self.weight_bits, in_scale=scale).transpose(0, 1)
        assert not isinstance(self.padding, str)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding)
