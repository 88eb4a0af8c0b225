"""Errors as clients see them: one shape, a word for programs, a sentence for people, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cadyq.service.jobs import Failure
from cadyq.service.queue import Busy

__all__ = ["Problem", "ServiceError", "add_handlers", "documented"]

_MEANINGS = {
    403: "The request comes from a page of another origin, or addresses the service by a foreign name",
    404: "There is no such job; finished ones are kept for a while only",
    405: "The method is not one of this address",
    408: "The body did not come in time",
    409: "The job has no result yet",
    413: "The body is too large",
    422: "The picture or an option is not acceptable",
    500: "An error of the service",
    501: "The model needs an extra that is not installed",
    503: "Too many requests wait, or the job was cancelled; Retry-After says when to try again",
    504: "The job took too long",
}


class ProblemDetail(BaseModel):
    """What went wrong."""

    kind: str = Field(description="for programs, for example picture, argument, busy", examples=["picture"])
    message: str = Field(description="for people: what was given, what was expected, what to do")


class Problem(BaseModel):
    """The body of every answer that is no success."""

    error: ProblemDetail


class ServiceError(Exception):
    """Ends a request with a `Problem`."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, headers

    @classmethod
    def of(cls, failure: Failure) -> ServiceError:
        headers = {"Retry-After": "5"} if failure.status == 503 else None
        return cls(failure.status, failure.kind, failure.message, headers)

    def response(self) -> JSONResponse:
        content = {"error": {"kind": self.kind, "message": self.message}}
        return JSONResponse(content, self.status, self.headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for a route's description."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": Problem, "description": _MEANINGS[status]}
        if status == 503:
            seconds = {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
            found[status]["headers"] = {"Retry-After": seconds}
    return found


def add_handlers(app: FastAPI) -> None:
    """Give every error of the app the one shape."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return error.response()

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return ServiceError(503, "busy", str(error), {"Retry-After": str(error.retry_after)}).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return ServiceError(422, "argument", "; ".join(map(_sentence, error.errors()))).response()

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        kinds = {404: "not_found", 405: "method"}
        kind = kinds.get(error.status_code, "request")
        return ServiceError(error.status_code, kind, str(error.detail), error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return ServiceError(500, "internal", "an error of the service; its log says more").response()


def _sentence(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"][1:]) or "request"
    return f"{name} is {error.get('input')!r}: {error['msg']}"
