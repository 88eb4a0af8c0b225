"""Fake-quantised torch network -> plan of the integer engine: the only file that knows both worlds.

Supported are networks of the form head, residual blocks, last body convolution plus shortcut, upsampler, tail
(SRResNet's form), converted with ``edges="integer"`` and ``stream_bits=16``, quantiser PAMS. Everything a plan holds
is read off the network's sites and convolutions; equation numbers are those of ``docs/numerics.md``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cadyq.backbones.srresnet import ResidualBlock, SRResNet
from cadyq.config import Quantization
from cadyq.engine import plan as p
from cadyq.errors import UnsupportedError
from cadyq.quant.layers import Conv2d
from cadyq.quant.pams import PAMS
from cadyq.quant.selector import LOG_OFFSET, SELECTOR_INPUTS, BitSelector
from cadyq.quant.site import Site

__all__ = ["lower"]

Array = NDArray[Any]

IMAGE_STEP = 1.0 / 32767
TANH_RANGE = 8.0  # tanh(8) is 1 - 2e-7: beyond it all tables are flat


def lower(network: nn.Module, config: Quantization) -> p.Plan:
    """Plan of a converted, calibrated network.

    Raises:
        UnsupportedError: a network or configuration without integer form; the message says what would have one.
    """
    _check(network, config)
    assert isinstance(network, SRResNet)
    step = {
        "head": float(network.stream_up.grid),  # the shortcut is added to that plane, so it shares its grid
        "body": float(network.stream.grid),
        "up": float(network.stream_up.grid),
    }
    planes = [
        p.Plane(3, 1, IMAGE_STEP),
        p.Plane(network.stream.channels, 1, step["head"]),
        p.Plane(network.stream.channels, 1, step["body"]),
        p.Plane(network.stream.channels, 1, step["up"]),
    ]
    unit8, unit16 = np.float32(32767 / 255), np.float32(32767 / 65535)
    steps: list[p.Step] = [
        p.ImageIn(0, np.full(3, unit8), np.full(3, unit16), np.zeros(3, np.float32)),
        p.Layer(0, 1, _conv(network.head, None, IMAGE_STEP, step["head"], network.head_act)),
        p.Layer(1, 2, _rescale(network.stream.channels, step["head"] / step["body"])),
    ]
    for block in network.body:
        assert isinstance(block, ResidualBlock)
        hidden = float(block.site2.grid)
        first = _conv(block.conv1, block.site1, step["body"], hidden, block.act)
        second = _conv(block.conv2, block.site2, hidden, step["body"])
        steps.append(p.Block(2, 2, (first, second)))
    steps.append(
        p.Layer(2, 3, _conv(network.body_end, network.body_end_site, step["body"], step["up"]), residual=1)
    )
    source, level = 3, 1
    next_sites = [*list(network.up.sites)[1:], network.tail_site]
    stages = zip(
        network.up.convs, network.up.sites, network.up.acts, network.up.factors, next_sites, strict=True
    )
    for conv, site, act, factor, following in stages:
        assert isinstance(conv, Conv2d) and isinstance(site, Site) and isinstance(following, Site)
        level *= factor
        target = float(following.grid)
        planes.append(p.Plane(conv.out_channels // factor**2, level, target))
        wide = site if site.quantizer is not None else None
        packed = _conv(conv, wide, planes[source].step, target, act, shuffle=factor)
        steps.append(p.Layer(source, len(planes) - 1, packed, shuffle=factor))
        source = len(planes) - 1
    out_step = TANH_RANGE / 32767 if network.keras else 2.0 / 32767
    planes.append(p.Plane(3, level, out_step))
    steps.append(
        p.Layer(
            source, len(planes) - 1, _conv(network.tail, network.tail_site, planes[source].step, out_step)
        )
    )
    steps.append(p.ImageOut(len(planes) - 1, *_tables(out_step, tanh=network.keras)))
    return p.Plan(network.scale, config.tile, tuple(planes), tuple(steps)).validate()


def _check(network: nn.Module, config: Quantization) -> None:
    what = type(network).__name__
    if not isinstance(network, SRResNet) or network.config["norm"] or not network.keras:
        raise UnsupportedError(
            f"{what}: the engine runs SRResNet in its folded Keras form so far; run it on torch"
        )
    if config.quantizer != "pams":
        raise UnsupportedError(f"quantizer {config.quantizer!r} has no integer form here; expected 'pams'")
    if config.edges != "integer" or config.stream_bits != 16:
        raise UnsupportedError(
            f"edges {config.edges!r}, stream_bits {config.stream_bits}: the engine needs 'integer' and 16; "
            "convert again"
        )


def _codes(conv: Conv2d) -> tuple[Array, Array]:
    """int8 weights (C_out, k, k, C_in) and the step of each output channel (C_out,), float64."""
    if conv.weight_bits is None or conv.groups != 1:
        raise UnsupportedError(f"a convolution has weight_bits {conv.weight_bits} and {conv.groups} groups")
    with torch.no_grad():
        weight = conv.weight.double()
        if conv.in_scale is not None:
            weight = weight * conv.weight_scale().double()
        q = 2 ** (conv.weight_bits - 1) - 1
        dims = (1, 2, 3) if conv.per_channel else (0, 1, 2, 3)
        largest = weight.abs().amax(dims, keepdim=True).clamp_min(1e-30)
        codes = torch.round(weight * q / largest).to(torch.int8)
        steps = (largest / q).flatten().expand(conv.out_channels)
    return np.ascontiguousarray(codes.permute(0, 2, 3, 1).numpy()), steps.numpy()


def _conv(
    conv: Conv2d, site: Site | None, in_step: float, out_step: float, act: Any = None, shuffle: int = 1
) -> p.Conv:
    """Pack a convolution: from codes of its site (or of its source plane) to values of ``out_step``."""
    weight, weight_step = _codes(conv)
    bias = conv.bias.detach().double().numpy() if conv.bias is not None else np.zeros(conv.out_channels)
    slope = None
    if isinstance(act, nn.PReLU):
        per_channel = conv.out_channels // shuffle**2
        values = act.weight.detach().double().expand(per_channel).numpy()
        slope = np.repeat(values, shuffle**2)
    elif act is not None:
        raise UnsupportedError(f"activation {type(act).__name__} has no integer form here; expected PReLU")
    packed = None if site is None else _site(site, in_step)
    input_steps = np.array([in_step]) if site is None else _input_steps(site)
    factor = input_steps[:, None] * weight_step[None] / out_step
    if shuffle > 1:
        # torch counts (channel, row, column), the engine (row, column, channel).
        order = np.arange(conv.out_channels).reshape(-1, shuffle**2).T.ravel()
        weight, factor, bias = weight[order], factor[:, order], bias[order]
        slope = None if slope is None else slope[order]
    return p.Conv(
        np.ascontiguousarray(weight),
        np.ascontiguousarray(factor, np.float32),
        (bias / out_step).astype(np.float32),
        None if slope is None else slope.astype(np.float32),
        packed,
    )


def _rescale(channels: int, ratio: float) -> p.Conv:
    """A plane onto another grid: the 1x1 convolution with unit weights."""
    weight = np.eye(channels, dtype=np.int8)[:, None, None, :]
    return p.Conv(
        np.ascontiguousarray(weight),
        np.full((1, channels), ratio, np.float32),
        np.zeros(channels, np.float32),
    )


def _clips_and_levels(site: Site) -> tuple[Array, Array]:
    """Clip and largest code per candidate (without 0), float64."""
    quantizer = site.quantizer
    if not isinstance(quantizer, PAMS):
        raise UnsupportedError(
            f"{site.name}: quantizer {type(quantizer).__name__} has no integer form; expected PAMS"
        )
    clip = quantizer.clip.detach().double().clamp_min(1e-8).numpy()
    bits = quantizer.bits.numpy()
    return clip, 2.0 ** (bits - 1) - 1 if quantizer.signed else 2.0**bits - 1


def _zeros(site: Site) -> int:
    """1 if the site's first candidate is 0 (skip), else 0."""
    return int(site.selector is not None and site.selector.has_zero)


