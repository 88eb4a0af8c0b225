"""Limits of the service; every default is safe on a machine of 8 GB that others cannot reach."""

from __future__ import annotations

from dataclasses import dataclass

from cadyq.errors import ArgumentError

__all__ = ["LOOPBACK", "Settings"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine that only itself can reach."""


@dataclass(frozen=True)
class Settings:
    """What the service offers and allows.

    Attributes:
        models: names of shipped models or model files that clients may choose from, the default first; none
            are all shipped ones. Clients name them by name (files: by stem), never by path.
        max_upload: bytes of a request's body.
        max_pixels: pixels of a picture; checked before it is decoded.
        queue: requests that may wait; one more is answered 503 with ``Retry-After``.
        workers: requests worked on at a time. The engine runs one after another on all threads, so a second
            one reads and writes its file meanwhile; it costs its memory.
        threads: CPU threads of the engine, None for all.
        timeout: seconds that a request may be worked on.
        upload_timeout: seconds within which a request's body must have come.
        keep_seconds: how long a finished job can be fetched.
        keep_bytes: bytes of finished jobs above which the oldest go first; the newest always stays.
        grace: seconds after which a job nobody listens to any more is cancelled.
        hosts: names by which a browser may address the service (keeps pages of other origins out by way of a
            name that they point here); None for any.
    """

    models: tuple[str, ...] = ()
    max_upload: int = 64 * 2**20
    max_pixels: int = 12_500_000
    queue: int = 16
    workers: int = 2
    threads: int | None = None
    timeout: float = 900.0
    upload_timeout: float = 60.0
    keep_seconds: float = 600.0
    keep_bytes: int = 512 * 2**20
    grace: float = 5.0
    hosts: tuple[str, ...] | None = LOOPBACK

    def __post_init__(self) -> None:
        for name in ("max_upload", "max_pixels", "queue", "workers", "timeout", "upload_timeout"):
            value = getattr(self, name)
            if not value > 0:
                raise ArgumentError(name, value, "more than 0")
