"""Picture file in, picture file out: which model, which size, in memory or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cadyq.cells import Levels
from cadyq.errors import ArgumentError, ImageError, MissingExtraError
from cadyq.functional.resize import imresize, resized_strips
from cadyq.io.files import replacing, sha256_of
from cadyq.io.images import (
    MAX_PIXELS,
    SUFFIXES,
    Header,
    Picture,
    check_output,
    probe_image,
    profile_if_fitting,
    read_image,
    save_picture,
)
from cadyq.io.shipped import default_model, model_path, plan_path, shipped_models, shipped_scales
from cadyq.io.stream import STREAMED_FORMATS, FileRows, has_vips, reduced, split_channels, write_rows
from cadyq.upscale import Figures, Mode, Model, OnPart, Progress, load

__all__ = ["STREAM_PIXELS", "PictureTask", "Wanted", "choose_model", "job_settings", "prepare"]

STREAM_PIXELS = 48_000_000
"""Output pixels from which on a picture is streamed, where libvips is installed and the format allows it."""

_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383}


@dataclass(frozen=True)
class Wanted:
    """What is asked for; None leaves the choice to the program.

    Attributes:
        model: name of a shipped model, or a model file.
        scale: enlargement factor; one that no shipped model has is made by the next larger one, and shrunk.
        width, height: exact size of the result in pixels; one of them keeps the proportions.
        quality: 1 to 100 for lossy formats.
        depth: 8 reduces 16 bits per channel to 8; 16 keeps what the file has.
        mode, tile, budget, threads: as of `Model.upscale`.
        max_pixels: width times height above which an input is refused.
    """

    model: str | None = None
    scale: float | None = None
    width: int | None = None
    height: int | None = None
    quality: int | None = None
    depth: int = 16
    mode: Mode = "tiles"
    tile: int | None = None
    budget: float = 0.0
    threads: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1_000_000:
                raise ArgumentError(name, value, "1 to 1000000 pixels")
        if self.scale is not None and not 1 <= self.scale <= 16:
            raise ArgumentError("scale", self.scale, "1 to 16")
        if self.scale is not None and (self.width or self.height):
            raise ArgumentError("scale", self.scale, "not to be given together with width or height")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ArgumentError("quality", self.quality, "1 to 100")
        if self.depth not in (8, 16):
            raise ArgumentError("depth", self.depth, "8 or 16")


@dataclass(frozen=True)
class PictureTask:
    """One picture file to be made; `prepare` makes it.

    Attributes:
        source, target: the files.
        wanted: what is asked for.
        header: what the source says about itself.
        model_name: the model, and ``why`` it was chosen.
        size: height and width of the result.
        notes: what the user should know, one sentence each.
    """

    source: Path
    target: Path
    wanted: Wanted
    header: Header
    model_name: str
    why: str
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides about the result besides the source; threads do not."""
        return {
            **_deciding(self.wanted),
            "model": _fingerprint(self.model_name),
            "streamed": self.is_streamed,
        }

    @property
    def format(self) -> str:
        """Format of the result."""
        return SUFFIXES[self.target.suffix.lower()]

    @property
    def is_streamed(self) -> bool:
        """Whether rows go out while they are computed."""
        scale = model(self.model_name).scale
        large = self.header.width * self.header.height * scale**2 > STREAM_PIXELS
        return large and self.wanted.mode == "tiles" and self.format in STREAMED_FORMATS and has_vips()

    def run(
        self, progress: Progress | None = None, ready: Callable[[Path], None] | None = None
    ) -> Mapping[str, Any]:
        """Make the file; what is returned is fit for JSON. ``ready`` is that of `replacing`.

        Raises:
            ImageError: the source is damaged, or the file cannot be written.
            ArgumentError: a setting does not fit the picture or the model.
        """
        try:
            with replacing(self.target, ready) as temporary:
                figures, notes = self.make(temporary, progress)
        except OSError as error:
            raise ImageError(f"{self.target} cannot be written: {error}") from error
        return {
            "width": self.size[1],
            "height": self.size[0],
            "model": self.model_name,
            "why": self.why,
            "seconds": round(figures.seconds, 3),
            "fqr": figures.fqr,
            "fqr_area": figures.fqr_area,
            "exited": figures.exited,
            "tile": figures.tile,
            "grid": list(figures.grid),
            "runtime": figures.runtime,
            "streamed": self.is_streamed,
            "notes": [*self.notes, *notes],
        }

    def make(
        self, path: Path, progress: Progress | None = None, on_part: OnPart | None = None
    ) -> tuple[Figures, tuple[str, ...]]:
        """Write the result to ``path``, whatever it is called; return what it cost, and further notes.

        Raises as `run` does, and `OSError` as the file system does. ``on_part`` is that of `Model.upscale`.
        """
        return (self._stream if self.is_streamed else self._in_memory)(path, progress, on_part)

    def read(self) -> Picture:
        """The decoded source. Raises as `read_image` does."""
        return read_image(self.source, self.wanted.max_pixels, deep=self.wanted.depth == 16)

    def _in_memory(
        self, path: Path, progress: Progress | None, on_part: OnPart | None
    ) -> tuple[Figures, tuple[str, ...]]:
        source, w = self.read(), self.wanted
        check_output(self.target.suffix, w.quality, source.alpha is not None)
        found = model(self.model_name).upscale(
            source,
            mode=w.mode,
            tile=w.tile,
            budget=w.budget,
            threads=w.threads,
            progress=progress,
            on_part=on_part,
        )
        picture = found.picture()
        if picture.pixels.shape[:2] != self.size:
            color, alpha = split_channels(imresize(found.pixels, self.size))
            picture = Picture(color, alpha, picture.is_gray, picture.icc, metadata=picture.metadata)
        save_picture(path, self.target.suffix, picture, w.quality)
        return found, source.notes

    def _stream(
        self, path: Path, progress: Progress | None, on_part: OnPart | None
    ) -> tuple[Figures, tuple[str, ...]]:
        w, header = self.wanted, self.header
        source = FileRows(self.source, w.depth)
        found = model(self.model_name).upscale_rows(
            source, tile=w.tile, budget=w.budget, threads=w.threads, progress=progress, on_part=on_part
        )
        rows: Iterable[Levels] = found.rows()
        if found.shape[:2] != self.size:
            rows = resized_strips(rows, found.shape[0], self.size)
        dtype = found.dtype
        if self.format == "JPEG" and dtype == np.uint16:
            rows, dtype = _shallow(rows), np.dtype(np.uint8)
        is_cmyk = header.mode == "CMYK"
        write_rows(
            path,
            self.format,
            (*self.size, found.shape[2]),
            dtype,
            rows,
            quality=w.quality,
            icc=None if is_cmyk else profile_if_fitting(header.icc, is_gray=source.is_gray),
            metadata=header.metadata.fitted(self.size[1], self.size[0]),
        )
        return found.figures(), ("CMYK was converted to RGB.",) if is_cmyk else ()


