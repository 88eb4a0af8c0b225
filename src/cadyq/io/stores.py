"""Folders that may lie anywhere: on a disk, or behind a URL that fsspec knows (``s3://``, ``sftp://``, ...).

Both kinds do the same few things by a file's name inside the folder. What is put there appears under its name
whole or not at all, whatever dies in the middle, and however many processes put the same name at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from cadyq.errors import ArgumentError, MissingExtraError
from cadyq.io.files import leftovers, remove_leftovers, replacing, sha256_of, temporary_name, write_atomic

__all__ = ["Entry", "LocalStore", "Store", "UrlStore", "is_url", "open_store", "url_parts"]

_CHUNK = 1 << 20

# What an upload to them has not finished is not there: a put is atomic, and a rename would be a copy.
_OBJECT_STORES = frozenset(
    ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2", "tos")
)

# What file systems call that which changes with a file's content, the surest first.
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated")


class Entry(NamedTuple):
    """What a store says about a file without reading it.

    Attributes:
        size: in bytes; -1 where it does not tell.
        stamp: something that changes when the file is written anew; "" where it has nothing of the kind.
    """

    size: int
    stamp: str


class Store(Protocol):
    """A folder, by the names of the files inside it (with ``/`` between folders).

    All but `shown` raise `OSError`, or what the library behind a URL raises, when something is wrong.
    """

    def shown(self, name: str) -> str:
        """What a user calls the file."""

    def look(self, name: str) -> Entry | None:
        """What there is to know without reading; None where no such file is."""

    def fetch(self, name: str, folder: Path) -> Path:
        """A local file of this content: the file itself, or a copy of the same name in ``folder``."""

    def sha256(self, name: str) -> str:
        """SHA-256 of the content, in hexadecimal."""

    def put(self, local: Path, name: str) -> Entry:
        """Give the content of ``local`` to ``name``, at once; folders in between are made."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where no such file is."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file as `put` does."""

    def remove_leftovers(self, names: Iterable[str]) -> None:
        """Remove the temporary files that killed processes left of ``names``.

        One that a living process is writing goes, too, and its `put` raises `FileNotFoundError`.
        """


def is_url(given: str) -> bool:
    """Whether it is a URL that does not simply name a local file."""
    return ("://" in given or "::" in given) and _local_path(given) is None


def open_store(given: str) -> Store:
    """Open the folder of a path or a URL; it need not exist.

    Raises:
        MissingExtraError: fsspec, or what it needs for this protocol, is not installed.
        ArgumentError: nothing is known about this protocol, or nobody answers.
    """
    if is_url(given):
        return UrlStore(given)
    return LocalStore(_local_path(given) or Path(given))


def url_parts(url: str) -> tuple[str, str, str]:
    """The link of a chain (``cache::s3://bucket/folder``, ``zip://folder::s3://bucket/a.zip``) that holds the path,
    without a slash in the end, between what is before and what is behind it."""
    links = url.split("::")
    nth = next((i for i, link in enumerate(links) if "://" in link), 0)
    path = links[nth] if links[nth].endswith("://") else links[nth].rstrip("/")
    return (
        "".join(f"{link}::" for link in links[:nth]),
        path,
        "".join(f"::{link}" for link in links[nth + 1 :]),
    )


class LocalStore:
    """A folder on a disk, see `Store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def look(self, name: str) -> Entry | None:
        try:
            return _entry(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def fetch(self, name: str, folder: Path) -> Path:
        return self.folder / name

    def sha256(self, name: str) -> str:
        return sha256_of(self.folder / name)

    def put(self, local: Path, name: str) -> Entry:
        target, made = self.folder / name, list[Entry]()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Looked at before it is renamed: afterwards it may be somebody else's.
        with replacing(target, lambda complete: made.append(_entry(complete))) as temporary:
            shutil.copyfile(local, temporary)
        return made[0]

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)

    def remove_leftovers(self, names: Iterable[str]) -> None:
        remove_leftovers(self.folder / name for name in names)


class UrlStore:
    """A folder behind a URL, see `Store`.

    On an object store a file is put directly: it appears when it has been transmitted completely, and what was
    not is never seen (a rename there would be a copy, at twice the traffic). Anywhere else it is written under a
    temporary name in the same folder and renamed. A file system that has neither is refused when something is to
    be put there: it renames by copying.

    Raises:
        MissingExtraError: fsspec, or what it needs for this protocol, is not installed.
        ArgumentError: nothing is known about this protocol, or nobody answers.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"fsspec is not installed, and {url} needs it; install it with: pip install 'cadyq[ray]'"
            ) from error
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtraError(f"{url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise ArgumentError("URL", url, "a protocol that fsspec knows", str(error)) from error
        except Exception as error:  # some protocols connect at once, and raise what they like
            why = f"{type(error).__name__}: {error}"
            raise ArgumentError("URL", url, "a place that answers", why) from error
        self._parts, self._root = url_parts(url), str(root).rstrip("/")
        innermost = self._files
        while innermost.protocol == "dir":  # only names: what counts is whose they are
            innermost = innermost.fs
        names = innermost.protocol if isinstance(innermost.protocol, tuple) else (innermost.protocol,)
        self._puts_at_once = bool(_OBJECT_STORES.intersection(names))
        self._renames = type(innermost).mv is not fsspec.AbstractFileSystem.mv

    def shown(self, name: str) -> str:
        before, path, behind = self._parts
        return (
            f"{before}{path}{'' if path.endswith('/') else '/'}{name}{behind}"
            if name
            else "".join(self._parts)
        )

    def look(self, name: str) -> Entry | None:
        self._files.invalidate_cache()
        try:
            known = self._files.info(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if known.get("type") == "directory":
            return None
        size = known.get("size")
        stamp = next((f"{key} {known[key]}" for key in _STAMPS if known.get(key)), "")
        return Entry(-1 if size is None else int(size), stamp)

    def fetch(self, name: str, folder: Path) -> Path:
        local = folder / posixpath.basename(name)
        self._files.get_file(self._at(name), str(local))
        return local

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(self._at(name), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def put(self, local: Path, name: str) -> Entry:
        if self._puts_at_once:
            self._files.put_file(str(local), self._at(name))
            found = self.look(name)
        else:
            with self._renamed_to(name) as temporary:
                self._files.put_file(str(local), self._at(temporary))
                found = self.look(temporary)
        if found is None:
            raise FileNotFoundError(f"{self.shown(name)} was removed while it was written")
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._at(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        if self._puts_at_once:
            self._files.pipe_file(self._at(name), content)
            return
        with self._renamed_to(name) as temporary:
            self._files.pipe_file(self._at(temporary), content)

    def remove_leftovers(self, names: Iterable[str]) -> None:
        if self._puts_at_once:
            return
        folders: dict[str, list[str]] = {}
        for name in names:
            folders.setdefault(posixpath.dirname(name), []).append(posixpath.basename(name))
        self._files.invalidate_cache()
        for folder, known in folders.items():
            try:
                there = self._files.ls(self._at(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for name in leftovers(map(posixpath.basename, there), known):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._at(posixpath.join(folder, name)))

    def find(self, pattern: str = "", recursive: bool = False) -> list[str]:
        """Names of all files inside, or of those that match a pattern, in a fixed order."""
        self._files.invalidate_cache()
        if pattern:
            found = self._files.glob(self._at(pattern))
        elif self._files.isfile(self._root):
            return [""]
        else:
            found = self._files.find(self._root, maxdepth=None if recursive else 1)
        # Some file systems give names with a slash before them, or the whole URL, some without.
        start = self._root.lstrip("/")
        names = (str(path).lstrip("/").removeprefix(start).lstrip("/") for path in found)
        return sorted(name for name in names if name)

    def check_writable(self) -> None:
        """Raise `ArgumentError` where nothing can be put whole or not at all."""
        if not self._puts_at_once and not self._renames:
            raise ArgumentError(
                "output",
                self.shown(""),
                "an object store, or a file system that can rename",
                "this one renames by copying, and a file that is half there could be seen",
            )

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    @contextlib.contextmanager
    def _renamed_to(self, name: str) -> Iterator[str]:
        """Yield the name of a temporary file that takes the place of ``name`` in the end."""
        folder, base = posixpath.split(name)
        temporary = posixpath.join(folder, temporary_name(base))
        self._files.makedirs(self._at(folder), exist_ok=True)
        try:
            yield temporary
            try:
                self._files.mv(self._at(temporary), self._at(name))
            except FileNotFoundError:
                raise
            except OSError:
                # Some servers do not rename onto a file. For a moment there is none then, but never a part of one.
                if self.look(name) is None:
                    raise
                self._files.rm_file(self._at(name))
                self._files.mv(self._at(temporary), self._at(name))
        except BaseException:
            with contextlib.suppress(Exception):
                self._files.rm_file(self._at(temporary))
            raise


def _local_path(given: str) -> Path | None:
    """The path in ``file://`` and ``local://`` URLs; None for anything else."""
    for scheme in ("file://", "local://"):
        if given.startswith(scheme) and "::" not in given:
            return Path(given.removeprefix(scheme))
    return None


def _entry(path: Path) -> Entry:
    found = os.stat(path)
    return Entry(found.st_size, str(found.st_mtime_ns))
