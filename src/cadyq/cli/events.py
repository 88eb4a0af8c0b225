"""How the events of a job are shown: JSON lines, or text and a bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cadyq.cli.common import progress

if TYPE_CHECKING:
    from cadyq.folders import Event

__all__ = ["print_json", "print_text", "shown"]

_SECONDS_BETWEEN_EVENTS = 1.0


@contextmanager
def shown(as_json: bool, n_images: int) -> Iterator[Callable[[Event], None]]:
    """Yield what tells the user about events: JSON lines, or text and a bar on a terminal."""
    with progress("pictures", n_images, eta=True) as step:
        last = 0.0

        def emit(event: Event) -> None:
            nonlocal last
            if event["event"] == "progress":
                step(event["index"] - 1 + event["share"], n_images, eta_seconds=event["eta_seconds"])
                if as_json and time.monotonic() - last >= _SECONDS_BETWEEN_EVENTS:
                    last = time.monotonic()
                    print_json(event)
                return
            if "index" in event:
                step(event["index"], n_images)
            (print_json if as_json else print_text)(event)

        yield emit


def print_json(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def print_text(event: Mapping[str, Any]) -> None:
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
