"""Weights from elsewhere: a network of the same kind, of another scale, of another form, or already quantized."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cadyq.backbones import Backbone, build_backbone
from cadyq.backbones.carn import CARN, Cascade, ResidualBlock
from cadyq.backbones.srresnet import SRResNet
from cadyq.errors import CheckpointError
from cadyq.io.importers import import_float
from cadyq.io.models import load_model
from cadyq.quant.pams import PAMS
from cadyq.quant.quantizer import ActQuantizer
from cadyq.quant.site import sites_of

__all__ = ["copy_clips", "float_copy", "load_source", "warm_start"]

_LEAST_SHARE = 0.4  # of the parameters must come from the source, else it is another network


def load_source(path: str | os.PathLike[str], scale: int | None = None) -> Backbone:
    """A network from one of our model files or shipped models, or from foreign float weights (.npz, .pth).

    Raises:
        ArgumentError, CheckpointError: neither.
    """
    if Path(path).suffix in (".npz", ".pth"):
        return import_float(Path(path), scale)
    return load_model(path).network


@torch.no_grad()
def warm_start(network: Backbone, source: Backbone) -> list[str]:
    """Copy what fits from ``source`` into a float network of the same backbone, in place.

    Layers of another scale stay as they are; batch norms are folded, and the shared grouped blocks of CARN-M are
    written out, where ``network`` has the other form.

    Returns:
        Names of the parameters that the source did not give.

    Raises:
        CheckpointError: another backbone, or less than 40 % of the parameters fit.
    """
    if source.name != network.name:
        raise CheckpointError(f"the network to start from is {source.name!r}, expected {network.name!r}")
    if isinstance(source, SRResNet) and isinstance(network, SRResNet) and not network.config["norm"]:
        source = source.folded()
    given = source.state_dict()
    if isinstance(source, CARN) and isinstance(network, CARN) and source.config["shared"]:
        given = _written_out(source, network)
    fresh, copied, total = [], 0, 0
    for name, p in network.state_dict().items():
        total += p.numel()
        value = given.get(name)
        if value is None or value.shape != p.shape:
            fresh.append(name)
        else:
            p.copy_(value)
            copied += p.numel()
    if copied < _LEAST_SHARE * total:
        raise CheckpointError(
            f"only {copied} of {total} parameters fit the {network.name} to be trained (fresh: {fresh[:5]} ...); "
            "start from a network of the same width and depth"
        )
    return fresh


def _written_out(source: CARN, network: CARN) -> dict[str, Tensor]:
    """State of a CARN whose blocks are neither shared nor grouped, computing what ``source`` (CARN-M) computes,

    but for the ReLU between CARN-M's second convolution and its 1x1 one, which are multiplied into one.
    """
    state = dict(source.state_dict())
    for c, cascade in enumerate(source.body):
        assert isinstance(cascade, Cascade)
        block = cascade.blocks[0]
        assert isinstance(block, ResidualBlock) and block.pointwise is not None
        mix = block.pointwise.weight[:, :, 0, 0]
        weight2 = torch.einsum("om,mikl->oikl", mix, _dense(block.conv2.weight, block.conv2.groups))
        assert block.conv1.bias is not None and block.conv2.bias is not None
        assert block.pointwise.bias is not None
        bias2 = mix @ block.conv2.bias + block.pointwise.bias
        for i in range(3):
            prefix = f"body.{c}.blocks.{i}."
            state[prefix + "conv1.weight"] = _dense(block.conv1.weight, block.conv1.groups)
            state[prefix + "conv1.bias"] = block.conv1.bias
            state[prefix + "conv2.weight"] = weight2
            state[prefix + "conv2.bias"] = bias2
    own = network.state_dict()
    for name, value in state.items():
        if name.startswith("ups.") and name in own and value.dim() == 4:
            state[name] = _dense(value, own[name].shape[1] // value.shape[1])
    return state


def _dense(weight: Tensor, groups: int) -> Tensor:
    """Weights (O, I / groups, F, F) of a grouped convolution as (O, I, F, F), zero between groups."""
    n_out, n_in, *kernel = weight.shape
    dense = weight.new_zeros(n_out, n_in * groups, *kernel)
    for g in range(groups):
        rows = slice(g * n_out // groups, (g + 1) * n_out // groups)
        dense[rows, g * n_in : (g + 1) * n_in] = weight[rows]
    return dense


@torch.no_grad()
def float_copy(network: Backbone) -> Backbone:
    """The float network that a (converted) network was made from, with its present weights."""
    result = build_backbone(network.name, **network.config)
    own = set(result.state_dict())
    result.load_state_dict({k: v for k, v in network.state_dict().items() if k in own}, strict=True)
    return result.eval()


@torch.no_grad()
def copy_clips(network: Backbone, source: Backbone) -> None:
    """Take over clips, steps and channel scales that ``source`` learned, where both have a candidate of these bits.

    The 16-bit grids, too, where both have one: a value that is rounded otherwise may fall on another code behind it.
    """
    theirs = {site.name: site for site in sites_of(source)}
    for site in sites_of(network):
        other = theirs.get(site.name)
        if other is not None and site.has_grid and other.has_grid:
            site.set_grid(float(other.grid))
        if other is None or site.quantizer is None or type(other.quantizer) is not type(site.quantizer):
            continue
        mine, its = site.quantizer, other.quantizer
        if mine.signed != its.signed or (mine.channel_scale is None) != (its.channel_scale is None):
            continue
        if mine.channel_scale is not None and its.channel_scale is not None:
            # Clips are counted in channel scales. Both come from calibration on alike features, so that the
            # candidates without a counterpart stay good enough to learn from.
            assert site.conv is not None and site.conv.in_scale is not None
            mine.channel_scale.copy_(its.channel_scale)
            site.conv.in_scale.copy_(its.channel_scale)
        for k, bits in enumerate(its.bits.tolist()):
            for j in (mine.bits == bits).nonzero().flatten().tolist():
                _learned(mine)[j] = _learned(its)[k]


def _learned(quantizer: ActQuantizer) -> Tensor:
    """Clips or steps per candidate; an empty stand-in where nothing is learned."""
    if isinstance(quantizer, PAMS):
        return quantizer.clip
    step = getattr(quantizer, "step", None)
    return step if isinstance(step, Tensor) else torch.zeros(len(quantizer.bits))
