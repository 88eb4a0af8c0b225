"""The integer kernels against the machine's peak, and how the engine scales with picture size and threads.

    python bench/kernels.py [--isa ...] [--plan FILE.plan.safetensors] [--repeats 200] [--out FOLDER]

1. Kernels alone: one core, 3x3 64->64 layers on a 96x96 tile (`layer.cpp`, with the engine's source). The peak is
   that of the kernels' own multiply-add of 16-bit integers, measured by a loop in registers (`peak.cpp`), both built
   with the system's compiler and run in turns; Winograd F(4,3) needs a quarter of the multiplications, so 4 peaks are
   the ceiling. Beside them the same layers within the engine, where values are quantized and tiles have surroundings.
2. Scaling: time per output megapixel over picture sizes and threads.
3. Peak memory of a fresh process by output size.
4. Time of every stage at 480x270.

2 to 4 run the shape of a 16-block network with two PixelShuffle stages and random weights, or a plan file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import SHAPES
from machine import commit, cpu, peak_mb

from cadyq.engine.plan import Plan
from cadyq.engine.run import Engine, available_isas
from cadyq.engine.synthetic import Shape, random_picture, random_plan
from cadyq.io.files import write_atomic
from cadyq.io.plans import load_plan

HERE = Path(__file__).resolve().parent
TILE, CHANNELS, BLOCKS = 96, 64, 1  # short, so that a busy machine lets some runs pass undisturbed
MACS = TILE * TILE * CHANNELS * CHANNELS * 9
BARS = {"avx2": 0.75, "avx512vnni": 0.85}
SOURCE = HERE.parent / "src/cadyq/native/engine"
# As CMakeLists.txt has them.
FLAGS = {
    "avx2": ["-mavx2"],
    "avxvnni": ["-mavx2", "-mavxvnni"],
    "avx512vnni": [f"-mavx512{kind}" for kind in ("f", "bw", "dq", "vl", "vnni")] + ["-DCADYQ_INTERLEAVED"],
}
SIZES = ("120x68", "240x135", "480x270", "960x540")
THREADS = (1, 2)
# Of the whole process at 3840x2160 output.
MEMORY_BAR_MB = 300


def compiler() -> str | None:
    """The system's; None and a message where there is none."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        print("no C++ compiler: neither the peak nor the kernels alone are measured")
    return found


