"""One job, in a thread: bytes of a picture in, bytes of the larger one out, and parts on the way."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadyq.errors import ArgumentError
from cadyq.functional.tiling import Grid
from cadyq.io.images import Picture, encode_image, read_image
from cadyq.service.catalog import Catalog
from cadyq.service.jobs import Job, Outcome
from cadyq.service.settings import Settings
from cadyq.upscale import Model, Part, Result

__all__ = ["MEDIA_TYPES", "Cancelled", "OutOfTime", "upscale_job"]

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "tif": "image/tiff"}
"""Formats of results, as on the command line, and their media types."""

Publish = Callable[[str, dict[str, Any]], None]

# Previews are for the eye and for the wire: the whole picture's longer side is about this long.
_PREVIEW_SIDE = 1600
_PREVIEW_QUALITY = 85


class Cancelled(Exception):
    """The client does not want the result any more."""


class OutOfTime(Exception):
    """The job took longer than the service allows."""


def upscale_job(job: Job, catalog: Catalog, settings: Settings, publish: Publish) -> Outcome:
    """Do a job; ``publish`` is called with events as they occur.

    Raises:
        Cancelled, OutOfTime: between two parts of the picture.
        CadyqError: as `Model.upscale`, `read_image` and `encode_image`.
    """
    deadline = time.monotonic() + settings.timeout

    def check(done: int = 0, total: int = 0) -> None:
        if job.cancelled.is_set():
            raise Cancelled
        if time.monotonic() > deadline:
            raise OutOfTime
        if total:
            publish("progress", {"done": done, "total": total})

    check()
    model = catalog.get(job.options.model)
    picture = read_image(job.content, settings.max_pixels)
    suffix = f".{job.options.format}"
    if picture.alpha is not None and suffix == ".jpg":
        raise ArgumentError("format", "jpg", "a format with transparency, as the picture has it", "use png")
    publish("started", _description(model, picture, job.watched))
    on_part = _teller(model, picture, publish) if job.watched else None
    result = model.upscale(
        picture, budget=job.options.budget, threads=settings.threads, progress=check, on_part=on_part
    )
    check()
    content = encode_image(result.picture(), suffix)
    return Outcome(content, MEDIA_TYPES[job.options.format], _figures(result, content), _bits(result))


def _description(model: Model, picture: Picture, with_preview: bool) -> dict[str, Any]:
    height, width = picture.pixels.shape[:2]
    grid = Grid(height, width, model.tile)
    found: dict[str, Any] = {
        "width": width,
        "height": height,
        "scale": model.scale,
        "tile": model.tile,
        "rows": grid.rows,
        "cols": grid.cols,
        "candidate_bits": sorted({bits for site in model.sites for bits in site.candidates}),
        "notes": list(picture.notes),
    }
    if with_preview:
        found["preview"] = _preview(picture.pixels, _reduction(height, width), picture.is_gray)
    return found


def _teller(model: Model, picture: Picture, publish: Publish) -> Callable[[Part], None]:
    height, width = picture.pixels.shape[:2]
    factor = _reduction(height * model.scale, width * model.scale)
    body = [site.name for site in model.sites if site.kind == "body"]

    def tell(part: Part) -> None:
        mean = np.mean([part.bits[name] for name in body], axis=0, dtype=np.float64)
        preview = _preview(part.pixels, factor, picture.is_gray)
        publish("tiles", {"box": part.box, "bits": mean.round(3).tolist(), "preview": preview})

    return tell


def _reduction(height: int, width: int) -> int:
    return -(-max(height, width) // _PREVIEW_SIDE)


def _preview(pixels: NDArray[np.uint8], factor: int, is_gray: bool) -> str:
    """A JPEG as a data URL; parts begin on multiples of the scale, so at most a pixel is lost between them."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).reduce(factor)
    buffer = io.BytesIO()
    (image.convert("L") if is_gray else image).save(buffer, "JPEG", quality=_PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figures(result: Result, content: bytes) -> dict[str, Any]:
    height, width = result.pixels.shape[:2]
    bits = np.mean(list(result.bits.values()), axis=0, dtype=np.float64)
    return {
        "width": width,
        "height": height,
        "n_bytes": len(content),
        "fqr": round(result.fqr, 4),
        "fqr_area": round(result.fqr_area, 4),
        "exited": round(result.exited, 4),
        "bitops_g": round(result.bitops / 1e9, 4),
        "seconds": round(result.seconds, 3),
        "tile": result.tile,
        "mean_bits": bits.round(3).tolist(),
    }


def _bits(result: Result) -> dict[str, list[list[int]]]:
    return {name: grid.tolist() for name, grid in result.bits.items()}
