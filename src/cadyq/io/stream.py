"""Pictures read and written row by row through libvips: for 16 bits per channel, and for what exceeds the memory.

libvips is an extra (``cadyq[photo]``), imported when it is needed. Rows come in and go out from top to bottom;
whoever writes hands over an iterator, which libvips pulls while it compresses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import TiffImagePlugin, TiffTags

from cadyq.cells import Levels
from cadyq.errors import ArgumentError, ImageError, MissingExtraError
from cadyq.functional.alpha import FILL_CELL, fill_transparent
from cadyq.io.metadata import Metadata, add_exif_to_tiff

__all__ = ["STREAMED_FORMATS", "FileRows", "RowReader", "has_vips", "write_rows"]

STREAMED_FORMATS = ("PNG", "TIFF", "JPEG")
"""Formats that can be written while they are computed."""

_BIGTIFF_BYTES = 1 << 32
_LOADERS = ("png", "jpeg", "webp", "tiff", "heif")
_READ_AT_ONCE = 64
_ROWS_OF_A_STRIP = 16


def vips() -> Any:
    """The module pyvips. Raises `MissingExtraError` where it, or libvips, is not installed."""
    # libvips then drops its warnings; what cannot be read is an error beside them.
    os.environ.setdefault("VIPS_WARNING", "1")
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            "this picture needs libvips (16 bits per channel, or too large for the memory); "
            "install it with: pip install 'cadyq[photo]'"
        ) from error
    # pyvips hands warnings to Python. There, Python may collect a damaged picture, which warns when it is closed; for
    # GLib a message within a message is fatal: the process aborts.
    pyvips._remove_log_handler()
    # Nothing is read twice, so libvips' cache of results would only fill the memory.
    pyvips.cache_set_max(0)
    return pyvips


def has_vips() -> bool:
    """Whether libvips is installed."""
    try:
        vips()
    except MissingExtraError:
        return False
    return True


class RowReader:
    """A picture file whose rows are decoded when they are asked for, upright and in RGB or gray.

    Args:
        source: a path, or the content of a file.

    Attributes:
        height, width, channels: of the upright picture; 1 or 3 channels, one more with opacity.
        dtype: uint8 or uint16.
        bits: bits per channel that the file states.

    Raises:
        MissingExtraError: libvips is not installed. ImageError: not a picture, or damaged.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        pyvips = vips()
        self._error = pyvips.Error
        self._name = "" if isinstance(source, bytes) else f"{os.fspath(source)} "
        options = {"fail_on": "truncated"}
        try:
            if isinstance(source, bytes):
                image = pyvips.Image.new_from_buffer(source, "", access="sequential", **options)
            else:
                path = os.fspath(source)
                image = pyvips.Image.new_from_file(path, access="sequential", **options)
                if image.get_typeof("orientation") and image.get("orientation") > 4:
                    # Turning needs all rows at once; libvips then decodes into a temporary file of its own.
                    image = pyvips.Image.new_from_file(path, **options)
            self._open(image.autorot())
        except pyvips.Error as error:
            raise ImageError(f"{self._name}is damaged or cut off: {_first_line(error)}") from error

    def _open(self, image: Any) -> None:
        # libvips knows many more formats, and not all of its readers are made for hostile files.
        loader = str(image.get("vips-loader"))
        if not loader.startswith(_LOADERS):
            raise ImageError(
                f"{self._name}is not a picture that can be read, expected PNG, JPEG, WebP, TIFF or AVIF"
            )
        self.bits = image.get("bits-per-sample") if image.get_typeof("bits-per-sample") else 8
        if image.format not in ("uchar", "ushort"):
            raise ImageError(
                f'{self._name}has pixels of the kind "{image.format}", expected 8 or 16 bits per channel'
            )
        deep = image.format == "ushort"
        if image.interpretation == "cmyk":
            image = image.icc_transform("srgb", embedded=True, depth=16 if deep else 8)
        self.dtype = np.dtype(np.uint16 if deep else np.uint8)
        self.channels = min(image.bands, 4)
        image = image[: self.channels] if image.bands > 4 else image
        self.width, self.height = image.width, image.height
        self._region = vips().Region.new(image)

    def read(self, top: int, bottom: int) -> Levels:
        """Rows ``top`` to ``bottom`` (not included), ``(rows, width, channels)``; only ever further down."""
        parts = []
        for y in range(top, bottom, _READ_AT_ONCE):
            n = min(_READ_AT_ONCE, bottom - y)
            try:
                data = self._region.fetch(0, y, self.width, n)
            except self._error as error:
                raise ImageError(f"{self._name}is damaged or cut off: {_first_line(error)}") from error
            parts.append(np.frombuffer(data, self.dtype).reshape(n, self.width, self.channels))
        return np.concatenate(parts)


