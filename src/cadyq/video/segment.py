"""Writing: frames with exact times into segments, segments and the source's sound into a file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ArgumentError
from cadyq.io.files import replacing
from cadyq.video.ffmpeg import local_input, piped, run
from cadyq.video.source import Source, color_arguments

__all__ = ["CODECS", "CONTAINERS", "join", "segment_writer"]

# x264 and x265 give the same bytes for the same number of threads: a fixed one, whatever the machine.
_THREADS = "2"
CODECS = {
    "h264": ("libx264", "yuv420p"),
    "h265": ("libx265", "yuv420p"),
    "ffv1": ("ffv1", "bgr0"),
}
"""Codecs of the output, as ffmpeg calls their encoder and pixels; ffv1 is lossless."""

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Suffixes of outputs, and ffmpeg's names."""

_TEXT = ("subrip", "ass", "ssa", "webvtt", "mov_text", "text")
_MICROSECOND = 1_000_000


@contextmanager
def segment_writer(path: Path, source: Source, scale: int, codec: str, crf: int) -> Iterator[SegmentWriter]:
    """Encode frames into ``path`` (NUT, which keeps any time base); it appears when it is complete."""
    encoder, pixels = CODECS[codec]
    options, tags = color_arguments(source)
    if codec == "ffv1":
        filters, extra = f"format={pixels}", ["-level", "3", "-g", "1"]
        tags = []
    else:
        flags = "flags=bicubic+accurate_rnd+full_chroma_int"
        filters = f"{_even(source, scale)}scale={options}:{flags},format={pixels}"
        extra = ["-crf", str(crf), "-preset", "medium"]
        if codec == "h265":
            extra += ["-x265-params", "log-level=error:pools=2:frame-threads=1"]
    with replacing(path) as temporary:
        arguments = [
            # Times stand as they are given; the raw format tells its pixels by its tag.
            *("-copyts", "-f", "ivf", "-c:v", "rawvideo", "-i", "pipe:0"),
            *("-vf", f"{filters},setsar={source.aspect.replace(':', '/')}", "-c:v", encoder, *extra, *tags),
            *("-fps_mode", "passthrough", "-enc_time_base", "-1", "-threads", _THREADS),
            *("-fflags", "+bitexact", "-flags:v", "+bitexact", "-f", "nut", f"file:{temporary}"),
        ]
        with piped(arguments, f"{path} cannot be encoded with {encoder}", writes=True) as pipe:
            yield SegmentWriter(pipe, source, scale)


class SegmentWriter:
    """Hands frames to ffmpeg with their times, as raw video in IVF: the smallest format that has times."""

    def __init__(self, pipe: IO[bytes], source: Source, scale: int) -> None:
        width, height = source.width * scale, source.height * scale
        if max(width, height) > 0xFFFF:
            raise ArgumentError("scale", scale, "frames of at most 65535 pixels a side")
        base = source.time_base
        header = (b"DKIF", 0, 32, b"RGB\x18", width, height, base.denominator, base.numerator, 0, 0)
        pipe.write(struct.pack("<4sHH4sHHIIII", *header))
        self._pipe = pipe

    def write(self, frame: NDArray[np.uint8], time: int) -> None:
        self._pipe.write(struct.pack("<IQ", frame.nbytes, time))
        self._pipe.write(np.ascontiguousarray(frame).data)


def join(segments: Sequence[Path], starts: Sequence[int], source: Source, output: Path) -> None:
    """Put segments together, with the source's sound, subtitles, attachments, chapters and metadata.

    Args:
        segments: files of `segment_writer`.
        starts: time of the first frame of each, from the video's first frame on.
        source: where everything else comes from.
        output: the file to write; it appears when it is complete.
    """
    container = CONTAINERS[output.suffix.lower()]
    listing = segments[0].parent / "segments.txt"
    listing.write_text(_listing(segments, [_microseconds(start * source.time_base) for start in starts]))
    offset = _microseconds(source.times[0] * source.time_base)
    extra = ["-map", "1:t?"] if container == "matroska" else ["-movflags", "+faststart"]
    if container != "matroska":
        extra += ["-video_track_timescale", str(source.time_base.denominator)]
    with replacing(output) as temporary:
        arguments = [
            # Both inputs keep their times: by default each would be moved to begin at 0 by itself.
            *("-copyts", "-itsoffset", f"{offset}us"),
            *("-f", "concat", "-safe", "0", "-protocol_whitelist", "file,pipe", "-i", f"file:{listing}"),
            *local_input(source.path),
            *("-map", "0:v:0", "-map", "1:a?", "-map", "1:s?", "-c", "copy", *_subtitles(source, container)),
            *("-map_metadata", "1", "-map_chapters", "1"),
            *(*extra, "-fflags", "+bitexact", "-f", container, f"file:{temporary}"),
        ]
        run(arguments, f"{output} cannot be written")


def _listing(segments: Sequence[Path], starts: Sequence[int]) -> str:
    """A list for ffmpeg's concat: every segment begins at 0 by its own times, and here after the others' durations."""
    lines = ["ffconcat version 1.0"]
    for i, path in enumerate(segments):
        lines.append(f"file {path.name}")
        if i + 1 < len(starts):
            lines.append(f"duration {starts[i + 1] - starts[i]}us")
    return "\n".join(lines) + "\n"


def _microseconds(seconds: Fraction) -> int:
    """Rounded as ffmpeg rounds: to the nearest, halves away from zero."""
    scaled = abs(seconds) * _MICROSECOND
    whole = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)
    return whole if seconds >= 0 else -whole


def _subtitles(source: Source, container: str) -> list[str]:
    """Text subtitles are copied where the container can hold them, else kept as its own kind of text."""
    own = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip"}[container]
    chosen = []
    for i, codec in enumerate(source.subtitles):
        fits = codec != "mov_text" if container == "matroska" else codec not in _TEXT or codec == "mov_text"
        chosen += [f"-c:s:{i}", "copy" if fits else own]
    return chosen


def _even(source: Source, scale: int) -> str:
    """4:2:0 needs even sides; an odd one (possible with odd scales) gets one more row or column."""
    if source.width * scale % 2 == 0 and source.height * scale % 2 == 0:
        return ""
    return "pad=ceil(iw/2)*2:ceil(ih/2)*2:0:0:black,"
