"""A bounded queue of jobs with back-pressure, worked off by a few threads; and the jobs that can be fetched."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cadyq.errors import CadyqError, ImageError, MissingExtraError
from cadyq.service.jobs import Failure, Job, Outcome, State
from cadyq.service.metrics import Metrics
from cadyq.service.settings import Settings
from cadyq.service.work import Cancelled, OutOfTime

__all__ = ["Busy", "JobQueue", "Work"]

Work = Callable[[Job, Callable[[str, dict[str, Any]], None]], Outcome]
"""Does a job in a thread; it is handed the job and what publishes its events."""

_LOG = logging.getLogger("cadyq.service")
_LONGEST_RETRY = 120
_SWEEP_SECONDS = 15.0


class Busy(Exception):
    """No job is taken now; ask again in ``retry_after`` seconds."""

    def __init__(self, retry_after: int, reason: str) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class JobQueue:
    """Takes jobs, works them off, keeps results for a while. Lives on one event loop.

    Args:
        work: does a job.
        settings: sizes and times.
        metrics: is told what happens.
    """

    def __init__(self, work: Work, settings: Settings, metrics: Metrics) -> None:
        self._work, self._settings, self._metrics = work, settings, metrics
        self._waiting: asyncio.Queue[tuple[Job, float]] = asyncio.Queue()
        self._running: set[Job] = set()
        self._held = 0  # places that are taken: uploads under way and jobs that wait
        self._mean_seconds = 1.0
        self._kept: dict[str, Job] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._open = False

    async def start(self) -> None:
        self._open = True
        self._pool = ThreadPoolExecutor(self._settings.workers, "cadyq-worker")
        workers = [self._serve() for _ in range(self._settings.workers)]
        self._tasks = [asyncio.create_task(one) for one in [*workers, self._sweep()]]

    async def stop(self) -> None:
        """Refuse new jobs, cancel the others, and wait for the threads."""
        self._open = False
        waiting = [self._waiting.get_nowait()[0] for _ in range(self._waiting.qsize())]
        for job in (*waiting, *self._running):
            self.cancel(job, "the service is shutting down")
        await asyncio.gather(*(job.wait() for job in self._running))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=True)

    @property
    def is_open(self) -> bool:
        """Whether a job would be taken now."""
        return self._open and self._held < self._settings.queue

    @contextlib.contextmanager
    def place(self) -> Iterator[Callable[[Job], None]]:
        """Take a place before the upload, so that memory is bounded; yields what submits the job.

        Raises:
            Busy: the queue is full, or the service is shutting down.
        """
        if not self._open:
            raise Busy(5, "the service is shutting down")
        if self._held >= self._settings.queue:
            self._metrics.refused.inc()
            raise Busy(self._retry_after(), f"{self._held} requests wait already; try again later")
        self._change(1)
        submitted = False

        def submit(job: Job) -> None:
            nonlocal submitted
            submitted = True
            self._waiting.put_nowait((job, time.monotonic()))
            job.publish("queued", {"ahead": self._waiting.qsize() - 1 + len(self._running)})

        try:
            yield submit
        finally:
            if not submitted:
                self._change(-1)

    def cancel(self, job: Job, reason: str = "cancelled by the client") -> None:
        """End a job: at once if it waits, else between two parts of its picture."""
        job.cancelled.set()
        if job.state is State.queued:
            # It keeps its place until a worker meets it, which is soon: there is nothing to do any more.
            self._end(job, State.cancelled, failure=Failure(503, "cancelled", reason))

    def keep(self, job: Job) -> None:
        """Let a job be found by its id, until it is too old or others need the room."""
        self._kept[job.id] = job

    def find(self, job_id: str) -> Job | None:
        return self._kept.get(job_id)

    def forget(self, job: Job) -> None:
        self.cancel(job)
        self._kept.pop(job.id, None)
        self._tidy()

    async def _serve(self) -> None:
        while True:
            job, since = await self._waiting.get()
            self._change(-1)
            if job.is_final:
                continue
            self._metrics.wait_seconds.observe(time.monotonic() - since)
            job.state = State.running
            self._running.add(job)
            self._metrics.running.set(len(self._running))
            start = time.monotonic()
            try:
                await self._do(job)
            finally:
                self._running.discard(job)
                self._metrics.running.set(len(self._running))
            seconds = time.monotonic() - start
            self._metrics.work_seconds.observe(seconds)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    async def _do(self, job: Job) -> None:
        loop = asyncio.get_running_loop()

        def publish(name: str, data: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(job.publish, name, data)

        try:
            outcome = await loop.run_in_executor(self._pool, self._work, job, publish)
        except Cancelled:
            self._end(job, State.cancelled, failure=Failure(503, "cancelled", "the job was cancelled"))
        except Exception as error:
            self._end(job, State.failed, failure=self._failure(job, error))
        else:
            self._metrics.pixels.inc(outcome.figures["width"] * outcome.figures["height"])
            self._metrics.fqr.observe(outcome.figures["fqr"])
            self._end(job, State.done, outcome=outcome)

    def _failure(self, job: Job, error: Exception) -> Failure:
        """Say what went wrong, and nothing of how this program looks inside."""
        if isinstance(error, OutOfTime):
            limit = f"{self._settings.timeout:g} s"
            return Failure(504, "timeout", f"it took longer than {limit}; send a smaller picture")
        if isinstance(error, ImageError):
            return Failure(422, "picture", str(error))
        if isinstance(error, MissingExtraError):
            return Failure(501, "not_installed", str(error))
        if isinstance(error, CadyqError):
            return Failure(422, "argument", str(error))
        if isinstance(error, MemoryError):
            return Failure(503, "memory", "there is not enough memory for this picture now")
        _LOG.error("job %s failed", job.id, exc_info=error)
        return Failure(500, "internal", f"an error of the service; its log says more (job {job.id})")

    def _end(
        self, job: Job, state: State, *, outcome: Outcome | None = None, failure: Failure | None = None
    ) -> None:
        if not job.is_final:
            job.finish(state, outcome=outcome, failure=failure)
            self._metrics.jobs.labels(state.value).inc()
            self._tidy()

    def _retry_after(self) -> int:
        """Seconds until a place is free, judging by the jobs of late."""
        ahead = self._held / 2 + len(self._running)
        return min(_LONGEST_RETRY, max(1, math.ceil(ahead * self._mean_seconds / self._settings.workers)))

    def _change(self, places: int) -> None:
        self._held += places
        self._metrics.waiting.set(self._held)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._settings.keep_seconds))
            self._tidy()

    def _tidy(self) -> None:
        """Drop finished jobs that are too old, and the oldest of those that together are too large."""
        ended = sorted(
            (job for job in self._kept.values() if job.is_final), key=lambda job: job.finished_at or 0
        )
        total = sum(job.n_bytes for job in ended)
        for job in ended:
            age = time.monotonic() - (job.finished_at or 0)
            is_newest = job is ended[-1]
            if age > self._settings.keep_seconds or (total > self._settings.keep_bytes and not is_newest):
                total -= job.n_bytes
                del self._kept[job.id]
        self._metrics.kept_bytes.set(total)