def _input_steps(site: Site) -> Array:
    """Real value of one code per candidate (channel scales are in the weights)."""
    clip, levels = _clips_and_levels(site)
    return np.concatenate([np.ones(_zeros(site)), clip / levels])


def _site(site: Site, in_step: float) -> p.Site:
    """Candidates of a site whose plane has step ``in_step``; equation (4)."""
    quantizer = site.quantizer
    assert isinstance(quantizer, PAMS)
    clip, levels = _clips_and_levels(site)
    scale = np.ones(site.channels)
    if quantizer.channel_scale is not None:
        scale = quantizer.channel_scale.double().numpy()
    multiplier = in_step * levels[:, None] / (clip[:, None] * scale[None])
    low = -levels if quantizer.signed else np.zeros_like(levels)
    zeros = _zeros(site)
    bits = (*([0] * zeros), *(int(b) for b in quantizer.bits))

    def padded(values: Array, dtype: type) -> Array:
        return np.concatenate([np.zeros((zeros, *values.shape[1:])), values]).astype(dtype)

    selector = None if site.selector is None else _selector(site.selector, site.channels)
    return p.Site(
        site.name,
        bits,
        in_step,
        padded(multiplier, np.float32),
        padded(low, np.int32),
        padded(levels, np.int32),
        selector,
    )


def _selector(selector: BitSelector, channels: int) -> p.Selector:
    """Weights on (log) gradient and deviations, with the standardisation folded in; equation (10)."""
    use_gradient, kind = SELECTOR_INPUTS[selector.inputs]
    if kind == "layer":
        raise UnsupportedError(
            f"selector inputs {selector.inputs!r} have no integer form; expected 'both' or 'channel'"
        )
    weight = selector.linear.weight.detach().double().numpy()
    bias = selector.linear.bias.detach().double().numpy().copy()
    if selector.log_features:
        center, spread = selector.center.double().numpy(), selector.spread.double().numpy()
        weight = weight / spread
        bias = bias - weight @ center
    full = np.zeros((len(bias), 2 + channels))
    start = 0 if use_gradient else 2
    full[:, start : start + weight.shape[1]] = weight
    if use_gradient and not selector.log_features:
        full[:, :2] *= selector.gradient_gain
    return p.Selector(full, bias, log_offset=LOG_OFFSET if selector.log_features else 0.0)


def _tables(step: float, tanh: bool) -> tuple[Array, Array]:
    """8- and 16-bit pixel of every int16 value of the output plane; equation (8)."""
    value = np.arange(-32768, 32768, dtype=np.float64) * step
    pixel = np.clip((np.tanh(value) + 1) / 2 if tanh else value, 0, 1)
    return np.floor(pixel * 255 + 0.5).astype(np.uint8), np.floor(pixel * 65535 + 0.5).astype(np.uint16)
