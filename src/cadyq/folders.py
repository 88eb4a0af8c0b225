"""Many pictures into a folder: which ones, where to, what is done already; one bad file stops nothing.

The work itself is handed in as a function: this module knows files, but neither pictures nor networks.
A job that was killed at any moment is finished by running it again; the result is the same to the last byte.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from cadyq.errors import ArgumentError, CadyqError, ImageError
from cadyq.io.files import remove_leftovers
from cadyq.io.images import SUFFIXES
from cadyq.io.journal import Journal

__all__ = [
    "HOPELESS",
    "Event",
    "Job",
    "Outcome",
    "Task",
    "check_targets",
    "find_jobs",
    "is_picture",
    "pictures_in",
    "run_jobs",
]

HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""After these, every further picture would fail as well, after minutes of work each."""

Event: TypeAlias = dict[str, Any]
"""What happened, fit for JSON; ``event`` is ``start``, ``progress``, ``done``, ``skipped``, ``failed`` or
``end``."""


class Job(NamedTuple):
    """A picture file, and the file it becomes."""

    source: Path
    target: Path


class Task(Protocol):
    """The work on one picture."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides about the result besides the source, fit for JSON."""

    def run(self, progress: Callable[[int, int], None], ready: Callable[[Path], None]) -> Mapping[str, Any]:
        """Do it, and return what there is to say; ``ready`` gets the complete temporary file."""


