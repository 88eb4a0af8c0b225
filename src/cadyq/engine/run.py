"""Executes plans with native integer kernels, or with the NumPy reference where those are missing."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine import reference
from cadyq.engine.plan import Block, Conv, ImageIn, ImageOut, Layer, Plan
from cadyq.engine.reference import Result
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.native import load_native

__all__ = ["Engine", "available_isas"]

Array = NDArray[Any]


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


def _conv(native: ModuleType, conv: Conv) -> Any:
    site = None
    if conv.site is not None:
        s, sel = conv.site, conv.site.selector
        arrays = (np.ascontiguousarray(a) for a in (s.multiplier, s.low, s.high))
        weight, bias = (None, None) if sel is None else map(np.ascontiguousarray, (sel.weight, sel.bias))
        log_offset = 0.0 if sel is None else sel.log_offset
        site = native.site(list(s.bits), s.step, *arrays, weight, bias, log_offset)
    slope = None if conv.slope is None else np.ascontiguousarray(conv.slope)
    return native.conv(*map(np.ascontiguousarray, (conv.weight, conv.factor, conv.bias)), slope, site)


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
                residual = -1 if step.residual is None else step.residual
                runner.add_layer(step.src, step.dst, residual, step.shuffle, _conv(native, step.conv))
            elif isinstance(step, Block):
                runner.add_block(step.src, step.dst, step.residual, [_conv(native, c) for c in step.convs])
            else:
                tables = np.ascontiguousarray(step.table8), np.ascontiguousarray(step.table16)
                runner.add_image_out(step.src, *tables)
        runner.finish()
    except ValueError as error:
        raise UnsupportedError(f"plan: {error}; isa='reference' runs it") from error
    return runner
