"""A flat list of operations -> a network with sites: head, body, blocks, planes and tail are found in the topology.

* A convolution that reads the picture is the head; one behind or at an upsampling step belongs to the tail.
* A stretch with one input and one output that ends in a sum is a block: a residual block, a dense block, a distillation
  block. The innermost ones count.
* Convolutions between blocks keep 8 bits if the blocks do most of the work, as in the networks written by hand;
  otherwise each is a block of its own.
* A value that is stored (read more than once, added, concatenated, passed from block to block) lies on a 16-bit grid;
  values that are added or concatenated share one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cadyq.backbones.graph import INPUT, Graph, Op, Unit, reach
from cadyq.backbones.trace import Step
from cadyq.errors import UnsupportedError

__all__ = ["build_graph"]

MAX_HALO = 8
"""Wider blocks are taken apart: a tile of 32 would compute more than twice its own pixels."""

_UNARY = ("relu", "leaky", "prelu", "tanh", "sigmoid", "clamp", "affine")
_ACTIVATIONS = ("relu", "leaky", "prelu")
_LAYERS = ("conv", "deconv")
_UPSAMPLING = ("shuffle", "resize", "deconv")


@dataclass
class _Region:
    """Steps that become a block: ``source`` is the only value they read, ``result`` the only one that is read."""

    source: str
    result: str
    steps: list[Step]
    residual: bool
    layer: str = ""


@dataclass
class _Facts:
    """What is known about each value."""

    steps: list[Step]
    made: dict[str, Step] = field(default_factory=dict)
    users: dict[str, list[Step]] = field(default_factory=dict)
    level: dict[str, int] = field(default_factory=lambda: {INPUT: 1})
    channels: dict[str, int] = field(default_factory=lambda: {INPUT: 3})
    pictures: set[str] = field(default_factory=lambda: {INPUT})
    nonneg: set[str] = field(default_factory=lambda: {INPUT})

    def __post_init__(self) -> None:
        for step in self.steps:
            self.made[step.out] = step
            for name in step.inputs:
                self.users.setdefault(name, []).append(step)
            self._learn(step)
        self.users[self.steps[-1].out] = []

    def _learn(self, step: Step) -> None:
        kind, first = step.kind, step.inputs[0]
        level, channels = self.level[first], self.channels[first]
        if any(self.level[name] != level for name in step.inputs):
            raise UnsupportedError(f"layer {step.layer!r} joins features of different sizes")
        if kind == "deconv":
            level *= step.data["stride"]
        elif kind in ("shuffle", "resize"):
            level *= step.data["factor"]
        if kind in _LAYERS:
            channels = step.data["channels"][1]
        elif kind == "shuffle":
            channels //= step.data["factor"] ** 2
        elif kind == "slice":
            channels = step.data["stop"] - step.data["start"]
        elif kind == "cat":
            channels = sum(self.channels[name] for name in step.inputs)
        self.level[step.out], self.channels[step.out] = level, channels
        if first in self.pictures and kind in ("affine", "resize", "clamp", "slice"):
            self.pictures.add(step.out)
        if _is_nonneg(step, [name in self.nonneg for name in step.inputs]):
            self.nonneg.add(step.out)

    def only_user(self, value: str) -> Step | None:
        users = self.users[value]
        return users[0] if len(users) == 1 else None

    def is_head(self, step: Step) -> bool:
        return step.kind in _LAYERS and step.inputs[0] in self.pictures

    def feeds_shuffle(self, step: Step) -> bool:
        """Whether a layer's result goes, by way of activations, to nothing but PixelShuffle."""
        users = self.users[step.out]
        return bool(users) and all(
            u.kind == "shuffle" or (u.kind in _UNARY and self.feeds_shuffle(u)) for u in users
        )

    def is_body(self, step: Step) -> bool:
        return (
            step.kind == "conv"
            and self.level[step.out] == 1
            and not self.is_head(step)
            and not self.feeds_shuffle(step)
        )


def _is_nonneg(step: Step, inputs: list[bool]) -> bool:
    if step.kind in ("relu", "sigmoid"):
        return True
    if step.kind == "clamp":
        return bool(step.data["low"] >= 0) or inputs[0]
    if step.kind == "affine":
        return inputs[0] and all(bool((t >= 0).all()) for t in step.tensors.values())
    if step.kind == "resize":
        return inputs[0] and step.data["mode"] != "bicubic"
    return step.kind in ("add", "cat", "slice", "shuffle", "leaky", "prelu") and all(inputs)


