"""What the commands share: options of a run, a progress bar, how a mistake is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadyq.pictures import Wanted

__all__ = [
    "FORMATS",
    "MODES",
    "add_result",
    "add_running",
    "complain",
    "progress",
    "running",
    "suffix_rule",
    "wanted_from",
]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origins.
MODES = ("tiles", "image", "patches")
FORMATS = ("png", "jpg", "webp", "tif", "avif")


def add_result(parser: argparse.ArgumentParser) -> None:
    """Options of what pictures become; `wanted_from` and `suffix_rule` read them, together with `add_running`'s."""
    size = parser.add_argument_group("result")
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
    parser.add_argument("--model", help="name of a shipped model, or a model file; see cadyq info")
    parser.add_argument("--max-pixels", type=int, help="refuse larger inputs (default: 178956970)")


def wanted_from(options: argparse.Namespace) -> Wanted:
    from cadyq.pictures import Wanted

    names = ("model", "scale", "width", "height", "quality", "depth", "max_pixels")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Wanted(**given, **running(options))


def suffix_rule(options: argparse.Namespace) -> Callable[[Path], str]:
    """The suffix that a source's output gets in a folder."""

    def suffix(source: Path) -> str:
        return source.suffix.lower() if options.format == "same" else f".{options.format or 'png'}"

    return suffix


def add_running(parser: argparse.ArgumentParser, threads: str = "CPU threads (default: all)") -> None:
    parser.add_argument(
        "--mode", choices=MODES, default="tiles", help="how bits are decided (default: tiles)"
    )
    parser.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    parser.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    parser.add_argument("--threads", type=int, help=threads)


def running(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("mode", "tile", "budget", "threads")}


@contextmanager
def progress(what: str, total: int | None, eta: bool = False) -> Iterator[Any]:
    """Show a bar on the terminal's error stream; silent where that is no terminal.

    What is yielded is called with (done, total); with ``eta`` also with ``eta_seconds``, the caller's own
    estimate of what is left.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = TextColumn("{task.fields[left]}") if eta else TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, left="")

        def step(done: float, out_of: float, eta_seconds: float | None = None) -> None:
            if eta_seconds is not None:
                bar.update(task, left=f"{timedelta(seconds=round(eta_seconds))} left")
            bar.update(task, completed=done, total=out_of)

        yield step


def complain(error: Exception) -> None:
    print(f"cadyq: {error}", file=sys.stderr)
