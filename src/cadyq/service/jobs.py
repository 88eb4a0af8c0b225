"""Jobs of the service: what is asked, what has happened so far, and who listens.

A job belongs to the event loop: only `Job.cancelled` is touched by the thread that works on it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

__all__ = ["Event", "Failure", "Job", "Options", "Outcome", "State"]


class State(str, Enum):
    """Where a job stands; the last three are final."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"


class Options(NamedTuple):
    """What a client may choose; ``format`` is one of the command line's, no model leaves it to the picture."""

    model: str | None
    budget: float
    format: str


class Event(NamedTuple):
    """One message to those who watch: a name, and JSON."""

    name: str
    data: str


class Failure(NamedTuple):
    """Why there is no result: the HTTP status that fits, a word for programs, a sentence for people."""

    status: int
    kind: str
    message: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """A result: the file, its media type, its figures, and bits per site, ``{name: rows of columns}``."""

    content: bytes
    media_type: str
    figures: dict[str, Any]
    bits: dict[str, list[list[int]]]


@dataclass(eq=False)
class Job:
    """A request to upscale one picture.

    Attributes:
        content: the picture's file; let go when the job ends.
        options: what the client chose.
        watched: whether somebody may look at it on the way, so that parts are worth telling.
        keep: whether it goes on when nobody listens.
    """

    content: bytes
    options: Options
    watched: bool = False
    keep: bool = True
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = State.queued
    outcome: Outcome | None = None
    failure: Failure | None = None
    finished_at: float | None = None
    events: list[Event] = field(default_factory=list)
    listeners: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_final(self) -> bool:
        return self.state in (State.done, State.failed, State.cancelled)

    @property
    def n_bytes(self) -> int:
        """Bytes that it holds while it waits to be fetched."""
        result = len(self.outcome.content) if self.outcome is not None else 0
        return result + sum(len(event.data) for event in self.events)

    def publish(self, name: str, data: dict[str, Any]) -> None:
        """Tell those who watch."""
        self.events.append(Event(name, json.dumps(data, separators=(",", ":"))))
        self._wake()

    def finish(self, state: State, *, outcome: Outcome | None = None, failure: Failure | None = None) -> None:
        """Enter a final state, once; later calls are ignored."""
        if self.is_final:
            return
        self.state, self.outcome, self.failure = state, outcome, failure
        self.finished_at, self.content = time.monotonic(), b""
        if outcome is not None:
            self.publish("done", {"figures": outcome.figures})
        elif failure is not None:
            self.publish(state.value, {"kind": failure.kind, "message": failure.message})

    async def wait(self) -> None:
        """Return when the job has ended."""
        while not self.is_final:
            await self._news.wait()

    async def follow(self, after: int = 0, idle: float = 15.0) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield (number, event) from number ``after`` on until the job has ended; None after ``idle`` seconds.

        The first event has the number 0.
        """
        while True:
            news = self._news
            for number in range(after, len(self.events)):
                yield number, self.events[number]
            after = max(after, len(self.events))
            if self.is_final:
                return
            try:
                await asyncio.wait_for(news.wait(), idle)
            except asyncio.TimeoutError:
                yield None

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
