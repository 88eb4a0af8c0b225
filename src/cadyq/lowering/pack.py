"""Convolutions, sites and tables as the arrays of a plan; equation numbers are those of ``docs/numerics.md``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cadyq.engine import plan as p
from cadyq.errors import UnsupportedError
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.linq import LinQ
from cadyq.quant.lsq import LSQ
from cadyq.quant.pams import PAMS
from cadyq.quant.selector import LOG_OFFSET, SELECTOR_INPUTS, BitSelector
from cadyq.quant.site import Site

__all__ = [
    "Kernel",
    "base_weights",
    "clips_and_levels",
    "conv_kernel",
    "deconv_kernel",
    "input_steps",
    "linear_kernel",
    "pack_site",
    "tables",
]

Array = p.Array
TAPS = 1 << 16  # unit of the weights of the enlarged image


@dataclass(frozen=True)
class Kernel:
    """int8 weights ``(C_out, k, k, C_in / groups)``, real value of one unit per output, real biases ``(C_out,)``.

    Outputs are in torch's order (channel, row, column) before a PixelShuffle, unless ``shuffle`` is above 1: then
    the kernel contains the shuffle and the order is the engine's. ``borders`` are weights and biases of the
    border variants, with 15 in front.
    """

    weight: Array
    step: Array
    bias: Array
    groups: int = 1
    shuffle: int = 1
    borders: tuple[Array, Array] | None = None

    def dense(self) -> Kernel:
        """The same without groups: zero weights instead. A PixelShuffle mixes the order of grouped outputs."""
        c_out, k, _, c_in = self.weight.shape
        weight = np.zeros((c_out, k, k, c_in * self.groups), np.int8)
        for outputs, inputs in zip(
            np.split(np.arange(c_out), self.groups),
            np.split(np.arange(c_in * self.groups), self.groups),
            strict=True,
        ):
            weight[outputs[0] : outputs[-1] + 1, :, :, inputs[0] : inputs[-1] + 1] = self.weight[outputs]
        return replace(self, weight=weight, groups=1)


def _codes(weight: Tensor, bits: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Codes of weights with outputs first (float64), and the step of each output."""
    if bits is None:
        raise UnsupportedError(f"{name} has float weights; the engine needs 8 bits: edges='integer'")
    q = 2 ** (bits - 1) - 1
    largest = weight.abs().flatten(1).amax(1).clamp_min(1e-30)
    scale = largest.view(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight * q / scale), largest / q


def _packed(codes: Tensor) -> Array:
    """(C_out, C_in, k, k) -> int8 (C_out, k, k, C_in)."""
    return np.ascontiguousarray(codes.permute(0, 2, 3, 1).to(torch.int8).numpy())


