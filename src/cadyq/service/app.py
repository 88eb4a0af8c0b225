"""The application: routes, guard, page, and a queue that lives as long as it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from starlette.routing import Route

from cadyq import __version__
from cadyq.service.catalog import Catalog
from cadyq.service.errors import add_handlers
from cadyq.service.guard import Guard
from cadyq.service.jobs import Job, Outcome
from cadyq.service.metrics import Metrics
from cadyq.service.queue import JobQueue
from cadyq.service.routes import api
from cadyq.service.settings import Settings
from cadyq.service.work import Publish, upscale_job

__all__ = ["create_app"]

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/view.js": ("view.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Everything the page consists of. Addresses are looked up here; none is ever made into a path."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Return the service as an ASGI application.

    Raises:
        ArgumentError: a model is unknown. CheckpointError: the default model cannot be read.
    """
    settings = settings or Settings()
    catalog, metrics = Catalog(settings.models), Metrics()
    catalog.get(catalog.default)

    def work(job: Job, publish: Publish) -> Outcome:
        return upscale_job(job, catalog, settings, publish)

    queue = JobQueue(work, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await queue.start()
        try:
            yield
        finally:
            await asyncio.shield(queue.stop())

    app = FastAPI(
        title="cadyq",
        version=__version__,
        description="Image super-resolution that spends bits only where an image needs them.",
        # The viewers of the description load scripts from elsewhere; /openapi.json itself is ours.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    add_handlers(app)
    app.include_router(api(queue, catalog, settings, metrics))
    _add_page(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app


def _add_page(app: FastAPI) -> None:
    folder = files("cadyq.service").joinpath("page")
    for address, (name, media_type) in _PAGE.items():
        app.router.routes.append(Route(address, _constant(folder.joinpath(name).read_bytes(), media_type)))


def _constant(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return serve
