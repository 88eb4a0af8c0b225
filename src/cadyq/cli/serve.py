"""`cadyq serve`."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import webbrowser
from typing import TYPE_CHECKING, Any

from cadyq.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from cadyq.service.settings import Settings

__all__ = ["add"]

_MIB = 2**20


def add(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="upscale over HTTP, with a page to look at",
        description="Serve an HTTP API (described at /openapi.json) and a page, to this machine alone unless "
        "--host says otherwise. Needs: pip install 'cadyq[web]'.",
    )
    serve.add_argument("--open", action="store_true", help="open the page in the browser")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8765, help="port, 0 for any free one (default: 8765)")
    serve.add_argument(
        "--model", action="append", help="model to offer, repeatable; the first is the default (default: all)"
    )
    serve.add_argument("--threads", type=int, help="CPU threads (default: all)")
    serve.add_argument("--workers", type=int, help="pictures worked on at a time (default: 2)")
    serve.add_argument("--queue", type=int, help="requests that may wait (default: 16)")
    serve.add_argument("--timeout", type=float, help="seconds of work for a picture (default: 900)")
    serve.add_argument("--max-upload", type=float, help="largest file, in MiB (default: 64)")
    serve.add_argument("--max-pixels", type=int, help="largest picture (default: 12500000)")
    serve.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from cadyq.service.app import create_app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cadyq"):
            raise
        raise MissingExtraError(
            f"{error.name} is not installed, and the service needs it; install it with: pip install 'cadyq[web]'"
        ) from error

    app = create_app(_settings(options))
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"cadyq: {address} (Ctrl-C ends it)", flush=True)
    if not _is_loopback(options.host):
        print(
            "cadyq: everyone who can reach this address can use the service: it has no passwords and no TLS; "
            "put a reverse proxy before it",
            file=sys.stderr,
        )
    if options.open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from cadyq.service.settings import LOOPBACK, Settings

    names = ("threads", "workers", "queue", "timeout", "max_pixels")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.max_upload is not None:
        given["max_upload"] = int(options.max_upload * _MIB)
    hosts = (*LOOPBACK, options.host) if _is_loopback(options.host) else None
    return Settings(models=tuple(options.model or ()), hosts=hosts, **given)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _listen(host: str, port: int) -> socket.socket:
    """Open the port ourselves, so that a taken one is told in one line."""
    if not 0 <= port <= 65535:
        raise ArgumentError("port", port, "0 to 65535")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ArgumentError("host", host, "a name or address of this machine", str(error)) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(target)
        listener.listen(128)  # at once: whoever reads the address may connect before the server is ready
    except OSError as error:
        listener.close()
        what = f"{host}:{port}"
        raise ArgumentError("host and port", what, "an address that is free", error.strerror or "") from error
    return listener
