"""What does reuse gain in videos? A still scene, one with a small moving part, and one that moves as a whole.

    python bench/video.py [--seconds 10] [--size 640x360] [--out results.json]

Prints one JSON object. Bar: the still scene takes at most a third of the moving one's time per frame. All clips
have sound, and what ffprobe says of frames, times and sound is compared with the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from cadyq.upscale import load
from cadyq.video import Options, upscale_video

RATE = 25
STILL = "[0:v]trim=end_frame=1,loop=-1:1:0,setpts=N/{rate}/TB"
CLOCK = "[s];[1:v]crop=64:36:0:0[c];[s][c]overlay=W-w-32:H-h-32:shortest=1[v]"
FILTERS = {
    "static": f"{STILL}[v]",  # a detailed picture that stands still
    "corner": f"{STILL}{CLOCK}",  # the same with a small clock that runs in a corner
    "moving": f"{STILL},scroll=h=0.004:v=0.002{CLOCK}",  # the same, moving by some pixels a frame
}


def make(path: Path, filters: str, size: str, seconds: float) -> None:
    """Draw a clip; the codec is lossless, so that what stands still stands still exactly."""
    pictures = f"mandelbrot=size={size}:rate={RATE}:start_scale=0.4"
    clock = f"testsrc2=size={size}:rate={RATE}:duration={seconds}"
    sources = (pictures, clock, f"sine=duration={seconds}")
    inputs = [word for source in sources for word in ("-f", "lavfi", "-i", source)]
    command = ["ffmpeg", "-v", "error", "-y", *inputs, "-filter_complex", filters.format(rate=RATE)]
    command += ["-map", "[v]", "-map", "2:a", "-t", str(seconds), "-c:v", "ffv1", "-c:a", "aac", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def packets(path: Path, stream: str) -> list[float]:
    command = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        stream,
        "-show_entries",
        "packet=pts_time",
        "-of",
        "json",
    ]
    found = json.loads(subprocess.run([*command, str(path)], check=True, capture_output=True).stdout)
    return sorted(float(one["pts_time"]) for one in found["packets"])


def measure(size: str, seconds: float, model_name: str | None) -> dict[str, object]:
    model = load(model_name)
    found: dict[str, object] = {}
    per_frame = {}
    with tempfile.TemporaryDirectory() as name:
        for scene, filters in FILTERS.items():
            source, output = Path(name, f"{scene}.mkv"), Path(name, f"{scene}_x4.mkv")
            make(source, filters, size, seconds)
            report = upscale_video(model, source, output, Options())
            per_frame[scene] = report.seconds / report.n_frames
            kept = {
                "times": packets(source, "v:0") == packets(output, "v:0"),
                "sound": packets(source, "a:0") == packets(output, "a:0"),
            }
            found[scene] = {
                "n_frames": report.n_frames,
                "seconds_per_frame": round(per_frame[scene], 4),
                "tiles_computed": round(report.computed, 4),
                "kept": kept,
            }
    faster = {scene: round(per_frame["moving"] / per_frame[scene], 2) for scene in ("static", "corner")}
    return {
        "model": model.name,
        "size": size,
        "cpus": os.cpu_count(),
        **found,
        "faster_than_moving": faster,
        "meets_bar": faster["static"] >= 3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--model", help="name or file (default: the shipped one)")
    parser.add_argument("--out", help="file for the result")
    options = parser.parse_args()
    text = json.dumps(measure(options.size, options.seconds, options.model), indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
