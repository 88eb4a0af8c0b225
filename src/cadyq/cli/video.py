"""`cadyq video`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import progress

if TYPE_CHECKING:
    from cadyq.video import Report

__all__ = ["add"]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origin.
CODECS = ("h264", "h265", "ffv1")


def add(commands: Any) -> None:
    video = commands.add_parser(
        "video",
        help="upscale a video",
        description="Upscale a video through ffmpeg. Sound, subtitles and the times of frames stay; what does "
        "not move is computed once. Run again after an interruption, it goes on where it was.",
    )
    video.add_argument("input", metavar="INPUT", help="a video that ffmpeg can read")
    video.add_argument("-o", "--output", required=True, help="file to write: .mp4, .m4v, .mov or .mkv")
    video.add_argument("--scale", type=int, help="enlargement factor of the shipped model (default: 4)")
    video.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    video.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    video.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    video.add_argument("--threads", type=int, help="CPU threads (default: all)")
    video.add_argument("--codec", choices=CODECS, default="h264", help="of the output; ffv1 is lossless")
    video.add_argument(
        "--crf", type=int, default=17, help="quality of h264 and h265, lower is better (default: 17)"
    )
    video.add_argument(
        "--segment",
        type=int,
        default=60,
        help="frames after which what is done survives a crash (default: 60)",
    )
    video.add_argument("--json", action="store_true", help="print JSON instead of text")
    video.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.upscale import load
    from cadyq.video import Options, upscale_video

    names = ("budget", "tile", "threads", "codec", "crf", "segment")
    chosen = Options(**{name: getattr(options, name) for name in names})
    source, output = Path(options.input), Path(options.output)
    model = load(options.model, options.scale)
    with progress("frames", None) as step:
        report = upscale_video(model, source, output, chosen, step)
    if options.json:
        print(
            json.dumps({"input": str(source), "output": str(output), "model": model.name, **asdict(report)})
        )
    else:
        for note in report.notes:
            print(f"cadyq: {source}: {note}", file=sys.stderr)
        print(f"{source} -> {output}: {_text(report)}")
    return 0


def _text(report: Report) -> str:
    resumed = f", {report.n_resumed} of them by an earlier run" if report.n_resumed else ""
    return (
        f"{report.width}x{report.height}, {report.n_frames} frames{resumed}, {report.seconds:.1f} s, "
        f"{report.computed:.0%} of the tiles computed"
    )