def prepare(source: Path, target: Path, wanted: Wanted) -> PictureTask:
    """Look at a picture file, choose the model and the size, and check that the result can be written.

    Raises:
        ImageError: the source is no picture, or too large. ArgumentError: what is wanted cannot be had.
        MissingExtraError: 16 bits per channel need libvips.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise ArgumentError("output", str(target), f"a suffix out of {', '.join(SUFFIXES)}", "add one")
    header = probe_image(source, wanted.max_pixels)
    file_format = SUFFIXES[target.suffix.lower()]
    if file_format == "JPEG" and header.has_alpha:
        raise ArgumentError("output", str(target), f"a format with transparency, as {source} has", "use .png")
    if header.is_deep and not header.is_gray and wanted.depth == 16 and not has_vips():
        raise MissingExtraError(
            f"{source} has 16 bits per channel, and libvips keeps them; install it with: "
            "pip install 'cadyq[photo]'; or reduce them with --depth 8"
        )
    name, why, notes = choose_model(header, wanted)
    size = _size(header, wanted, model(name).scale)
    largest = _LONGEST_SIDE.get(file_format)
    if largest is not None and max(size) > largest:
        found = f"{size[1]}x{size[0]} pixels in {target.name}"
        raise ArgumentError("output", found, f"at most {largest} a side, as {file_format} allows", "use .tif")
    if max(size[0] / header.height, size[1] / header.width) > model(name).scale:
        notes = (*notes, f"Beyond x{model(name).scale} it was enlarged by bicubic.")
    if header.is_deep and wanted.depth == 16 and file_format in ("JPEG", "WEBP"):
        notes = (*notes, f"16 bits per channel were reduced to 8, as {file_format} has.")
    return PictureTask(source, target, wanted, header, name, why, size, notes)


def choose_model(header: Header, wanted: Wanted) -> tuple[str, str, tuple[str, ...]]:
    """Name of the model for a picture, the reason for it, and notes.

    Raises `ArgumentError` where no shipped model enlarges enough, or ``wanted.model`` has another scale.
    """
    if wanted.model is not None:
        if wanted.scale is not None:
            load_scale = model(wanted.model).scale
            if load_scale != wanted.scale:
                raise ArgumentError(
                    "scale",
                    wanted.scale,
                    f"{load_scale}, which is what {wanted.model} does",
                    "omit one of both",
                )
        return wanted.model, "it was asked for", ()
    scales = shipped_scales()
    if not scales:
        return default_model(4), "", ()
    factor = _factor(header, wanted, 4 if 4 in scales else scales[-1])
    if wanted.scale is not None and factor > scales[-1]:
        raise ArgumentError(
            "scale", wanted.scale, f"at most {scales[-1]}, which shipped models do", "or give --width"
        )
    scale = next((s for s in scales if s >= factor), scales[-1])
    is_compressed = header.format == "JPEG"
    name = default_model(scale, photo=is_compressed)
    why = f"x{scale}"
    if is_compressed:
        why += ", for a JPEG" if "photo" in name else ", no photo network is shipped for a JPEG"
    notes: tuple[str, ...] = ()
    if scale > factor:
        notes = (f"It was made by a x{scale} network and shrunk to x{factor:g} by bicubic.",)
    return name, why, notes


@lru_cache(maxsize=4)
def model(name: str) -> Model:
    """A loaded model, kept for the next picture."""
    return load(name)


def job_settings(wanted: Wanted) -> Mapping[str, Any]:
    """All that decides about results besides the sources, without looking at one; fit for JSON.

    Where `prepare` would choose the model by the picture, all that it could choose are in it.

    Raises:
        ArgumentError: the model is not known.
    """
    names = shipped_models() if wanted.model is None else [wanted.model]
    return {**_deciding(wanted), "models": [_fingerprint(name) for name in names], "vips": has_vips()}


def _deciding(wanted: Wanted) -> dict[str, Any]:
    return {k: v for k, v in asdict(wanted).items() if k not in ("threads", "max_pixels", "model")}


@lru_cache(maxsize=16)
def _fingerprint(name: str) -> str:
    return sha256_of(plan_path(name) or model_path(name))


def _factor(header: Header, wanted: Wanted, usual: int) -> float:
    if wanted.width is None and wanted.height is None:
        return float(usual if wanted.scale is None else wanted.scale)
    across = 0.0 if wanted.width is None else wanted.width / header.width
    down = 0.0 if wanted.height is None else wanted.height / header.height
    return max(across, down)


def _size(header: Header, wanted: Wanted, scale: int) -> tuple[int, int]:
    """Height and width of the result."""
    factor = _factor(header, wanted, scale)
    height = wanted.height if wanted.height is not None else max(1, round(header.height * factor))
    width = wanted.width if wanted.width is not None else max(1, round(header.width * factor))
    return height, width


def _shallow(rows: Iterable[Levels]) -> Iterator[Levels]:
    return (reduced(part) for part in rows)
