"""Kill a folder job at random moments, again and again: no picture may be lost, partial or different.

    python scripts/kill_folder.py             # 200 kills, a few minutes
    python scripts/kill_folder.py --kills 5 --pictures 6

The job is the real command in a process of its own, killed with SIGKILL at a random moment after it has begun. After
every kill all files under their final names must equal those of an uninterrupted run, byte for byte. When a job
gets through, its folder is emptied and the next one begins.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cadyq.io.journal import JOURNAL_NAME

SUFFIXES = (".png", ".jpg", ".webp", ".tif")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        return torture(Path(name), options.kills, options.pictures, rng)


def torture(room: Path, kills: int, n_pictures: int, rng: random.Random) -> int:
    source, reference, output = room / "in", room / "reference", room / "out"
    draw_pictures(source, n_pictures, rng)
    seconds = finish(source, reference)
    expected = contents(reference)
    assert len(expected) == n_pictures, f"{len(expected)} of {n_pictures} pictures in an uninterrupted run"
    done = finished = 0
    kept: list[int] = []
    before: set[str] = set()
    while done < kills:
        process = start(source, output)
        time.sleep(rng.uniform(0, seconds))
        if process.poll() is None:
            process.kill()
            done += 1
        process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            print(f"kill {done}: a job failed by itself with code {process.returncode}")
            return 1
        found = contents(output)
        wrong = [name for name, content in found.items() if expected.get(name) != content]
        lost = sorted(before - set(found))
        if wrong or lost:
            print(f"kill {done}: partial or different: {wrong}; lost: {lost}")
            return 1
        kept.append(len(found))
        if process.returncode == 0:
            finished += 1
            shutil.rmtree(output)
        before = set(found) if process.returncode else set()
    finish(source, output)
    left = [path.name for path in output.rglob(".*") if path.name != JOURNAL_NAME]
    if contents(output) != expected or left:
        print(f"after the last run: files differ, or leftovers: {left}")
        return 1
    print(
        f"{done} kills, {finished} jobs got through between them; after a kill {min(kept)} to {max(kept)} of "
        f"{n_pictures} pictures were there; 0 lost, 0 partial, all byte-identical"
    )
    return 0


def draw_pictures(folder: Path, number: int, rng: random.Random) -> None:
    noise = np.random.default_rng(rng.randrange(1 << 30))
    for i in range(number):
        path = folder / f"deep{i % 3}" / f"picture{i}{SUFFIXES[i % len(SUFFIXES)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (int(n) for n in noise.integers(30, 90, 2))
        Image.fromarray(noise.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)


def command(source: Path, output: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "cadyq", "upscale", str(source), "-o", str(output)),
        *("--recursive", "--json", "--threads", "1"),
    ]


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    """Start the job, and wait until it has begun."""
    process = subprocess.Popen(command(source, output), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(source: Path, output: Path) -> float:
    """Let a job end; return its seconds from its beginning on."""
    process = start(source, output)
    begin = time.monotonic()
    process.communicate()
    if process.returncode:
        raise SystemExit(f"an undisturbed job failed with code {process.returncode}")
    return time.monotonic() - begin


def contents(folder: Path) -> dict[str, bytes]:
    """Files under their final names: hidden ones are the journal and temporary files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    sys.exit(main())
