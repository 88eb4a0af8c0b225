"""`cadyq upscale`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import FORMATS, add_running, complain, progress, running
from cadyq.errors import ArgumentError, CadyqError

if TYPE_CHECKING:
    from cadyq.upscale import Model, Progress, Result

__all__ = ["add"]

_SAME = {"jpg": (".jpeg",), "tif": (".tiff",)}


def add(commands: Any) -> None:
    upscale = commands.add_parser("upscale", help="upscale pictures", description="Upscale pictures.")
    upscale.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, or folder of pictures")
    upscale.add_argument(
        "-o", "--output", required=True, help="picture for one picture; folder for several or for a folder"
    )
    upscale.add_argument("--scale", type=int, help="enlargement factor of the shipped model (default: 4)")
    upscale.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    upscale.add_argument("--format", choices=FORMATS, help="format in an output folder (default: png)")
    add_running(upscale)
    upscale.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from cadyq.io.images import SUFFIXES
    from cadyq.upscale import load

    jobs, several = _jobs([Path(name) for name in options.inputs], Path(options.output), options.format)
    for source, target in jobs:
        if target.suffix.lower() not in SUFFIXES:
            raise ArgumentError("output", str(target), f"a suffix out of {', '.join(SUFFIXES)}", "add one")
        if not several and not target.parent.is_dir():
            raise ArgumentError("output", str(target), "an existing folder to write to", "create it first")
        if not several and not source.is_file():
            from cadyq.io.images import read_image

            read_image(source)  # says what is wrong with it, before a model is loaded
    model = load(options.model, options.scale)
    codes = []
    with progress("pictures" if several else "parts", len(jobs) if several else None) as step:
        for done, (source, target) in enumerate(jobs, start=1):
            try:
                result = _upscale_one(model, source, target, options, None if several else step)
                print(_report(model, source, target, result), flush=True)
            except CadyqError as error:
                if not several:
                    raise
                complain(error)
                codes.append(error.exit_code)
            if several:
                step(done, len(jobs))
    if codes:
        print(f"cadyq: {len(codes)} of {len(jobs)} pictures failed", file=sys.stderr)
    return codes[0] if codes else 0


def _upscale_one(
    model: Model, source: Path, target: Path, options: argparse.Namespace, progress: Progress | None
) -> Result:
    from cadyq.errors import ImageError
    from cadyq.io.images import read_image

    picture = read_image(source)
    if picture.alpha is not None and target.suffix.lower() in (".jpg", ".jpeg"):
        raise ArgumentError("output", str(target), f"a format with transparency, as {source} has", "use .png")
    for note in picture.notes:
        print(f"cadyq: {source}: {note}", file=sys.stderr)
    result = model.upscale(picture, progress=progress, **running(options))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{target.parent} cannot be created: {error.strerror or error}") from error
    result.save(target)
    return result


def _jobs(inputs: list[Path], output: Path, suffix: str | None) -> tuple[list[tuple[Path, Path]], bool]:
    """Pair every picture with the file it becomes; and whether the output is a folder."""
    from cadyq.data.sets import list_pictures

    into_folder = (
        len(inputs) > 1
        or inputs[0].is_dir()
        or output.is_dir()
        or (not output.suffix and not output.is_file())
        or str(output).endswith(os.sep)
    )
    if not into_folder:
        if suffix is not None and output.suffix.lower() not in (f".{suffix}", *_SAME.get(suffix, ())):
            raise ArgumentError("format", suffix, f"the suffix of the output, {output}", "leave it out")
        jobs = [(inputs[0], output)]
    else:
        if output.is_file():
            raise ArgumentError("output", str(output), "a folder, since there may be several pictures")
        sources: list[Path] = []
        for path in inputs:
            found = list_pictures(path) if path.is_dir() else [path]
            if not found:
                raise ArgumentError("input", str(path), "a folder that holds pictures")
            sources += found
        jobs = [(source, output / f"{source.stem}.{suffix or 'png'}") for source in sources]
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise ArgumentError("output", str(target), f"one picture, not both {taken[target]} and {source}")
        taken[target] = source
    for target in taken:
        if any(target.exists() and source.exists() and target.samefile(source) for source in taken.values()):
            raise ArgumentError("output", str(target), "not one of the inputs", "choose another output")
    return jobs, into_folder


def _report(model: Model, source: Path, target: Path, result: Result) -> str:
    height, width = result.pixels.shape[:2]
    parts = [
        f"{source} -> {target}: {width}x{height}",
        model.name,
        f"{result.seconds:.2f} s",
        f"mean {result.fqr:.2f} bits",
    ]
    if result.tile is not None:
        rows, cols = result.grid
        parts.append(f"{rows}x{cols} tiles of {result.tile}")
        parts.append(f"{result.exited:.0%} exited")
    return ", ".join(parts)
