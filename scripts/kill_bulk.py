"""Kill workers and drivers of a bulk job at random moments: no picture may be lost, partial or different.

    python scripts/kill_bulk.py             # 20 kills, a few minutes
    python scripts/kill_bulk.py --url       # the same through fsspec, as for a store that is no local folder
    python scripts/kill_bulk.py --kills 3 --pictures 20

A Ray cluster of two machines (both of them this one) is started for this alone. The job is the real command in a
process of its own; whom SIGKILL hits, one of its workers or (every fourth time) the command itself, and when, is
random. After every kill, all files under their final names must equal those of `cadyq upscale`, byte for byte, and
none may be missing that was there before. A job that was killed itself is started again; when one gets through, it
must have made every picture, its folder is emptied and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

_WORKER = "MapWorker"  # what Ray calls its processes that run `RayWorker`


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", action="store_true", help="read and write through fsspec")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, cluster(Path(name) / "ray") as (address, environment):
        torture = Torture(Path(name), address, environment, options.pictures, rng, options.url)
        try:
            found = torture.run(options.kills)
        finally:
            torture.stop()
    print(json.dumps(found))
    return int(any(found[what] for what in ("lost", "partial", "different", "failed", "leftovers")))


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the address of a Ray cluster of two nodes with one CPU each, and the environment to use it in."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",  # nobody else on this machine may use it
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    ray += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={folder}"]
    nodes = []
    try:
        for own in (head, [f"--address={address}"]):
            nodes.append(
                subprocess.Popen(
                    [*ray, *own], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
            wait_for(nodes[-1], b"Ray runtime started")
        yield address, environment
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in reversed(nodes):
            node.communicate(timeout=60)


def wait_for(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if word in line:
            return
    raise SystemExit(b"".join(seen).decode())


class Torture:
    """A folder of pictures, what they should become, and the job that is killed over them."""

    def __init__(
        self,
        room: Path,
        address: str,
        environment: dict[str, str],
        n_pictures: int,
        rng: random.Random,
        through_url: bool,
    ) -> None:
        self._source, self._reference, self._output = room / "in", room / "reference", room / "out"
        self._address, self._environment, self._rng, self._url = address, environment, rng, through_url
        self._job: subprocess.Popen[str] | None = None
        draw_pictures(self._source, n_pictures, rng)
        subprocess.run(
            [sys.executable, "-m", "cadyq", "upscale", self._source, "-o", self._reference, "-r", "--json"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        self._expected = contents(self._reference)
        self._before: set[str] = set()
        self._found = {"kills": 0, "workers": 0, "drivers": 0, "jobs_through": 0}
        self._found |= {"lost": 0, "partial": 0, "different": 0, "failed": 0, "leftovers": 0}

    def run(self, kills: int) -> dict[str, int]:
        self._start()
        while self._found["kills"] < kills:
            time.sleep(self._rng.uniform(0.2, 3))
            self._kill()
            self._check()
            assert self._job is not None
            code = self._job.poll()
            if code is not None:
                self._ended(code)
                self._start()
        assert self._job is not None
        while self._ended(self._job.wait()):
            self._start()
        return self._found

    def stop(self) -> None:
        if self._job is not None and self._job.poll() is None:
            self._job.kill()

    def _start(self) -> None:
        source, output = str(self._source), str(self._output)
        if self._url:
            # A file system in another: all but the last step is what a remote one takes.
            room = f"::file://{self._source.parent}"
            source, output = f"dir://{self._source.name}{room}", f"dir://{self._output.name}{room}"
        self._job = subprocess.Popen(
            [
                *(sys.executable, "-m", "cadyq", "bulk", source, output, "-r", "--json"),
                *("--ray", self._address, "--workers", "2", "--retries", "20"),
            ],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _kill(self) -> None:
        assert self._job is not None
        workers = [pid for pid in descendants(os.getpid()) if _WORKER in command_line(pid)]
        if not workers or self._job.poll() is not None:
            return
        is_driver = self._rng.random() < 0.25
        try:
            os.kill(self._job.pid if is_driver else self._rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return
        self._found["kills"] += 1
        self._found["drivers" if is_driver else "workers"] += 1
        if is_driver:
            self._job.wait()
        print(f"kill {self._found['kills']}: a {'driver' if is_driver else 'worker'}", file=sys.stderr)

    def _check(self) -> None:
        found = contents(self._output)
        for name, content in found.items():
            expected = self._expected.get(name, b"")
            if content != expected:
                self._found["partial" if expected.startswith(content) else "different"] += 1
        self._found["lost"] += len(self._before - set(found))
        self._before = set(found)

    def _ended(self, code: int) -> bool:
        """Look at what a job has left behind; tell whether it was killed."""
        assert self._job is not None
        _, errors = self._job.communicate()
        self._check()
        if code == -signal.SIGKILL:
            return True
        if code:
            print(errors, file=sys.stderr)
            self._found["failed"] += 1
        self._found["lost"] += len(set(self._expected) - self._before)
        # What killed workers left behind goes with the next run.
        self._start()
        self._job.communicate()
        self._found["leftovers"] += sum(1 for path in self._output.rglob("*.tmp"))
        self._found["jobs_through"] += 1
        print(f"a job got through, {len(self._before)} pictures", file=sys.stderr)
        shutil.rmtree(self._output)
        self._before = set()
        return False


def draw_pictures(folder: Path, number: int, rng: random.Random) -> None:
    noise = np.random.default_rng(rng.randrange(1 << 30))
    for i in range(number):
        path = folder / f"deep{i % 3}" / f"picture{i}.{('png', 'jpg', 'webp', 'tif')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (int(n) for n in noise.integers(60, 180, 2))
        Image.fromarray(noise.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Files under their final names: hidden ones are records and temporary files."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts) and path.is_file():
            found[name.as_posix()] = path.read_bytes()
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs: nobody else's are killed."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        new = children.get(left.pop(), [])
        found += new
        left += new
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
