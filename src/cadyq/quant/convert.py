"""Float network -> fake-quantised network, and the calibration that gives its ranges."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from cadyq.config import Quantization
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.functional.quantize import channel_range_scale, quantize_clipped
from cadyq.quant.context import Context
from cadyq.quant.daq import DAQ
from cadyq.quant.layers import Conv2d
from cadyq.quant.linq import LinQ
from cadyq.quant.lsq import LSQ
from cadyq.quant.pams import PAMS
from cadyq.quant.quantizer import ActQuantizer
from cadyq.quant.selector import BitSelector
from cadyq.quant.site import Site, SiteObserver, sites_of

__all__ = [
    "ACT_QUANTIZERS",
    "BIT_SELECTORS",
    "SiteStatistics",
    "calibrate",
    "convert",
    "observe",
    "scale_clips",
    "scale_together",
]

CUT = 4.0
"""What is cut off of a value counts so many times where no convolution says what it does."""
CLIP_STEP = 0.87
"""Clips are searched in steps of this factor."""
CLIP_FACTORS = (1.0, 1.25, 1.6, 2.0, 0.8, 0.65)

Network = TypeVar("Network", bound=nn.Module)

ACT_QUANTIZERS: dict[str, type[ActQuantizer]] = {"pams": PAMS, "linq": LinQ, "daq": DAQ, "lsq": LSQ}
BIT_SELECTORS: dict[str, type[BitSelector]] = {"cadyq": BitSelector}


def convert(network: Network, config: Quantization) -> Network:
    """Copy of a float network with quantisers (and selectors) at its sites.

    Clips and scales are neutral until :func:`calibrate` or a checkpoint sets them. Batch norm must be folded
    first where weights are to be quantised as they will run; it is kept if it is there (its statistics frozen).

    Raises:
        UnsupportedError: 0 bits in a network whose blocks have no skip.
    """
    result = copy.deepcopy(network)
    blocks = [
        module for module in result.modules() if hasattr(module, "residual") and hasattr(module, "halo")
    ]
    if 0 in config.bits and not all(block.residual for block in blocks):
        raise UnsupportedError(
            f"{type(network).__name__} has blocks without a skip: 0 bits (skip) is not defined"
        )
    first_sites = {id(sites_of(block)[0]) for block in blocks}
    for site in sites_of(result):
        _install(site, config, is_first=id(site) in first_sites)
    return result


def _install(site: Site, config: Quantization, *, is_first: bool) -> None:
    everything = config.skips  # fully quantised
    body_quantizer = ACT_QUANTIZERS[config.quantizer]
    edge_quantizer = LSQ if config.quantizer == "lsq" else PAMS
    signed = not (config.unsigned and site.nonneg)
    conv = site.conv
    if site.kind == "body":
        bits = [b for b in config.bits if b] if config.dynamic else [config.bits[-1]]
        site.quantizer = body_quantizer(site.channels, bits, signed)
        if config.dynamic:
            candidates = list(config.bits) if is_first else bits
            site.selector = BitSelector(
                site.channels,
                candidates,
                config.selector_inputs,
                log_features=config.log_features,
                gradient_gain=config.gradient_gain,
            )
    elif site.kind == "fixed" or (site.kind == "skip" and everything):
        # The range of a whole plane is not known before all of it is computed, so with integer edges LinQ's fixed
        # sites have clips, as the edges do.
        clipped = body_quantizer is LinQ and config.edges == "integer"
        quantizer = edge_quantizer if site.kind == "skip" or clipped else body_quantizer
        site.quantizer = quantizer(site.channels, [site.static_bits], signed)
    elif site.kind == "edge" and (config.edges == "integer" or everything):
        if site.static_bits <= 8:
            site.quantizer = edge_quantizer(site.channels, [site.static_bits], signed)
        else:
            site.set_grid(1.0 / 32767)  # the picture's; calibration replaces it for other planes
    if _reads_levels(site):
        # Its clip is 1 and stays so: the codes are the levels of an 8-bit picture, and nothing is lost.
        cast(PAMS, site.quantizer).clip.requires_grad_(False)
    if site.quantizer is None and not float(site.grid):
        return
    if conv is not None:
        conv.weight_bits = config.weight_bits
        if isinstance(conv, Conv2d):
            conv.per_channel = config.per_channel_weights
    if config.channel_power and conv is not None and site.quantizer is not None:
        # Placeholders of the right shape, so that a checkpoint can fill them.
        site.quantizer.channel_scale = torch.ones(site.channels)
        conv.in_scale = torch.ones(site.channels)


def _reads_levels(site: Site) -> bool:
    """Whether the site is that of a picture in [0, 1], with unsigned 8-bit codes and a clip."""
    quantizer = site.quantizer
    is_picture = site.kind == "fixed" and site.channels <= 3 and site.static_bits == 8
    return is_picture and isinstance(quantizer, PAMS) and not quantizer.signed


@dataclass
class SiteStatistics:
    """What calibration saw at one site.

    Attributes:
        channel_max: largest magnitude per channel, (C,).
        patch_max: sum over patches of the largest magnitude, and their number (PAMS' running estimate).
        samples: random values per channel, (C, n), for clips that minimise the squared error.
        windows: what the convolution sees at random pixels, (n, C, F, F), behind sites of the body and fixed ones.
        features: selector inputs per patch: gradient (n, 2) and deviations (n, C).
    """

    channel_max: Tensor
    patch_max: float = 0.0
    n_patches: int = 0
    samples: list[Tensor] = field(default_factory=list)
    windows: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    deviations: list[Tensor] = field(default_factory=list)


class _Collector(SiteObserver):
    def __init__(self, n_values: int, n_windows: int, seed: int) -> None:
        self.found: dict[str, SiteStatistics] = {}
        self.n_values, self.n_windows = n_values, n_windows
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, site: Site, x: Tensor, ctx: Context) -> None:
        x = x.detach()
        magnitude = x.abs()
        stats = self.found.setdefault(site.name, SiteStatistics(torch.zeros(site.channels)))
        stats.channel_max = torch.maximum(stats.channel_max, magnitude.amax((0, 2, 3)))
        stats.patch_max += float(magnitude.amax((1, 2, 3)).sum())
        stats.n_patches += x.shape[0]
        flat = x.permute(1, 0, 2, 3).flatten(1)
        index = torch.randint(flat.shape[1], (self.n_values,), generator=self.generator)
        stats.samples.append(flat[:, index].clone())
        if isinstance(site.conv, Conv2d) and site.kind in ("body", "fixed"):
            stats.windows.append(self._windows(x, site.conv))
        if site.kind == "body":
            stats.gradients.append(ctx.gradient.detach())
            stats.deviations.append(ctx.deviation(x))

    def _windows(self, x: Tensor, conv: Conv2d) -> Tensor:
        """Random windows of ``x`` as the convolution sees them."""
        side = conv.kernel_size[0]
        padded = nn.functional.pad(x, [side // 2] * 4).unfold(2, side, 1).unfold(3, side, 1)
        n, _, height, width = x.shape
        places = torch.randint(n * height * width, (n * self.n_windows,), generator=self.generator)
        result: Tensor = padded[places // (height * width), :, places // width % height, places % width]
        return result.contiguous()


@torch.no_grad()
def observe(
    network: nn.Module, batches: Iterable[Tensor], *, n_values: int = 256, n_windows: int = 32, seed: int = 0
) -> dict[str, SiteStatistics]:
    """Run a network over LR batches (N, 3, H, W) in [0, 1] and collect what its sites see.

    ``n_values`` values of each channel are kept per batch, and ``n_windows`` windows per picture.
    """
    collector = _Collector(n_values, n_windows, seed)
    sites = sites_of(network)
    for site in sites:
        site.observer = collector
    try:
        for batch in batches:
            network(batch, Context.of(batch))
    finally:
        for site in sites:
            site.observer = None
    if not collector.found:
        raise ArgumentError("batches", "empty", "at least one LR batch")
    return collector.found


def fitted_clip(windows: Tensor, conv: Conv2d, levels: float, signed: bool, scale: Tensor) -> float:
    """Clip with which the convolution's results come nearest to those of the float one.

    What rounding and cutting off do to a result depends on the weights and on how channels go together. Distances,
    not their squares, are averaged: with squares, few windows of flares decide, and SRResNet's last blocks get clips
    several times as large (0.4 dB at 4 bits).

    Args:
        windows: what the convolution sees, (n, C, F, F).
        levels: largest code; ``signed``: whether codes are symmetric around 0.
        scale: per-channel scales, (C,); the clip is in units of the scaled feature.
    """
    scale = scale.view(-1, 1, 1)
    exact = nn.functional.conv2d(windows, conv.weight, groups=conv.groups)
    weight, scaled, q = conv.effective_weight(), windows / scale, torch.tensor(levels)

    def error(clip: float) -> float:
        rounded = quantize_clipped(scaled, torch.tensor(clip), q, signed) * scale
        return float((nn.functional.conv2d(rounded, weight, groups=conv.groups) - exact).norm(dim=1).mean())

    clip = result = float(scaled.abs().max().clamp_min(1e-6))
    best, worse = error(clip), 0
    while worse < 3:
        clip *= CLIP_STEP
        found = error(clip)
        worse = worse + 1 if found >= best else 0
        if found < best:
            best, result = found, clip
    return result


def best_clip(samples: Tensor, levels: float, signed: bool) -> float:
    """Clip that minimises the squared error on ``samples`` (C, n), what is cut off counting ``CUT`` times.

    Errors of rounding average out further on, while those of cutting off have one sign and add up.
    """
    flat = samples if signed else samples.clamp_min(0)
    top = float(flat.abs().max().clamp_min(1e-6))
    best, result = float("inf"), top
    q = torch.tensor(levels)
    for fraction in torch.linspace(0.08, 1.0, 70).tolist():
        clip = torch.tensor(top * fraction)
        square = (quantize_clipped(flat, clip, q, signed) - samples).square()
        value = float(torch.where(flat.abs() > clip, CUT * square, square).mean())
        if value < best:
            best, result = value, top * fraction
    return result


@torch.no_grad()
def calibrate(
    network: nn.Module, stats: dict[str, SiteStatistics], config: Quantization, *, clips: str = "mse"
) -> None:
    """Set clips, channel scales, grids and selector standardisation of a converted network, in place.

    Args:
        network: result of :func:`convert`.
        stats: what the *float* network's sites saw, from :func:`observe`.
        config: the configuration it was converted with.
        clips: ``mse`` minimises the error per candidate, behind the convolution where there is one (`fitted_clip`), but
            cuts nothing off at edges, where the few large values matter more than their number says (IDN x4:
            0.09 dB); ``max`` is PAMS' mean of max|x|.
    """
    if clips not in ("mse", "max"):
        raise ArgumentError("clips", clips, "'mse' or 'max'")
    for site in sites_of(network):
        seen = stats.get(site.name)
        if seen is None:
            continue
        wide = site.kind == "edge" and float(site.grid) > 0 and site.channels > 3
        kept = site.kind in ("stream", "body", "edge") or (site.kind == "fixed" and site.conv is not None)
        stored = config.stream_bits and kept and site.channels > 3
        if wide or (stored and not site.on_stream):
            # No headroom: the few values beyond are flares whose exact height does not matter (SRResNet x4: clipping
            # at a third of the largest value costs nothing, a step twice as coarse 0.05 dB).
            site.set_grid(float(seen.channel_max.max()) / 32767)
        quantizer = site.quantizer
        if quantizer is not None and not _reads_levels(site):
            _calibrate_quantizer(site, quantizer, seen, config, clips)
        if site.selector is not None:
            _standardize(site.selector, torch.cat(seen.gradients), torch.cat(seen.deviations))


def _calibrate_quantizer(
    site: Site, quantizer: ActQuantizer, seen: SiteStatistics, config: Quantization, clips: str
) -> None:
    samples, conv = torch.cat(seen.samples, 1), site.conv
    mean_max, largest = seen.patch_max / max(1, seen.n_patches), seen.channel_max
    scale = torch.ones_like(largest)
    if quantizer.channel_scale is not None and conv is not None:
        scale = channel_range_scale(seen.channel_max, config.channel_power)
        quantizer.channel_scale.copy_(scale)
        assert conv.in_scale is not None
        conv.in_scale.copy_(scale)
        samples, largest = samples / scale[:, None], largest / scale
        mean_max = float(samples.abs().max())
    levels = quantizer.levels(torch.arange(len(quantizer.bits))).flatten().tolist()
    if clips == "max":
        values = [mean_max] * len(levels)
    elif site.kind == "edge":
        values = [float(largest.max().clamp_min(1e-6))] * len(levels)
    elif isinstance(conv, Conv2d):
        windows = torch.cat(seen.windows)
        values = [fitted_clip(windows, conv, q, quantizer.signed, scale) for q in levels]
    else:
        values = [best_clip(samples, q, quantizer.signed) for q in levels]
    if isinstance(quantizer, PAMS):
        quantizer.clip.copy_(torch.tensor(values))
    elif isinstance(quantizer, LSQ):
        quantizer.step.copy_(torch.tensor([v / q for v, q in zip(values, levels, strict=True)]))


@torch.no_grad()
def scale_clips(network: nn.Module, floating: nn.Module, lr: Tensor) -> None:
    """Scale the body's clips, all together per candidate, so that the result comes nearest to the float network's.

    Every clip is the best for its own convolution, but what is cut off adds up over the depth more than rounding does:
    CARN wants 1.25 times as much, IDN 1.6 times, SRResNet no change.

    Args:
        network: converted and calibrated. Clips that are no parameters of their own (LinQ's, DAQ's, LSQ's) stay.
        floating: the network that it was made from.
        lr: a few pictures, (N, 3, H, W) in [0, 1].
    """
    body = [site.quantizer for site in sites_of(network, "body") if isinstance(site.quantizer, PAMS)]
    if not body:
        return
    aim = floating(lr)
    for index, bits in enumerate(body[0].bits.tolist()):

        def error(bits: int = bits) -> float:
            ctx = Context.of(lr)
            ctx.force_bits = bits
            return float((network(lr, ctx) - aim).square().mean())

        scale_together([quantizer.clip[index] for quantizer in body], CLIP_FACTORS, error)


def scale_together(
    clips: Sequence[Tensor],
    factors: Sequence[float],
    error: Callable[[], float],
    *,
    while_falling: bool = False,
) -> float:
    """Multiply clips, views of parameters, by the factor with the least error, and return that error.

    With ``while_falling`` factors are tried in order only until the error stops falling.
    """
    full, best, least = [clip.clone() for clip in clips], 1.0, math.inf

    def apply(factor: float) -> None:
        for clip, value in zip(clips, full, strict=True):
            clip.copy_(factor * value)

    for factor in factors:
        apply(factor)
        found = error()
        if found < least:
            best, least = factor, found
        elif while_falling:
            break
    apply(best)
    return least


def _standardize(selector: BitSelector, gradients: Tensor, deviations: Tensor) -> None:
    if not selector.log_features:
        return
    selector.center.zero_()
    selector.spread.fill_(1.0)
    vector = selector.features(gradients, deviations)
    selector.center.copy_(vector.mean(0))
    # All-equal weights of 1 on standardised inputs would start far from 0; keep the sum of inputs of order 1.
    selector.spread.copy_(vector.std(0).clamp_min(1e-3) * len(vector[0]) ** 0.5)
