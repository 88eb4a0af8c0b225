"""How does the service hold under load? Clients send pictures for a while, waiting when they are told to.

    python bench/service.py --clients 32 --seconds 60 [--out results.json]

Prints one JSON object. Bars: no error but 429/503 with Retry-After; throughput at least 80 % of the command
line's over the same pictures; memory flat (growth of the second half); all results equal to the command line's.
The command line's throughput is that of one process over a folder, start included, on the idle machine before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path(__file__).parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}
SIZES = ((120, 160), (180, 240), (160, 200), (200, 300))


def pictures(folder: Path, n: int) -> list[Path]:
    """Draw pictures with smooth and busy parts, of some sizes, each different."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        height, width = SIZES[i % len(SIZES)]
        y, x = np.mgrid[0:height, 0:width]
        light = (
            120
            + 70 * np.sin(x / (7 + i)) * np.cos(y / 19)
            + rng.normal(0, 25, (height, width)) * (x > width / 2)
        )
        color = np.stack([light, light * 0.9 + 10, 255 - light], axis=2).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{i:02}.png")
        Image.fromarray(color).save(paths[-1])
    return paths


def by_command_line(sources: list[Path], output: Path) -> tuple[dict[str, bytes], float]:
    """Upscale with one process; return results by name, and pictures per second."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "cadyq", "upscale", *map(str, sources), "-o", str(output)]
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return {path.name: (output / path.name).read_bytes() for path in sources}, len(sources) / seconds


@contextlib.contextmanager
def service() -> Iterator[tuple[str, int]]:
    """Start the service; yield its address and process id."""
    command = [sys.executable, "-m", "cadyq", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1], process.pid
    finally:
        process.terminate()
        process.wait()


def memory_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Load:
    """Clients that send until the time is over, and what they met."""

    def __init__(self, address: str, sources: list[Path], expected: dict[str, bytes], seconds: float) -> None:
        self.address, self.expected = address, expected
        self.bodies = [(path.name, path.read_bytes()) for path in sources]
        self.end = time.monotonic() + seconds
        self.met: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        turn = number
        while time.monotonic() < self.end:
            name, body = self.bodies[turn % len(self.bodies)]
            start = time.monotonic()
            what, wait = self.send(name, body)
            with self._lock:
                self.met[what] += 1
                if what == "equal":
                    self.latencies.append(time.monotonic() - start)
                    turn += 1
            time.sleep(min(wait, max(0.0, self.end - time.monotonic())))

    def send(self, name: str, body: bytes) -> tuple[str, float]:
        request = urllib.request.Request(f"{self.address}v1/upscale", body, {"Content-Type": "image/png"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return ("equal" if answer.read() == self.expected[name] else "different"), 0.0
        except urllib.error.HTTPError as error:
            retry = error.headers.get("Retry-After")
            told = error.code in (429, 503) and retry is not None
            return (f"{error.code} with Retry-After" if told else f"error {error.code}"), float(retry or 1)
        except OSError as error:
            return f"error {type(error).__name__}", 1.0


def measure(clients: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = pictures(folder, 12)
        expected, cli_rate = by_command_line(sources, folder / "out")
        with service() as (address, pid):
            urllib.request.urlopen(f"{address}readyz", timeout=60).close()
            load = Load(address, sources, expected, seconds)
            threads = [threading.Thread(target=load.client, args=(i,)) for i in range(clients)]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            memory = []
            while time.monotonic() < load.end:
                time.sleep(0.5)
                memory.append(memory_mib(pid))
            for thread in threads:
                thread.join()
            rate = load.met["equal"] / (time.monotonic() - start)
    half = len(memory) // 2
    # The first seconds fill buffers; what counts is whether it goes on growing.
    growth = statistics.median(memory[-half // 2 :]) - statistics.median(memory[half // 2 : half])
    errors = sum(n for what, n in load.met.items() if what != "equal" and "Retry-After" not in what)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": dict(load.met),
        "n_errors": errors,
        "pictures_per_second": round(rate, 3),
        "cli_pictures_per_second": round(cli_rate, 3),
        "share_of_cli": round(rate / cli_rate, 3),
        "latency_median_s": round(statistics.median(load.latencies), 3) if load.latencies else None,
        "memory_mib": {"first": round(memory[0]), "peak": round(max(memory)), "growth": round(growth, 1)},
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "meets_bars": errors == 0 and rate >= 0.8 * cli_rate and growth < 0.05 * max(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", help="file for the result")
    options = parser.parse_args()
    text = json.dumps(measure(options.clients, options.seconds), indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
