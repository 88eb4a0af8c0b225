"""What the commands share: options of a run, a progress bar, how a mistake is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadyq.upscale import Progress

__all__ = ["FORMATS", "MODES", "add_running", "complain", "progress", "running"]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origins.
MODES = ("tiles", "image", "patches")
FORMATS = ("png", "jpg", "webp", "tif")


def add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=MODES, default="tiles", help="how bits are decided (default: tiles)"
    )
    parser.add_argument("--tile", type=int, help="side of a tile in LR pixels (default: the model's)")
    parser.add_argument("--budget", type=float, default=0.0, help="negative: fewer bits; positive: more")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")


def running(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("mode", "tile", "budget", "threads")}


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Progress]:
    """Show a bar on the terminal's error stream; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, out_of: bar.update(task, completed=done, total=out_of)


def complain(error: Exception) -> None:
    print(f"cadyq: {error}", file=sys.stderr)
