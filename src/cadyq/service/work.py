"""One job, in a thread: bytes of a picture in, bytes of the larger one out, and parts on the way."""

from __future__ import annotations

import base64
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadyq.errors import CadyqError
from cadyq.functional.tiling import Grid
from cadyq.io.images import read_image
from cadyq.io.shipped import model_name
from cadyq.io.stream import reduced
from cadyq.pictures import PictureTask, Wanted, model, prepare
from cadyq.service.catalog import Catalog
from cadyq.service.jobs import Job, Options, Outcome
from cadyq.service.settings import Settings
from cadyq.upscale import Figures, Part

__all__ = ["MEDIA_TYPES", "Cancelled", "OutOfTime", "upscale_job"]

MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "tif": "image/tiff",
    "avif": "image/avif",
}
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
    """Do a job as the command line would; ``publish`` is called with events as they occur.

    Raises:
        Cancelled, OutOfTime: between two parts of the picture.
        CadyqError: as `prepare` and `PictureTask.make`.
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
    with tempfile.TemporaryDirectory(prefix="cadyq-") as name:
        folder = Path(name)
        # The names appear in messages.
        source, target = folder / "the picture", folder / f"the result.{job.options.format}"
        source.write_bytes(job.content)
        try:
            task = prepare(source, target, _wanted(job.options, catalog, settings))
            publish("started", _description(task, job.watched))
            on_part = _teller(task, publish) if job.watched else None
            figures, _ = task.make(target, check, on_part)
        except CadyqError as error:
            error.args = (str(error).replace(f"{folder}{os.sep}", ""),)
            raise
        check()
        content = target.read_bytes()
    bits = {site: grid.tolist() for site, grid in figures.bits.items()}
    return Outcome(content, MEDIA_TYPES[job.options.format], _figures(task, figures, content), bits)


def _wanted(options: Options, catalog: Catalog, settings: Settings) -> Wanted:
    return Wanted(
        model=catalog.source(options.model),
        budget=options.budget,
        threads=settings.threads,
        max_pixels=settings.max_pixels,
    )


def _description(task: PictureTask, with_preview: bool) -> dict[str, Any]:
    found, header = model(task.model_name), task.header
    grid = Grid(header.height, header.width, found.tile)
    said: dict[str, Any] = {
        "width": header.width,
        "height": header.height,
        "scale": found.scale,
        "tile": found.tile,
        "rows": grid.rows,
        "cols": grid.cols,
        "candidate_bits": found.candidate_bits,
        "model": model_name(task.model_name),
        "notes": list(task.notes),
    }
    if with_preview:
        pixels = read_image(task.source, task.wanted.max_pixels).pixels
        said["preview"] = _preview(pixels, _reduction(header.height, header.width), header.is_gray)
    return said


def _teller(task: PictureTask, publish: Publish) -> Callable[[Part], None]:
    found, header = model(task.model_name), task.header
    factor = _reduction(header.height * found.scale, header.width * found.scale)
    body = [site.name for site in found.sites if site.kind == "body"]

    def tell(part: Part) -> None:
        mean = np.mean([part.bits[name] for name in body], axis=0, dtype=np.float64)
        preview = _preview(reduced(part.pixels), factor, header.is_gray)
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


def _figures(task: PictureTask, figures: Figures, content: bytes) -> dict[str, Any]:
    bits = np.mean(list(figures.bits.values()), axis=0, dtype=np.float64)
    return {
        "width": task.size[1],
        "height": task.size[0],
        "n_bytes": len(content),
        "fqr": round(figures.fqr, 4),
        "fqr_area": round(figures.fqr_area, 4),
        "exited": round(figures.exited, 4),
        "bitops_g": round(figures.bitops / 1e9, 4),
        "seconds": round(figures.seconds, 3),
        "tile": figures.tile,
        "mean_bits": bits.round(3).tolist(),
    }
