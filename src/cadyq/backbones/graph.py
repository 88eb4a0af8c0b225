"""Any network of supported operators, written as a plain list of operations: what a traced network becomes.

An operation is a dictionary that JSON can hold: ``op`` (its kind), ``in`` (names of values), ``out`` (name of the
result), and what the kind needs:

=========  ========================================================================================================
kind       further keys
=========  ========================================================================================================
conv       layer, channels [in, out], kernel (odd), groups, bias, level, site {kind, nonneg, bits, grid}
deconv     the same with stride and padding; the result is cut to ``stride`` times the input's size
prelu      layer, slopes (1 or one per channel)
leaky      slope
relu       none; as tanh, sigmoid, add (two values) and cat (along channels)
clamp      low, high
slice      start, stop (channels)
affine     scale, offset: lists of 1 or one per channel
shuffle    factor (PixelShuffle)
resize     factor, level, mode (nearest, bilinear, bicubic; corners not aligned)
stream     grid (values of one name share its step), site, channels
block      layer, ops, halo, residual: computed tile by tile; its input is the only value it sees
tail       ops: layers at the output's size, computed in bands; its input is the only value they see
=========  ========================================================================================================

A site's ``grid`` names the grid of the stored planes that it reads, if it does. ``level`` is how many times wider than
the LR picture a feature is. The first value is called ``x``: RGB in [0, 1]; the last
operation's result is the network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.backbones.blocks import Backbone
from cadyq.quant.context import Context
from cadyq.quant.layers import Conv2d, ConvTranspose2d
from cadyq.quant.site import Site

__all__ = ["INPUT", "Graph", "Op", "Unit", "flatten", "reach"]

Op: TypeAlias = dict[str, Any]

INPUT = "x"
_RESIZE_REACH = {"nearest": 1, "bilinear": 1, "bicubic": 2}


class Unit(nn.Module):
    """A convolution and the site before it."""

    conv: Conv2d | ConvTranspose2d

    def __init__(self, op: Op) -> None:
        super().__init__()
        (c_in, c_out), kernel, level, site = op["channels"], op["kernel"], op["level"], op["site"]
        kind, nonneg, bits, stored = site["kind"], site["nonneg"], site["bits"], site["grid"] is not None
        if op["op"] == "conv":
            self.conv = Conv2d(c_in, c_out, kernel, groups=op["groups"], bias=op["bias"])
        else:
            stride, padding = op["stride"], op["padding"]
            self.conv = ConvTranspose2d(c_in, c_out, kernel, stride, padding=padding, bias=op["bias"])
        self.site = Site(self.conv, kind, nonneg=nonneg, pixels=level**2, bits=bits, on_stream=stored)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C_out, H, W), or ``stride`` times larger."""
        y: Tensor = self.conv(self.site(x, ctx))
        if isinstance(self.conv, ConvTranspose2d):
            stride = int(self.conv.stride[0])
            y = y[:, :, : stride * x.shape[2], : stride * x.shape[3]]
        return y


