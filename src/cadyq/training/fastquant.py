"""The quantiser of a site with several candidates, for training on a CPU, one pass each way.

Candidate k clips to a_k and has q_k levels. With per-channel scales s::

    Q_k(x) = round(clip(x / s, -a_k, a_k) / a_k * q_k) / q_k * a_k * s        (unsigned: clip to [0, a_k])

Forward takes each sample's chosen candidate; backward takes the mixture sum_k P_k Q_k(x) with
straight-through rounding (PAMS, Li et al., 2020; CADyQ, Hong et al., 2022, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cadyq.errors import ArgumentError
from cadyq.native import load_native
from cadyq.quant.context import channel_deviation
from cadyq.training.fastconv import _empty, _pixels

_native: Any = load_native("_train_conv")

__all__ = ["deviation", "mixture"]


def deviation(x: Tensor) -> Tensor:
    """Compute `cadyq.quant.context.channel_deviation` of ``x`` without history, natively where that is covered.

    torch's own is slow where channels are adjacent; the results differ in their last bits.
    """
    x = x.detach()
    if not _is_native(x):
        return channel_deviation(x)
    result = torch.empty(x.shape[:2])
    _native.deviation(_pixels(x), result, torch.get_num_threads())
    return result


def mixture(
    x: Tensor,
    prob: Tensor,
    clip: Tensor,
    levels: Tensor,
    chosen: Tensor,
    scale: Tensor,
    *,
    signed: bool = True,
) -> Tensor:
    """Quantise every sample of ``x`` (N, C, H, W) by its ``chosen`` candidate; the gradient is the mixture's.

    ``prob`` is (N, K), ``clip`` (K) positive, ``levels`` (K) whole numbers below 2^22 (127 for 8 signed
    bits), ``chosen`` (N) indices, ``scale`` (C) positive. Gradients reach ``x``, ``prob`` and ``clip``;
    ``scale`` and ``levels`` are constants. With g the gradient of the result and v = x / scale, sums over a
    sample's elements::

        dx      = g * sum_k P_k [|v| < a_k]                  (unsigned: 0 < v < a_k)
        dP_nk   = sum g * Q_k(x)
        dclip_k = sum_n P_nk sum g * scale * r
        r       = inside: round(u q_k) / q_k - u, u = v / a_k; outside: sign (unsigned, v <= 0: 0)

    Native and torch round alike; sums may differ in their last bits. Raises `ArgumentError` for shapes that
    do not fit.
    """
    n, c = x.shape[0], x.shape[1] if x.dim() == 4 else -1
    k = clip.numel()
    expected = {"prob": (n, k), "clip": (k,), "levels": (k,), "chosen": (n,), "scale": (c,)}
    given = {"prob": prob, "clip": clip, "levels": levels, "chosen": chosen, "scale": scale}
    if x.dim() != 4:
        raise ArgumentError("x", tuple(x.shape), "(N, C, H, W)")
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ArgumentError(name, tuple(given[name].shape), f"shape {shape}")
    out: Tensor = _Mixture.apply(x, prob, clip, levels.to(x.dtype), chosen, scale.to(x.dtype), signed)
    return out


def _is_native(*tensors: Tensor) -> bool:
    return _native is not None and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors
    )


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        prob: Tensor,
        clip: Tensor,
        levels: Tensor,
        chosen: Tensor,
        scale: Tensor,
        signed: bool,
    ) -> Tensor:
        x, prob, clip, levels, scale = (t.detach() for t in (x, prob, clip, levels, scale))
        ctx.signed = signed
        if not _is_native(x, prob, clip, levels, scale):
            ctx.save_for_backward(x, prob, clip, levels, scale)
            return _forward(x, clip, levels, chosen, scale, signed)
        assert _native is not None
        x, prob, clip, levels, scale = _pixels(x), *(t.contiguous() for t in (prob, clip, levels, scale))
        ctx.save_for_backward(x, prob, clip, levels, scale)
        y = _empty(*x.shape)
        index = chosen.to(torch.int32).contiguous()
        _native.mixture_forward(x, scale, clip, levels, index, signed, y, torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, prob, clip, levels, scale = ctx.saved_tensors
        dy = grads[0].detach()
        if not _is_native(x, prob, clip, levels, scale, dy):
            dx, dprob, dclip = _backward(x, prob, clip, levels, scale, ctx.signed, dy)
        else:
            assert _native is not None
            dx = _empty(*x.shape)
            dprob, dclip = torch.empty_like(prob), torch.empty_like(clip)
            _native.mixture_backward(
                x,
                scale,
                clip,
                levels,
                prob,
                ctx.signed,
                _pixels(dy),
                dx,
                dprob,
                dclip,
                torch.get_num_threads(),
            )
        return dx, dprob, dclip, None, None, None, None


def _forward(x: Tensor, clip: Tensor, levels: Tensor, chosen: Tensor, scale: Tensor, signed: bool) -> Tensor:
    s, a, q = scale.view(1, -1, 1, 1), clip[chosen].view(-1, 1, 1, 1), levels[chosen].view(-1, 1, 1, 1)
    v = torch.minimum(torch.maximum(x / s, -a if signed else torch.zeros_like(a)), a)
    return torch.round(v / a * q) / q * a * s


def _backward(
    x: Tensor, prob: Tensor, clip: Tensor, levels: Tensor, scale: Tensor, signed: bool, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s = scale.view(1, -1, 1, 1)
    v = x / s
    weight, dprob, dclip = torch.zeros_like(x), torch.empty_like(prob), torch.empty_like(clip)
    for k in range(clip.numel()):
        a, q = clip[k], levels[k]
        low = -a if signed else torch.zeros_like(a)
        u = torch.minimum(torch.maximum(v, low), a) / a
        rounded = torch.round(u * q) / q
        inside = (v > low) & (v < a)
        weight += inside * prob[:, k].view(-1, 1, 1, 1)
        dprob[:, k] = (g * (rounded * a * s)).sum((1, 2, 3))
        bound = (v >= a).to(x.dtype) - (v <= low).to(x.dtype) * float(signed)
        slope = torch.where(inside, rounded - u, bound)
        dclip[k] = ((g * s * slope).sum((1, 2, 3)) * prob[:, k]).sum()
    return g * weight, dprob, dclip
