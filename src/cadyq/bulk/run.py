"""A whole bulk job: here, one picture after the other, or by workers of a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, cast

from cadyq.bulk.order import Item, Order
from cadyq.bulk.records import record_name
from cadyq.bulk.worker import Worker
from cadyq.errors import ArgumentError, CadyqError, ImageError, MissingExtraError
from cadyq.folders import Event, Outcome
from cadyq.io.stores import open_store

__all__ = ["Cluster", "run_bulk"]

LOCAL = "local"
"""The address that starts a cluster on this machine, for this job only."""

# Ray keeps something per block; many pictures share one, so that this stays small for millions of them.
_MOST_BLOCKS = 4096
_STORE_BYTES = 128 << 20  # only names and events pass through Ray, never pictures


@dataclass(frozen=True)
class Cluster:
    """Where the workers live, and how many there are.

    Attributes:
        address: of a running Ray cluster ("auto", "host:port", "ray://host:port"), or "local".
        workers: pictures worked on at a time, each by a process with a model of its own; None takes as many as
            the cluster's CPUs allow.
        threads: CPUs of a worker.
    """

    address: str = LOCAL
    workers: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100_000:
                raise ArgumentError(name, value, "1 or more")


def run_bulk(
    order: Order, items: Sequence[Item], emit: Callable[[Event], None], cluster: Cluster | None = None
) -> Outcome:
    """Do what is not done yet, in any order.

    What is done is recorded beside the results (`cadyq.bulk.records`), by whoever does it. So a job that was
    killed at any moment, as a whole or in parts, is finished by running it again, with or without a cluster and
    by any number of workers, to the same last byte.

    Args:
        order: what is wanted.
        items: of `find_items`.
        emit: called with every event, see `cadyq.folders`; ``index`` counts what is finished, and ``worker``
            says by whom.
        cluster: where to work; None works here, without Ray.

    Raises:
        MissingExtraError: Ray is not installed.
        ArgumentError: there is no cluster at this address.
        CadyqError: the disk is full, the cluster went away, or a machine of it has another version or model;
            what is done stays done.
    """
    store = open_store(order.output)
    with _told(f"{order.output} cannot be used"):
        store.remove_leftovers([n for item in items for n in (item.target, record_name(item.target))])
    outcome, begin = Outcome(), time.monotonic()
    emit({"event": "start", "n_images": len(items), "output": order.output})
    events = _here(order, items) if cluster is None else _on_ray(order, items, cluster)
    first = begin
    with contextlib.closing(events):
        for index, event in enumerate(events, start=1):
            kind = event["event"]
            if kind == "stop":
                raise _stopped(event, outcome.done, len(items))
            outcome.done += kind == "done"
            outcome.skipped += kind == "skipped"
            if kind == "failed":
                outcome.failed += (event["exit_code"],)
            emit({"event": kind, "index": index, **{k: v for k, v in event.items() if k != "event"}})
            now = time.monotonic()
            if outcome.done == 1 and kind == "done":
                first = now  # before it workers were starting; the pace is that of those after it
            pace = (now - first) / (outcome.done - 1) if outcome.done > 1 else None
            left = None if pace is None else round(pace * (len(items) - index), 1)
            emit({"event": "progress", "index": index, "share": 1.0, "eta_seconds": left})
    n_told = outcome.done + outcome.skipped + len(outcome.failed)
    if n_told != len(items):
        raise CadyqError(f"{n_told} of {len(items)} pictures were reported; the same command does the others")
    emit(outcome.event(time.monotonic() - begin))
    return outcome


class Attempts:
    """Counts how often workers began a picture that is not finished; an actor of its own on the cluster.

    Ray begins again whatever a dead worker had before it, for ever. Where the picture itself is what kills its
    workers, by the memory it takes, somebody has to remember.
    """

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, target: str) -> int:
        """Return how often it was begun before."""
        self._begun[target] += 1
        return self._begun[target] - 1

    def end(self, target: str) -> None:
        """Forget it."""
        self._begun.pop(target, None)


class RayWorker:
    """A `Worker` as Ray Data calls it: a batch of names in, a batch of events (JSON) out."""

    def __init__(self, order: Order, attempts: Any) -> None:
        self._order, self._attempts, self._ray = order, attempts, _import_ray()
        self._worker = Worker(order)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        items = map(Item, batch["source"].tolist(), batch["target"].tolist())
        return {"event": [json.dumps(self._one(item)) for item in items]}

    def _one(self, item: Item) -> Event:
        n_deaths = self._ray.get(self._attempts.begin.remote(item.target))
        event = (
            self._worker.given_up(item, n_deaths) if n_deaths > self._order.retries else self._worker(item)
        )
        self._attempts.end.remote(item.target)
        return event


def _here(order: Order, items: Iterable[Item]) -> Generator[Event, None, None]:
    worker = Worker(order)
    yield from map(worker, items)


def _on_ray(order: Order, items: Sequence[Item], cluster: Cluster) -> Generator[Event, None, None]:
    """Yield the event of every item, as they come."""
    ray = _import_ray()
    with _connected(ray, cluster):
        workers = min(cluster.workers or _workers_that_fit(ray, cluster), len(items))
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # Here Ray Data's own defaults are wanted: dead workers are replaced, and what they had is begun again.
        dataset = ray.data.from_items(
            [item._asdict() for item in items], override_num_blocks=min(len(items), _MOST_BLOCKS)
        ).map_batches(
            RayWorker,
            fn_constructor_kwargs={"order": order, "attempts": attempts},
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=cluster.threads,
        )
        try:
            for row in dataset.iter_rows():
                yield json.loads(row["event"])
        except ray.exceptions.RayError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise CadyqError(
                f"the Ray cluster gave up: {last}; every machine of it needs this version of cadyq; when that is "
                "mended, the same command goes on from here"
            ) from error


@contextlib.contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """Use the cluster that this process is connected to already, or else connect, and disconnect in the end."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == LOCAL:
        n_cpus = (cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads)) * cluster.threads
        options.update(num_cpus=n_cpus, include_dashboard=False, object_store_memory=_STORE_BYTES)
    try:
        ray.init(address=cluster.address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentError(
            "ray", cluster.address, '"local", or the address of a running cluster', first
        ) from error
    try:
        with contextlib.redirect_stdout(cast(TextIO, _StdoutOfOneThread())):
            yield
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            ray.shutdown()


class _StdoutOfOneThread:
    """What stands in for `sys.stdout`: what any other thread prints there goes to the error stream.

    Ray reports dead workers on the standard output, whatever it is told, and our own output is for machines to read.
    """

    def __init__(self) -> None:
        self._stdout, self._thread = sys.stdout, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout if threading.get_ident() == self._thread else sys.stderr, name)


def _workers_that_fit(ray: Any, cluster: Cluster) -> int:
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    n_workers = sum(int(cpus // cluster.threads) for cpus in nodes)
    if not n_workers:
        found = (
            f"{cluster.threads}, and the largest machine of the cluster has {max(nodes, default=0):g} CPUs"
        )
        raise ArgumentError("threads", found, "fewer", "or pass --workers to wait for machines")
    return n_workers


def _import_ray() -> Any:
    # What it says about itself would hide what we say about pictures. Who wants it sets these two.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Nothing is reported to anybody about who uses Ray for what.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed, and --ray needs it; install it with: pip install 'cadyq[ray]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Libraries behind URLs raise what they like; a user gets one line."""
    try:
        yield
    except CadyqError:
        raise
    except Exception as error:
        raise ImageError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


def _stopped(event: Event, n_done: int, n_all: int) -> CadyqError:
    error = CadyqError(
        f"stopped after {n_done} of {n_all} pictures: {event['message']}; "
        "when that is mended, the same command goes on from here"
    )
    error.exit_code = event["exit_code"]
    return error
