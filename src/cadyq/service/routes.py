"""The HTTP API; its description is served at /openapi.json."""

# Annotations are evaluated here on purpose: FastAPI reads them, and the choice of models is known at run time.

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from cadyq.service.catalog import Catalog
from cadyq.service.errors import ServiceError, documented
from cadyq.service.jobs import Job, Options, Outcome, State
from cadyq.service.metrics import Metrics
from cadyq.service.queue import Busy, JobQueue
from cadyq.service.settings import Settings
from cadyq.service.upload import drain, gone, read_body
from cadyq.service.work import MEDIA_TYPES

__all__ = ["api"]

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a PNG, JPEG, WebP, TIFF or AVIF file; which of them, they tell themselves",
        "content": dict.fromkeys(("application/octet-stream", *MEDIA_TYPES.values()), _BINARY),
    }
}
_FILE: dict[str, Any] = {
    "description": "The picture",
    "content": dict.fromkeys(MEDIA_TYPES.values(), _BINARY),
}
_LARGEST_BUDGET = 64.0


class ModelInfo(BaseModel):
    """A model that can be chosen."""

    name: str
    is_default: bool
    scale: int = Field(description="how many times wider and higher the result is")
    tile: int = Field(description="side of a tile in pixels of the given picture")
    candidate_bits: list[int] = Field(description="bit-widths among which every tile and site chooses")
    n_sites: int
    runtime: str
    license: str


class Limits(BaseModel):
    """What a request may measure."""

    max_upload: int = Field(description="bytes")
    max_pixels: int
    timeout: float = Field(description="seconds of work")


class Offer(BaseModel):
    """What the service offers."""

    models: list[ModelInfo]
    formats: list[str]
    limits: Limits


class JobFailure(BaseModel):
    kind: str
    message: str


class Figures(BaseModel):
    """What came out, and what it cost."""

    width: int
    height: int
    n_bytes: int
    fqr: float = Field(description="mean bits over sites and tiles")
    fqr_area: float = Field(description="the same, tiles counting by their area")
    exited: float = Field(description="share of the tiles that became bicubic")
    bitops_g: float
    seconds: float
    tile: int | None
    mean_bits: list[list[float]] = Field(description="mean bits of every tile, rows of columns")


class JobInfo(BaseModel):
    """Where a job stands."""

    id: str
    state: State
    options: dict[str, Any]
    figures: Figures | None = None
    error: JobFailure | None = None


