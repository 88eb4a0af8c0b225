"""Fast float32 convolutions for training on a CPU, as drop-in functions of torch tensors.

3x3 convolutions run as Winograd F(4x4, 3x3), 1x1 ones as matrix products, both with bias, activation,
residual and PixelShuffle in the same pass and with their own backward. Whatever the native kernels do not
cover (other devices and types, other kernel sizes, a build without them) goes to torch, with the same
meaning.

Kernels want channels-last tensors; others are copied. Results do not depend on the number of threads, which
is ``torch.get_num_threads()`` at the time of the call. The environment variable ``CADYQ_ISA`` (``avx512``,
``avx2`` or ``portable``) forces one instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cadyq.errors import ArgumentError
from cadyq.native import load_native

_native: Any = load_native("_train_conv")

__all__ = ["Activation", "available", "conv2d", "conv2d_like", "enabled", "isas", "release_memory", "use"]

Activation: TypeAlias = (
    Literal["relu"] | tuple[Literal["leaky"], float] | tuple[Literal["prelu"], Tensor] | None
)

_LARGE = 1 << 20  # values
_NONE, _RELU, _LEAKY, _PRELU = range(4)
_use: ContextVar[bool] = ContextVar("cadyq_fastconv", default=False)


def available() -> bool:
    """Say whether the native kernels were built."""
    return _native is not None


def isas() -> list[str]:
    """Name the instruction sets that can run here, fastest first; empty without native kernels."""
    return _native.isas() if _native is not None else []


def enabled() -> bool:
    """Say whether `conv2d_like` takes the native kernels at present."""
    return _native is not None and _use.get()


@contextmanager
def use(on: bool = True) -> Iterator[None]:
    """Route `conv2d_like` through the native kernels within the block, or with ``on=False`` through torch."""
    token = _use.set(on)
    try:
        yield
    finally:
        _use.reset(token)


def release_memory() -> None:
    """Give memory back that the kernels keep between steps (at most 3 GiB)."""
    if _native is not None:
        _native.release()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    residual: Tensor | None = None,
    shuffle: int = 1,
    groups: int = 1,
) -> Tensor:
    """Compute ``act(pixel_shuffle(conv2d(x, weight) + bias, shuffle)) + residual``: stride 1, padding k // 2.

    ``x`` is (N, C_in, H, W), ``weight`` (C_out, C_in / groups, k, k) with odd k, ``bias`` (C_out); the result
    and ``residual`` are (N, C_out / shuffle^2, H * shuffle, W * shuffle). ``activation`` is None, ``"relu"``,
    ``("leaky", slope)`` or ``("prelu", slopes)`` with one slope, or one per channel of the result. Gradients
    reach ``x``, ``weight``, ``bias``, ``residual`` and the slopes, and agree with torch's to about 1e-5 of
    their largest value; second derivatives are refused.

    Raises `ArgumentError` for an even or non-square kernel, an unknown activation or a shuffle below 1.
    """
    kind, slope, slopes = _parse(activation)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ArgumentError("weight", tuple(weight.shape), "(out, in, k, k) with odd k")
    if shuffle < 1:
        raise ArgumentError("shuffle", shuffle, "1 or more")
    if _native is None or not _supported(x, weight, bias, residual, slopes, shuffle, groups):
        return _torch_conv2d(x, weight, bias, kind, slope, slopes, residual, shuffle, groups)
    if slopes is not None and slopes.numel() == 1:
        slopes = slopes.reshape(1).expand(weight.shape[0] // shuffle**2)
    out: Tensor = _Conv.apply(x, weight, bias, residual, slopes, kind, slope, groups, shuffle)
    return out


def conv2d_like(module: nn.Conv2d, x: Tensor, weight: Tensor | None = None, shuffle: int = 1) -> Tensor:
    """Compute what ``module(x)`` does, by the native kernels where they are `enabled` and cover it.

    A PixelShuffle by ``shuffle`` follows. ``weight`` replaces the module's own, for example by its fake-quantised
    values; gradients flow through it.
    """
    w = module.weight if weight is None else weight
    k = module.kernel_size[0]
    plain = (
        module.kernel_size == (k, k)
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and module.padding in ((k // 2, k // 2), "same")
    )
    if plain and k in (1, 3) and enabled():
        return conv2d(x, w, module.bias, shuffle=shuffle, groups=module.groups)
    if plain and k > 3 and module.groups == 1 and module.out_channels * k <= 32 and enabled():
        out = _by_rows(x, w, module.bias)
    else:
        out = module._conv_forward(x, w, module.bias)
    return out if shuffle == 1 else F.pixel_shuffle(out, shuffle)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """k x k convolution with very few outputs: a 1 x k convolution with k times as many, then shifted sums.

    Vectors run over outputs; with three of them most of a vector is idle (9x9 64->3: 3.5 times slower).
    """
    c_out, c_in, k, _ = weight.shape
    rows = F.conv2d(x, weight.permute(2, 0, 1, 3).reshape(k * c_out, c_in, 1, k), padding=(0, k // 2))
    rows = F.pad(rows, (0, 0, k // 2, k // 2))
    height = x.shape[2]
    out = rows[:, :c_out, :height]
    for i in range(1, k):
        out = out + rows[:, i * c_out : (i + 1) * c_out, i : i + height]
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def _parse(activation: Activation) -> tuple[int, float, Tensor | None]:
    if activation is None:
        return _NONE, 1.0, None
    if activation == "relu":
        return _RELU, 0.0, None
    if isinstance(activation, tuple) and len(activation) == 2:
        name, value = activation
        if name == "leaky" and not isinstance(value, Tensor):
            return _LEAKY, float(value), None
        if name == "prelu" and isinstance(value, Tensor):
            return _PRELU, 0.0, value
    raise ArgumentError("activation", activation, "None, 'relu', ('leaky', slope) or ('prelu', slopes)")


def _supported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slopes: Tensor | None,
    shuffle: int,
    groups: int,
) -> bool:
    tensors = [t for t in (x, weight, bias, residual, slopes) if t is not None]
    return (
        all(
            type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
            for t in tensors
        )
        and x.dim() == 4
        and x.numel() > 0
        and weight.shape[2] in (1, 3)
        and weight.shape[0] % (groups * shuffle**2) == 0
        and x.shape[1] == weight.shape[1] * groups
    )


def _torch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: int,
    slope: float,
    slopes: Tensor | None,
    residual: Tensor | None,
    shuffle: int,
    groups: int,
) -> Tensor:
    """The same by torch's own operations: the definition, and the fallback."""
    y = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=groups)
    if shuffle > 1:
        y = F.pixel_shuffle(y, shuffle)
    if kind == _RELU:
        y = F.relu(y)
    elif kind == _LEAKY:
        y = F.leaky_relu(y, slope)
    elif kind == _PRELU:
        assert slopes is not None
        y = F.prelu(y, slopes)
    return y if residual is None else y + residual


