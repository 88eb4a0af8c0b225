"""Writing a file so that a crash leaves either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["leftovers", "remove_leftovers", "replacing", "sha256_of", "temporary_name", "write_atomic"]

_TEMPORARY = re.compile(r"\.([0-9a-f]{16})-[0-9a-f]{8}\.tmp")
_CHUNK = 1 << 20


@contextmanager
def replacing(path: Path, ready: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, else it is removed.

    The file is flushed to the disk before it is renamed. Raises `OSError` as the file system does.

    Args:
        path: the file to replace.
        ready: called with the complete temporary file just before it is renamed.
    """
    # In the same folder, because a rename is atomic within one file system only. Opened by the caller, so
    # that the file gets the permissions of any new file, not the private ones of `tempfile`.
    temporary = path.parent / temporary_name(path.name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if ready is not None:
            ready(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def temporary_name(name: str) -> str:
    """A new name for the temporary file that will be called ``name``, in the same folder.

    It says whose it is: what a killed process left can be told from anything else, see `leftovers`.
    """
    return f".{_tag(name)}-{uuid.uuid4().hex[:8]}.tmp"


def leftovers(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Those ``names`` of a folder's files that are temporary files of one of ``targets``, by `temporary_name`."""
    known = {_tag(target) for target in targets}
    found = (_TEMPORARY.fullmatch(name) for name in names)
    return [match.group() for match in found if match is not None and match.group(1) in known]


def remove_leftovers(targets: Iterable[Path]) -> int:
    """Remove the temporary files that killed processes left beside ``targets``; return how many."""
    folders: dict[Path, list[str]] = {}
    for target in targets:
        folders.setdefault(target.parent, []).append(target.name)
    removed = 0
    for folder, known in folders.items():
        for name in leftovers(os.listdir(folder), known) if folder.is_dir() else ():
            (folder / name).unlink(missing_ok=True)
            removed += 1
    return removed


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `OSError` as the file system does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _tag(name: str) -> str:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