def build(cxx: str, target: Path, *arguments: str | Path) -> ctypes.CDLL:
    """Sources as a shared library."""
    subprocess.run([cxx, "-shared", "-fPIC", *arguments, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def layer_run(cxx: str | None, isa: str, folder: Path) -> Callable[[int], float] | None:
    """A function that measures a layer once, without or with an addition, in multiply-adds per second."""
    if cxx is None or isa not in FLAGS:
        return None
    sources: list[str | Path] = [HERE / "layer.cpp", SOURCE / f"{isa}.cpp"]
    if isa == "avx512vnni":
        sources.append(folder / "interleaved.S")
        subprocess.run([sys.executable, SOURCE / "avx512_interleaved.py", sources[-1]], check=True)
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-w", *FLAGS[isa]]
    defines = [f"-DKERNELS=cadyq_kernels_{isa}", f"-DSIDE={TILE}", f"-DCHANNELS={CHANNELS}"]
    function = build(cxx, folder / f"layer-{isa}.so", *flags, *defines, "-I", SOURCE, *sources).layer
    function.argtypes, function.restype = [ctypes.c_int], None

    def run(adds: int) -> float:
        function(adds)  # what it reads is where the layer before leaves it: in the caches
        start = time.perf_counter()
        function(adds)
        return MACS / (time.perf_counter() - start)

    return run


def peak_run(library: ctypes.CDLL | None, isa: str) -> Callable[[], float] | None:
    """A function that measures the peak once, in multiply-adds per second.

    The loop makes as many as a layer does by Winograd: what else runs on the machine then disturbs both alike.
    """
    function = getattr(library, f"peak_{isa}", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64

    rounds = MACS // 4 // function(1)

    def run() -> float:
        start = time.perf_counter()
        made: int = function(rounds)
        return made / (time.perf_counter() - start)

    return run


def kernel_rates(
    isa: str, repeats: int, peak: Callable[[], float] | None, layer: Callable[[int], float] | None
) -> dict[str, Any]:
    """Multiply-adds per second of 3x3 64->64, best and median, beside the peak."""
    plan = random_plan(Shape(channels=CHANNELS, blocks=BLOCKS, head=3, tail=3, tile=TILE, act="relu"))
    engine, image = Engine(plan, 1, isa), random_picture(TILE, TILE)
    alone = {"kernel, codes to codes": 0, "kernel, codes to sums": 1} if layer else {}
    rates: dict[str, list[float]] = {name: [] for name in (*alone, "engine, block", "engine, layer")}
    peaks: list[float] = []
    engine.upscale(image)
    for _ in range(repeats):
        engine.upscale(image)
        stages = engine.profile()
        blocks = sum(t for name, t in stages if name.startswith("block"))
        single = sum(t for name, t in stages if name == f"layer 3x3 {CHANNELS}->{CHANNELS}")
        rates["engine, block"].append(2 * BLOCKS * MACS / blocks)
        rates["engine, layer"].append(MACS / single)
        if peak is not None:
            peaks.append(peak())
        if layer is not None:
            for name, adds in alone.items():
                rates[name].append(layer(adds))
    result: dict[str, Any] = {"isa": isa, "peak_gmacs": max(peaks) / 1e9 if peaks else None, "kernels": {}}
    for name, found in rates.items():
        entry = {"best_gmacs": max(found) / 1e9, "median_gmacs": statistics.median(found) / 1e9}
        if peaks:
            entry["of_4_peaks"] = max(found) / (4 * max(peaks))
            entry["median_of_4_peaks"] = statistics.median(found) / (4 * statistics.median(peaks))
        result["kernels"][name] = entry
    return result


def scaling(plan: Plan, isa: str, sizes: list[str], runs: int) -> list[dict[str, Any]]:
    """Median milliseconds by size and threads, all in turns."""
    cases = [(size, threads) for size in sizes for threads in THREADS]
    engines = {threads: Engine(plan, threads, isa) for threads in THREADS}
    times: dict[Any, list[float]] = {case: [] for case in cases}
    for i in range(runs + 1):
        for size, threads in cases:
            width, height = map(int, size.split("x"))
            image = random_picture(height, width)
            start = time.perf_counter()
            engines[threads].upscale(image)
            if i:
                times[size, threads].append((time.perf_counter() - start) * 1e3)
    rows = []
    for (size, threads), found in times.items():
        width, height = map(int, size.split("x"))
        megapixels = width * height * plan.scale**2 / 1e6
        one = statistics.median(times[size, 1])
        median = statistics.median(found)
        rows.append(
            {
                "lr": size,
                "threads": threads,
                "min_ms": min(found),
                "median_ms": median,
                "ms_per_output_megapixel": median / megapixels,
                "speedup": one / median,
            }
        )
    return rows


def memory(plan_file: str | None, isa: str, sizes: list[str]) -> list[dict[str, Any]]:
    """Peak resident memory of fresh processes, with and without the work."""
    rows = []
    for size in ("8x8", *sizes):
        command = [sys.executable, __file__, "--memory-of", size, "--isa", isa]
        command += ["--plan", plan_file] if plan_file else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        rows.append({"lr": size, **found})
    return rows


def memory_of(plan: Plan, isa: str, size: str) -> None:
    width, height = map(int, size.split("x"))
    engine, image = Engine(plan, 2, isa), random_picture(height, width)
    before = peak_mb()
    out = engine.upscale(image).image
    print(json.dumps({"peak_mb": peak_mb(), "before_mb": before, "output_mb": out.nbytes / 2**20}))


def stages(plan: Plan, isa: str, runs: int) -> dict[str, float]:
    """Milliseconds of every stage of the fastest of some runs at 480x270, equal stages added up."""
    engine, image = Engine(plan, 2, isa), random_picture(270, 480)
    best: list[tuple[str, float]] = []
    for _ in range(runs + 1):
        engine.upscale(image)
        found = engine.profile()
        if not best or sum(t for _, t in found) < sum(t for _, t in best):
            best = found
    merged: dict[str, float] = {}
    for name, seconds in best:
        merged[name] = merged.get(name, 0.0) + seconds * 1e3
    return merged


def report(record: dict[str, Any]) -> None:
    isa = record["isa"]
    found = record["kernels"]
    peak = found["peak_gmacs"]
    print(f"\n{isa}, one core, 3x3 {CHANNELS}->{CHANNELS}, {TILE}x{TILE}: peak of the multiply-add ", end="")
    bar = f"; bar of the kernel {BARS[isa]:.0%} of 4 peaks" if isa in BARS else ""
    print("not measured" if peak is None else f"{peak:.1f} GMAC/s{bar}")
    for name, entry in found["kernels"].items():
        share = f", {entry['of_4_peaks']:.1%} of 4 peaks" if peak is not None else ""
        print(
            f"  {name:<24} best {entry['best_gmacs']:.1f}, median {entry['median_gmacs']:.1f} GMAC/s{share}"
        )
    for row in record["scaling"]:
        print(
            f"  {row['lr']:>9}, {row['threads']} threads: median {row['median_ms']:8.1f} ms, "
            f"{row['ms_per_output_megapixel']:6.1f} ms per output megapixel, speed-up {row['speedup']:.2f}"
        )
    for row in record["memory"]:
        print(
            f"  {row['lr']:>9}: peak {row['peak_mb']:6.1f} MB, of them {row['before_mb']:.1f} before the run, "
            f"{row['output_mb']:.1f} output (bar at 960x540: {MEMORY_BAR_MB})"
        )
    print("  " + "; ".join(f"{name} {ms:.1f} ms" for name, ms in record["stages_ms"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", nargs="+", default=available_isas()[:1])
    parser.add_argument("--plan", help="plan file instead of random weights")
    parser.add_argument("--shape", choices=SHAPES, default="relu3")
    parser.add_argument("--repeats", type=int, default=200, help="of the kernels alone")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="of the LR pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = load_plan(args.plan).plan if args.plan else random_plan(SHAPES[args.shape])
    if args.memory_of:
        return memory_of(plan, args.isa[0], args.memory_of)
    print(cpu())
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cxx = compiler()
        library = build(cxx, Path(folder) / "peak.so", "-O2", HERE / "peak.cpp") if cxx else None
        for isa in args.isa:
            record = {
                "cpu": cpu(),
                "commit": commit(),
                "isa": isa,
                "plan": args.plan or args.shape,
                "kernels": kernel_rates(
                    isa, args.repeats, peak_run(library, isa), layer_run(cxx, isa, Path(folder))
                ),
                "scaling": scaling(plan, isa, args.sizes, args.runs),
                "memory": memory(args.plan, isa, args.sizes),
                "stages_ms": stages(plan, isa, args.runs),
            }
            report(record)
            write_atomic(args.out / f"kernels-{isa}.json", (json.dumps(record, indent=1) + "\n").encode())
    return None


if __name__ == "__main__":
    main()