@torch.no_grad()
def build_graph(steps: Sequence[Step], what: str = "the network") -> Graph:
    """Network of traced, simplified steps, float, with its weights.

    Raises:
        UnsupportedError: not a super-resolution network, or none whose bits could be chosen.
    """
    facts = _Facts(list(steps))
    scale = facts.level[steps[-1].out]
    if facts.channels[steps[-1].out] != 3 or scale < 2:
        raise UnsupportedError(
            f"{what} maps 3 channels to {facts.channels[steps[-1].out]}, {scale} times larger; "
            "expected RGB to RGB, 2 times larger or more"
        )
    regions = _regions(facts)
    body = [s for region in regions for s in region.steps if s.kind == "conv"]
    if not body:
        raise UnsupportedError(
            f"{what} has no convolution between head and upsampler at the picture's own size: nothing to choose"
        )
    names = _names(facts.steps, regions)
    ops = _Emitter(facts, regions, names).ops()
    graph = Graph(scale, ops)
    for step in facts.steps:
        if step.tensors and step.kind in (*_LAYERS, "prelu"):
            module = graph.layers.get_submodule(names[step.out])
            layer = module.conv if isinstance(module, Unit) else module
            for key, value in step.tensors.items():
                layer.get_parameter(key).copy_(value)
    return graph.eval()


def _regions(facts: _Facts) -> list[_Region]:
    """Blocks, in the order of their results."""
    found: list[_Region] = []
    taken: set[str] = set()
    parent = _dominators(facts)
    candidates = [r for step in facts.steps if (r := _region_of(facts, step, parent)) is not None]
    for region in sorted(candidates, key=lambda r: len(r.steps)):
        if not taken.intersection(s.out for s in region.steps):
            found.append(_with_activation(facts, region))
            taken.update(s.out for s in found[-1].steps)
    bodies = [step for step in facts.steps if facts.is_body(step)]
    lone = [step for step in bodies if step.out not in taken]
    if 2 * sum(map(_macs, lone)) > sum(map(_macs, bodies)):
        singles = [_Region(step.inputs[0], step.out, [step], False) for step in lone]
        found += [_with_activation(facts, region) for region in singles]
    order = {step.out: i for i, step in enumerate(facts.steps)}
    return sorted(found, key=lambda r: order[r.result])


