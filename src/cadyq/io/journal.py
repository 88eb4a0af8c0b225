"""What a folder job has finished: one JSON object a line, in the output folder itself.

A line is written, and flushed to the disk, when an output is complete but still has its temporary name. So
whatever lies under a final name is either described by a line or is not this program's, at whatever moment a
process was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from cadyq.errors import ImageError
from cadyq.io.files import sha256_of

__all__ = ["JOURNAL_NAME", "Journal", "State", "lock"]

JOURNAL_NAME = ".cadyq.jsonl"

State: TypeAlias = Literal["missing", "done", "stale", "foreign"]
"""``done``: made from this input with these settings; ``stale``: made here from another input or with other
settings; ``foreign``: not made here, or changed since."""


class Journal:
    """The journal of an output folder, held by one process at a time; a context manager.

    The file is created with the first line. Raises `ImageError` if it cannot be read or written, or if another
    process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME
        self._folder = folder
        self._descriptor: int | None = None
        self._entries: dict[str, list[dict[str, Any]]] = {}  # the newest last

    def __enter__(self) -> Journal:
        if self.path.exists():
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def state(self, source: Path, target: Path, settings: str) -> State:
        """Tell what lies at ``target``; ``settings`` is a digest of all that decides about the result."""
        if not target.exists():
            return "missing"
        # The newest line may describe a file that was never given its name: then an older one holds.
        lines = self._entries.get(self._key(target), [])
        made = next((entry for entry in reversed(lines) if _is_same(target, entry["target"])), None)
        if made is None:
            return "foreign"
        same = made["settings"] == settings and _is_same(source, made["source"])
        return "done" if same else "stale"

    def recorder(self, source: Path, target: Path, settings: str) -> Callable[[Path], None]:
        """Return what is to be called with the complete temporary file of ``target`` before its renaming.

        The source is looked at now, so that a change during the work is noticed by the next run.
        """
        origin = _identity(source)

        def record(temporary: Path) -> None:
            key = self._key(target)
            made = _identity(temporary)
            self._append({"name": key, "target": made, "source": origin, "settings": settings})

        return record

    def _key(self, target: Path) -> str:
        return target.relative_to(self._folder).as_posix()

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            lock(self._descriptor)
            with self.path.open("rb") as file:
                lines = file.read().split(b"\n")
        except BlockingIOError:
            raise ImageError(f"{self._folder} is being written to by another process; wait for it") from None
        except OSError as error:
            raise ImageError(f"{self.path} cannot be used: {error.strerror or error}") from error
        for entry in map(_parsed, lines):
            if entry is not None:
                self._entries.setdefault(entry["name"], []).append(entry)
        if lines[-1]:
            # The process was killed in the middle of this line.
            self._write(b"\n")

    def _append(self, entry: dict[str, Any]) -> None:
        if self._descriptor is None:
            self._open()
        self._write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._entries.setdefault(entry["name"], []).append(entry)

    def _write(self, line: bytes) -> None:
        assert self._descriptor is not None
        end = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)  # a full disk may have taken half of the line
            raise ImageError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An entry, or None for a line that was cut off."""
    try:
        entry = json.loads(line)
        for side in ("target", "source"):
            _ = (int(entry[side]["size"]), int(entry[side]["mtime_ns"]), str(entry[side]["sha256"]))
        _ = (str(entry["name"]), str(entry["settings"]))
    except (ValueError, TypeError, KeyError):
        return None
    return dict(entry)


def _identity(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_same(path: Path, known: dict[str, Any]) -> bool:
    """Whether a file has the known content: by size and time at once, else by its hash (it may be a copy)."""
    try:
        stat = path.stat()
        if stat.st_size != known["size"]:
            return False
        return bool(stat.st_mtime_ns == known["mtime_ns"] or sha256_of(path) == known["sha256"])
    except OSError:
        return False


def lock(descriptor: int) -> None:
    """Hold a file until it is closed, or the process ends in whatever way; raises `BlockingIOError`."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