@torch.no_grad()
def conv_kernel(conv: Conv2d) -> Kernel:
    """Kernel of an ordinary or grouped convolution."""
    size = conv.kernel_size[0]
    plain = conv.kernel_size == (size, size) and size % 2 == 1 and conv.padding == (size // 2, size // 2)
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        raise UnsupportedError(
            f"{conv} has no integer form; expected stride 1, an odd square kernel k, zero padding k // 2"
        )
    weight = conv.scaled_weight().cpu()
    if conv.per_channel:
        codes, step = _codes(weight, conv.weight_bits, "a convolution")
    else:
        codes, step = _codes(weight[None], conv.weight_bits, "a convolution")
        codes, step = codes[0], step.expand(conv.out_channels)
    return Kernel(_packed(codes), step.numpy(), _bias(conv.bias, conv.out_channels), conv.groups)


@torch.no_grad()
def deconv_kernel(conv: ConvTranspose2d) -> Kernel:
    """A transposed convolution as a convolution with PixelShuffle; section 8."""
    size, s = conv.kernel_size[0], conv.stride[0]
    assert not isinstance(conv.padding, str)
    pad = conv.padding[0]
    square = conv.kernel_size == (size, size) and conv.stride == (s, s) and conv.padding == (pad, pad)
    if not square or conv.groups != 1 or conv.dilation != (1, 1) or not 1 <= s <= 8:
        raise UnsupportedError(f"{conv} has no integer form; expected equal sides, no groups, no dilation")
    codes, step = _codes(conv.scaled_weight().cpu(), conv.weight_bits, "a deconvolution")
    c_out, c_in = codes.shape[:2]
    # Output s y + r is the sum over j of w[s j + r + pad] x[y - j].
    taps = [(r, j, s * j + r + pad) for r in range(s) for j in range(-size, size)]
    taps = [tap for tap in taps if 0 <= tap[2] < size]
    radius = max(abs(j) for _, j, _ in taps)
    out = torch.zeros(s, s, c_out, c_in, 2 * radius + 1, 2 * radius + 1, dtype=codes.dtype)
    for ry, jy, ky in taps:
        for rx, jx, kx in taps:
            out[ry, rx, :, :, radius - jy, radius - jx] = codes[:, :, ky, kx]
    n = s * s
    return Kernel(
        _packed(out.flatten(0, 2)),
        step.repeat(n).numpy(),
        np.tile(_bias(conv.bias, c_out), n),
        shuffle=s,
    )


def linear_kernel(weight: Tensor, bias: Tensor, shuffle: int, bits: int, in_scale: Tensor | None) -> Kernel:
    """Kernel of a collapsed chain: (16, C_out, C_in, k, k) and (16, C_out) in the engine's order of outputs."""
    if in_scale is not None:
        weight = weight * in_scale.double().cpu().view(1, 1, -1, 1, 1)
    # All variants of an output share its step.
    codes, step = _codes(weight.transpose(0, 1), bits, "a chain of convolutions")
    packed = [_packed(codes[:, i]) for i in range(16)]
    biases = bias.numpy()
    return Kernel(
        packed[0], step.numpy(), biases[0], 1, shuffle, (np.stack(packed[1:]), np.stack(list(biases[1:])))
    )


def _bias(bias: Tensor | None, n: int) -> Array:
    return np.zeros(n) if bias is None else bias.detach().double().cpu().numpy()


def clips_and_levels(site: Site) -> tuple[Array, Array]:
    """Clip and largest code per candidate (without 0), float64."""
    quantizer = site.quantizer
    assert quantizer is not None
    bits = quantizer.bits.cpu().numpy()
    levels = 2.0 ** (bits - 1) - 1 if quantizer.signed else 2.0**bits - 1
    if isinstance(quantizer, PAMS):
        return quantizer.clip.detach().double().cpu().clamp_min(1e-8).numpy(), levels
    if isinstance(quantizer, LSQ):
        return quantizer.step.detach().double().cpu().clamp_min(1e-8).numpy() * levels, levels
    raise UnsupportedError(
        f"{site.name}: quantizer {type(quantizer).__name__} has no integer form here; expected PAMS or LSQ"
    )


def _zeros(site: Site) -> int:
    """1 if the site's first candidate is 0 (skip), else 0."""
    return int(site.selector is not None and site.selector.has_zero)


def input_steps(site: Site) -> Array:
    """Real value of one code per candidate (channel scales are in the weights)."""
    if isinstance(site.quantizer, LinQ):
        return np.ones(_zeros(site) + len(site.quantizer.bits))
    clip, levels = clips_and_levels(site)
    return np.concatenate([np.ones(_zeros(site)), clip / levels])


def pack_site(site: Site, step: Array) -> p.Site:
    """Candidates of a site whose channels have the given steps (C,); equation (4)."""
    quantizer = site.quantizer
    assert quantizer is not None
    scale = np.ones(site.channels)
    if quantizer.channel_scale is not None:
        scale = quantizer.channel_scale.double().cpu().numpy()
    bits = quantizer.bits.cpu().numpy()
    inverse = None
    if isinstance(quantizer, LinQ):
        levels = 2.0 ** (bits - 1) - 1 if quantizer.signed else 2.0**bits - 1
        multiplier, inverse = np.zeros((len(bits), site.channels)), 1.0 / scale
    else:
        clip, levels = clips_and_levels(site)
        multiplier = step[None] * levels[:, None] / (clip[:, None] * scale[None])
    low = -levels if quantizer.signed else np.zeros_like(levels)
    zeros = _zeros(site)
    if (site.selector is not None or inverse is not None) and not (step == step[0]).all():
        raise UnsupportedError(f"{site.name} chooses from channels that are stored on several grids")

    def padded(values: Array, dtype: type) -> Array:
        return np.concatenate([np.zeros((zeros, *values.shape[1:])), values]).astype(dtype)

    return p.Site(
        site.name,
        "body" if site.kind == "body" else "fixed" if site.kind == "fixed" else "edge",
        site.macs_per_pixel,
        (*([0] * zeros), *(int(b) for b in bits)),
        float(step[0]),
        padded(multiplier, np.float32),
        padded(low, np.int32),
        padded(levels, np.int32),
        None if site.selector is None else _selector(site.selector, site.channels),
        inverse,
    )


def _selector(selector: BitSelector, channels: int) -> p.Selector:
    """Weights on (log) gradient and deviations, with the standardisation folded in; equation (10)."""
    use_gradient, kind = SELECTOR_INPUTS[selector.inputs]
    if kind == "layer":
        raise UnsupportedError(
            f"selector inputs {selector.inputs!r} have no integer form; expected 'both' or 'channel'"
        )
    weight = selector.linear.weight.detach().double().cpu().numpy()
    bias = selector.linear.bias.detach().double().cpu().numpy().copy()
    if selector.log_features:
        center, spread = selector.center.double().cpu().numpy(), selector.spread.double().cpu().numpy()
        weight = weight / spread
        bias = bias - weight @ center
    full = np.zeros((len(bias), 2 + channels))
    start = 0 if use_gradient else 2
    full[:, start : start + weight.shape[1]] = weight
    if use_gradient and not selector.log_features:
        full[:, :2] *= selector.gradient_gain
    return p.Selector(full, bias, log_offset=LOG_OFFSET if selector.log_features else 0.0)


def tables(step: float, functions: Sequence[Callable[[Array], Array]]) -> tuple[Array, Array]:
    """8- and 16-bit pixel of every int16 value of the output plane; equation (8)."""
    pixel = np.arange(-32768, 32768, dtype=np.float64) * step
    for function in functions:
        pixel = function(pixel)
    pixel = np.clip(pixel, 0, 1)
    return np.floor(pixel * 255 + 0.5).astype(np.uint8), np.floor(pixel * 65535 + 0.5).astype(np.uint16)


def base_weights(kind: str, scale: int, upscale: Callable[[Tensor], Tensor]) -> Array:
    """Weights (scale, 5) of an enlargement, in 1/65536: its response to a unit far from the border."""
    line = torch.zeros(1, 1, 1, 11, dtype=torch.float64)
    line[..., 5] = 1
    row = upscale(line.expand(1, 1, 11, 11))[0, 0, 5 * scale]
    taps = row.numpy().reshape(11, scale)[3:8][::-1].T
    weight = np.rint(taps * TAPS)
    weight[np.arange(scale), np.abs(weight).argmax(1)] += TAPS - weight.sum(1)
    if np.abs(weight / TAPS - taps).max() > 1e-4:
        raise UnsupportedError(f"enlargement {kind!r} by {scale} reaches further than two pixels")
    packed: Array = weight.astype(np.int32)
    return packed


def enlargement(kind: str, scale: int) -> Callable[[Tensor], Tensor]:
    """torch's interpolation by its mode's name; ``torch`` is its bicubic."""
    mode = "bicubic" if kind == "torch" else kind
    corners = None if mode.startswith("nearest") else False
    return lambda x: F.interpolate(x, scale_factor=scale, mode=mode, align_corners=corners)
