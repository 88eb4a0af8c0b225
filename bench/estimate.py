"""The estimate of `cadyq upscale --dry-run` against the truth, on pictures of different sizes.

    python bench/estimate.py            # 20 pictures; the bars are 30 % of the time and 15 % of the memory
    python bench/estimate.py --sizes 300x200 900x600 --suffix .jpg

Estimate and work run in processes of their own, one after the other: the first says what the second will take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [
    *(
        "64x64",
        "120x90",
        "200x150",
        "256x256",
        "320x240",
        "400x300",
        "480x270",
        "512x512",
        "640x360",
        "640x640",
    ),
    *("800x600", "960x540", "1024x768", "1280x720", "1200x1200", "1600x900", "1600x1200", "1920x1080"),
    *("2048x1536", "2560x1440"),
]
WORK = """
import json, resource, sys, time
from pathlib import Path
from cadyq.estimate import estimate, measure_rates
from cadyq.pictures import Wanted, prepare
kind, source, target, threads = sys.argv[1:]
task = prepare(Path(source), Path(target), Wanted(threads=int(threads) or None))
if kind == "estimate":
    start = time.perf_counter()
    found = estimate(task, measure_rates(task))
    print(json.dumps([found.seconds, found.memory_bytes / 2**20, time.perf_counter() - start]))
else:
    start = time.perf_counter()
    task.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([time.perf_counter() - start, peak]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="of the inputs, in pixels")
    parser.add_argument("--suffix", default=".png", help="of the results")
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    options = parser.parse_args()
    print(
        f"{'LR':>10} {'estimated s':>11} {'s':>7} {'':>6} {'estimated MB':>12} {'MB':>6} {'':>6} {'asking s':>8}"
    )
    time_ok = memory_ok = 0
    with tempfile.TemporaryDirectory() as room:
        for i, size in enumerate(options.sizes):
            width, height = map(int, size.split("x"))
            source, target = Path(room) / "in.png", Path(room) / f"out{options.suffix}"
            draw(source, height, width, seed=i)
            arguments = [str(source), str(target), str(options.threads)]
            guess = ask("estimate", arguments)
            truth = ask("run", arguments)
            errors = [guess[k] / truth[k] - 1 for k in (0, 1)]
            time_ok += abs(errors[0]) <= 0.30
            memory_ok += abs(errors[1]) <= 0.15
            print(
                f"{size:>10} {guess[0]:11.2f} {truth[0]:7.2f} {errors[0]:+6.0%} {guess[1]:12.0f} {truth[1]:6.0f} "
                f"{errors[1]:+6.0%} {guess[2]:8.2f}",
                flush=True,
            )
    n = len(options.sizes)
    print(f"time within 30 %: {time_ok} of {n}; memory within 15 %: {memory_ok} of {n}")
    return 0 if time_ok == memory_ok == n else 1


def draw(path: Path, height: int, width: int, seed: int) -> None:
    """A picture with smooth and busy parts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = 120 + 80 * np.sin(x / 41) * np.cos(y / 53)
    busy = rng.normal(0, 25, (height, width, 3)) * (np.sin(x / 150 + y / 90) > 0)[..., None]
    Image.fromarray((smooth[..., None] + busy).clip(0, 255).astype(np.uint8)).save(path)


def ask(kind: str, arguments: list[str]) -> list[float]:
    command = [sys.executable, "-c", WORK, kind, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    return list(json.loads(done.stdout))


if __name__ == "__main__":
    sys.exit(main())
