"""Writing a file so that a crash leaves either the old one or the new one, never half of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_atomic"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, else it is removed.

    The file is flushed to the disk before it is renamed. Raises `OSError` as the file system does.
    """
    # In the same folder, because a rename is atomic within one file system only. Opened by the caller, so
    # that the file gets the permissions of any new file, not the private ones of `tempfile`.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
