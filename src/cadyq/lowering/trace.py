"""A network's run on torch -> a graph of operations.

The network is run once on a small picture while convolutions and sites (by hooks) and functions of tensors (by a
``TorchFunctionMode``) are recorded, so that it may be written in any way: nothing here knows how. What is recorded
but has no integer form is refused later, by name, and only if the result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cadyq.backbones.blocks import Bicubic
from cadyq.quant.context import Block, Context
from cadyq.quant.layers import Conv2d, ConvTranspose2d, conv2d_implementation
from cadyq.quant.site import Site

__all__ = ["BlockSpan", "Graph", "Node", "trace"]

LEAVES = (Conv2d, ConvTranspose2d, Site, Bicubic)
HEIGHT, WIDTH = 12, 8  # of the picture: small, and different


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: ``input``, ``conv``, ``deconv``, ``site``, ``act``, ``add``, ``cat``, ``slice``, ``shuffle``, ``affine``,
            ``tanh``, ``sigmoid``, ``clamp``, ``crop``, ``resize``, or a function's name that is not understood.
        inputs: numbers of the nodes it reads.
        channels: of the result.
        level: how many times wider than the picture the result is, or 0 (no whole number).
        module: of a convolution or site.
        value: what the operation needs: slopes, ``(first, channels)``, a factor, ``(scale, offset)``, bounds.
    """

    op: str
    inputs: tuple[int, ...]
    channels: int
    level: int
    module: nn.Module | None = None
    value: Any = None


@dataclass(frozen=True)
class BlockSpan:
    """A stretch that is computed tile by tile: its nodes are ``range(first, last + 1)``."""

    source: int
    first: int
    last: int
    residual: bool


@dataclass
class Graph:
    """What a run did, in order."""

    nodes: list[Node] = field(default_factory=list)
    blocks: list[BlockSpan] = field(default_factory=list)
    output: int = -1

    def users(self) -> list[list[int]]:
        """By node, those that read it and that the output depends on."""
        needed = {self.output}
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].inputs)
        users: list[list[int]] = [[] for _ in self.nodes]
        for i in sorted(needed):
            for source in self.nodes[i].inputs:
                users[source].append(i)
        return users


@torch.no_grad()
def trace(network: nn.Module) -> Graph:
    """Record a run of a network in evaluation mode."""
    like = next(network.parameters())
    lr = torch.linspace(0, 1, 3 * HEIGHT * WIDTH, dtype=like.dtype, device=like.device)
    lr = lr.view(1, 3, HEIGHT, WIDTH)
    recorder = _Recorder(lr)
    base = Context.of(lr)
    context = _TraceContext(base.gradient, base.area, is_traced=True)
    context.recorder = recorder
    hooks = [
        hook
        for module in network.modules()
        if isinstance(module, LEAVES)
        for hook in (
            module.register_forward_pre_hook(recorder.enter),
            module.register_forward_hook(recorder.leave),
        )
    ]
    try:
        # Training's kernels, where it is within training that a network is lowered, join what is traced apart.
        with conv2d_implementation(), recorder:
            result = network(lr, context)
    finally:
        for hook in hooks:
            hook.remove()
    recorder.graph.output = recorder.known[id(result)]
    return _simplified(recorder.graph)


class _TraceContext(Context):
    recorder: _Recorder

    def run(self, block: Block, x: Tensor) -> Tensor:
        """Compute a block and remember where it began and ended."""
        graph = self.recorder.graph
        source, first = self.recorder.known[id(x)], len(graph.nodes)
        result = block(x, self)
        self.keep = None
        graph.blocks.append(BlockSpan(source, first, self.recorder.known[id(result)], block.residual))
        return result


def _array(x: Any) -> NDArray[np.float64]:
    """A constant: one number, or one per channel."""
    values = x.detach().double().cpu().numpy() if isinstance(x, Tensor) else np.float64(x)
    return np.asarray(values, np.float64).reshape(-1)


class _Recorder(TorchFunctionMode):
    def __init__(self, lr: Tensor) -> None:
        super().__init__()
        self.graph = Graph([Node("input", (), lr.shape[1], 1)])
        self.known = {id(lr): 0}
        self.alive: list[Any] = [lr]  # so that no id is used twice
        self.depth = 0

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        self.depth -= 1
        if self.depth or id(args[0]) not in self.known:
            return
        if isinstance(module, Bicubic):
            self.add("resize", (args[0],), result, (module.kind, module.scale))
            return
        kind = "site" if isinstance(module, Site) else "conv" if isinstance(module, Conv2d) else "deconv"
        self.add(kind, (args[0],), result, module=module)

    def add(
        self,
        op: str,
        inputs: tuple[Tensor, ...],
        result: Tensor,
        value: Any = None,
        module: nn.Module | None = None,
    ) -> None:
        height, width = result.shape[2:] if result.dim() == 4 else (0, 0)
        level = height // HEIGHT if height % HEIGHT == 0 and height * WIDTH == width * HEIGHT else 0
        sources = tuple(self.known[id(x)] for x in inputs)
        channels = result.shape[1] if result.dim() == 4 else 0
        self.graph.nodes.append(Node(op, sources, channels, level, module, value))
        self.known[id(result)] = len(self.graph.nodes) - 1
        self.alive.append(result)

    def is_known(self, x: Any) -> bool:
        return isinstance(x, Tensor) and id(x) in self.known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        flat = [a for arg in args for a in (arg if isinstance(arg, tuple | list) else [arg])]
        if self.depth or not any(self.is_known(a) for a in flat):
            return result
        name = str(getattr(func, "__name__", func)).strip("_")
        handler = _FUNCTIONS.get(name)
        if handler is None or not handler(self, name, args, kwargs, result):
            tensors = result if isinstance(result, tuple | list) else [result]
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    self.add(name, tuple(a for a in flat if self.is_known(a)), tensor)
        return result


