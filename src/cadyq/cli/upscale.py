"""`cadyq upscale`."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import FORMATS, add_running, progress, running
from cadyq.errors import ArgumentError, CadyqError

if TYPE_CHECKING:
    from cadyq.estimate import Estimate
    from cadyq.folders import Event, Job
    from cadyq.pictures import PictureTask, Wanted

__all__ = ["add"]

_SAME = {"jpg": (".jpeg",), "tif": (".tiff",)}
_SECONDS_BETWEEN_EVENTS = 1.0
_LONG_WORK = 8_000_000  # pixels of a result from which on the estimate is told first


def add(commands: Any) -> None:
    upscale = commands.add_parser(
        "upscale",
        help="upscale pictures",
        description="Upscale a picture into a picture, or many into a folder. What was done there is skipped the "
        "next time; a job that was killed is finished by the same command.",
    )
    upscale.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder of pictures, or pattern")
    upscale.add_argument(
        "-o", "--output", required=True, help="picture for one picture; folder for several or for a folder"
    )
    size = upscale.add_argument_group("result")
    size.add_argument("--scale", type=float, help="enlargement factor (default: the model's, 4)")
    size.add_argument("--width", type=int, help="exact width in pixels")
    size.add_argument("--height", type=int, help="exact height in pixels; one of them keeps the proportions")
    size.add_argument(
        "--format", choices=(*FORMATS, "same"), help="format in an output folder (default: png)"
    )
    size.add_argument(
        "--quality", type=int, help="1 to 100 for jpg, webp and avif (default: 95, lossless, 90)"
    )
    size.add_argument("--depth", type=int, choices=(8, 16), default=16, help="8 reduces 16 bits per channel")
    folder = upscale.add_argument_group("folders")
    folder.add_argument(
        "-r", "--recursive", action="store_true", help="also folders inside; the tree is kept"
    )
    folder.add_argument("--overwrite", action="store_true", help="make all anew, whatever lies there")
    upscale.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    upscale.add_argument("--max-pixels", type=int, help="refuse larger inputs (default: 178956970)")
    upscale.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what time and memory it takes"
    )
    upscale.add_argument("--json", action="store_true", help="print events, one JSON object a line")
    add_running(upscale)
    upscale.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    wanted, output = _wanted(options), Path(options.output)
    if _is_folder_job(options.inputs, output):
        return _many(options, wanted, output)
    return _one(options, wanted, Path(options.inputs[0]), output)


def _wanted(options: argparse.Namespace) -> Wanted:
    from cadyq.pictures import Wanted

    names = ("model", "scale", "width", "height", "quality", "depth", "max_pixels")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Wanted(**given, **running(options))


def _is_folder_job(inputs: list[str], output: Path) -> bool:
    first = Path(inputs[0])
    return (
        len(inputs) > 1
        or first.is_dir()
        or (glob.has_magic(inputs[0]) and not first.exists())
        or output.is_dir()
        or (not output.suffix and not output.is_file())
        or str(output).endswith(os.sep)
    )


def _one(options: argparse.Namespace, wanted: Wanted, source: Path, target: Path) -> int:
    from cadyq.folders import Job, check_targets
    from cadyq.pictures import prepare

    name = options.format
    if name not in (None, "same") and target.suffix.lower() not in (f".{name}", *_SAME.get(name, ())):
        raise ArgumentError("format", name, f"the suffix of the output, {target}", "leave it out")
    check_targets([Job(source, target)])
    if not target.parent.is_dir():
        raise ArgumentError("output", str(target), "an existing folder to write to", "create it first")
    task = prepare(source, target, wanted)
    show = _print_json if options.json else _print_text
    if options.dry_run or task.size[0] * task.size[1] >= _LONG_WORK:
        from cadyq.estimate import estimate, measure_rates

        show(_estimated(task, estimate(task, measure_rates(task))))
        if options.dry_run:
            return 0
    with progress("parts", None) as step:
        said = task.run(step)
    show({"event": "done", "source": str(source), "target": str(target), **said})
    return 0


def _many(options: argparse.Namespace, wanted: Wanted, output: Path) -> int:
    from cadyq.folders import find_jobs, run_jobs
    from cadyq.pictures import model, prepare

    if output.is_file():
        raise ArgumentError("output", str(output), "a folder, since there may be several pictures")

    def suffix(source: Path) -> str:
        return source.suffix.lower() if options.format == "same" else f".{options.format or 'png'}"

    jobs = find_jobs(options.inputs, output, suffix, options.recursive)
    if wanted.model is not None:
        model(wanted.model)  # says what is wrong with it once, not for every picture

    def look(job: Job) -> PictureTask:
        return prepare(job.source, job.target, wanted)

    if options.dry_run:
        return _dry_run(jobs, look, _print_json if options.json else _print_text)
    with _shown(options.json, len(jobs)) as emit:
        return run_jobs(jobs, output, look, emit, options.overwrite).exit_code


def _dry_run(jobs: list[Job], look: Callable[[Job], PictureTask], show: Callable[[Event], None]) -> int:
    """Estimate every picture; what is done already counts, too."""
    from cadyq.estimate import Rates, estimate, measure_rates

    rates: dict[tuple[Any, ...], Rates] = {}
    codes, seconds, memory = [], 0.0, 0
    for job in jobs:
        try:
            task = look(job)
            # One measurement serves all pictures that are made alike.
            kind = (task.model_name, task.format, task.header.is_deep, task.is_streamed)
            if is_first := kind not in rates:
                rates[kind] = measure_rates(task)
        except CadyqError as error:
            show({"event": "failed", "source": str(job.source), "message": str(error)})
            codes.append(error.exit_code)
            continue
        found = estimate(task, rates[kind], is_first)
        seconds, memory = seconds + found.seconds, max(memory, found.memory_bytes)
        show(_estimated(task, found))
    show({"event": "total", "n_images": len(jobs), "seconds": round(seconds, 1), "memory_bytes": memory})
    return codes[0] if codes else 0


def _estimated(task: PictureTask, found: Estimate) -> Event:
    return {
        "event": "estimate",
        "source": str(task.source),
        "target": str(task.target),
        "width": task.size[1],
        "height": task.size[0],
        "model": task.model_name,
        "why": task.why,
        "streamed": task.is_streamed,
        "seconds": round(found.seconds, 1),
        "memory_bytes": found.memory_bytes,
    }


@contextmanager
def _shown(as_json: bool, n_images: int) -> Iterator[Callable[[Event], None]]:
    """Yield what tells the user about events: JSON lines, or text and a bar on a terminal."""
    with progress("pictures", n_images, eta=True) as step:
        last = 0.0

        def emit(event: Event) -> None:
            nonlocal last
            if event["event"] == "progress":
                step(event["index"] - 1 + event["share"], n_images, eta_seconds=event["eta_seconds"])
                if as_json and time.monotonic() - last >= _SECONDS_BETWEEN_EVENTS:
                    last = time.monotonic()
                    _print_json(event)
                return
            if "index" in event:
                step(event["index"], n_images)
            (_print_json if as_json else _print_text)(event)

        yield emit


def _print_json(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _print_text(event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "done":
        for note in event["notes"]:
            print(f"cadyq: {event['source']}: {note}", file=sys.stderr)
        print(_report(event), flush=True)
    elif kind == "estimate":
        how = ", streamed" if event["streamed"] else ""
        what = f"{event['width']}x{event['height']}, {event['model']} ({event['why']}){how}"
        print(f"{event['source']} -> {event['target']}: {what}, {_cost(event)}", flush=True)
    elif kind == "total":
        print(f"{event['n_images']} pictures: {_cost(event)}")
    elif kind == "failed":
        print(f"cadyq: {event['message']}", file=sys.stderr)
    elif kind == "end":
        total = event["n_done"] + event["n_skipped"] + event["n_failed"]
        if event["n_skipped"]:
            print(f"{event['n_skipped']} of {total} pictures were there already")
        if event["n_failed"]:
            print(f"cadyq: {event['n_failed']} of {total} pictures failed", file=sys.stderr)


def _cost(event: Mapping[str, Any]) -> str:
    return f"about {event['seconds']:.1f} s and {event['memory_bytes'] / 1e6:.0f} MB of memory"


def _report(event: Mapping[str, Any]) -> str:
    parts = [
        f"{event['source']} -> {event['target']}: {event['width']}x{event['height']}",
        f"{event['model']} ({event['why']})",
        f"{event['seconds']:.2f} s",
        f"mean {event['fqr']:.2f} bits",
    ]
    if event["tile"] is not None:
        rows, cols = event["grid"]
        parts.append(f"{rows}x{cols} tiles of {event['tile']}")
        parts.append(f"{event['exited']:.0%} exited")
    return ", ".join(parts)