@dataclass
class Outcome:
    """How a folder job ended.

    Attributes:
        done: pictures made now.
        skipped: pictures that were there already.
        failed: exit codes of the pictures that failed, in order.
    """

    done: int = 0
    skipped: int = 0
    failed: tuple[int, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or that of the first failure."""
        return self.failed[0] if self.failed else 0

    def event(self, seconds: float) -> Event:
        """The last event of a job."""
        return {
            "event": "end",
            "n_done": self.done,
            "n_skipped": self.skipped,
            "n_failed": len(self.failed),
            "exit_code": self.exit_code,
            "seconds": round(seconds, 3),
        }


def find_jobs(
    inputs: Sequence[str | os.PathLike[str]],
    output: Path,
    suffix: Callable[[Path], str],
    recursive: bool = False,
) -> list[Job]:
    """Pair every picture with the file it becomes in the folder ``output``.

    Args:
        inputs: files, folders and glob patterns (``**`` is any depth). Hidden files are left out.
        output: the folder to write to; what lies in it is no input.
        suffix: the suffix of a source's output, such as ".png".
        recursive: also take folders inside folders; their tree is kept.

    Raises:
        ArgumentError: an input holds no picture, or two would become one file.
    """
    jobs: list[Job] = []
    for given in inputs:
        found = pictures_in(os.fspath(given), output, recursive)
        jobs += [Job(p, output / p.relative_to(base).parent / f"{p.stem}{suffix(p)}") for p, base in found]
    check_targets(jobs)
    return jobs


def pictures_in(given: str, output: Path | None, recursive: bool = False) -> list[tuple[Path, Path]]:
    """Pictures of a file, folder or pattern, in a fixed order, each with the folder that its place counts from.

    Args:
        given: as of `find_jobs`.
        output: a folder to leave out, if there is one.
        recursive: also take folders inside folders.

    Raises:
        ArgumentError: there is none.
    """
    found = list(_pictures(given, output, recursive))
    if not found:
        remedy = "" if recursive else "pass --recursive if they lie in folders inside it"
        raise ArgumentError("input", given, "a folder or pattern that holds pictures", remedy)
    return found


def check_targets(jobs: Iterable[Job]) -> None:
    """Refuse jobs of which two write one file, or one writes a file that another reads.

    Raises `ArgumentError`.
    """
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise ArgumentError("output", str(target), f"one picture, not both {taken[target]} and {source}")
        taken[target] = source
    sources = {_file_id(source) for source in taken.values()} - {None}
    for target in taken:
        if _file_id(target) in sources:
            raise ArgumentError("output", str(target), "not one of the inputs", "choose another output")


def run_jobs(
    jobs: Sequence[Job],
    output: Path,
    prepare: Callable[[Job], Task],
    emit: Callable[[Event], None],
    overwrite: bool = False,
) -> Outcome:
    """Do what is not done yet, one picture after the other.

    An output that was made from its input with the same settings is skipped, one that was made here from an
    older input or with other settings is replaced, and any other file is left alone unless ``overwrite``.

    Args:
        jobs: of `find_jobs`.
        output: the folder that all targets lie in; its journal is kept there, see `cadyq.io.journal`.
        prepare: looks at a picture and says how it will be made; cheap.
        emit: called with every event.
        overwrite: make everything anew, and replace whatever lies there.

    Raises:
        ImageError: another process writes to the folder, or the disk is full; what is done stays done.
    """
    remove_leftovers(job.target for job in jobs)
    outcome, clock = Outcome(), _Clock(jobs)
    with Journal(output) as journal:
        emit({"event": "start", "n_images": len(jobs), "output": str(output)})
        for index, job in enumerate(jobs, start=1):
            here = {"index": index, "source": str(job.source), "target": str(job.target)}
            try:
                said = _one(job, journal, prepare, overwrite, partial(_progress, emit, clock, job, here))
            except CadyqError as error:
                outcome.failed += (error.exit_code,)
                clock.finished(job, worked=False)
                emit({"event": "failed", **here, "message": str(error), "exit_code": error.exit_code})
                if getattr(error.__cause__, "errno", None) in HOPELESS:
                    raise ImageError(
                        f"stopped after {outcome.done} of {len(jobs)} pictures: {error}; "
                        "when that is mended, the same command goes on from here"
                    ) from error
                continue
            outcome.skipped += said is None
            outcome.done += said is not None
            clock.finished(job, worked=said is not None)
            emit({"event": "skipped" if said is None else "done", **here, **(said or {})})
        emit(outcome.event(clock.elapsed()))
    return outcome


def _one(
    job: Job,
    journal: Journal,
    prepare: Callable[[Job], Task],
    overwrite: bool,
    on_share: Callable[[float], None],
) -> Mapping[str, Any] | None:
    """Make one picture; None where it is there already."""
    task = prepare(job)
    settings = hashlib.sha256(json.dumps(task.settings, sort_keys=True).encode()).hexdigest()
    state = journal.state(job.source, job.target, settings)
    if not overwrite:
        if state == "done":
            return None
        if state == "foreign":
            raise ArgumentError(
                "output",
                str(job.target),
                "no file that something else has written or changed",
                "pass --overwrite to replace it",
            )
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{job.target.parent} cannot be created: {error.strerror or error}") from error
    ready = journal.recorder(job.source, job.target, settings)
    return task.run(lambda done, total: on_share(done / total), ready)


def _progress(
    emit: Callable[[Event], None], clock: _Clock, job: Job, here: Mapping[str, Any], share: float
) -> None:
    emit({"event": "progress", **here, "share": round(share, 4), "eta_seconds": clock.eta(job, share)})


class _Clock:
    """Time that is left, by the sizes of the files: what a picture takes is about proportional to them."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._sizes = {job: _size(job.source) for job in jobs}
        self._left, self._worked = sum(self._sizes.values()), 0
        self._start = self._last = time.monotonic()
        self._spent = 0.0

    def finished(self, job: Job, worked: bool) -> None:
        now = time.monotonic()
        if worked:
            self._worked += self._sizes[job]
            self._spent += now - self._last
        self._left -= self._sizes[job]
        self._last = now

    def eta(self, job: Job, share: float) -> float | None:
        """Seconds that are left when ``share`` of a picture is done; None before anything is."""
        here = share * self._sizes[job]
        worked = self._worked + here
        spent = self._spent + time.monotonic() - self._last
        return round(max(0.0, self._left - here) * spent / worked, 1) if worked else None

    def elapsed(self) -> float:
        return time.monotonic() - self._start


def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture, by its name alone."""
    return name[0] != "." and Path(name).suffix.lower() in SUFFIXES


def _pictures(given: str, output: Path | None, recursive: bool) -> Iterator[tuple[Path, Path]]:
    path = Path(given)
    if path.is_dir():
        for folder, names, files in os.walk(path):
            here = Path(folder)
            names[:] = sorted(n for n in names if recursive and n[0] != "." and not _same(here / n, output))
            yield from ((here / n, path) for n in sorted(files) if is_picture(n))
    elif glob.has_magic(given) and not path.exists():
        parts = path.parts
        n_plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = Path(*parts[:n_plain])
        matches = map(Path, sorted(glob.glob(given, recursive=True)))
        yield from (
            (m, base) for m in matches if m.is_file() and is_picture(m.name) and output not in m.parents
        )
    else:
        yield path, path.parent


def _same(one: Path, other: Path | None) -> bool:
    return other is not None and other.exists() and one.samefile(other)


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _size(path: Path) -> int:
    try:
        return max(1, path.stat().st_size)
    except OSError:
        return 1
