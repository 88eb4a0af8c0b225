"""Running ffmpeg: found, started, fed, and its complaints turned into ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cadyq.errors import ImageError, MissingExtraError

__all__ = ["piped", "probe_json", "run"]


def run(arguments: Sequence[str], what: str) -> None:
    """Run ffmpeg to its end.

    Raises:
        MissingExtraError: it is not installed. ImageError: it failed; ``what`` says at what.
    """
    done = subprocess.run(
        [*_base(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        raise _failed(what, done.stderr)


def probe_json(path: Path, *arguments: str) -> dict[str, Any]:
    """Return what ffprobe says of a file.

    Raises:
        MissingExtraError: it is not installed. ImageError: the file is missing or no video.
    """
    if not path.is_file():
        raise ImageError(f"{path} does not exist, or is no file")
    command = [_found("ffprobe"), "-v", "error", "-print_format", "json", *arguments, "-i", _local(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise _failed(f"{path} is not a video that can be read", done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def piped(arguments: Sequence[str], what: str, *, writes: bool) -> Iterator[IO[bytes]]:
    """Run ffmpeg with its standard input (``writes``) or output as a file for the caller.

    On leaving, the input is closed and ffmpeg waited for; if the caller fails, it is killed.

    Raises:
        MissingExtraError, ImageError: as `run`.
    """
    # Its own session: Ctrl-C is for us to handle, not for it. Complaints go to a file, which never blocks.
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [*_base(), *arguments],
            stdin=subprocess.PIPE if writes else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if writes else subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        pipe = process.stdin if writes else process.stdout
        assert pipe is not None
        try:
            try:
                yield pipe
                pipe.close()
            except BrokenPipeError:
                pass  # it ended early, and says why
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                pipe.close()
        if code:
            complaints.seek(0)
            raise _failed(what, complaints.read())


def local_input(path: Path) -> list[str]:
    """Arguments for a file of this machine: nothing in its name or content can make ffmpeg open an address."""
    return ["-protocol_whitelist", "file,pipe", "-i", _local(path)]


def _local(path: Path) -> str:
    return f"file:{path}"


def _base() -> list[str]:
    return [_found("ffmpeg"), "-hide_banner", "-nostdin", "-v", "error", "-y"]


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise MissingExtraError(
            f"{program} is not installed, and videos need it; install ffmpeg 5.1 or newer "
            "(apt install ffmpeg, brew install ffmpeg, winget install ffmpeg)"
        )
    return path


def _failed(what: str, complaints: bytes) -> ImageError:
    lines = complaints.decode(errors="replace").strip().splitlines()
    return ImageError(f"{what}: {lines[-1] if lines else 'ffmpeg gave no reason'}")