def _macs(step: Step) -> int:
    n_in, n_out = step.data["channels"]
    return int(n_in * n_out * step.data["kernel"] ** 2 // step.data["groups"])


def _dominators(facts: _Facts) -> dict[str, str]:
    """Of every value, the last one through which all paths from the picture lead."""
    parent, depth = {INPUT: INPUT}, {INPUT: 0}
    for step in facts.steps:
        meet = step.inputs[0]
        for other in step.inputs[1:]:
            while meet != other:
                if depth[meet] < depth[other]:
                    other = parent[other]
                else:
                    meet = parent[meet]
        parent[step.out], depth[step.out] = meet, depth[meet] + 1
    return parent


def _region_of(facts: _Facts, last: Step, parent: dict[str, str]) -> _Region | None:
    """The block that ends in a sum, if what lies between it and its dominator can be one."""
    if last.kind != "add" or facts.level[last.out] != 1 or last.out in facts.pictures:
        return None
    source, inside, waiting = parent[last.out], {last.out}, [last]
    while waiting:
        for name in waiting.pop().inputs:
            if name != source and name not in inside:
                inside.add(name)
                waiting.append(facts.made[name])
    steps = [step for step in facts.steps if step.out in inside]
    layers = [step for step in steps if step.kind in _LAYERS]
    if not layers or not all(map(facts.is_body, layers)) or any(s.kind in _UPSAMPLING for s in steps):
        return None
    for step in steps[:-1]:
        if any(user.out not in inside for user in facts.users[step.out]):
            return None
    if source in facts.pictures or reach([_plain(s, facts) for s in steps], source)[last.out] > MAX_HALO:
        return None
    return _Region(source, last.out, steps, last.kind == "add" and source in last.inputs)


def _with_activation(facts: _Facts, region: _Region) -> _Region:
    """Add activations that nothing else reads behind; such a block is no plain sum, and cannot be skipped."""
    while (user := facts.only_user(region.result)) is not None and user.kind in _ACTIVATIONS:
        region = _Region(region.source, user.out, [*region.steps, user], False)
    return region


def _plain(step: Step, facts: _Facts) -> Op:
    return {"op": step.kind, "in": step.inputs, "out": step.out, "level": facts.level[step.out], **step.data}


def _names(steps: Sequence[Step], regions: list[_Region]) -> dict[str, str]:
    """Paths of all layers by their value; regions learn theirs. A layer that is used twice gets two names."""
    inside = {step.out: region for region in regions for step in region.steps}
    named = [step for step in steps if step.kind in (*_LAYERS, "prelu")]
    paths = {step.out: _safe(step.layer) for step in named}
    result: dict[str, str] = {}
    taken: set[str] = set()
    for step in named:
        if step.out not in inside:
            result[step.out] = _free(paths[step.out], taken)
    for i, region in enumerate(regions):
        own = [step for step in region.steps if step.out in paths]
        prefix = _common([paths[step.out] for step in own])
        layers = [paths[step.out] for step in own if step.kind == "conv"]
        region.layer = _free(layers[0] if len(layers) == 1 else prefix or f"block{i}", taken)
        inner: set[str] = set()
        for step in own:
            path = paths[step.out]
            relative = path[len(prefix) + 1 :] if prefix else path
            result[step.out] = f"{region.layer}.{_free(relative, inner)}"
    return result


def _safe(path: str) -> str:
    parts = [re.sub(r"\W", "_", part) for part in path.split(".")]
    reserved = {*dir(torch.nn.Module), "ops", "halo", "residual", "source", "result", "conv", "site"}
    return ".".join(f"{part}_" if part in reserved or not part else part for part in parts)


def _free(path: str, taken: set[str]) -> str:
    """``path``, or with a number behind it, so that it is neither, above nor below one that is taken."""

    def clashes(name: str) -> bool:
        return any(f"{name}.".startswith(f"{t}.") or f"{t}.".startswith(f"{name}.") for t in taken)

    name, n = path, 1
    while clashes(name):
        n += 1
        name = f"{path}_{n}"
    taken.add(name)
    return name


def _common(paths: list[str]) -> str:
    """Longest path above all of ``paths`` (never one of them)."""
    parents = [path.split(".")[:-1] for path in paths]
    result: list[str] = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        result.append(parts[0])
    return ".".join(result)


class _Emitter:
    """Writes the operations, with sites, grids and tail."""

    def __init__(self, facts: _Facts, regions: list[_Region], names: dict[str, str]) -> None:
        self.facts, self.regions, self.names = facts, regions, names
        self.inside = {step.out: region for region in regions for step in region.steps}
        self.fresh = self._fresh_grids()
        self.stored = self._stored()
        self.grids = self._grids()

    def ops(self) -> list[Op]:
        result: list[Op] = []
        for step in self.facts.steps:
            region = self.inside.get(step.out)
            if region is None:
                result += self._op(step)
            elif step.out == region.result:
                result += self._block(region)
        return self._with_tail(result)

    # Grids.

    def _fresh_grids(self) -> set[str]:
        """Values that go both into the blocks and around all of them (the long skip): the blocks' copy is stored anew.

        Head and upsampler often have a much larger range than the stream between, which deserves its own grid.
        """
        order = {step.out: i for i, step in enumerate(self.facts.steps)}
        last = max(order[region.result] for region in self.regions)
        sources = {region.source for region in self.regions}
        sums = [
            s
            for s in self.facts.steps
            if s.kind == "add" and order[s.out] > last and s.out not in self.inside
        ]
        return {name for s in sums for name in s.inputs if name in sources}

    def _stored(self) -> set[str]:
        facts = self.facts
        crossing = {name for region in self.regions for name in (region.source, region.result)}
        result: set[str] = set()
        for step in facts.steps:
            value, users = step.out, facts.users[step.out]
            if value in facts.pictures or facts.channels[value] <= 4 or step.kind in ("cat", "slice"):
                continue
            ends_sum = self._ends_sum(step) and not (len(users) == 1 and users[0].kind in _UNARY)
            if (
                len(users) > 1
                or value in crossing
                or ends_sum
                or any(u.kind in ("cat", "slice") for u in users)
            ):
                result.add(value)
        for step in facts.steps:
            known = any(n in facts.pictures or self._plane(n, result) for n in step.inputs)
            if step.kind == "add" and not known and facts.channels[step.out] > 4:
                result.add(step.inputs[0])
        return result

    def _ends_sum(self, step: Step) -> bool:
        while step.kind in _UNARY and step.inputs[0] in self.facts.made:
            step = self.facts.made[step.inputs[0]]
        return step.kind == "add"

    def _plane(self, value: str, stored: set[str]) -> bool:
        """Whether a value is stored, or a view of stored ones."""
        step = self.facts.made.get(value)
        if step is not None and step.kind in ("cat", "slice"):
            return all(self._plane(name, stored) for name in step.inputs)
        return value in stored

    def _grids(self) -> dict[str, str]:
        """Name of the grid of every stored value and view: values that are added or concatenated share one."""
        root: dict[str, str] = {}

        def find(value: str) -> str:
            while root.get(value, value) != value:
                value = root[value]
            return value

        def join(values: Iterable[str]) -> None:
            first, *others = [find(v) for v in values]
            for other in others:
                root[other] = first

        facts = self.facts
        for step in facts.steps:
            region = self.inside.get(step.out)
            inputs = [
                f"{name}~" if region is not None and name == region.source and name in self.fresh else name
                for name in step.inputs
            ]
            planes = [
                n for n, name in zip(inputs, step.inputs, strict=True) if self._plane(name, self.stored)
            ]
            if step.kind in ("cat", "slice") and len(planes) == len(inputs):
                join([step.out, *planes])
            elif step.kind == "add" and planes:
                out: Step = step
                while (
                    out.out not in self.stored and (user := facts.only_user(out.out)) and user.kind in _UNARY
                ):
                    out = user
                join([*planes, *([out.out] if out.out in self.stored else [])])
        views = [s.out for s in facts.steps if s.kind in ("cat", "slice") and self._plane(s.out, self.stored)]
        order = [s.out for s in facts.steps if s.out in self.stored or s.out in views]
        names: dict[str, str] = {}
        result = {}
        for value in order:
            for key in (value, f"{value}~") if value in self.fresh else (value,):
                result[key] = names.setdefault(find(key), f"grid{len(names)}")
        return result

    # Operations.

    def _block(self, region: _Region) -> list[Op]:
        source, fresh = region.source, region.source in self.fresh
        if fresh:
            source = f"{source}~"
        inner: list[Op] = []
        for step in region.steps:
            inner += self._op(step, rename={region.source: source}, store=step.out != region.result)
        block = {
            "op": "block",
            "layer": region.layer,
            "in": [source],
            "out": region.result,
            "halo": int(reach(inner, source)[region.result]),
            "residual": region.residual,
            "ops": inner,
        }
        before = [self._stream(region.source, source)] if fresh else []
        return [*before, block, *([self._stream(region.result)] if region.result in self.stored else [])]

    def _stream(self, value: str, out: str = "") -> Op:
        out = out or value
        grid, channels = self.grids[out], self.facts.channels[value]
        site = f"{grid}_{channels}"
        return {"op": "stream", "in": [value], "out": out, "grid": grid, "site": site, "channels": channels}

    def _op(self, step: Step, rename: dict[str, str] | None = None, store: bool = True) -> list[Op]:
        rename = rename or {}
        inputs = [rename.get(name, name) for name in step.inputs]
        op: Op = {"op": step.kind, "in": inputs, "out": step.out}
        op.update({key: value for key, value in step.data.items() if key != "folded"})
        if step.kind in (*_LAYERS, "resize"):
            op["level"] = self.facts.level[step.inputs[0]]
        if step.kind in _LAYERS:
            op["layer"] = self._relative(step)
            op["bias"] = "bias" in step.tensors
            op["site"] = self._site(step, inputs[0])
        elif step.kind == "prelu":
            op["layer"] = self._relative(step)
        elif step.kind == "affine":
            op.update({key: value.tolist() for key, value in step.tensors.items()})
        stored = store and step.out in self.stored
        return [op, self._stream(step.out)] if stored else [op]

    def _relative(self, step: Step) -> str:
        region, name = self.inside.get(step.out), self.names[step.out]
        return name if region is None else name[len(region.layer) + 1 :]

    def _site(self, step: Step, source: str) -> dict[str, Any]:
        body = step.out in self.inside
        picture = step.inputs[0] in self.facts.pictures
        return {
            "kind": "body" if body else "edge",
            "nonneg": step.inputs[0] in self.facts.nonneg,
            "bits": 16 if picture else 8,
            "grid": self.grids.get(source),
        }

    def _with_tail(self, ops: list[Op]) -> list[Op]:
        """Gather the layers behind the body that depend on one value into a tail, if that is all there is."""
        first = next((i for i, op in enumerate(ops) if self._is_up(op)), None)
        if first is None:
            return ops
        start = ops[first]["in"][0]
        known, rest = {start}, ops[:first]
        tail: list[Op] = []
        for op in ops[first:]:
            inside = all(name in known for name in op["in"])
            (tail if inside else rest).append(op)
            if inside:
                known.add(op["out"])
        last = ops[-1]["out"]
        needed = {name for op in rest for name in op["in"]} | {last}
        if any(op["op"] == "block" for op in tail) or {op["out"] for op in tail} & needed != {
            tail[-1]["out"]
        }:
            return ops
        wrapped = {"op": "tail", "in": [start], "out": tail[-1]["out"], "ops": tail}
        return [*rest, wrapped] if wrapped["out"] == last else [*rest[:first], wrapped, *rest[first:]]

    def _is_up(self, op: Op) -> bool:
        step = self.facts.made.get(op["out"])
        if step is None or op["op"] in ("stream", "block") or step.out in self.facts.pictures:
            return False
        return step.kind in _UPSAMPLING or (step.kind == "conv" and self.facts.feeds_shuffle(step))
