"""How long a picture will take and how much memory it will need, before the work begins.

A small part of the picture itself is upscaled and encoded on this machine; the rest is proportional to pixels.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadyq.bands import cut_into_blocks
from cadyq.io.images import Picture, save_picture
from cadyq.io.stream import FileRows, write_rows
from cadyq.pictures import PictureTask, model
from cadyq.upscale import Model

__all__ = ["Estimate", "Rates", "estimate", "measure_rates"]

_SMALL, _LARGE = 96, 255
_REPEATS = 3
# The part is taken from this many places down and across: noise takes far longer to compress than sky.
_PLACES = 3
_READ_AT_ONCE = 256
_MIB = 1 << 20
# Peak resident set, fitted to measurements (bench/estimate.py prints both). The interpreter with its libraries:
_BASE_BYTES = {"engine": 62 * _MIB, "torch": 300 * _MIB}
# What a runtime holds per LR pixel of the block that it computes (SRResNet's shape), its result included:
_BLOCK_BYTES = {"engine": 560, "torch": 4200}
# What Pillow holds per pixel while it writes, besides the array; libvips' buffers while it reads and writes rows:
_ENCODER_BYTES, _STREAM_BYTES = 4, 40 * _MIB


@dataclass(frozen=True)
class Rates:
    """What this machine takes for pictures of one kind.

    Attributes:
        start: seconds before the first picture, for packing the network.
        block: seconds per block, besides its pixels.
        pixel: seconds per LR pixel of a block, halo included.
        decode: seconds per LR pixel of the file.
        encode: seconds per pixel of the result's file.
    """

    start: float
    block: float
    pixel: float
    decode: float
    encode: float


@dataclass(frozen=True)
class Estimate:
    """What a picture will take: seconds from opening the source to the finished file, peak memory in bytes."""

    seconds: float
    memory_bytes: int


def measure_rates(task: PictureTask) -> Rates:
    """Upscale and encode parts of the picture; takes about a second.

    Raises as reading the picture does: it is decoded, all of it.
    """
    picture, decode = _decode(task)
    found = model(task.model_name)
    small, large = (_sample(picture, side) for side in (_SMALL, _LARGE))
    start = time.perf_counter()
    _upscale(found, task, small)  # packs the network
    start = time.perf_counter() - start
    result = _upscale(found, task, large)
    times = [_best(lambda part=part: _upscale(found, task, part)) for part in (small, large)]  # type: ignore[misc]
    areas = [part.pixels.shape[0] * part.pixels.shape[1] for part in (small, large)]
    slope = (times[1] - times[0]) / (areas[1] - areas[0]) if areas[1] > areas[0] else times[1] / areas[1]
    # A loaded machine can make the smaller piece take longer; time per pixel is then all there is.
    pixel = slope if slope > 0 else times[1] / areas[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece"
        quality = task.wanted.quality
        if task.is_streamed:
            pixels = result.pixels
            encode = _best(
                lambda: write_rows(path, task.format, pixels.shape, pixels.dtype, [pixels], quality=quality)
            )
        else:
            encode = _best(lambda: save_picture(path, task.target.suffix, result, quality))
    n_result = result.pixels.shape[0] * result.pixels.shape[1]
    block = max(0.0, times[1] - pixel * areas[1])
    return Rates(max(0.0, start - times[0]), block, pixel, decode, encode / n_result)


def estimate(task: PictureTask, rates: Rates, is_first: bool = True) -> Estimate:
    """Scale measured rates to a picture, the same or another one of its kind; the first one of a job takes longer."""
    found, header = model(task.model_name), task.header
    height, width = header.height, header.width
    tile = task.wanted.tile or found.tile
    down, across = cut_into_blocks(height, width, tile, found.radius)
    read = sum(d.read[1] - d.read[0] for d in down) * sum(a.read[1] - a.read[0] for a in across)
    network = rates.block * len(down) * len(across) + rates.pixel * read
    files = rates.decode * height * width + rates.encode * task.size[0] * task.size[1]
    seconds = network + files
    if task.is_streamed:
        # libvips compresses one band while the next is computed; cores are all that they share.
        cores = os.cpu_count() or 1
        threads = min(task.wanted.threads or cores, cores)
        seconds = max(network, files, (threads * network + files) / cores)
    return Estimate(seconds + (rates.start if is_first else 0.0), _memory(task, found))


def _memory(task: PictureTask, found: Model) -> int:
    header, wanted = task.header, task.wanted
    tile = wanted.tile or found.tile
    runtime = found.runtime(wanted.mode, tile)
    down, across = cut_into_blocks(header.height, header.width, tile, found.radius)
    rows = max(d.read[1] - d.read[0] for d in down)
    block = rows * max(a.read[1] - a.read[0] for a in across)
    channels = (1 if header.is_gray else 3) + header.has_alpha
    n_bytes = 2 if header.is_deep and wanted.depth == 16 else 1
    pixels, larger = header.height * header.width, found.scale**2
    work = _BLOCK_BYTES[runtime] * block
    band = max(d.keep[1] - d.keep[0] for d in down) * header.width * larger * 3 * n_bytes
    if task.is_streamed:
        window = (rows + tile) * header.width * channels * n_bytes
        return _BASE_BYTES[runtime] + _STREAM_BYTES + work + band + 2 * window
    result = pixels * larger * 3 * n_bytes
    work += band if len(across) > 1 else 0  # a block that is as wide as the picture is its band
    # The network's planes are gone when the file is written.
    writing = task.size[0] * task.size[1] * _ENCODER_BYTES * n_bytes
    return _BASE_BYTES[runtime] + pixels * 3 * n_bytes + result + max(work, writing)


def _decode(task: PictureTask) -> tuple[Picture, float]:
    """The picture, or as many rows of it as are needed, and seconds per pixel for reading it."""
    start = time.perf_counter()
    if task.is_streamed:
        picture, n_pixels = _sampled_rows(FileRows(task.source, task.wanted.depth))
    else:
        picture = task.read()
        n_pixels = picture.pixels.shape[0] * picture.pixels.shape[1]
    return picture, (time.perf_counter() - start) / n_pixels


def _sampled_rows(rows: FileRows) -> tuple[Picture, int]:
    height, width = rows.shape
    kept = _spread(height, _LARGE)
    color, alpha = [], []
    for top in range(0, height, _READ_AT_ONCE):
        bottom = min(height, top + _READ_AT_ONCE)
        inside = kept[(kept >= top) & (kept < bottom)] - top
        color.append(rows.read(top, bottom)[inside])
        if rows.has_alpha:
            alpha.append(rows.alpha(top, bottom)[inside])
        rows.forget(bottom)
    opacity = np.concatenate(alpha) if alpha else None
    return Picture(np.concatenate(color), opacity, rows.is_gray), height * width


def _sample(picture: Picture, side: int) -> Picture:
    """Parts of a picture put together, at most ``side`` pixels a side."""
    index = np.ix_(*(_spread(n, side) for n in picture.pixels.shape[:2]))
    alpha = None if picture.alpha is None else picture.alpha[index]
    return Picture(picture.pixels[index], alpha, picture.is_gray, picture.icc)


def _spread(length: int, n: int) -> NDArray[np.intp]:
    """Positions of about ``n`` rows or columns in `_PLACES` even places; all of them if there are no more."""
    if length <= n:
        return np.arange(length)
    each = n // _PLACES
    return np.concatenate([np.arange(each) + k * (length - each) // (_PLACES - 1) for k in range(_PLACES)])


def _upscale(found: Model, task: PictureTask, part: Picture) -> Picture:
    w = task.wanted
    return found.upscale(part, mode=w.mode, tile=w.tile, budget=w.budget, threads=w.threads).picture()


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