Handler = Callable[[_Recorder, str, tuple[Any, ...], dict[str, Any], Any], bool]


def _arithmetic(
    r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> bool:
    """``+ - * /`` of a value and a constant, or the sum of two values."""
    if kwargs or len(args) != 2:
        return False
    a, b = args
    if r.is_known(a) and r.is_known(b):
        if name not in ("add", "iadd") or a.shape != b.shape:
            return False
        r.add("add", (a, b), result)
        return True
    x, constant = (a, b) if r.is_known(a) else (b, a)
    if isinstance(constant, Tensor) and constant.numel() not in (1, x.shape[1]):
        return False
    c, reverse = _array(constant), name.startswith("r") or not r.is_known(a)
    one, zero = np.ones(1), np.zeros(1)
    kind = name.lstrip("ri") if name != "rsub" else "sub"
    if kind == "add":
        scale, offset = one, c
    elif kind == "sub":
        scale, offset = (-one, c) if reverse else (one, -c)
    elif kind == "mul":
        scale, offset = c, zero
    elif kind in ("div", "truediv") and not reverse:
        scale, offset = 1 / c, zero
    else:
        return False
    r.add("affine", (x,), result, (scale, offset))
    return True


def _cat(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim not in (1, -3) or not all(r.is_known(part) for part in parts):
        return False
    r.add("cat", tuple(parts), result)
    return True


def _getitem(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    """Channels, or rows and columns cut at the end."""
    x, index = args
    index = index if isinstance(index, tuple) else (index,)
    if result.dim() != 4 or not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return False
    starts = [i.indices(n)[0] for i, n in zip(index, x.shape, strict=False)] + [0] * (4 - len(index))
    if starts[0] or starts[2] or starts[3] or result.shape[0] != x.shape[0]:
        return False
    if result.shape[1] != x.shape[1]:
        if result.shape[2:] != x.shape[2:]:
            return False
        r.add("slice", (x,), result, (starts[1], result.shape[1]))
    else:
        r.add("crop", (x,), result)
    return True


def _narrow(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    if kwargs or len(args) != 4 or args[1] not in (1, -3):
        return False
    r.add("slice", (args[0],), result, (int(args[2]), result.shape[1]))
    return True


def _split(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    if kwargs.get("dim", args[2] if len(args) > 2 else 0) not in (1, -3):
        return False
    first = 0
    for part in result:
        r.add("slice", (args[0],), part, (first, part.shape[1]))
        first += part.shape[1]
    return True


def _activation(
    r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> bool:
    if name.startswith("leaky_relu"):
        slope = _array(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
    elif name == "prelu":
        slope = _array(args[1] if len(args) > 1 else kwargs["weight"])
    else:
        slope = np.zeros(1)
    r.add("act", (args[0],), result, slope)
    return True


def _shuffle(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    r.add("shuffle", (args[0],), result, int(kwargs.get("upscale_factor", args[1] if len(args) > 1 else 0)))
    return True


def _bounded(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    r.add("clamp", (args[0],), result, (low, high))
    return True


def _plain(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    r.add(name, (args[0],), result)
    return True


def _resize(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    x, mode = args[0], kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
    factor = result.shape[2] // x.shape[2]
    whole = result.shape[2] == factor * x.shape[2] and result.shape[3] == factor * x.shape[3]
    corners = kwargs.get("align_corners", args[4] if len(args) > 4 else None)
    if not whole or corners or kwargs.get("antialias"):
        return False
    r.add("resize", (x,), result, ("torch" if mode == "bicubic" else mode, factor))
    return True


def _same(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
    """The same values, perhaps in other memory."""
    if result.shape != args[0].shape:
        return False
    r.known[id(result)] = r.known[id(args[0])]
    r.alive.append(result)
    return True


def _ignored(r: _Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    return not isinstance(result, Tensor)


_FUNCTIONS: dict[str, Handler] = {
    **dict.fromkeys(
        ("add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "imul", "div", "truediv"), _arithmetic
    ),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "chunk"), _split),
    **dict.fromkeys(("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu"), _activation),
    **dict.fromkeys(("clamp", "clip"), _bounded),
    **dict.fromkeys(("tanh", "sigmoid"), _plain),
    **dict.fromkeys(("contiguous", "clone", "detach", "to", "float"), _same),
    **dict.fromkeys(("get", "size", "dim", "stride", "is_contiguous", "numel"), _ignored),
    "getitem": _getitem,
    "narrow": _narrow,
    "pixel_shuffle": _shuffle,
    "interpolate": _resize,
}


def _simplified(graph: Graph) -> Graph:
    """The same graph with every node that changes nothing bypassed."""
    stands_for = list(range(len(graph.nodes)))
    nodes = []
    for i, node in enumerate(graph.nodes):
        node = replace(node, inputs=tuple(stands_for[s] for s in node.inputs))
        nodes.append(node)
        if _changes_nothing(node, nodes):
            stands_for[i] = node.inputs[0]
    blocks = [replace(b, source=stands_for[b.source], last=stands_for[b.last]) for b in graph.blocks]
    return Graph(nodes, blocks, stands_for[graph.output])


def _changes_nothing(node: Node, nodes: list[Node]) -> bool:
    if node.op == "site":
        site = cast(Site, node.module)
        is_grid = float(site.grid) > 0 and site.kind != "skip"
        return site.quantizer is None and not is_grid and site.conv is None
    if node.op == "crop":
        before = nodes[node.inputs[0]]
        return node.level > 0 and (before.level in (0, node.level))
    return node.op == "act" and bool((node.value == 1).all())