def api(queue: JobQueue, catalog: Catalog, settings: Settings, metrics: Metrics) -> APIRouter:
    """Return the routes of a service."""
    router = APIRouter()
    model = Query(
        description="the model; see /v1/models. Without one the kind of picture decides",
        json_schema_extra={"enum": catalog.names},
        examples=[catalog.default],
    )
    budget = Query(
        ge=-_LARGEST_BUDGET,
        le=_LARGEST_BUDGET,
        allow_inf_nan=False,
        description="negative: fewer bits, positive: more",
    )
    format = Query(description="format of the result", json_schema_extra={"enum": list(MEDIA_TYPES)})
    Chosen = Annotated[str | None, model]
    Budget = Annotated[float, budget]
    Format = Annotated[str, format]

    def checked(model: str | None, budget: float, format: str) -> Options:
        for name, value, known in (("model", model, catalog.names), ("format", format, list(MEDIA_TYPES))):
            if value is not None and value not in known:
                raise ServiceError(
                    422, "argument", f"{name} is {value!r}, expected one of {', '.join(known)}"
                )
        return Options(model, budget, format)

    async def taken(request: Request, options: Options, watched: bool = False, keep: bool = True) -> Job:
        """Read the body and put a job into the queue."""
        try:
            with queue.place() as submit:
                job = Job(await read_body(request, settings), options, watched, keep)
                submit(job)
                return job
        except Busy:
            await drain(request, settings)
            raise
        except ClientDisconnect:
            raise ServiceError(408, "upload_timeout", "the connection ended within the body") from None

    def found(job_id: str) -> Job:
        job = queue.find(job_id)
        if job is None:
            raise ServiceError(
                404, "not_found", f"there is no job {job_id!r}; finished ones are kept for a while"
            )
        return job

    @router.post(
        "/v1/upscale",
        tags=["upscale"],
        summary="Upscale a picture and wait for it",
        response_class=Response,
        openapi_extra=_BODY,
        responses={200: _FILE, **documented(403, 408, 413, 422, 500, 501, 503, 504)},
    )
    async def upscale(
        request: Request, model: Chosen = None, budget: Budget = 0.0, format: Format = "png"
    ) -> Response:
        """The answer has the bytes that the command line writes. Closing the connection cancels the work."""
        job = await taken(request, checked(model, budget, format))
        waits = [asyncio.create_task(job.wait()), asyncio.create_task(gone(request))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            if not job.is_final:
                queue.cancel(job, "the client went away")
        if job.outcome is not None:
            return _file(job.outcome)
        raise _why_not(job)

    @router.post(
        "/v1/jobs",
        tags=["jobs"],
        summary="Hand in a picture, to be watched and fetched later",
        status_code=202,
        openapi_extra=_BODY,
        responses=documented(403, 408, 413, 422, 500, 503),
    )
    async def create(
        request: Request,
        response: Response,
        model: Chosen = None,
        budget: Budget = 0.0,
        format: Format = "png",
        keep: Annotated[bool, Query(description="go on when nobody listens to its events any more")] = True,
    ) -> JobInfo:
        job = await taken(request, checked(model, budget, format), watched=True, keep=keep)
        queue.keep(job)
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return _info(job)

    @router.get(
        "/v1/jobs/{job_id}", tags=["jobs"], summary="Where a job stands", responses=documented(403, 404, 422)
    )
    async def status(job_id: str) -> JobInfo:
        return _info(found(job_id))

    @router.delete(
        "/v1/jobs/{job_id}",
        tags=["jobs"],
        summary="Cancel and forget a job",
        status_code=204,
        response_class=Response,
        responses=documented(403, 404, 422),
    )
    async def cancel(job_id: str) -> Response:
        queue.forget(found(job_id))
        return Response(status_code=204)

    @router.get(
        "/v1/jobs/{job_id}/result",
        tags=["jobs"],
        summary="The larger picture",
        response_class=Response,
        responses={200: _FILE, **documented(403, 404, 409, 422, 500, 501, 503, 504)},
    )
    async def result(job_id: str) -> Response:
        job = found(job_id)
        if job.outcome is None:
            raise _why_not(job)
        return _file(job.outcome)

    @router.get(
        "/v1/jobs/{job_id}/bits",
        tags=["jobs"],
        summary="Bits of every tile, per site: rows of columns",
        responses=documented(403, 404, 409, 422, 500, 501, 503, 504),
    )
    async def bits(job_id: str) -> dict[str, list[list[int]]]:
        job = found(job_id)
        if job.outcome is None:
            raise _why_not(job)
        return job.outcome.bits

    @router.get(
        "/v1/jobs/{job_id}/events",
        tags=["jobs"],
        summary="What happens, as it happens (server-sent events)",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Events: queued {ahead}; started {width, height, scale, tile, rows, cols, "
                "candidate_bits, notes, preview}; tiles {box: [y0, y1, x0, x1] in pixels of the given picture, "
                "bits: mean bits per tile, preview: JPEG as data URL}; progress {done, total}; "
                "then one of done {figures}, failed {kind, message}, cancelled {kind, message}",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            **documented(403, 404, 422),
        },
    )
    async def events(
        job_id: str,
        last_event_id: Annotated[int, Header(ge=-1, le=10**9, description="go on after this event")] = -1,
    ) -> StreamingResponse:
        return StreamingResponse(
            _stream(found(job_id), last_event_id, queue, settings), media_type="text/event-stream"
        )

    @router.get("/v1/models", tags=["about"], summary="What is offered", responses=documented(403))
    async def models() -> Offer:
        described = await asyncio.to_thread(catalog.describe)
        limits = Limits(
            max_upload=settings.max_upload, max_pixels=settings.max_pixels, timeout=settings.timeout
        )
        return Offer(models=[ModelInfo(**one) for one in described], formats=list(MEDIA_TYPES), limits=limits)

    @router.get("/healthz", tags=["about"], summary="Whether the process lives", responses=documented(403))
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get(
        "/readyz", tags=["about"], summary="Whether a job would be taken now", responses=documented(403, 503)
    )
    async def ready() -> dict[str, str]:
        if not queue.is_open:
            raise Busy(5, "the queue is full, or the service is shutting down")
        return {"status": "ready"}

    @router.get(
        "/metrics",
        tags=["about"],
        summary="Figures for Prometheus",
        response_class=Response,
        responses={
            200: {"description": "The figures", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **documented(403),
        },
    )
    async def figures() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    return router


async def _stream(job: Job, after: int, queue: JobQueue, settings: Settings) -> AsyncIterator[str]:
    job.listeners += 1
    try:
        async for item in job.follow(after + 1):
            if item is None:
                yield ": still here\n\n"
            else:
                number, event = item
                yield f"id: {number}\nevent: {event.name}\ndata: {event.data}\n\n"
    finally:
        job.listeners -= 1

        def leave() -> None:
            if not job.listeners and not job.is_final:
                queue.cancel(job, "nobody listened any more")

        if not job.keep and not job.is_final:
            # Not at once: a browser that lost the connection comes back within seconds.
            asyncio.get_running_loop().call_later(settings.grace, leave)


def _info(job: Job) -> JobInfo:
    failure = job.failure
    return JobInfo(
        id=job.id,
        state=job.state,
        options=job.options._asdict(),
        figures=None if job.outcome is None else Figures(**job.outcome.figures),
        error=None if failure is None else JobFailure(kind=failure.kind, message=failure.message),
    )


def _file(outcome: Outcome) -> Response:
    figures = outcome.figures
    suffix = next(name for name, kind in MEDIA_TYPES.items() if kind == outcome.media_type)
    headers = {
        "Content-Disposition": f'inline; filename="upscaled.{suffix}"',
        "X-Cadyq-FQR": str(figures["fqr"]),
        "X-Cadyq-Seconds": str(figures["seconds"]),
    }
    return Response(outcome.content, media_type=outcome.media_type, headers=headers)


def _why_not(job: Job) -> ServiceError:
    if job.failure is not None:
        return ServiceError.of(job.failure)
    return ServiceError(409, "unfinished", f"the job is {job.state.value}; its events tell when it is done")
