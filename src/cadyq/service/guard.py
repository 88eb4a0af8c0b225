"""What stands before the application: foreign pages are kept out, answers carry safe headers, all is counted."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cadyq.service.errors import ServiceError
from cadyq.service.metrics import Metrics
from cadyq.service.settings import Settings

__all__ = ["Guard"]

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware.

    A page of another origin cannot read our answers, but it could make a browser on this machine send us
    work, or point a name of its own at us; both are refused (403).
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            reason = self._refusal(scope)
            app = self._app if reason is None else ServiceError(403, "forbidden", reason).response()
            await app(scope, receive, watched)
        finally:
            # The route's pattern, not the address: a client must not be able to make up ever new series.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        allowed = self._settings.hosts
        host = _without_port(headers.get("host", ""))
        if allowed is not None and host not in allowed:
            return f"the service does not answer to the name {host!r}; open it as http://127.0.0.1"
        if scope["method"] not in ("GET", "HEAD") and headers.get("sec-fetch-site") in (
            "cross-site",
            "same-site",
        ):
            return "pages of other origins may not use the service"
        return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
