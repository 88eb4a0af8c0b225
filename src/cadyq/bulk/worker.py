"""One picture after the other, wherever a worker lives: look, fetch, upscale, put, record."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from cadyq import __version__
from cadyq.bulk.order import Item, Order, digest_of
from cadyq.bulk.records import Known, Made, described, is_same, read_records, write_records
from cadyq.errors import ArgumentError, CadyqError, ImageError
from cadyq.folders import HOPELESS, Event
from cadyq.io.files import sha256_of
from cadyq.io.journal import lock
from cadyq.io.stores import LocalStore, Store, open_store
from cadyq.pictures import prepare

__all__ = ["Worker"]

_T = TypeVar("_T")
_Access: TypeAlias = Callable[[], _T]

_FIRST_WAIT = 0.5  # seconds before the first retry; each further one waits twice as long
_PERMANENT = (PermissionError, IsADirectoryError, NotADirectoryError, TypeError, ValueError)
_SCRATCH = "cadyq-bulk-"
_YOUNG = 60.0  # seconds


class Worker:
    """Does items of an order. It keeps nothing between them but the loaded models: it may die at any moment."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._source: Store
        self._output: Store
        try:
            self._source, self._output = open_store(order.source), open_store(order.output)
            self._refusal: CadyqError | None = self._other_than_ordered()
        except (
            CadyqError
        ) as error:  # told with the first picture, since a worker that raises here is not heard
            self._source, self._output = LocalStore(Path(order.source)), LocalStore(Path(order.output))
            self._refusal = CadyqError(f"{socket.gethostname()}: {error}")
            self._refusal.exit_code = error.exit_code
        _remove_dead_scratch()

    def __call__(self, item: Item) -> Event:
        """Make one picture, if it is not there; return what happened.

        The event is ``done``, ``skipped`` or ``failed``, or ``stop`` where every further picture would fail, too.
        Nothing is raised: a worker that does not return has died.
        """
        here = self._here(item)
        try:
            if self._refusal is not None:
                raise self._refusal
            said = self._make(item)
        except CadyqError as error:
            is_hopeless = error is self._refusal or getattr(error.__cause__, "errno", None) in HOPELESS
            kind = "stop" if is_hopeless else "failed"
            return {"event": kind, **here, "message": str(error), "exit_code": error.exit_code}
        except Exception as error:  # of a library: it must not take the other pictures along
            message = f"{here['source']}: {type(error).__name__}: {error}"
            return {"event": "failed", **here, "message": message, "exit_code": CadyqError.exit_code}
        return {"event": "skipped" if said is None else "done", **here, **(said or {})}

    def given_up(self, item: Item, n_deaths: int) -> Event:
        """The event of a picture over which so many workers died."""
        here = self._here(item)
        message = f"{here['source']}: {n_deaths} workers died over it; it may need more memory than they have"
        return {"event": "failed", **here, "message": message, "exit_code": CadyqError.exit_code}

    def _here(self, item: Item) -> Event:
        return {
            "source": self._source.shown(item.source),
            "target": self._output.shown(item.target),
            "worker": self._name,
        }

    def _make(self, item: Item) -> dict[str, Any] | None:
        """Make one picture; None where it is there already."""
        order, source, output = self._order, self._source, self._output
        from_, to = source.shown(item.source), output.shown(item.target)
        origin = self._reading(from_, lambda: source.look(item.source))
        if origin is None:
            raise ImageError(f"{from_} is not there")
        there = self._reading(to, lambda: output.look(item.target))
        old: Made | None = None
        if there is not None:
            records = self._reading(to, lambda: read_records(output, item.target))
            old = self._reading(to, lambda: described(output, item.target, there, records))
        if not order.overwrite and there is not None:
            if old is None:
                raise ArgumentError(
                    "output",
                    to,
                    "no file that something else has written or changed",
                    "pass --overwrite to replace it",
                )
            past = old.source
            if old.settings == order.settings and self._reading(
                from_, lambda: is_same(source, item.source, origin, past)
            ):
                return None
        with _scratch() as folder:
            # Two folders: a picture that keeps its name must not replace its own source.
            (folder / "in").mkdir()
            (folder / "out").mkdir()
            fetched = self._reading(from_, lambda: source.fetch(item.source, folder / "in"))
            result = folder / "out" / PurePosixPath(item.target).name
            try:
                known = Known(*origin, sha256_of(fetched))
                said = prepare(fetched, result, order.wanted).run()
                new = Known(result.stat().st_size, "", sha256_of(result))
            except CadyqError as error:
                raise _renamed(error, {str(fetched): from_, str(result): to}) from error.__cause__
            except OSError as error:
                raise ImageError(f"{from_} cannot be worked on: {error}") from error
            made = Made(known, order.settings, new)
            before = () if old is None else (old,)
            self._writing(to, lambda: write_records(output, item.target, (*before, made)))
            put = self._writing(to, lambda: output.put(result, item.target))
            # Now it can be recognized without being read.
            settled = made._replace(target=new._replace(stamp=put.stamp))
            self._writing(to, lambda: write_records(output, item.target, (settled,)))
        return dict(said)

    def _other_than_ordered(self) -> CadyqError | None:
        """What on this machine would lead to other results than on the one that gave the order.

        Raises `CadyqError` where nothing can be made here at all.
        """
        host = socket.gethostname()
        if self._order.version != __version__:
            return CadyqError(
                f"cadyq on {host} is {__version__}, expected {self._order.version}; install the same everywhere"
            )
        if digest_of(self._order.wanted) != self._order.settings:
            return CadyqError(
                f"{host} has another model of this name, or lacks an extra; install the same everywhere"
            )
        return None

    def _reading(self, shown: str, access: _Access[_T]) -> _T:
        return self._patiently(access, f"{shown} cannot be read", (*_PERMANENT, FileNotFoundError))

    def _writing(self, shown: str, access: _Access[_T]) -> _T:
        # What is not found while writing is a temporary file that another job has taken for a leftover.
        return self._patiently(access, f"{shown} cannot be written", _PERMANENT)

    def _patiently(self, access: _Access[_T], what: str, permanent: tuple[type[Exception], ...]) -> _T:
        """Try again after errors that may go away. Raises `ImageError` in the end.

        Libraries behind URLs raise what they like, so what is permanent is named here, not what is not.
        """
        wait = _FIRST_WAIT
        for left in range(self._order.retries, -1, -1):
            try:
                return access()
            except CadyqError:
                raise
            except Exception as error:
                is_permanent = isinstance(error, permanent) or getattr(error, "errno", None) in HOPELESS
                if is_permanent or not left:
                    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise ImageError(f"{what}: {detail}") from error
            time.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")


def _renamed(error: CadyqError, names: dict[str, str]) -> CadyqError:
    """The same error, in which local copies are called what the user calls them."""
    message = str(error)
    for local, shown in names.items():
        message = message.replace(local, shown)
    renamed = CadyqError(message)
    renamed.exit_code = error.exit_code
    return renamed


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a new folder on this machine's disk, locked as long as this process works in it."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as name:
        descriptor = os.open(Path(name) / "lock", os.O_RDWR | os.O_CREAT)
        try:
            lock(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)


def _remove_dead_scratch() -> None:
    """Remove the folders of workers that were killed on this machine; nobody holds their locks."""
    if os.name == "nt":
        return  # locks that end with their process are missing there
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        try:
            if time.time() - folder.stat().st_mtime < _YOUNG:
                continue  # it may have been made, but not locked yet
            descriptor = os.open(folder / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            lock(descriptor)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)
