"""Executes plans with native integer kernels, or with the NumPy reference where those are missing."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from cadyq.engine import reference
from cadyq.engine.plan import Array, Block, Conv, ImageIn, ImageOut, Layer, Part, Plan, Site
from cadyq.engine.reference import Result
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.native import load_native

__all__ = ["Engine", "available_isas"]


def _native() -> ModuleType | None:
    return load_native("_engine")


def available_isas() -> list[str]:
    """Instruction sets that this machine can execute, fastest first; empty without the native module."""
    native = _native()
    return [] if native is None else list(native.available())


class Engine:
    """A plan made ready for this machine.

    ``isa`` is one of `available_isas`, ``"reference"``, or ``None`` for the environment variable
    ``CADYQ_ISA`` and else the fastest.
    ``isa`` and ``threads`` are readable afterwards. Calls from several threads are run
    one after another; the interpreter lock is released meanwhile.

    Raises `ArgumentError` for an unknown instruction set and `UnsupportedError` for a plan whose topology the
    kernels cannot run.
    """

    def __init__(self, plan: Plan, threads: int | None = None, isa: str | None = None) -> None:
        self.plan = plan.validate()
        self.threads = threads if threads is not None else (os.cpu_count() or 1)
        if not 1 <= self.threads <= 256:
            raise ArgumentError("threads", threads, "1 to 256")
        names = available_isas()
        wanted = isa or os.environ.get("CADYQ_ISA") or (names[0] if names else "")
        if not wanted:
            warnings.warn(
                "cadyq was installed without its native kernels; the NumPy reference runs instead, about "
                "100 times slower. Reinstall with a C++17 compiler at hand.",
                RuntimeWarning,
                stacklevel=2,
            )
            wanted = "reference"
        if wanted != "reference" and wanted not in names:
            raise ArgumentError("isa", wanted, f"one of {[*names, 'reference']}", "see CADYQ_ISA")
        self.isa = wanted
        self._runner = None if wanted == "reference" else _build(self.plan, wanted, self.threads)

    def upscale(self, image: Array, choice: Array | None = None, exited: Array | None = None) -> Result:
        """Upscale a uint8 or uint16 image ``(H, W, C)``; arguments as for `cadyq.engine.reference.run`."""
        if self._runner is None:
            return reference.run(self.plan, image, choice, exited)
        reference.check_image(self.plan, image)
        forced, gone = reference.check_masks(self.plan, image, choice, exited)
        last = self.plan.steps[-1]
        assert isinstance(last, ImageOut)
        height, width = image.shape[:2]
        shape = (height * self.plan.scale, width * self.plan.scale, self.plan.planes[last.src].channels)
        out = np.empty(shape, image.dtype)
        bits, picked = np.zeros(forced.shape, np.uint8), np.zeros(forced.shape, np.int8)
        run = self._runner.run8 if image.dtype == np.uint8 else self._runner.run16
        run(np.ascontiguousarray(image), out, forced, gone.view(np.uint8), bits, picked)
        return Result(out, bits, picked)

    def profile(self) -> list[tuple[str, float]]:
        """Stages of the last run in order, with their seconds; empty for the reference."""
        return [] if self._runner is None else list(self._runner.profile())


def _site(native: ModuleType, site: Site | None) -> Any:
    if site is None:
        return None
    sel = site.selector
    arrays = (np.ascontiguousarray(a) for a in (site.multiplier, site.low, site.high))
    weight, bias = (None, None) if sel is None else map(np.ascontiguousarray, (sel.weight, sel.bias))
    log_offset = 0.0 if sel is None else sel.log_offset
    counted = site.kind == "body"
    inverse = _contiguous(site.inverse_scale)
    return native.site(list(site.bits), site.step, counted, *arrays, weight, bias, log_offset, inverse)


def _contiguous(array: Array | None) -> Array | None:
    return None if array is None else np.ascontiguousarray(array)


def _conv(native: ModuleType, conv: Conv) -> Any:
    arrays = map(np.ascontiguousarray, (conv.weight, conv.factor, conv.bias))
    site, requant = _site(native, conv.site), conv.requant
    levels, gain = (0, None) if requant is None else (requant.levels, np.ascontiguousarray(requant.gain))
    return native.conv(*arrays, _contiguous(conv.slope), site, conv.groups, levels, gain)


def _parts(parts: tuple[Part, ...]) -> list[tuple[int, int, int]]:
    return [(part.plane, part.first, part.channels) for part in parts]


def _layer(native: ModuleType, layer: Layer) -> Any:
    skip, borders = None, []
    if layer.skip is not None:
        found = layer.skip
        ratio, site = _contiguous(found.ratio), _site(native, found.site)
        skip = native.skip(_parts(found.parts), ratio, site, found.shared)
    if layer.borders is not None:
        variants = zip(layer.borders.weight, layer.borders.bias, strict=True)
        borders = [_conv(native, replace(layer.conv, weight=w, bias=b)) for w, b in variants]
    conv = _conv(native, layer.conv)
    return native.layer(_parts(layer.src), layer.dst, conv, skip, layer.shuffle, layer.rectify, borders)


def _image_out(runner: Any, step: ImageOut) -> None:
    base = step.base
    weight = None if base is None else np.ascontiguousarray(base.weight)
    symmetric, gains = (False, (0.0, 0.0)) if base is None else (base.symmetric, (base.gain8, base.gain16))
    tables = np.ascontiguousarray(step.table8), np.ascontiguousarray(step.table16)
    runner.add_image_out(step.src, *tables, weight, symmetric, *gains)


def _build(plan: Plan, isa: str, threads: int) -> Any:
    native = _native()
    assert native is not None
    runner = native.Runner(isa, plan.scale, plan.tile, threads)
    for plane in plan.planes:
        runner.add_plane(plane.channels, plane.level)
    try:
        for step in plan.steps:
            if isinstance(step, ImageIn):
                arrays = (np.ascontiguousarray(a) for a in (step.multiplier8, step.multiplier16, step.offset))
                runner.add_image_in(step.dst, *arrays)
            elif isinstance(step, Layer):
                runner.add_layer(_layer(native, step))
            elif isinstance(step, Block):
                layers = [_layer(native, layer) for layer in step.layers]
                runner.add_block(step.src, step.dst, step.residual, layers)
            else:
                _image_out(runner, step)
        runner.finish()
    except ValueError as error:
        raise UnsupportedError(f"plan: {error}; isa='reference' runs it") from error
    return runner