def _pixels(t: Tensor) -> Tensor:
    """``t`` without history, its channels adjacent in memory."""
    t = t.detach()
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def _empty(n: int, c: int, h: int, w: int) -> Tensor:
    # Large results are taken from our own reserve: the system's would be zeroed page by page in every step.
    if _native is not None and n * c * h * w >= _LARGE:
        storage: Tensor = _native.empty(n, c, h, w)
        return storage
    return torch.empty((n, c, h, w), memory_format=torch.channels_last)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        slopes: Tensor | None,
        kind: int,
        slope: float,
        groups: int,
        shuffle: int,
    ) -> Tensor:
        assert _native is not None
        n, _, h, w = x.shape
        shape = (n, weight.shape[0] // shuffle**2, h * shuffle, w * shuffle)
        x, weight = _pixels(x), weight.detach().contiguous()
        bias = None if bias is None else bias.detach().contiguous()
        slopes = None if slopes is None else slopes.detach().contiguous()
        y = _empty(*shape)
        # The output tells the sign of the activation's argument, unless a residual or a slope <= 0 hides it.
        wants_mask = kind != _NONE and any(ctx.needs_input_grad)
        from_output = kind != _PRELU and residual is None and (kind == _RELU or slope > 0)
        pre = _empty(*shape) if wants_mask and not from_output else None
        residual = None if residual is None else _pixels(residual)
        _native.conv_forward(
            x, weight, bias, residual, y, pre, kind, slope, slopes, groups, shuffle, torch.get_num_threads()
        )
        mask = (y if from_output else pre) if wants_mask else None
        ctx.save_for_backward(x, weight, mask, slopes)
        ctx.setup = (kind, slope, groups, shuffle)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert _native is not None
        x, weight, mask, slopes = ctx.saved_tensors
        kind, slope, groups, shuffle = ctx.setup
        wants_x, wants_weight, wants_bias, wants_residual, wants_slopes = ctx.needs_input_grad[:5]
        dy = _pixels(grads[0])
        mask = None if mask is None else mask.detach()
        threads = torch.get_num_threads()
        dx = dweight = dbias = dslopes = None
        if wants_x:
            dx = _empty(*x.shape)
            _native.conv_input_grad(dy, weight, mask, dx, kind, slope, slopes, groups, shuffle, threads)
        if wants_weight or wants_bias or wants_slopes:
            dweight = torch.empty(weight.shape)
            dbias = torch.empty(weight.shape[0]) if wants_bias else None
            dslopes = torch.empty(dy.shape[1]) if wants_slopes else None
            _native.conv_weight_grad(
                x, dy, mask, dweight, dbias, dslopes, kind, slope, slopes, groups, shuffle, threads
            )
        return (
            dx,
            dweight if wants_weight else None,
            dbias,
            grads[0] if wants_residual else None,
            dslopes,
            None,
            None,
            None,
            None,
        )
