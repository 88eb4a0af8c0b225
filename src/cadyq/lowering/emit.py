"""Graph of operations -> steps of a plan.

Every convolution takes what follows it along: PixelShuffle, activation, requantisation, sum, ReLU, stream. What
remains is a *value*: channels of planes, each on a grid. Slices and concatenations are only other views of planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from cadyq.backbones.blocks import bicubic_upscale
from cadyq.engine import plan as p
from cadyq.errors import UnsupportedError
from cadyq.lowering import pack
from cadyq.lowering.collapse import Collapsed
from cadyq.lowering.trace import BlockSpan, Graph, Node
from cadyq.quant.linq import LinQ
from cadyq.quant.site import Site

__all__ = ["emit"]

Array = p.Array

IMAGE_STEP = 1.0 / 32767
TANH_RANGE = 8.0  # tanh(8) is 1 - 2e-7: beyond it all tables are flat
SIGMOID_RANGE = 16.0


@dataclass(frozen=True)
class Value:
    """Channels of planes, and the real value of one unit of each channel, (C,)."""

    parts: tuple[p.Part, ...]
    step: Array

    def sliced(self, first: int, channels: int) -> Value:
        """Some of the channels."""
        parts, at, end = [], 0, first + channels
        for part in self.parts:
            low, high = max(first, at), min(end, at + part.channels)
            if low < high:
                parts.append(p.Part(part.plane, part.first + low - at, high - low))
            at += part.channels
        return Value(tuple(parts), self.step[first:end])


@dataclass
class Chain:
    """A convolution and what it takes along."""

    last: int
    nodes: list[int]
    shuffle: int = 1
    slope: Array | None = None
    slope_first: bool = True  # before the shuffle
    requant: Site | None = None
    skip: int | None = None
    rectify: bool = False


def emit(graph: Graph, tile: int) -> p.Plan:
    """Plan of a traced network; raises `UnsupportedError` for what has no integer form."""
    return _Emitter(graph).plan(tile)


def _refused(what: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"{what} has no integer form here; expected {remedy}")


class _Emitter:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes, self.users = graph, graph.nodes, graph.users()
        self.values: dict[int, Value | None] = {}
        self.planes: list[p.Plane] = []
        self.steps: list[p.Step] = []
        self.image: tuple[int, p.ImageIn] | None = None
        self.span: BlockSpan | None = None
        self.layers: list[p.Layer] = []  # of the block that is open
        self.done: set[int] = set()

    # ---- the whole ----

    def plan(self, tile: int) -> p.Plan:
        scale = self.nodes[self.graph.output].level
        for i, node in enumerate(self.nodes):
            if not self.users[i] and i != self.graph.output:
                continue
            if i in self.done:
                continue
            self._open_block(i)
            if node.op in ("conv", "deconv", "linear"):
                self._convolution(i)
            elif node.op == "add" and self.values.get(i) is None and not self._is_base_sum(i):
                raise _refused("a sum of two stored values", "one of them to come from a convolution")
        if self.image is None or not isinstance(self.steps[-1], p.ImageOut):
            node = self.nodes[self.graph.output]
            raise _refused(f"a network whose result is {node.op!r}", "its last convolution's result")
        steps = (self.image[1], *self.steps)
        return p.Plan(scale, tile, tuple(self.planes), steps).validate()

    def _open_block(self, i: int) -> None:
        if self.span is None:
            span = next((b for b in self.graph.blocks if b.first <= i <= b.last), None)
            if span is not None:
                self.source = self._value(span.source)
                self.span, self.layers = span, []

    def _plane(self, channels: int, level: int) -> int:
        self.planes.append(p.Plane(channels, level))
        return len(self.planes) - 1

    # ---- values ----

    def _value(self, i: int) -> Value:
        found = self._stored(i)
        if found is None:
            node = self.nodes[self._culprit(i)]
            what = node.op if node.op != "site" else f"site {cast(Site, node.module).name}"
            raise _refused(f"operation {what!r}", "what the docstring of cadyq.lowering lists")
        return found

    def _culprit(self, i: int) -> int:
        """The first operation on the way to a node that cannot be read from planes."""
        for source in self.nodes[i].inputs:
            if self._stored(source) is None:
                return self._culprit(source)
        return i

    def _stored(self, i: int) -> Value | None:
        """The value of a node if it can be read from planes now."""
        if i not in self.values:
            found = self._made(i)
            if found is None:
                return None
            self.values[i] = found
        return self.values[i]

    def _made(self, i: int) -> Value | None:
        node = self.nodes[i]
        if node.op == "input" or self._is_picture(i):
            return self._image(i)
        sources = [self._stored(s) for s in node.inputs]
        known = [s for s in sources if s is not None]
        if not known or len(known) < len(sources):
            return None
        if node.op == "slice":
            return known[0].sliced(*node.value)
        if node.op == "cat":
            parts = tuple(part for value in known for part in value.parts)
            return Value(parts, np.concatenate([value.step for value in known]))
        if node.op == "site" and cast(Site, node.module).kind == "stream":
            return self._rescaled(known[0], float(cast(Site, node.module).grid), node)
        return None

    def _is_picture(self, i: int) -> bool:
        while self.nodes[i].op == "affine":
            i = self.nodes[i].inputs[0]
        return self.nodes[i].op == "input"

    def _image(self, i: int) -> Value:
        """The picture after additions and multiplications, on the grid of what reads it."""
        scale, offset, at = np.ones(1), np.zeros(1), i
        while self.nodes[at].op == "affine":
            a, b = self.nodes[at].value
            scale, offset, at = scale * a, offset + scale * b, self.nodes[at].inputs[0]
        channels = self.nodes[i].channels
        scale, offset = np.broadcast_to(scale, channels), np.broadcast_to(offset, channels)
        step = float(np.abs(np.stack([offset, offset + scale])).max()) / 32767
        for user in self.users[i]:
            site = self.nodes[user].module
            if isinstance(site, Site) and float(site.grid) > 0:
                grid = float(site.grid)
                step = IMAGE_STEP if math.isclose(grid, IMAGE_STEP, rel_tol=1e-6) else grid
        if self.image is not None:
            raise _refused(
                "a picture that is prepared in two ways", "one preparation for all layers that read it"
            )
        dst = self._plane(channels, 1)
        eight, sixteen = ((scale * (1 / step) / most).astype(np.float32) for most in (255, 65535))
        self.image = (i, p.ImageIn(dst, eight, sixteen, (offset / step).astype(np.float32)))
        return Value((p.Part(dst, 0, channels),), np.full(channels, step))

    def _rescaled(self, value: Value, step: float, node: Node) -> Value:
        """A stored value on another grid: the 1x1 convolution with unit weights."""
        if (value.step == step).all():
            return value
        if self.span is not None:
            raise _refused("a stored value that changes its grid within a block", "the change outside of it")
        channels = node.channels
        dst = self._plane(channels, node.level)
        weight = np.ascontiguousarray(np.eye(channels, dtype=np.int8)[:, None, None, :])
        ratio = (value.step / step)[None].astype(np.float32)
        self.steps.append(p.Layer(value.parts, dst, p.Conv(weight, ratio, np.zeros(channels, np.float32))))
        return Value((p.Part(dst, 0, channels),), np.full(channels, step))

    # ---- grids ----

    def _grid(self, i: int) -> Array:
        """The grid on which a node's result will be stored, (C,): that of the first that reads it."""
        node = self.nodes[i]
        step = np.full(node.channels, np.nan)
        if i == self.graph.output or self._ending(i) is not None:
            step[:] = self._output_step(i)
            return step
        for user in self.users[i]:
            if not np.isnan(step).any():
                break
            found = self._grid_of_user(i, self.nodes[user], user)
            step = np.where(np.isnan(step), found, step)
        return step

    def _grid_of_user(self, i: int, node: Node, user: int) -> Array:
        channels = self.nodes[i].channels
        if node.op == "site":
            site = cast(Site, node.module)
            if float(site.grid) > 0:
                return np.full(channels, float(site.grid))
            if site.quantizer is None or isinstance(site.quantizer, LinQ):
                return np.full(channels, np.nan)
            clip, _ = pack.clips_and_levels(site)
            scale = site.quantizer.channel_scale
            largest = float(clip.max()) * (1.0 if scale is None else float(scale.max()))
            return np.full(channels, largest / 32767)
        if node.op == "slice":
            step = np.full(channels, np.nan)
            first, count = node.value
            step[first : first + count] = self._grid(user)
            return step
        if node.op == "cat":
            at = sum(self.nodes[s].channels for s in node.inputs[: node.inputs.index(i)])
            return self._grid(user)[at : at + channels]
        if node.op == "add" or node.op == "act":
            return self._grid(user)
        if node.op == "shuffle":
            return np.repeat(self._grid(user), node.value**2)
        return np.full(channels, np.nan)

    # ---- the end of the network ----

    def _ending(self, i: int) -> list[int] | None:
        """Nodes from ``i`` (exclusive) to the output if all are element by element."""
        path: list[int] = []
        while i != self.graph.output:
            if len(self.users[i]) != 1:
                return None
            i = self.users[i][0]
            if self.nodes[i].op not in ("affine", "tanh", "sigmoid", "clamp") and not self._is_base_sum(i):
                return None
            path.append(i)
        return path

    def _base_of(self, i: int) -> int | None:
        """The enlargement of the picture that an addition adds."""
        for source in self.nodes[i].inputs:
            if self.nodes[source].op == "resize" and self.nodes[self.nodes[source].inputs[0]].op == "input":
                return source
        return None

    def _is_base_sum(self, i: int) -> bool:
        return self.nodes[i].op == "add" and self._base_of(i) is not None

    def _functions(self, i: int) -> tuple[Array, list[tuple[str, Any]], int | None]:
        """Behind node ``i``: offset per channel, functions of one number, and the enlargement that is added."""
        offset, functions, base = np.zeros(1), list[tuple[str, Any]](), None
        for at in self._ending(i) or []:
            node = self.nodes[at]
            if node.op == "add":
                if functions:
                    raise _refused(
                        "an enlarged picture added behind other functions", "it right behind a convolution"
                    )
                base = self._base_of(at)
            elif node.op == "affine" and not functions and (node.value[0] == 1).all():
                offset = offset + node.value[1]
            elif node.op == "affine" and max(len(v) for v in node.value) > 1:
                raise _refused(
                    "a factor per channel behind the last convolution", "one factor for all channels"
                )
            else:
                functions.append((node.op, node.value))
        return offset, functions, base

    def _output_step(self, i: int) -> float:
        low, high = 0.0, 1.0
        for op, value in reversed(self._functions(i)[1]):
            if op == "tanh":
                low, high = -TANH_RANGE, TANH_RANGE
            elif op == "sigmoid":
                low, high = -SIGMOID_RANGE, SIGMOID_RANGE
            elif op == "affine":
                scale, shift = float(value[0][0]), float(value[1][0])
                low, high = sorted(((low - shift) / scale, (high - shift) / scale))
        span = max(abs(low), abs(high))
        bounded = low == -span and span in (TANH_RANGE, SIGMOID_RANGE)
        return span / 32767 if bounded else 2.0 * span / 32767

    def _image_out(self, i: int, plane: int) -> None:
        """The network's last step."""
        _, functions, base = self._functions(i)
        step = self._output_step(i)

        def applied(op: str, value: Any) -> Callable[[Array], Array]:
            if op == "affine":
                return lambda x: np.asarray(x * value[0] + value[1])
            if op == "clamp":
                return lambda x: np.clip(x, *value)
            return np.tanh if op == "tanh" else lambda x: np.asarray(1 / (1 + np.exp(-x)))

        table8, table16 = pack.tables(step, [applied(*f) for f in functions])
        added = None if base is None else self._base(base, step)
        self.steps.append(p.ImageOut(plane, table8, table16, added))

    def _base(self, i: int, step: float) -> p.Bicubic:
        kind, scale = self.nodes[i].value
        upscale = pack.enlargement(kind, scale)
        if kind == "matlab":
            upscale = partial(bicubic_upscale, scale=scale, kind="matlab")
        unit = float(pack.TAPS) ** 2 * step
        weight = pack.base_weights(kind, scale, upscale)
        return p.Bicubic(weight, kind == "matlab", 1 / (unit * 255), 1 / (unit * 65535))

    # ---- convolutions ----

    def _convolution(self, i: int) -> None:
        node = self.nodes[i]
        source, site = node.inputs[0], None
        if self.nodes[source].op == "site":
            site = cast(Site, self.nodes[source].module)
            source = self.nodes[source].inputs[0]
        if site is None:
            raise _refused("a convolution without a site", "a Site before every convolution")
        value = self._value(source)
        kernel = self._kernel(node)
        chain = self._chain(i, kernel.shuffle)
        last = chain.last
        channels = self.nodes[last].channels
        step = self._grid(last)
        if self._is_stream(last):
            step = np.full(channels, float(cast(Site, self.nodes[last].module).grid))
        if np.isnan(step).any():
            raise _refused(
                f"the result behind site {site.name}", "a site with a grid or a clip that reads it"
            )
        conv, borders = self._pack(kernel, site, value, chain, step, self._offset(last))
        level = self.nodes[source].level * chain.shuffle
        skip = None if chain.skip is None else self._skip(chain.skip, step)
        dst = self._target(last, channels, level, step)
        layer = p.Layer(value.parts, dst, conv, skip, chain.shuffle, chain.rectify, borders)
        self.values[last] = Value((p.Part(dst, 0, channels),), step)
        self.done.update(chain.nodes)
        if self.span is None:
            self.steps.append(layer)
        else:
            self.layers.append(layer)
            if self.span.last in chain.nodes:
                self._close_block(dst)
        if last == self.graph.output or self._ending(last) is not None:
            self._image_out(last, dst)

    def _offset(self, last: int) -> Array:
        is_end = last == self.graph.output or self._ending(last) is not None
        return self._functions(last)[0] if is_end else np.zeros(1)

    def _kernel(self, node: Node) -> pack.Kernel:
        if node.op == "conv":
            return pack.conv_kernel(cast(Any, node.module))
        if node.op == "deconv":
            return pack.deconv_kernel(cast(Any, node.module))
        chain = cast(Collapsed, node.value)
        bits = chain.first.weight_bits
        assert bits is not None
        return pack.linear_kernel(chain.weight, chain.bias, chain.shuffle, bits, chain.first.in_scale)

    def _is_stream(self, i: int) -> bool:
        node = self.nodes[i]
        return node.op == "site" and cast(Site, node.module).kind == "stream"

    def _chain(self, i: int, shuffle: int) -> Chain:
        chain = Chain(i, [i], shuffle)
        while len(self.users[chain.last]) == 1:
            at = self.users[chain.last][0]
            behind = self.span is not None and chain.last == self.span.last
            if (behind and not self._is_stream(at)) or not self._takes(chain, at):
                break
            chain.last = at
            chain.nodes.append(at)
            if self._is_stream(at):
                break
        return chain

    def _takes(self, chain: Chain, at: int) -> bool:
        """Whether the next node can be part of the chain; notes what it does."""
        node = self.nodes[at]
        plain = chain.skip is None and chain.requant is None
        if node.op == "shuffle" and plain and chain.shuffle == 1:
            chain.shuffle = int(node.value)
            return True
        if node.op == "act" and plain and chain.slope is None:
            chain.slope, chain.slope_first = node.value, chain.shuffle == 1
            return True
        if node.op == "act" and chain.skip is not None and not chain.rectify:
            chain.rectify = bool((node.value == 0).all())
            return chain.rectify
        if node.op == "site":
            site = cast(Site, node.module)
            if self._is_stream(at):
                return True
            if site.conv is None and site.kind == "fixed" and plain and chain.shuffle == 1:
                chain.requant = site
                return True
        if node.op == "add" and chain.skip is None and chain.shuffle == 1:
            other = node.inputs[1] if node.inputs[0] == chain.last else node.inputs[0]
            if other != chain.last and self._can_be_added(other):
                chain.skip = other
                return True
        return False

    def _can_be_added(self, i: int) -> bool:
        node = self.nodes[i]
        if node.op == "site" and cast(Site, node.module).quantizer is not None:
            return self._stored(node.inputs[0]) is not None
        return node.op != "input" and not self._is_picture(i) and self._stored(i) is not None

    def _skip(self, i: int, step: Array) -> p.Skip:
        node = self.nodes[i]
        if node.op == "site" and cast(Site, node.module).quantizer is not None:
            site, value = cast(Site, node.module), self._value(node.inputs[0])
            quantizer = site.quantizer
            assert quantizer is not None
            if isinstance(quantizer, LinQ) and site.kind != "body":
                raise _refused(f"{site.name}: a quantized shortcut with LinQ's range per tile", "PAMS or LSQ")
            scale = np.ones(site.channels)
            if quantizer.channel_scale is not None:
                scale = quantizer.channel_scale.double().cpu().numpy()
            unit = value.step[None] if isinstance(quantizer, LinQ) else 1.0
            ratio = (pack.input_steps(site)[:, None] * unit * scale[None] / step[None]).astype(np.float32)
            if site.kind == "body":
                return p.Skip(value.parts, ratio, shared=True)
            return p.Skip(value.parts, ratio, pack.pack_site(site, value.step))
        value = self._value(i)
        plain = value.step / step
        return p.Skip(value.parts, None if (plain == 1).all() else plain[None].astype(np.float32))

    def _pack(
        self, kernel: pack.Kernel, site: Site, value: Value, chain: Chain, step: Array, offset: Array
    ) -> tuple[p.Conv, p.Borders | None]:
        """The convolution from codes of its site (or of its source plane) to values of ``step`` (C,)."""
        n = chain.shuffle**2
        if n > 1 and kernel.groups > 1:
            kernel = kernel.dense()
        n_out = len(kernel.step)
        # torch counts (channel, row, column), the engine (row, column, channel).
        order = np.arange(n_out) if kernel.shuffle > 1 else np.arange(n_out).reshape(-1, n).T.ravel()
        target = np.tile(step, n)
        requant = None
        if chain.requant is not None:
            clip, levels = pack.clips_and_levels(chain.requant)
            if chain.requant.quantizer is None or not chain.requant.quantizer.signed:
                raise _refused(f"{chain.requant.name}: unsigned codes of a result", "signed ones")
            requant = p.Requant(int(levels[0]), (clip[0] / levels[0] / target).astype(np.float32))
            target = np.full(n_out, clip[0] / levels[0])
        packed, in_steps = self._site(site, value)
        factor = in_steps[:, None] * kernel.step[order][None] / target[None]
        shift = np.tile(np.broadcast_to(offset, len(step)), n) if offset.any() else np.zeros(1)
        slope = None
        if chain.slope is not None:
            slope = self._slope(chain, kernel, n_out, n)
        conv = p.Conv(
            np.ascontiguousarray(kernel.weight[order]),
            np.ascontiguousarray(factor, np.float32),
            ((kernel.bias[order] + shift) / target).astype(np.float32),
            slope,
            packed,
            kernel.groups,
            requant,
        )
        if kernel.borders is None:
            return conv, None
        weight, bias = kernel.borders
        return conv, p.Borders(weight, ((bias + shift) / target).astype(np.float32))

    def _slope(self, chain: Chain, kernel: pack.Kernel, n_out: int, n: int) -> Array:
        assert chain.slope is not None
        if chain.slope_first and kernel.shuffle == 1:
            per_output = np.broadcast_to(chain.slope, n_out)
            return np.ascontiguousarray(per_output.reshape(-1, n).T.ravel(), np.float32)
        return np.tile(np.broadcast_to(chain.slope, n_out // n), n).astype(np.float32)

    def _site(self, site: Site, value: Value) -> tuple[p.Site | None, Array]:
        """The packed site, and the real value of one code per candidate."""
        if site.quantizer is None:
            if not float(site.grid) > 0:
                raise _refused(
                    f"site {site.name} without a quantizer", "a network converted with integer edges"
                )
            if not (value.step == value.step[0]).all():
                raise _refused(f"site {site.name} over several grids", "one grid")
            return None, value.step[:1]
        if isinstance(site.quantizer, LinQ):
            if site.kind != "body" or self.span is None:
                raise _refused(f"{site.name}: LinQ at a {site.kind} site", "LinQ at sites of blocks only")
            return pack.pack_site(site, value.step), value.step[0] * pack.input_steps(site)
        return pack.pack_site(site, value.step), pack.input_steps(site)

    # ---- blocks ----

    def _target(self, last: int, channels: int, level: int, step: Array) -> int:
        """The plane that a chain writes: a block updates its source's where nobody else needs that."""
        span = self.span
        if span is None or last < span.last:
            return self._plane(channels, level)
        inside = range(span.first, span.last + 1)
        only = all(user in inside for user in self.users[span.source])
        whole = len(self.source.parts) == 1
        plane = self.source.parts[0].plane
        same = self.planes[plane] == p.Plane(channels, level) and (self.source.step == step).all()
        if only and whole and same and not self._is_picture(span.source):
            return plane
        return self._plane(channels, level)

    def _close_block(self, dst: int) -> None:
        span, parts = self.span, self.source.parts
        assert span is not None
        if len(parts) != 1 or parts[0].channels != self.planes[parts[0].plane].channels:
            raise _refused("a block that reads a concatenation or slice", "one that reads a stored value")
        self.steps.append(p.Block(parts[0].plane, dst, tuple(self.layers), span.residual))
        self.span = None
