"""Any float super-resolution module -> one of our networks."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.backbones.blocks import Backbone
from cadyq.backbones.carn import CARN
from cadyq.backbones.graph import Graph
from cadyq.backbones.srresnet import SRResNet
from cadyq.backbones.structure import build_graph
from cadyq.backbones.trace import RANGES, InRange, simplify, trace
from cadyq.errors import ArgumentError, UnsupportedError

__all__ = ["adopt"]

TOLERANCE = 1e-3
"""In [0, 1]: a quarter of a gray level; rounding in float32 stays far below."""


@torch.no_grad()
def adopt(
    module: nn.Module, pictures: Tensor, *, scale: int | None = None, value_range: str = "auto"
) -> Backbone:
    """Our form of a float network, batch norm folded; checked against the module on pictures of another size.

    Args:
        module: one of our backbones, or a module of supported operators (`trace.SUPPORTED`); it is not changed.
        pictures: LR pictures (N, 3, 32 or more, 32 or more) in [0, 1].
        scale: handed to a forward that asks for one; otherwise checked.
        value_range: what the module takes and returns, a key of `RANGES`, or ``auto``.

    Raises:
        ArgumentError: unknown range, or a scale that is not the network's.
        UnsupportedError: a layer that has no quantized form, or a forward that depends on the picture's size.
    """
    if value_range not in (*RANGES, "auto"):
        raise ArgumentError("value_range", value_range, f"auto or one of {', '.join(RANGES)}")
    if isinstance(module, Backbone):
        network = copy.deepcopy(module).eval()
        if isinstance(network, SRResNet):
            network = network.folded()
        elif isinstance(network, CARN):
            network = network.unshared()
    else:
        network = _traced(copy.deepcopy(module).float().eval(), pictures, scale, value_range)
    if scale is not None and scale != network.scale:
        raise ArgumentError("scale", scale, f"{network.scale}, which this network has")
    return network


def _traced(module: nn.Module, pictures: Tensor, scale: int | None, value_range: str) -> Graph:
    arguments = _further_arguments(module, scale)
    example, other = pictures[:1, :, :24, :24], pictures[:2, :, :32, :16]
    if value_range == "auto":
        value_range = _detect_range(module, example, arguments)
    wrapped = InRange(module, value_range, arguments)
    graph = build_graph(simplify(trace(wrapped, example)), type(module).__name__)
    difference = float((graph(other).clamp(0, 1) - wrapped(other).clamp(0, 1)).abs().max())
    if not difference <= TOLERANCE:
        raise UnsupportedError(
            f"{type(module).__name__}, traced on 24x24 pixels, differs by {difference:.2g} on 32x16: its forward "
            "depends on the picture's size or pixels"
        )
    return graph


def _further_arguments(module: nn.Module, scale: int | None) -> dict[str, Any]:
    """The scale, where the forward has a parameter of that name and no default for it (multi-scale networks)."""
    parameters = inspect.signature(module.forward).parameters
    if "scale" not in parameters or parameters["scale"].default is not inspect.Parameter.empty:
        return {}
    if scale is None:
        raise ArgumentError(
            "scale", scale, f"a number, as the forward of {type(module).__name__} asks for it"
        )
    return {"scale": scale}


def _detect_range(module: nn.Module, lr: Tensor, arguments: dict[str, Any]) -> str:
    """The range in which the result, made small again, looks most like the picture; 0:1 if none does."""
    best, result = 0.01, next(iter(RANGES))
    for name in RANGES:
        try:
            sr = InRange(module, name, arguments)(lr)
        except Exception:  # it will be told when the module is traced, with what it is called
            return result
        if isinstance(sr, Tensor) and sr.dim() == 4 and sr.shape[1] == lr.shape[1]:
            small = F.adaptive_avg_pool2d(sr, (lr.shape[2], lr.shape[3]))
            error = float((small - lr).square().mean())
            if error < 0.7 * best:
                best, result = error, name
    return result
