"""Peak memory and time of streamed pictures by size: the bar is 1 gigapixel out in less than 1 GB.

    python bench/huge.py                              # 1024 to 8192 LR pixels a side: up to 32768x32768, hours
    python bench/huge.py --sizes 2048x2048 8192x512   # memory depends on the width alone

Every size is one run of the command line in a process of its own; the peak is that process's largest resident set,
the pages of libraries included. Time is linear in pixels if the last column stays the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cadyq.cells import Levels
from cadyq.io.stream import write_rows

SIZES = ["1024x1024", "2048x2048", "4096x4096", "8192x8192"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="of the input, in pixels")
    parser.add_argument("--suffix", default=".tif", choices=(".tif", ".png", ".jpg"))
    parser.add_argument("--options", nargs="*", default=[], help="passed on to cadyq upscale, without dashes")
    parser.add_argument("--room", help="folder for the files (default: a temporary one)")
    options = parser.parse_args()
    print(f"{'LR':>12} {'output':>14} {'Mpixel':>8} {'s':>8} {'peak MB':>8} {'s/Mpixel':>9}")
    with tempfile.TemporaryDirectory(dir=options.room) as room:
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            source, target = Path(room) / "in.tif", Path(room) / f"out{options.suffix}"
            shape = (height, width, 3)
            write_rows(source, "TIFF", shape, np.dtype(np.uint8), scene(height, width))
            extra = [part for word in options.options for part in (f"--{word}").split("=")]
            seconds, peak = measure(source, target, extra)
            pixels = 16 * width * height / 1e6
            out = f"{4 * width}x{4 * height}"
            print(
                f"{size:>12} {out:>14} {pixels:8.1f} {seconds:8.1f} {peak:8.0f} {seconds / pixels:9.3f}",
                flush=True,
            )
            target.unlink()
    return 0


def scene(height: int, width: int) -> Iterator[Levels]:
    """Gradients, stripes and noise, 64 rows at a time."""
    rng, x = np.random.default_rng(0), np.arange(width)
    for top in range(0, height, 64):
        y = np.arange(top, min(top + 64, height))[:, None]
        planes = np.broadcast_arrays(
            128 + 100 * np.sin(x / 97), 255 * ((x // 5 + y // 7) % 2), y / height * 255
        )
        noise = rng.normal(0, 8, (len(y), width, 1))
        yield (np.stack(planes, axis=2) + noise).clip(0, 255).astype(np.uint8)


def measure(source: Path, target: Path, extra: list[str]) -> tuple[float, float]:
    """Seconds, and peak resident set in megabytes, of one run."""
    command = [sys.executable, "-m", "cadyq", "upscale", str(source), "-o", str(target), *extra]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