class FileRows:
    """A picture file as `cadyq.upscale` reads it: RGB rows, hidden colors filled, opacity beside them.

    Args:
        source: as of `RowReader`.
        depth: 8 reduces 16 bits per channel to 8.

    Attributes:
        shape: height and width.
        dtype: uint8 or uint16.
        is_gray, has_alpha: what the file's channels are.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, depth: int = 16) -> None:
        self._reader = RowReader(source)
        self.shape = (self._reader.height, self._reader.width)
        self._reduce = depth == 8 and self._reader.dtype == np.uint16
        self.dtype = np.dtype(np.uint8) if self._reduce else self._reader.dtype
        self.is_gray, self.has_alpha = self._reader.channels < 3, self._reader.channels % 2 == 0
        self._kept = np.empty((0, self.shape[1], self._reader.channels), self.dtype)
        self._top = 0

    def read(self, top: int, bottom: int) -> Levels:
        """Rows of RGB, ``(rows, width, 3)``."""
        if not self.has_alpha:
            return split_channels(self._rows(top, bottom))[0]
        # A filled color depends on its aligned square and the eight around it.
        first = max(0, (top // FILL_CELL - 1) * FILL_CELL)
        last = min(self.shape[0], (-(-bottom // FILL_CELL) + 1) * FILL_CELL)
        rgb, alpha = split_channels(self._rows(first, last))
        assert alpha is not None
        return fill_transparent(rgb, alpha)[top - first : bottom - first]

    def alpha(self, top: int, bottom: int) -> Levels:
        """Rows of opacity, ``(rows, width)``."""
        return np.ascontiguousarray(self._rows(top, bottom)[..., -1])

    def forget(self, top: int) -> None:
        """Rows above ``top`` will not be read again."""
        # What opacity is filled from reaches further up.
        top = max(0, (top // FILL_CELL - 1) * FILL_CELL) if self.has_alpha else top
        self._kept = self._kept[max(0, top - self._top) :].copy()
        self._top = max(self._top, top)

    def _rows(self, top: int, bottom: int) -> Levels:
        end = self._top + len(self._kept)
        if bottom > end:
            more = self._reader.read(end, bottom)
            self._kept = np.concatenate([self._kept, reduced(more) if self._reduce else more])
        return self._kept[top - self._top : bottom - self._top]


def split_channels(pixels: Levels) -> tuple[Levels, Levels | None]:
    """Take ``(H, W, 1 to 4)`` apart into RGB ``(H, W, 3)`` and opacity ``(H, W)`` or None."""
    channels = pixels.shape[2]
    color = pixels[..., :1].repeat(3, axis=2) if channels < 3 else pixels[..., :3]
    alpha = np.ascontiguousarray(pixels[..., -1]) if channels in (2, 4) else None
    return np.ascontiguousarray(color), alpha


def reduced(levels: Levels) -> Levels:
    """Reduce 0..65535 to 0..255, rounded to the nearest."""
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def write_rows(
    path: Path,
    file_format: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    rows: Iterable[Levels],
    *,
    quality: int | None = None,
    icc: bytes | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Write a picture from an iterator of its rows, which is pulled while the file grows.

    Args:
        path: the file to write (not atomic: the caller does that).
        file_format: ``PNG``, ``TIFF``, ``JPEG`` or ``AVIF``; the last one is held in memory.
        shape: height, width and channels (1 or 3, one more with opacity).
        dtype: uint8 or uint16; AVIF keeps 12 bits of the latter, JPEG 8.
        rows: pieces of the picture from top to bottom, ``(rows, width, channels)``.
        quality: 1 to 100 for lossy formats.
        icc: the color profile.
        metadata: already fitted to the size.

    Raises:
        ImageError: the file cannot be written. What the iterator raises is passed on.
    """
    pyvips = vips()
    height, width, channels = shape
    feed = _Feed(rows, shape, dtype)
    image = feed.image(pyvips)
    deep = dtype == np.uint16
    names = ("grey16", "rgb16") if deep else ("b-w", "srgb")
    metadata = metadata or Metadata()
    image = image.copy(interpretation=names[channels > 2], **_resolution(metadata))
    blobs = {"icc-profile-data": icc, "xmp-data": metadata.xmp, "exif-data": metadata.exif}
    for name, value in blobs.items():
        if value is not None:
            image.set_type(pyvips.GValue.blob_type, name, value)
    try:
        _save(image, path, file_format, quality, height * width * channels * dtype.itemsize)
        feed.check()
        if file_format == "TIFF" and metadata.exif is not None:
            add_exif_to_tiff(path, metadata.exif)
    except pyvips.Error as error:
        feed.check()
        cause = OSError(28, "No space left on device") if "No space left" in str(error) else error
        raise ImageError(f"a picture of {width}x{height} cannot be written: {_first_line(error)}") from cause


