"""Measured time: whole runs, interleaved, and the engine's own stages."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.engine.plan import Plan
from cadyq.engine.run import Engine

__all__ = ["STAGES", "Timed", "cpu_name", "engine_stages", "interleaved", "with_tile"]


STAGES = {
    "head": "input and head",
    "body": "body",
    "between": "between blocks",
    "tail": "tail and output",
}
"""Names of the stages of a run, as people read them."""


@dataclass(frozen=True)
class Timed:
    """Times of one configuration.

    Attributes:
        seconds: of every repeat.
        stages: seconds per stage of the median repeat, by the names of `STAGES`.
        fqr: mean bits over tiles and sites.
        bits: bit-widths, uint8 ``(rows, cols, sites)``.
    """

    seconds: tuple[float, ...]
    stages: Mapping[str, float]
    fqr: float
    bits: NDArray[np.uint8]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def interleaved(
    engines: Mapping[str, tuple[Engine, NDArray[np.int8] | None]], image: NDArray[np.uint8], repeats: int
) -> dict[str, Timed]:
    """Run configurations in turn, so that a slow moment of the machine hits all of them; one round warms up.

    Args:
        engines: by name an engine and forced candidates (None: its own choice).
        image: uint8 ``(H, W, 3)``.
        repeats: rounds that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    bits: dict[str, NDArray[np.uint8]] = {}
    for round_ in range(repeats + 1):
        for name, (engine, choice) in engines.items():
            start = time.perf_counter()
            found = engine.upscale(image, choice)
            taken = time.perf_counter() - start
            if round_:
                seconds[name].append(taken)
                stages[name].append(engine_stages(engine))
                bits[name] = found.bits
    result = {}
    for name, taken_all in seconds.items():
        middle = sorted(range(repeats), key=taken_all.__getitem__)[repeats // 2]
        mean = float(bits[name].mean()) if bits[name].size else 0.0
        result[name] = Timed(tuple(taken_all), stages[name][middle], mean, bits[name])
    return result


def engine_stages(engine: Engine) -> dict[str, float]:
    """Seconds of the last run before, in, between and behind the blocks; empty for the NumPy reference."""
    found = engine.profile()
    blocks = [i for i, (name, _) in enumerate(found) if "block" in name]
    result: dict[str, float] = {}
    for i, (name, seconds) in enumerate(found):
        if "block" in name:
            stage = "body"
        else:
            stage = "head" if not blocks or i < blocks[0] else "tail" if i > blocks[-1] else "between"
        result[STAGES[stage]] = result.get(STAGES[stage], 0.0) + seconds
    return result


def with_tile(plan: Plan, tile: int) -> Plan:
    """The same plan in other tiles."""
    return dataclasses.replace(plan, tile=tile)


def cpu_name() -> str:
    """The processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found: Any = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return str(found) or platform.machine()
