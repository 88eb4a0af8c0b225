"""A whole video: segment by segment, so that whatever ends it, a second run goes on where the first one was."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq import __version__
from cadyq.engine.reuse import ReusingRuntime
from cadyq.errors import ArgumentError, ImageError
from cadyq.io.files import write_atomic
from cadyq.io.shipped import model_path, plan_path
from cadyq.upscale import Model, Progress
from cadyq.video.segment import CODECS, CONTAINERS, join, segment_writer
from cadyq.video.source import Source, frames, probe

__all__ = ["FrameUpscaler", "Options", "Report", "upscale_video"]


@dataclass(frozen=True)
class Options:
    """How a video is made.

    Attributes:
        budget, tile, threads: as of `Model.upscale`.
        codec: one of `CODECS`.
        crf: quality of h264 and h265, 0 to 51; lower is better and larger.
        segment: frames after which what is done is safe from a crash.
    """

    budget: float = 0.0
    tile: int | None = None
    threads: int | None = None
    codec: str = "h264"
    crf: int = 17
    segment: int = 60


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        n_frames: frames of the video.
        n_resumed: how many of them an earlier run had made.
        width, height: of the output, in pixels.
        computed: share of tiles that were computed in this run; the others had not changed.
        seconds: wall time of this run.
        notes: what was reduced or ignored.
    """

    n_frames: int
    n_resumed: int
    width: int
    height: int
    computed: float
    seconds: float
    notes: tuple[str, ...]


class FrameUpscaler:
    """Upscales frames one after another; what has not changed is not computed again, and nothing differs by it.

    A model without a plan of the engine computes every frame that is not the last one again.
    """

    def __init__(self, model: Model, options: Options) -> None:
        self._model, self._options = copy.copy(model), options
        self._reusing: ReusingRuntime | None = None
        if model.plan is not None:
            self._reusing = ReusingRuntime(model.plan.plan, model.radius)
            self._model.engine = self._reusing
        self._frame: NDArray[np.uint8] | None = None
        self._result: NDArray[np.uint8] | None = None

    def upscale(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8 ``(scale H, scale W, 3)`` for uint8 ``(H, W, 3)``: what `Model.upscale` returns."""
        if self._result is not None and self._frame is not None and np.array_equal(frame, self._frame):
            if self._reusing is not None:
                self._reusing.repeat()
            return self._result
        if self._reusing is not None:
            self._reusing.begin()
        o = self._options
        result = self._model.upscale(frame, tile=o.tile, budget=o.budget, threads=o.threads)
        self._frame, self._result = frame, result.pixels
        return result.pixels

    @property
    def computed(self) -> float:
        """Share of tiles that were computed so far, halos included."""
        if self._reusing is None or not self._reusing.n_tiles:
            return 1.0
        return self._reusing.n_computed / self._reusing.n_tiles


def upscale_video(
    model: Model, source: Path, output: Path, options: Options | None = None, progress: Progress | None = None
) -> Report:
    """Upscale a video; sound, subtitles and the times of frames stay.

    Finished segments lie in a folder beside the output until it is complete. A second call with the same
    arguments goes on from there, and the output is byte for byte what an undisturbed call makes.

    Args:
        model: a loaded model.
        source: a video that ffmpeg can read.
        output: ``.mp4``, ``.m4v``, ``.mov`` or ``.mkv``.
        options: how it is made.
        progress: called after each frame with (done, total).

    Raises:
        ArgumentError: an option or the output's suffix is not acceptable.
        ImageError: the source is no video or damaged, or the output cannot be written.
        MissingExtraError: ffmpeg is not installed.
    """
    options = options or Options()
    _check(source, output, options)
    start = time.perf_counter()
    video = probe(source)
    parts = output.parent / f".{output.name}.parts"
    bounds = list(_bounds(len(video.times), options.segment))
    paths = [parts / f"{i:05}.nut" for i in range(len(bounds))]
    _prepare(parts, _fingerprint(model, video, options))
    n_resumed = sum(last - first for (first, last), path in zip(bounds, paths, strict=True) if path.exists())
    upscaler = FrameUpscaler(model, options)
    tell = progress or (lambda done, total: None)
    if n_resumed < len(video.times):
        with frames(video) as stream:
            for (first, last), path in zip(bounds, paths, strict=True):
                _segment(video, model.scale, options, upscaler, stream, first, last, path)
                tell(last, len(video.times))
    join(paths, [video.times[first] - video.times[0] for first, _ in bounds], video, output)
    shutil.rmtree(parts, ignore_errors=True)
    return Report(
        n_frames=len(video.times),
        n_resumed=n_resumed,
        width=video.width * model.scale,
        height=video.height * model.scale,
        computed=upscaler.computed,
        seconds=time.perf_counter() - start,
        notes=video.notes,
    )


def _segment(
    video: Source,
    scale: int,
    options: Options,
    upscaler: FrameUpscaler,
    stream: Iterator[NDArray[np.uint8]],
    first: int,
    last: int,
    path: Path,
) -> None:
    """Make one segment from the stream's next frames, or pass over them if it is there."""
    if path.exists():
        for _ in range(first, last):
            next(stream)
        return
    with segment_writer(path, video, scale, options.codec, options.crf) as writer:
        for number in range(first, last):
            writer.write(upscaler.upscale(next(stream)), video.times[number] - video.times[first])


def _check(source: Path, output: Path, options: Options) -> None:
    suffix = output.suffix.lower()
    if suffix not in CONTAINERS:
        raise ArgumentError("output", str(output), f"a suffix out of {', '.join(CONTAINERS)}")
    if not output.parent.is_dir():
        raise ArgumentError("output", str(output), "an existing folder to write to", "create it first")
    if output.exists() and source.exists() and output.samefile(source):
        raise ArgumentError("output", str(output), "not the input", "choose another output")
    if options.codec not in CODECS:
        raise ArgumentError("codec", options.codec, f"one of {', '.join(CODECS)}")
    if options.codec == "ffv1" and suffix != ".mkv":
        raise ArgumentError("output", str(output), "an .mkv file, for the codec ffv1")
    if not 0 <= options.crf <= 51:
        raise ArgumentError("crf", options.crf, "0 to 51")
    if options.segment < 1:
        raise ArgumentError("segment", options.segment, "at least 1 frame")


def _bounds(n_frames: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, n_frames, length):
        yield first, min(first + length, n_frames)


def _fingerprint(model: Model, video: Source, options: Options) -> dict[str, Any]:
    """Everything on which the segments depend; threads do not matter."""
    stat = video.path.stat()
    file = plan_path(model.name) or model_path(model.name)
    return {
        "version": __version__,
        "source": [str(video.path.resolve()), stat.st_size, stat.st_mtime_ns],
        "model": [model.name, hashlib.sha256(file.read_bytes()).hexdigest()],
        "options": {key: value for key, value in asdict(options).items() if key != "threads"},
    }


def _prepare(parts: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder of segments; what was made of something else is thrown away."""
    record = parts / "job.json"
    text = json.dumps(fingerprint, sort_keys=True)
    try:
        if parts.is_dir() and (not record.is_file() or record.read_text() != text):
            shutil.rmtree(parts)
        parts.mkdir(exist_ok=True)
        write_atomic(record, text.encode())
    except OSError as error:
        raise ImageError(f"{parts} cannot be written: {error.strerror or error}") from error
