"""Stretches without a nonlinearity become one convolution, borders included; section 7 of ``docs/numerics.md``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cadyq.lowering.trace import Graph, Node
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site

__all__ = ["Collapsed", "collapse"]


@dataclass(frozen=True)
class Collapsed:
    """One convolution with PixelShuffle in place of a chain.

    Attributes:
        weight: float64 (16, C_out, C_in, k, k): inside, and at borders (index 4 * row + column, each 0 inside,
            1 first, 2 last, 3 only).
        bias: float64 (16, C_out). Outputs are ordered (row, column, channel).
        shuffle: factor of the PixelShuffle.
        first: the chain's first convolution, whose site and input scales remain.
    """

    weight: Tensor
    bias: Tensor
    shuffle: int
    first: Conv2d


def collapse(graph: Graph) -> Graph:
    """The graph with its last chain of convolutions and PixelShuffles replaced, where that saves work."""
    users = graph.users()
    chain = _last_chain(graph, users)
    convs = [graph.nodes[i] for i in chain if graph.nodes[i].op == "conv"]
    if len(convs) < 2 or not _fits(convs):
        return graph
    parts = [graph.nodes[i] for i in chain if graph.nodes[i].op in ("conv", "shuffle")]
    level = math.prod(int(part.value) for part in parts if part.op == "shuffle")
    radius = math.ceil(sum(_pad(c) / c.level for c in convs))
    work = sum(cast(Conv2d, c.module).macs * c.level**2 for c in convs)
    first, last = cast(Conv2d, convs[0].module), graph.nodes[chain[-1]]
    if first.in_channels * last.channels * level**2 * (2 * radius + 1) ** 2 >= work:
        return graph
    weight, bias = _composed(parts, first.in_channels, radius, level)
    nodes = list(graph.nodes)
    source = graph.nodes[chain[0]].inputs
    value = Collapsed(weight, bias, level, first)
    nodes[chain[-1]] = replace(last, op="linear", inputs=source, module=None, value=value)
    return replace(graph, nodes=nodes)


def _pad(conv: Node) -> int:
    return cast(Conv2d, conv.module).kernel_size[0] // 2


def _fits(convs: list[Node]) -> bool:
    """From the picture's size on, and with only the outermost pixels different from the others."""
    after = math.ceil(sum(_pad(c) / c.level for c in convs[1:]))
    bits = {cast(Conv2d, c.module).weight_bits for c in convs}
    return convs[0].level == 1 and after <= 1 and None not in bits


def _last_chain(graph: Graph, users: list[list[int]]) -> list[int]:
    """Convolutions, shuffles and static sites before the output, from the first convolution to the last."""
    inside = {i for block in graph.blocks for i in range(block.first, block.last + 1)}

    def is_link(i: int) -> bool:
        node = graph.nodes[i]
        if i in inside or len(users[i]) != 1:
            return False
        if node.op == "site":
            site = cast(Site, node.module)
            return site.selector is None and site.conv is not None and site.quantizer is not None
        return node.op in ("conv", "shuffle")

    last = max((i for i, node in enumerate(graph.nodes) if node.op == "conv" and users[i]), default=-1)
    if last < 0 or not is_link(last):
        return []
    chain = [last]
    while is_link(graph.nodes[chain[0]].inputs[0]):
        chain.insert(0, graph.nodes[chain[0]].inputs[0])
    while graph.nodes[chain[0]].op != "conv":  # the first site stays, and a shuffle before it
        chain.pop(0)
    while users[chain[-1]] and graph.nodes[users[chain[-1]][0]].op == "shuffle" and is_link(chain[-1]):
        chain.append(users[chain[-1]][0])
    return chain


@torch.no_grad()
def _run(parts: list[Node], x: Tensor) -> Tensor:
    for part in parts:
        if part.op == "shuffle":
            x = F.pixel_shuffle(x, int(part.value))
            continue
        conv = cast(Conv2d, part.module)
        bias = None if conv.bias is None else conv.bias.double().cpu()
        x = F.conv2d(x, conv.weight.double().cpu(), bias, 1, conv.padding, 1, conv.groups)
    return x


@torch.no_grad()
def _transposed(parts: list[Node], y: Tensor) -> Tensor:
    """The chain without its biases, backwards: how much every input counts in a weighted sum of outputs."""
    for part in reversed(parts):
        if part.op == "shuffle":
            y = F.pixel_unshuffle(y, int(part.value))
            continue
        conv = cast(Conv2d, part.module)
        padding = cast(tuple[int, int], conv.padding)
        y = F.conv_transpose2d(y, conv.weight.double().cpu(), None, 1, padding, 0, conv.groups)
    return y


def _composed(parts: list[Node], c_in: int, radius: int, level: int) -> tuple[Tensor, Tensor]:
    """Weights and biases of a pixel's results, at every border: what the transposed chain makes of units there."""
    side = 2 * radius + 1
    # Where each case of a row (or column) is seen: size of the picture, and pixel.
    cases = [(side, radius), (side, 0), (side, side - 1), (1, 0)]
    weights, biases = [], []
    for height, y in cases:
        for width, x in cases:
            rest = _run(parts, torch.zeros(1, c_in, height, width, dtype=torch.float64))[0]
            rows, cols = slice(y * level, (y + 1) * level), slice(x * level, (x + 1) * level)
            biases.append(rest[:, rows, cols].permute(1, 2, 0).flatten())
            # Outputs (row, column, channel) as a batch of units.
            units = rest.new_zeros(level, level, rest.shape[0], *rest.shape)
            for row, col, channel in itertools.product(*map(range, units.shape[:3])):
                units[row, col, channel, channel, y * level + row, x * level + col] = 1
            own = _transposed(parts, units.flatten(0, 2))
            # From the picture to the window around the pixel, which may reach beyond it.
            window = (radius - x, x + radius + 1 - width, radius - y, y + radius + 1 - height)
            weights.append(F.pad(own, window))
    return torch.stack(weights), torch.stack(biases)