class _Feed:
    """Rows as an uncompressed BigTIFF file, which libvips reads from top to bottom while it is being made."""

    def __init__(self, rows: Iterable[Levels], shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self._rows, self._dtype = iter(rows), dtype.newbyteorder("<")
        self._strip = _ROWS_OF_A_STRIP * shape[1] * shape[2] * dtype.itemsize
        self._n_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self._header = _tiff_header(shape, dtype, self._strip, self._n_bytes)
        self._kept = bytearray()  # what was made last, from the position _first on
        self._first = self._position = 0
        self._failure: BaseException | None = None

    def image(self, pyvips: Any) -> Any:
        source = pyvips.SourceCustom()
        source.on_read(self._read)
        source.on_seek(self._seek)
        self._source = source  # kept alive as long as the feed
        return pyvips.Image.new_from_source(source, "", access="sequential", fail_on="truncated")

    def check(self) -> None:
        """Raise what the rows raised: libvips only sees that they end, and may not mind."""
        if self._failure is not None:
            raise self._failure

    def _seek(self, offset: int, whence: int) -> int:
        base = (0, self._position, len(self._header) + self._n_bytes)[whence]
        self._position = base + offset
        return self._position

    def _read(self, size: int) -> bytes:
        try:
            part = self._part(size)
        except BaseException as error:
            # An exception cannot pass through libvips' own threads; it is raised again by the writer.
            self._failure = error
            part = b""
        self._position += len(part)
        return part

    def _part(self, size: int) -> bytes:
        start = self._position - len(self._header)
        if start < 0:
            return self._header[self._position : self._position + size]
        while self._first + len(self._kept) < min(start + size, self._n_bytes):
            rows = next(self._rows, None)
            if rows is None:
                break
            # Two strips back is more than libtiff ever returns.
            drop = max(0, start - 2 * self._strip - self._first)
            del self._kept[:drop]
            self._first += drop
            self._kept += np.ascontiguousarray(rows, self._dtype).data.cast("B")
        if start < self._first:
            raise ImageError(f"cannot go back to byte {start}; libvips reads in an unexpected order")
        return bytes(self._kept[start - self._first : start - self._first + size])


def _tiff_header(shape: tuple[int, int, int], dtype: np.dtype[Any], strip: int, n_bytes: int) -> bytes:
    """What precedes the pixels of an uncompressed little-endian BigTIFF file."""
    height, width, channels = shape
    start = b"II\x2b\0\x08\0\0\0\x10" + b"\0" * 7
    directory = TiffImagePlugin.ImageFileDirectory_v2(start)
    offsets = tuple(range(0, n_bytes, strip))
    directory[256], directory[257] = width, height
    directory[258] = (8 * dtype.itemsize,) * channels
    directory[259], directory[262], directory[277] = 1, 2 if channels > 2 else 1, channels
    directory.tagtype[273] = directory.tagtype[279] = TiffTags.LONG8
    directory[273] = offsets  # tobytes() adds where the pixels begin
    directory[278] = _ROWS_OF_A_STRIP
    directory[279] = tuple(min(strip, n_bytes - offset) for offset in offsets)
    if channels % 2 == 0:
        directory[338] = 2  # opacity, colors not multiplied by it
    content: bytes = directory.tobytes(16)
    return start + content


def _save(image: Any, path: Path, file_format: str, quality: int | None, n_bytes: int) -> None:
    name = os.fspath(path)
    if file_format == "TIFF":
        # Tags of a normal TIFF cannot point beyond 4 GiB.
        big = n_bytes >= _BIGTIFF_BYTES - (1 << 26)
        image.tiffsave(name, compression="deflate", predictor="horizontal", bigtiff=big)
    elif file_format == "PNG":
        image.pngsave(name, compression=6)
    elif file_format == "JPEG":
        image.jpegsave(name, Q=quality or 95, subsample_mode="off", optimize_coding=True)
    elif file_format == "AVIF":
        bits = 12 if image.format == "ushort" else 8
        image.heifsave(name, compression="av1", Q=quality or 90, subsample_mode="off", bitdepth=bits)
    else:
        raise ArgumentError("format", file_format, f"one of {(*STREAMED_FORMATS, 'AVIF')}")


def _resolution(metadata: Metadata) -> dict[str, float]:
    if metadata.dpi is None:
        return {}
    return {"xres": metadata.dpi[0] / 25.4, "yres": metadata.dpi[1] / 25.4}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "unknown error of libvips"
