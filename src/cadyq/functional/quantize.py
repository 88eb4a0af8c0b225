"""The arithmetic of quantisation: the one place where the order of operations is written down.

All functions are pure and differentiable by straight-through estimation (rounding has gradient 1).
Bits are data: every argument that depends on the bit-width is a tensor that broadcasts over the feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GAUSSIAN_STEP",
    "candidate_index",
    "channel_range_scale",
    "gaussian_step",
    "n_levels",
    "quantize_clipped",
    "quantize_grid",
    "quantize_weight",
    "round_ste",
]

# Steps of the uniform quantiser that minimises the mean squared error on a unit Gaussian, 1 to 8 bits
# (Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960, table II; 6 to 8 bits computed by
# minimising the same integral numerically; tests/functional/test_quantize.py repeats the minimisation).
GAUSSIAN_STEP = (1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    result: Tensor = _RoundSTE.apply(x)
    return result


def n_levels(bits: Tensor, signed: bool) -> Tensor:
    """Largest code q of a ``bits``-bit quantiser: 2^(b-1) - 1 if signed, 2^b - 1 otherwise."""
    return 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1


class _QuantizeClipped(torch.autograd.Function):
    # What autograd makes of the composition, written out: it would store six copies of the feature.
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, levels: Tensor, signed: bool) -> Tensor:
        ctx.save_for_backward(x, clip, levels)
        ctx.signed = signed
        # clamp(x / a, -1, 1) equals clamp(x, -a, a) / a: division by a positive a is monotone and exact at a.
        ratio = (x / clip).clamp_(-1.0 if signed else 0.0, 1.0)
        return ratio.mul_(levels).round_().div_(levels).mul_(clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, clip, levels = ctx.saved_tensors
        grad = grads[0]
        ratio = x / clip
        inside = ((ratio > -1.0) if ctx.signed else (ratio > 0.0)) & (ratio < 1.0)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_clip = None
        if ctx.needs_input_grad[1]:
            # d/da: inside, the rounding error in units of a; outside, the sign of x.
            ratio.clamp_(-1.0 if ctx.signed else 0.0, 1.0)
            rounded = (ratio * levels).round_().div_(levels)
            slope = rounded.sub_(ratio.mul_(inside)).mul_(grad)
            grad_clip = slope.sum_to_size(clip.shape)
        return grad_x, grad_clip, None, None


def quantize_clipped(x: Tensor, clip: Tensor, levels: Tensor, signed: bool = True) -> Tensor:
    """Linear quantisation with a clip: round(clamp(x, -a, a) / a * q) / q * a (PAMS, equation 3).

    ``clip`` (a > 0) and ``levels`` (q) broadcast against ``x``. Dividing by a and multiplying by q, in this
    order, is part of the definition: x / (a / q) moves some values by one whole step. The unsigned form
    clamps to [0, a]. The clip receives the gradient of the composition, with rounding straight through.
    """
    result: Tensor = _QuantizeClipped.apply(x, clip, levels, signed)
    return result


class _QuantizeGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, limit: float) -> Tensor:
        return (x / step).round_().clamp_(-limit, limit).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def quantize_grid(x: Tensor, step: Tensor, bits: int = 16) -> Tensor:
    """Round to the signed grid ``step * n`` of ``bits`` bits; used for stored features, not for multiplication."""
    limit = float(2 ** (bits - 1) - 1)
    result: Tensor = _QuantizeGrid.apply(x, step, limit)
    return result


def quantize_weight(
    weight: Tensor, bits: int = 8, per_channel: bool = True, in_scale: Tensor | None = None
) -> Tensor:
    """Symmetric weight quantisation round(w * q / m) * m / q with m = max|w| (method: 8 bit).

    ``weight`` has shape (C_out, C_in / groups, F, F). ``per_channel`` takes m per output channel, otherwise per
    tensor. ``in_scale`` (C_out or 1, C_in / groups, 1, 1) folds per-channel input scales into the weights before
    they are quantised and takes them out again, so that ``conv(x, result)`` equals
    ``conv(x / scale, quantised(weight * scale))``.
    """
    q = float(2 ** (bits - 1) - 1)
    if in_scale is not None:
        weight = weight * in_scale
    dims = tuple(range(1, weight.dim())) if per_channel else tuple(range(weight.dim()))
    largest = weight.detach().abs().amax(dim=dims, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    result = round_ste(weight * q / largest) * largest / q
    return result if in_scale is None else result / in_scale


def channel_range_scale(ranges: Tensor, power: float) -> Tensor:
    """Per-channel scales range^power, normalised to geometric mean 1; channels that are always 0 get scale 1."""
    alive = ranges > 0
    safe = torch.where(alive, ranges, torch.ones_like(ranges))
    logs = torch.log(safe)
    mean = logs[alive].mean() if bool(alive.any()) else logs.new_zeros(())
    return torch.where(alive, torch.exp(power * (logs - mean)), torch.ones_like(ranges))


def gaussian_step(bits: Tensor) -> Tensor:
    """Step of the MSE-optimal uniform quantiser of a unit Gaussian for 1 to 8 bits (Max 1960)."""
    table = torch.tensor(GAUSSIAN_STEP, dtype=torch.get_default_dtype(), device=bits.device)
    return table[bits.long() - 1]


def candidate_index(candidates: Tensor, bits: int | Tensor, like: Tensor) -> Tensor:
    """Index of the candidate with the given bit-width for every patch; ``like`` gives shape (n,) and device.

    Raises:
        ValueError: a bit-width that is none of the ``candidates`` (K,).
    """
    wanted = torch.as_tensor(bits, device=like.device).expand_as(like)
    hit = wanted[:, None] == candidates.to(wanted.dtype)
    if not bool(hit.any(1).all()):
        raise ValueError(f"bits {wanted.unique().tolist()} are not all among {candidates.tolist()}")
    return hit.int().argmax(1)
