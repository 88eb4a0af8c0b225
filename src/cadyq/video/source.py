"""What a video file holds, and its frames."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cadyq.errors import ImageError
from cadyq.video.ffmpeg import local_input, piped, probe_json

__all__ = ["Source", "frames", "probe"]

_MATRICES = {"bt709", "smpte170m", "bt470bg", "bt2020nc"}
_HDR = ("smpte2084", "arib-std-b67")


@dataclass(frozen=True)
class Source:
    """A video file.

    Attributes:
        path: the file.
        stream: index of its video stream.
        width, height: of a frame as it is shown, in pixels.
        time_base: seconds that one unit of time stands for.
        times: when each frame is shown, in units of ``time_base``, ascending.
        matrix: how colors are coded; what is not said is taken as players do.
        is_full_range: whether luma uses 0 to 255.
        tags: further color tags, for ffmpeg.
        aspect: shape of a pixel, width to height, as ffmpeg writes it ("1:1").
        subtitles: codecs of the subtitle streams, in order.
        notes: what is reduced or ignored, one sentence each.
    """

    path: Path
    stream: int
    width: int
    height: int
    time_base: Fraction
    times: tuple[int, ...]
    matrix: str
    is_full_range: bool
    tags: tuple[str, ...]
    aspect: str
    subtitles: tuple[str, ...]
    notes: tuple[str, ...]


def probe(path: Path) -> Source:
    """Look into a video file; all frames are decoded once for their times.

    Raises:
        ImageError: missing, no video, or without usable times. MissingExtraError: no ffmpeg.
    """
    streams = probe_json(path, "-show_streams")["streams"]
    # A cover picture is a video stream, too.
    moving = [s for s in streams if s["codec_type"] == "video" and not s["disposition"].get("attached_pic")]
    if not moving:
        raise ImageError(f"{path} holds no video, expected a video file")
    video = moving[0]
    index, base = int(video["index"]), Fraction(video["time_base"])
    shown = "frame=best_effort_timestamp"
    found = probe_json(path, "-select_streams", str(index), "-show_frames", "-show_entries", shown)["frames"]
    try:
        times = tuple(int(frame["best_effort_timestamp"]) for frame in found)
    except KeyError:
        raise ImageError(f"{path} has frames without a time; remux it with ffmpeg -fflags +genpts") from None
    if not times or any(b <= a for a, b in itertools.pairwise(times)):
        raise ImageError(f"{path} has no frames, or their times do not ascend; remux it with ffmpeg first")
    width, height = int(video["width"]), int(video["height"])
    if _turned(video):
        width, height = height, width
    aspect = video.get("sample_aspect_ratio", "1:1")
    return Source(
        path=path,
        stream=index,
        width=width,
        height=height,
        time_base=base,
        times=times,
        matrix=_matrix(video, height),
        is_full_range=video.get("color_range") == "pc",
        tags=_tags(video),
        aspect="1:1" if aspect in ("0:1", "N/A") else str(aspect),
        subtitles=tuple(
            str(s.get("codec_name", "unknown")) for s in streams if s["codec_type"] == "subtitle"
        ),
        notes=tuple(_notes(video, len(moving))),
    )


@contextmanager
def frames(source: Source) -> Iterator[Iterator[NDArray[np.uint8]]]:
    """Yield all frames in order, uint8 RGB ``(height, width, 3)``; each array is new."""
    scaling = (
        f"scale=in_color_matrix={_swscale(source.matrix)}:in_range={'pc' if source.is_full_range else 'tv'}"
    )
    arguments = [
        *local_input(source.path),
        *("-map", f"0:{source.stream}", "-fps_mode", "passthrough"),
        *("-vf", f"{scaling}:flags=bicubic+accurate_rnd+full_chroma_int"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"),
    ]
    shape = (source.height, source.width, 3)

    def read(pipe: Any) -> Iterator[NDArray[np.uint8]]:
        for number in range(len(source.times)):
            frame = np.empty(shape, np.uint8)
            if pipe.readinto(frame.reshape(-1).data) != frame.nbytes:
                raise ImageError(
                    f"{source.path} is damaged: it ends at frame {number} of {len(source.times)}"
                )
            yield frame

    with piped(arguments, f"{source.path} cannot be decoded", writes=False) as pipe:
        yield read(pipe)
        while pipe.read(1 << 20):
            pass


def color_arguments(source: Source) -> tuple[str, list[str]]:
    """Filter options and tags with which frames are coded as the source's were."""
    span = "pc" if source.is_full_range else "tv"
    options = f"out_color_matrix={_swscale(source.matrix)}:out_range={span}"
    return options, ["-colorspace", source.matrix, "-color_range", span, *source.tags]


def _matrix(video: dict[str, Any], height: int) -> str:
    said = video.get("color_space", "unknown")
    if said in _MATRICES:
        return str(said)
    return "bt709" if height >= 720 else "smpte170m"


def _swscale(matrix: str) -> str:
    return "bt2020" if matrix == "bt2020nc" else matrix


def _tags(video: dict[str, Any]) -> tuple[str, ...]:
    tags: list[str] = []
    for option, key in (("-color_primaries", "color_primaries"), ("-color_trc", "color_transfer")):
        if video.get(key, "unknown") not in ("unknown", "reserved"):
            tags += [option, str(video[key])]
    return tuple(tags)


def _turned(video: dict[str, Any]) -> bool:
    """Whether players turn it by a quarter; ffmpeg then does so while decoding."""
    turns = [side.get("rotation", 0) for side in video.get("side_data_list", [])]
    return any(round(float(turn) / 90) % 2 for turn in turns)


def _notes(video: dict[str, Any], n_streams: int) -> Iterator[str]:
    depth = video.get("bits_per_raw_sample")
    pixels = str(video.get("pix_fmt", ""))
    if (depth and int(depth) > 8) or any(word in pixels for word in ("10", "12", "16")):
        yield "More than 8 bits per channel are reduced to 8."
    if video.get("color_transfer") in _HDR:
        yield "It is HDR; with 8 bits per channel banding may show."
    if video.get("field_order", "progressive") not in ("progressive", "unknown"):
        yield "It is interlaced, and its fields are upscaled as they are; deinterlace it first (ffmpeg -vf bwdif)."
    if n_streams > 1:
        yield f"It holds {n_streams} video streams; the first one is upscaled, the others are left out."
