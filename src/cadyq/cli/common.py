"""What the commands share: options of a run, a progress bar, how a mistake is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["FORMATS", "MODES", "add_running", "complain", "progress", "running"]

# Spelled out, because `cadyq --help` must not wait for imports; a test compares them with their origins.
MODES = ("tiles", "image", "patches")
FORMATS = ("png", "jpg", "webp", "tif", "avif")


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
