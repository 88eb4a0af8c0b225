"""Download of data sets: checked, resumable, and never half there.

Layout, as everybody has it: ``ROOT/DIV2K_train_HR/0001.png`` to ``0800.png``, ``ROOT/DIV2K_valid_HR/0801.png`` to
``0900.png``. An archive is fetched to ``ROOT/NAME.zip.part`` and goes on from there after an interruption; when its
checksum is right it is unpacked beside its final place and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cadyq.data.sets import list_pictures
from cadyq.errors import ArgumentError, DataError

__all__ = ["ARCHIVES", "Archive", "download"]

Progress = Callable[[int, int], None]

_CHUNK = 1 << 20
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Archive:
    """A zip file of pictures.

    Attributes:
        folder: what it holds, and where it goes.
        url: where it is.
        md5: its checksum, as its publishers' users know it.
        n_pictures: how many pictures it holds.
    """

    folder: str
    url: str
    md5: str
    n_pictures: int


_DIV2K = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "DIV2K": (
        Archive("DIV2K_train_HR", f"{_DIV2K}DIV2K_train_HR.zip", "bdc2d9338d4e574fe81bf7d158758658", 800),
        Archive("DIV2K_valid_HR", f"{_DIV2K}DIV2K_valid_HR.zip", "9fcdda83005c5e5997799b69f955ff88", 100),
    )
}
"""Archives by data set. DIV2K is made available for academic research only."""


def download(
    name: str, root: str | os.PathLike[str], progress: Progress = lambda done, total: None
) -> list[Path]:
    """Fetch a data set into ``root`` and return its folders; what is there already is not fetched again.

    Args:
        name: key of `ARCHIVES`.
        root: the folder of all data sets; made if missing.
        progress: called with bytes done and in all (as many as done, if the server does not say), per archive.

    Raises:
        ArgumentError: an unknown name.
        DataError: the server cannot be reached, the checksum is wrong, or the disk is full.
    """
    if name not in ARCHIVES:
        raise ArgumentError("name", name, f"one of {', '.join(ARCHIVES)}")
    return [fetch(archive, Path(root), progress) for archive in ARCHIVES[name]]


def fetch(archive: Archive, root: Path, progress: Progress = lambda done, total: None) -> Path:
    """Fetch and unpack one archive; errors as `download`."""
    target = root / archive.folder
    if target.is_dir() and len(list_pictures(target)) == archive.n_pictures:
        return target
    if target.exists() and any(target.iterdir()):
        raise DataError(
            f"{target} holds something else than the {archive.n_pictures} pictures of {archive.folder}; move it away"
        )
    part = root / f"{archive.folder}.zip.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _transfer(archive.url, part, progress)
        found = _md5(part)
        if found != archive.md5:
            part.unlink()
            raise DataError(
                f"{archive.url} has the MD5 {found}, expected {archive.md5}; the file was removed, try again"
            )
        _unpack(part, target, archive)
        part.unlink()
    except urllib.error.HTTPError as error:
        raise DataError(f"{archive.url} answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{archive.url} cannot be fetched ({reason}); run again to go on from {part}"
        ) from error
    except OSError as error:
        raise DataError(f"{archive.folder} cannot be written to {root}: {error}") from error
    return target


def _transfer(url: str, part: Path, progress: Progress) -> None:
    """Append to ``part`` what is missing of it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is missing; the checksum decides
            return
        raise
    with response:
        if have and response.status != 206:  # the server starts again from the beginning
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress(have, total or have)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(path: Path, target: Path, archive: Archive) -> None:
    """Unpack the pictures only, flat, and rename the whole folder when it is complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.infolist():
                # Only the last part of a name is used, so that no archive can write elsewhere.
                name = PurePosixPath(member.filename).name
                if member.is_dir() or name.startswith("."):
                    continue
                with file.open(member) as source, (temporary / name).open("wb") as out:
                    shutil.copyfileobj(source, out, _CHUNK)
        found = len(list_pictures(temporary))
        if found != archive.n_pictures:
            raise DataError(f"{archive.url} holds {found} pictures, expected {archive.n_pictures}")
        if target.exists():
            target.rmdir()  # empty, as checked before
        os.replace(temporary, target)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive.url} is no zip file: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
