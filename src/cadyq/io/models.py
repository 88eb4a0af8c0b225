"""Networks to and from model files: 8-bit weights are stored as 8-bit integers, everything else as float32."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cadyq.backbones import Backbone, build_backbone
from cadyq.config import Quantization, from_mapping, to_mapping
from cadyq.errors import CheckpointError
from cadyq.functional.exit import ExitRule
from cadyq.io.checkpoints import load_checkpoint, save_checkpoint
from cadyq.io.shipped import model_path, plan_beside
from cadyq.quant.convert import convert
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.site import sites_of

__all__ = ["LoadedModel", "load_model", "save_model"]


class LoadedModel:
    """A network and what its file says about it.

    Attributes:
        network: in evaluation mode, fake-quantised if ``quantization`` is not ``None``.
        quantization: its configuration, or ``None`` for a float network.
        exit_rule: which cells leave before the body, or ``None``.
        budgets: pairs (FQR, budget) as measured on training crops, see `cadyq.functional.budget`; may be empty.
        metadata: the file's record (training, figures, license).
    """

    def __init__(
        self,
        network: Backbone,
        quantization: Quantization | None,
        exit_rule: ExitRule | None,
        metadata: dict[str, Any],
        budgets: Sequence[tuple[float, float]] = (),
    ) -> None:
        self.network = network
        self.quantization = quantization
        self.exit_rule = exit_rule
        self.budgets = list(budgets)
        self.metadata = metadata


def save_model(
    path: str | os.PathLike[str],
    network: Backbone,
    quantization: Quantization | None,
    *,
    exit_rule: ExitRule | None = None,
    budgets: Sequence[tuple[float, float]] = (),
    training: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    license: str = "Apache-2.0",
    half: bool = False,
) -> None:
    """Write a network as a model file; weights that are used with 8 bits are stored with 8 bits.

    With ``half`` the other weights (not biases, clips or scales) are rounded to float16, to save space. A plan
    beside the file is removed: it is that of the network that was there before.
    """
    tensors: dict[str, NDArray[Any]] = {}
    packed = {
        f"{name}.weight": m
        for name, m in network.named_modules()
        if isinstance(m, Conv2d | ConvTranspose2d) and m.weight_bits
    }
    for name, value in network.state_dict().items():
        conv = packed.get(name)
        if conv is None:
            array = value.detach().numpy()
            is_weight = half and array.ndim > 1 and array.dtype == np.float32
            tensors[name] = array.astype(np.float16) if is_weight else array.copy()
        else:
            tensors[name], tensors[name + "_range"] = _pack(conv)
    for site_name, grid in _grids(network).items():
        tensors[site_name] = np.asarray(grid, np.float32)
    record: dict[str, Any] = {"config": network.config}
    if quantization is not None:
        record["conversion"] = to_mapping(quantization)
    if exit_rule is not None:
        record["exit"] = exit_rule.to_mapping()
    if budgets:
        record["budgets"] = [list(pair) for pair in budgets]
    metadata = {
        "backbone": network.name,
        "scale": network.scale,
        "quantization": record,
        "training": dict(training or {}),
        "figures": dict(figures or {}),
        "license": license,
    }
    plan_beside(path).unlink(missing_ok=True)
    save_checkpoint(path, tensors, metadata)


def load_model(model: str | os.PathLike[str]) -> LoadedModel:
    """Load a shipped model by name, or a model file.

    Raises:
        ArgumentError: unknown name. CheckpointError: damaged, newer, or not fitting its own description.
    """
    path = model_path(model)
    tensors, metadata = load_checkpoint(path)
    try:
        record = metadata["quantization"]
        network = build_backbone(metadata["backbone"], **record["config"])
        quantization = None
        if "conversion" in record:
            quantization = from_mapping(Quantization, record["conversion"])
            network = convert(network, quantization)
        rule = ExitRule.from_mapping(record["exit"]) if "exit" in record else None
        budgets = [(float(fqr), float(knob)) for fqr, knob in record.get("budgets", ())]
        _fill(network, tensors)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit its own description ({error}); it was written for another network or version"
        ) from error
    return LoadedModel(network.eval(), quantization, rule, metadata, budgets)


def _pack(conv: Conv2d | ConvTranspose2d) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes (C_out, C_in / groups, F, F) and the largest magnitude per output channel."""
    assert conv.weight_bits is not None
    with torch.no_grad():
        weight = conv.scaled_weight().float()
        per_tensor = isinstance(conv, Conv2d) and not conv.per_channel
        dims = (0, 1, 2, 3) if per_tensor else (1, 2, 3)
        largest = weight.abs().amax(dims, keepdim=True).clamp_min(1e-30)
        q = 2 ** (conv.weight_bits - 1) - 1
        codes = torch.round(weight * q / largest)
    return codes.to(torch.int8).numpy(), largest.numpy()


def _unpack(conv: Conv2d | ConvTranspose2d, codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    assert conv.weight_bits is not None
    weight: torch.Tensor = codes.float() * largest / (2 ** (conv.weight_bits - 1) - 1)
    if conv.in_scale is not None:
        weight = weight / conv.weight_scale()
    return weight if isinstance(conv, Conv2d) else weight.transpose(0, 1)


def _grids(network: Backbone) -> dict[str, float]:
    return {f"{s.name}.grid": float(s.grid) for s in sites_of(network) if float(s.grid) > 0}


def _fill(network: Backbone, tensors: Mapping[str, NDArray[Any]]) -> None:
    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    for site in sites_of(network):
        step = state.pop(f"{site.name}.grid", None)
        if step is not None:
            site.set_grid(float(step))
        conv, scales = site.conv, f"{site.name}.quantizer.channel_scale"
        if isinstance(conv, ConvTranspose2d) and site.quantizer is not None and scales not in state:
            site.quantizer.channel_scale = conv.in_scale = None  # written before deconvolutions had scales
    convs = {name: m for name, m in network.named_modules() if isinstance(m, Conv2d | ConvTranspose2d)}
    for name, conv in convs.items():
        scale = state.get(f"{name}.in_scale")
        if scale is not None:
            conv.in_scale = torch.empty_like(scale).copy_(scale)
        largest = state.pop(f"{name}.weight_range", None)
        if largest is not None:
            state[f"{name}.weight"] = _unpack(conv, state[f"{name}.weight"], largest)
    network.load_state_dict(state, strict=True)