class GraphBlock(nn.Module):
    """Operations that are computed tile by tile; see :class:`cadyq.quant.context.Block`."""

    def __init__(self, op: Op, streams: nn.ModuleDict) -> None:
        super().__init__()
        self.ops: list[Op] = op["ops"]
        self.source: str = op["in"][0]
        self.halo: int = op["halo"]
        self.residual: bool = op["residual"]
        # In a tuple: grids are the network's, as a block's own values may share one with the planes outside.
        self._streams = (streams,)
        _build(self, self.ops, streams)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(n, C, H, W) -> (n, C_out, H, W)."""
        return _execute(self, self.ops, {self.source: x}, ctx, self._streams[0])


class Graph(Backbone):
    """Interpreter of a list of operations (see the module) with visible quantization sites.

    Args:
        scale: enlargement factor.
        ops: the operations, in an order in which every value exists before it is read.
    """

    name = "graph"

    def __init__(self, scale: int, ops: Sequence[Op]) -> None:
        super().__init__(scale, {"ops": list(ops)})
        self.ops = list(ops)
        if not self.ops:
            raise ValueError("a network without operations")
        self.radius = math.ceil(reach(self.ops)[self.ops[-1]["out"]])
        self.streams = nn.ModuleDict()
        self.layers = nn.Module()
        _build(self.layers, self.ops, self.streams)
        self._finish()

    def _forward(self, lr: Tensor, ctx: Context) -> Tensor:
        return _execute(self.layers, self.ops, {INPUT: lr}, ctx, self.streams)

    def share_grids(self) -> None:
        """Give all planes of one grid the largest step of them, and edges of 16 bits the step of the plane they read.

        Calibration sets every stream for itself.
        """
        steps: dict[str, float] = {}
        streams = [op for op in flatten(self.ops) if op["op"] == "stream"]
        for op in streams:
            steps[op["grid"]] = max(steps.get(op["grid"], 0.0), float(self._site(op["site"]).grid))
        for op in streams:
            self._site(op["site"]).set_grid(steps[op["grid"]])
        for op in flatten([op for op in self.ops if op["op"] != "block"]):
            if "layer" in op and "site" in op and op["site"]["bits"] > 8 and op["site"]["grid"] is not None:
                unit = self.layers.get_submodule(op["layer"])
                assert isinstance(unit, Unit)
                unit.site.set_grid(steps[op["site"]["grid"]])

    def _site(self, name: str) -> Site:
        site = self.streams[name]
        assert isinstance(site, Site)
        return site


def flatten(ops: Sequence[Op]) -> list[Op]:
    """All operations, those of blocks and tails in place of them."""
    return [inner for op in ops for inner in (flatten(op["ops"]) if "ops" in op else [op])]


def reach(ops: Sequence[Op], start: str = INPUT) -> dict[str, float]:
    """How far each value looks around a pixel, in LR pixels."""
    far = {start: 0.0}
    for op in flatten(ops):
        far[op["out"]] = max(far[name] for name in op["in"]) + _own_reach(op)
    return far


def _own_reach(op: Op) -> float:
    if op["op"] == "conv":
        return float(op["kernel"] // 2 / op["level"])
    if op["op"] == "deconv":
        kernel, padding = op["kernel"], op["padding"]
        return float((math.ceil(max(padding, kernel - 1 - padding) / op["stride"]) + 1) / op["level"])
    return _RESIZE_REACH[op["mode"]] / op["level"] if op["op"] == "resize" else 0.0


def _build(owner: nn.Module, ops: Sequence[Op], streams: nn.ModuleDict) -> None:
    """Give ``owner`` the modules that ``ops`` name, at the paths they name."""
    for op in ops:
        kind = op["op"]
        if kind in ("conv", "deconv"):
            _place(owner, op["layer"], Unit(op))
        elif kind == "prelu":
            _place(owner, op["layer"], nn.PReLU(op["slopes"]))
        elif kind == "block":
            _place(owner, op["layer"], GraphBlock(op, streams))
        elif kind == "tail":
            _build(owner, op["ops"], streams)
        elif kind == "stream":
            if op["site"] not in streams:
                streams[op["site"]] = Site(None, "stream", channels=op["channels"])
        elif kind not in _FUNCTIONS:
            raise ValueError(f"unknown operation {kind!r}")


def _place(owner: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if last in owner._modules:
        raise ValueError(f"two layers are called {path!r}")
    owner.add_module(last, module)


def _execute(
    owner: nn.Module, ops: Sequence[Op], values: dict[str, Tensor], ctx: Context, streams: nn.ModuleDict
) -> Tensor:
    last_use = {name: i for i, op in enumerate(ops) for name in op["in"]}
    result = next(iter(values.values()))
    for i, op in enumerate(ops):
        inputs = [values[name] for name in op["in"]]
        for name in set(op["in"]):  # planes at the output's size are large: drop them as soon as possible
            if last_use[name] == i:
                del values[name]
        kind = op["op"]
        if kind in ("conv", "deconv"):
            result = owner.get_submodule(op["layer"])(inputs[0], ctx)
        elif kind == "prelu":
            result = owner.get_submodule(op["layer"])(inputs[0])
        elif kind == "block":
            block = owner.get_submodule(op["layer"])
            assert isinstance(block, GraphBlock)
            result = ctx.run(block, inputs[0])
        elif kind == "tail":
            result = _tail(owner, op, inputs[0], ctx, streams)
        elif kind == "stream":
            result = streams[op["site"]](inputs[0], ctx)
        else:
            result = _FUNCTIONS[kind](op, inputs)
        values[op["out"]] = result
    return result


def _tail(owner: nn.Module, op: Op, x: Tensor, ctx: Context, streams: nn.ModuleDict) -> Tensor:
    start = op["in"][0]

    def tail(part: Tensor, inner: Context) -> Tensor:
        return _execute(owner, op["ops"], {start: part}, inner, streams)

    return ctx.finish(tail, x, math.ceil(reach(op["ops"], start)[op["out"]]))


def _affine(op: Op, inputs: list[Tensor]) -> Tensor:
    x = inputs[0]
    scale, offset = (
        torch.tensor(op[key], dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for key in ("scale", "offset")
    )
    if any(value != 1 for value in op["scale"]):
        x = x * scale
    return x + offset if any(op["offset"]) else x


def _resize(op: Op, inputs: list[Tensor]) -> Tensor:
    corners = None if op["mode"] == "nearest" else False
    return F.interpolate(inputs[0], scale_factor=op["factor"], mode=op["mode"], align_corners=corners)


_FUNCTIONS: dict[str, Callable[[Op, list[Tensor]], Tensor]] = {
    "relu": lambda op, v: F.relu(v[0]),
    "leaky": lambda op, v: F.leaky_relu(v[0], op["slope"]),
    "tanh": lambda op, v: torch.tanh(v[0]),
    "sigmoid": lambda op, v: torch.sigmoid(v[0]),
    "clamp": lambda op, v: v[0].clamp(op["low"], op["high"]),
    "add": lambda op, v: v[0] + v[1],
    "cat": lambda op, v: torch.cat(v, 1),
    "slice": lambda op, v: v[0][:, op["start"] : op["stop"]],
    "shuffle": lambda op, v: F.pixel_shuffle(v[0], op["factor"]),
    "affine": _affine,
    "resize": _resize,
}
