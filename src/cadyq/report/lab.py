"""Measures subjects on data sets, once: results are kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cadyq
from cadyq.data.sets import DATA_SETS, find_pictures
from cadyq.errors import DataError
from cadyq.evaluate import Evaluation, Row, Summary, evaluate
from cadyq.io.files import write_atomic
from cadyq.report.networks import Network
from cadyq.report.variants import Subject
from cadyq.upscale import Mode, Progress

__all__ = ["QUICK", "Lab", "Request", "data_facts", "lr_sizes"]

QUICK = {"Urban100": 3, "Test2K": 1, "Large2K": 1, "Test4K": 0, "Large4K": 0}
"""Pictures of each set that ``--quick`` measures at x4; 0 leaves the set out. At smaller scales, where LR pictures
are large, only Urban100 is measured."""

_QUICK_OTHERS = 2
_SCORING = 1.2e-6  # seconds per output pixel
_CODE = (
    "functional",
    "quant",
    "backbones",
    "engine",
    "native",
    "lowering",
    "bands.py",
    "upscale.py",
    "evaluate.py",
)


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        subject: the network, or a variant of it.
        data: name of a data set, or a folder.
        mode: see `Model.upscale`, as ``tile`` and ``budget`` are.
    """

    subject: Subject
    data: str
    mode: Mode = "tiles"
    tile: int | None = None
    budget: float = 0.0


class Lab:
    """Measures, and remembers.

    Args:
        store: folder that keeps results; None remembers nothing beyond this object.
        root: folder of all data sets, see `data_root`.
        quick: measure few pictures of each set.
        threads: CPU threads.
        large: folder of large pictures that is measured where Test2K and Test4K are missing.

    Attributes:
        wanted: while `planning`, the requests that were made and not yet measured.
    """

    def __init__(
        self,
        store: Path | None,
        *,
        root: str | None = None,
        quick: bool = False,
        threads: int | None = None,
        large: str | None = None,
    ) -> None:
        self.store, self.root, self.quick, self.threads, self.large = store, root, quick, threads, large
        self.progress: Progress = lambda done, total: None
        self.wanted: list[Request] | None = None
        self._known: dict[str, Evaluation] = {}

    @contextmanager
    def planning(self) -> Iterator[list[Request]]:
        """Within the block nothing is measured; what would have been is listed."""
        self.wanted = []
        try:
            yield self.wanted
        finally:
            self.wanted = None

    @property
    def is_planning(self) -> bool:
        """Whether requests are only listed."""
        return self.wanted is not None

    def limit(self, data: str, scale: int = 4) -> int | None:
        """Pictures that are measured of a set; None is all."""
        if not self.quick:
            return None
        count = QUICK.get(data, _QUICK_OTHERS)
        return 0 if scale < 4 and QUICK.get(data) == 1 else count

    def has(self, data: str, scale: int = 4) -> bool:
        """Whether a data set is there, and is measured at all."""
        try:
            find_pictures(data, self.root)
        except DataError:
            return False
        return self.limit(data, scale) != 0

    def large_set(self, published: str) -> str:
        """The set itself where it is, else the user's folder, else our stand-in."""
        try:
            find_pictures(published, self.root)
        except DataError:
            return self.large or published.replace("Test", "Large")
        return published

    def evaluate(self, request: Request) -> Evaluation | None:
        """Measure, or find what was measured before; None while planning.

        Raises:
            CadyqError: as `evaluate` and `Subject.load` do.
        """
        key = self.key(request)
        found = self._known.get(key) or self._read(key)
        if found is None:
            if self.wanted is not None:
                if request not in self.wanted:
                    self.wanted.append(request)
                return None
            found = evaluate(
                request.subject.load(),
                request.data,
                mode=request.mode,
                tile=request.tile,
                budget=request.budget,
                threads=self.threads,
                limit=self._limit(request),
                root=self.root,
                progress=self.progress,
            )
            self._write(key, request, found)
        self._known[key] = found
        return found

    def key(self, request: Request) -> str:
        """Digest of the code, the files and the settings that a result depends on (not the threads)."""
        pictures = find_pictures(request.data, self.root)
        facts = {
            "code": _code_digest(),
            "subject": request.subject.digest(),
            "pictures": [(p.name, p.stat().st_size) for p in pictures[: self._limit(request)]],
            "of": len(pictures),
            "setting": [request.data, request.mode, request.tile, request.budget],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]

    def pixels(self, request: Request) -> int:
        """LR pixels that a request covers."""
        sizes = lr_sizes(request.data, request.subject.network.scale, self.root, self._limit(request))
        return sum(height * width for height, width in sizes)

    def seconds_per_pixel(self, network: Network, mode: Mode = "tiles") -> float:
        """Rough time per LR pixel, from one small picture."""
        model = Subject(network).load()
        side = 128 if model.runtime(mode, model.tile) == "engine" else 64
        picture = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
        model.upscale(picture, mode=mode, threads=self.threads)
        start = time.perf_counter()
        model.upscale(picture, mode=mode, threads=self.threads)
        # PSNR and SSIM of the output come on top.
        return (time.perf_counter() - start) / side**2 + _SCORING * network.scale**2

    def _limit(self, request: Request) -> int | None:
        return self.limit(request.data, request.subject.network.scale)

    def _read(self, key: str) -> Evaluation | None:
        if self.store is None or not (self.store / f"{key}.json").is_file():
            return None
        record = json.loads((self.store / f"{key}.json").read_text())
        rows = tuple(Row(**_numbers(row)) for row in record["rows"])
        return Evaluation(rows, Summary(**_numbers(record["summary"])))

    def _write(self, key: str, request: Request, found: Evaluation) -> None:
        if self.store is None:
            return
        self.store.mkdir(parents=True, exist_ok=True)
        record = {"subject": request.subject.label, **found.to_mapping()}
        write_atomic(self.store / f"{key}.json", (json.dumps(record) + "\n").encode())


def lr_sizes(
    data: str, scale: int, root: str | os.PathLike[str] | None, limit: int | None
) -> list[tuple[int, int]]:
    """Height and width of every LR picture of a set, from the files' headers."""
    result = []
    for path in find_pictures(data, root)[:limit]:
        with Image.open(path) as picture:
            result.append((picture.height // scale, picture.width // scale))
    return result


def data_facts(lab: Lab, data: str) -> dict[str, Any]:
    """What a table says about a data set: its name as what it is, and how many pictures were measured."""
    known = DATA_SETS.get(data)
    n_all = len(find_pictures(data, lab.root))
    limit = lab.limit(data)
    n = n_all if limit is None else min(limit, n_all)
    name = data if known is not None else f"folder {Path(data).name}"
    return {"dataset": name, "n_images": n, "whole": n == n_all and (known is None or known.is_benchmark)}


@cache
def _code_digest() -> str:
    home = Path(cadyq.__file__).parent
    total = hashlib.sha256(cadyq.__version__.encode())
    for name in _CODE:
        path = home / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.suffix in (".py", ".so", ".pyd"):
                total.update(file.read_bytes())
    return total.hexdigest()


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in record.items()}
