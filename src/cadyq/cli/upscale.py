"""`cadyq upscale`."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import add_result, add_running, progress, suffix_rule, wanted_from
from cadyq.cli.events import print_json, print_text, shown
from cadyq.errors import ArgumentError, CadyqError

if TYPE_CHECKING:
    from cadyq.estimate import Estimate
    from cadyq.folders import Event, Job
    from cadyq.pictures import PictureTask, Wanted

__all__ = ["add"]

_SAME = {"jpg": (".jpeg",), "tif": (".tiff",)}
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
    add_result(upscale)
    folder = upscale.add_argument_group("folders")
    folder.add_argument(
        "-r", "--recursive", action="store_true", help="also folders inside; the tree is kept"
    )
    folder.add_argument("--overwrite", action="store_true", help="make all anew, whatever lies there")
    upscale.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what time and memory it takes"
    )
    upscale.add_argument("--json", action="store_true", help="print events, one JSON object a line")
    add_running(upscale)
    upscale.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if _is_folder_job(options.inputs, output):
        return _many(options, wanted_from(options), output)
    return _one(options, wanted_from(options), Path(options.inputs[0]), output)


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
    show = print_json if options.json else print_text
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

    jobs = find_jobs(options.inputs, output, suffix_rule(options), options.recursive)
    if wanted.model is not None:
        model(wanted.model)  # says what is wrong with it once, not for every picture

    def look(job: Job) -> PictureTask:
        return prepare(job.source, job.target, wanted)

    if options.dry_run:
        return _dry_run(jobs, look, print_json if options.json else print_text)
    with shown(options.json, len(jobs)) as emit:
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
