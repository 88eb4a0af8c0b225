"""Bodies of requests, read within limits of size and time; and whether the client is still there."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from cadyq.service.errors import ServiceError
from cadyq.service.settings import Settings

__all__ = ["drain", "gone", "read_body"]


async def read_body(request: Request, settings: Settings) -> bytes:
    """Return the body.

    Raises:
        ServiceError: 413 it is too large, 408 it did not come in time, 422 it is empty.
        ClientDisconnect: the client went away.
    """
    limit = settings.max_upload
    too_large = ServiceError(413, "too_large", f"the body is larger than {limit} bytes; send a smaller file")
    if _announced(request) > limit:
        await drain(request, settings)
        raise too_large
    chunks, size = [], 0

    async def read() -> None:
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)

    try:
        await asyncio.wait_for(read(), settings.upload_timeout)
    except asyncio.TimeoutError:
        message = f"the body did not come within {settings.upload_timeout:g} s"
        raise ServiceError(408, "upload_timeout", message) from None
    if not size:
        raise ServiceError(422, "picture", "the body is empty, expected the bytes of a picture file")
    return b"".join(chunks)


async def drain(request: Request, settings: Settings) -> None:
    """Read a body that is refused and throw it away, up to the limits.

    A client that is still sending when the connection closes may never see the answer. One that asked first
    (``Expect: 100-continue``) sends nothing unless it is read.
    """
    if "expect" in request.headers or _announced(request) > 4 * settings.max_upload:
        return

    async def read() -> None:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > settings.max_upload:
                return

    try:
        await asyncio.wait_for(read(), min(10.0, settings.upload_timeout))
    except (asyncio.TimeoutError, ClientDisconnect):
        return


async def gone(request: Request) -> None:
    """Return when the client has closed the connection; call it after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _announced(request: Request) -> int:
    value = request.headers.get("content-length", "0")
    return int(value) if value.isascii() and value.isdigit() else 0
