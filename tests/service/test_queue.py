"""The queue alone: bounded, cancellable, tidy, and discreet about what goes wrong inside."""

import asyncio
import threading

import pytest

from cadyq.errors import ArgumentError, ImageError, MissingExtraError
from cadyq.service.jobs import Job, Options, Outcome, State
from cadyq.service.settings import Settings
from cadyq.service.work import Cancelled, OutOfTime

Metrics = pytest.importorskip("cadyq.service.metrics", reason="needs the extra [web]").Metrics
queues = pytest.importorskip("cadyq.service.queue", reason="needs the extra [web]")

FIGURES = {"width": 8, "height": 8, "fqr": 5.0}


def outcome(size=10):
    return Outcome(b"x" * size, "image/png", FIGURES, {})


def new(**more):
    return Job(b"picture", Options("m", 0.0, "png"), **more)


def run(scenario, work=lambda job, publish: outcome(), **settings):
    """Run a scenario against a started queue."""

    async def main():
        queue = queues.JobQueue(work, Settings(workers=1, **settings), Metrics())
        await queue.start()
        try:
            return await asyncio.wait_for(scenario(queue), 20)
        finally:
            await queue.stop()

    return asyncio.run(main())


def submit(queue, job):
    with queue.place() as put:
        put(job)
    return job


def blocker():
    """Work that lasts until it is let go or cancelled; and the two events for that."""
    begun, go = threading.Event(), threading.Event()

    def work(job, publish):
        begun.set()
        while not go.wait(0.01):
            if job.cancelled.is_set():
                raise Cancelled
        return outcome()

    return work, begun, go


def test_a_full_queue_says_when_to_come_back():
    work, begun, go = blocker()

    async def scenario(queue):
        submit(queue, new())
        await asyncio.to_thread(begun.wait)
        waiting = [submit(queue, new()), submit(queue, new())]
        assert not queue.is_open
        with pytest.raises(queues.Busy) as caught, queue.place():
            pass
        assert 1 <= caught.value.retry_after <= 120
        go.set()
        for job in waiting:
            await job.wait()
        assert queue.is_open
        assert [job.state for job in waiting] == [State.done, State.done]

    run(scenario, work, queue=2)


def test_a_place_without_a_job_is_given_back():
    async def scenario(queue):
        with pytest.raises(RuntimeError), queue.place():
            assert not queue.is_open
            raise RuntimeError("the upload failed")
        assert queue.is_open

    run(scenario, queue=1)


def test_cancelling():
    work, begun, go = blocker()

    async def scenario(queue):
        running, waiting = submit(queue, new()), submit(queue, new())
        await asyncio.to_thread(begun.wait)
        for job in (waiting, running):
            queue.cancel(job)
            await job.wait()
            assert job.state is State.cancelled
            assert job.failure.kind == "cancelled"
            assert job.content == b""
        go.set()
        after = submit(queue, new())
        await after.wait()
        assert after.state is State.done

    run(scenario, work)


def test_stopping_ends_what_runs_and_what_waits():
    work, begun, _ = blocker()

    async def scenario(queue):
        jobs = [submit(queue, new()) for _ in range(3)]
        await asyncio.to_thread(begun.wait)
        await queue.stop()
        assert [job.state for job in jobs] == [State.cancelled] * 3
        with pytest.raises(queues.Busy), queue.place():
            pass

    run(scenario, work)


@pytest.mark.parametrize(
    ("error", "status", "kind", "words"),
    [
        (ImageError("it is damaged"), 422, "picture", "damaged"),
        (ArgumentError("format", "jpg", "png"), 422, "argument", "jpg"),
        (MissingExtraError("torch is missing"), 501, "not_installed", "torch"),
        (OutOfTime(), 504, "timeout", "7 s"),
        (MemoryError(), 503, "memory", "memory"),
        (KeyError("secret"), 500, "internal", "log"),
    ],
)
def test_errors_are_told_without_what_is_inside(error, status, kind, words):
    def work(job, publish):
        raise error

    async def scenario(queue):
        job = submit(queue, new())
        await job.wait()
        return job.failure

    failure = run(scenario, work, timeout=7)
    assert (failure.status, failure.kind) == (status, kind)
    assert words in failure.message
    assert "secret" not in failure.message


def test_old_and_large_results_go():
    sizes = iter([60, 60, 500])

    async def scenario(queue):
        jobs = []
        for _ in range(3):
            job = submit(queue, new())
            queue.keep(job)
            await job.wait()
            jobs.append(job)
            found = [queue.find(one.id) is not None for one in jobs]
        assert found == [False, False, True]  # the newest stays, however large
        queue.forget(jobs[-1])
        assert queue.find(jobs[-1].id) is None

    run(scenario, lambda job, publish: outcome(next(sizes)), keep_bytes=400)

    async def aged(queue):
        job = submit(queue, new())
        queue.keep(job)
        await job.wait()
        while queue.find(job.id) is not None:
            await asyncio.sleep(0.02)

    run(aged, keep_seconds=0.1)


def test_listeners_hear_everything_and_late_ones_too():
    def work(job, publish):
        for number in range(3):
            publish("tiles", {"n": number})
        return outcome()

    async def scenario(queue):
        job = submit(queue, new())
        early = [event.name async for _, event in job.follow()]
        late = [(number, event.name) async for number, event in job.follow(after=3)]
        return early, late

    early, late = run(scenario, work)
    assert early == ["queued", "tiles", "tiles", "tiles", "done"]
    assert late == [(3, "tiles"), (4, "done")]
