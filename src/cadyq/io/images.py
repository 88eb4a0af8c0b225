"""Pictures in and out: the only code of the package that opens picture files.

Whatever a file holds, the rest of the package sees RGB of 8 bits, or of 16 where it asks for them (`Picture`);
what was lost or set aside on the way is said in `Picture.notes`. Pillow reads and writes; libvips (an extra) does
where Pillow knows only 8 bits.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError, features

from cadyq.cells import Levels
from cadyq.errors import ArgumentError, ImageError, MissingExtraError
from cadyq.io.files import replacing
from cadyq.io.metadata import (
    Metadata,
    add_exif_to_tiff,
    orientation_of,
    read_metadata,
    save_options,
    turned_upright,
)
from cadyq.io.stream import RowReader, has_vips, reduced, split_channels, write_rows

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "Header",
    "Picture",
    "check_output",
    "encode_image",
    "from_pil",
    "probe_image",
    "profile_if_fitting",
    "read_image",
    "save_picture",
    "write_image",
]

Source: TypeAlias = "str | os.PathLike[str] | bytes"

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
"""Suffixes of the files that can be read and written, in lower case, and their formats."""

MAX_PIXELS = 178_956_970
"""Pixels above which a picture is taken for a decompression bomb, unless the caller says otherwise."""

_GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
_DEEP_GRAY_MODES = ("I", "I;16", "I;16B", "I;16L")
_QUALITY = {"JPEG": 95, "AVIF": 90}

# Pillow's warnings and its pixel limit are process-wide; two readers must not restore each other's setting.
_PILLOW_SETTINGS = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright.

    Attributes:
        pixels: uint8 or uint16 RGB, ``(H, W, 3)``; a gray picture has three equal channels.
        alpha: opacity of the same type, ``(H, W)``, or None for an opaque picture. Colors are not multiplied by
            it.
        is_gray: whether the file had no color; it is then written without color, too.
        icc: the color profile that ``pixels`` are meant in, or None for sRGB.
        mode: the file's own pixel layout, in Pillow's terms ("RGB", "P", "CMYK", "I;16", ...).
        notes: what was reduced, converted or ignored while reading, one sentence each.
        format: the file's format ("PNG", "JPEG", ...), or "" where there was no file.
        metadata: EXIF, XMP and resolution, carried over on writing.
    """

    pixels: Levels
    alpha: Levels | None = None
    is_gray: bool = False
    icc: bytes | None = None
    mode: str = "RGB"
    notes: tuple[str, ...] = ()
    format: str = ""
    metadata: Metadata = field(default_factory=Metadata)

    def __post_init__(self) -> None:
        shape, kind = self.pixels.shape, self.pixels.dtype
        if kind not in (np.uint8, np.uint16) or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ArgumentError("pixels", f"{kind}{list(shape)}", "a non-empty uint8 or uint16 (H, W, 3)")
        if self.alpha is not None and (self.alpha.dtype != kind or self.alpha.shape != shape[:2]):
            found = f"{self.alpha.dtype}{list(self.alpha.shape)}"
            raise ArgumentError("alpha", found, f"{kind} {list(shape[:2])}, as the pixels")

    def reduced(self) -> Picture:
        """Return it with 8 bits per channel, rounded to the nearest."""
        if self.pixels.dtype == np.uint8:
            return self
        alpha = None if self.alpha is None else reduced(self.alpha)
        return replace(self, pixels=reduced(self.pixels), alpha=alpha)


@dataclass(frozen=True)
class Header:
    """What a picture file says before it is decoded.

    Attributes:
        width, height: pixels of the upright picture.
        format: "PNG", "JPEG", "WEBP", "TIFF" or "AVIF".
        mode: pixel layout in Pillow's terms.
        is_deep: whether its channels have 16 bits (of AVIF: unknown here, False).
        has_alpha: whether it has opacity.
        metadata: EXIF, XMP and resolution.
        icc: color profile, or None.
    """

    width: int
    height: int
    format: str
    mode: str
    is_deep: bool
    has_alpha: bool
    metadata: Metadata
    icc: bytes | None

    @property
    def is_gray(self) -> bool:
        """Whether it has no color."""
        return self.mode in _GRAY_MODES or self.mode in _DEEP_GRAY_MODES


def probe_image(source: Source, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a picture file's header only; arguments and errors are those of `read_image`."""
    with _opened(source, max_pixels) as image:
        # Pillow turns TIFF files by itself, their size included.
        is_lying = orientation_of(image) > 4 and image.format != "TIFF"
        width, height = image.size[::-1] if is_lying else image.size
        return Header(
            width=width,
            height=height,
            format=str(image.format),
            mode=image.mode,
            is_deep=_is_deep(image),
            has_alpha=image.has_transparency_data and image.mode not in _DEEP_GRAY_MODES,
            icc=image.info.get("icc_profile") or None,
            metadata=read_metadata(image),
        )


def read_image(source: Source, max_pixels: int = MAX_PIXELS, deep: bool = False) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or AVIF file of any common layout.

    EXIF's orientation is applied. Palettes become RGB, transparent colors become alpha, CMYK is converted to
    RGB (by its profile if it has one), and of an animation or a multi-page file the first picture is taken.

    Args:
        source: a path, or the content of such a file.
        max_pixels: width times height above which the file is refused before it is decoded.
        deep: keep 16 bits per channel as uint16 instead of reducing them to 8. Color, or gray with opacity,
            needs the extra ``photo`` for that.

    Raises:
        ImageError: if the file is missing, unreadable, empty, not a picture, damaged, or too large.
        MissingExtraError: 16 bits are wanted, and libvips is missing.
    """
    content = source if isinstance(source, bytes) else _read_bytes(Path(source))
    with _opened(source, max_pixels, content) as image:
        if deep and _needs_vips(image, content):
            return _decode_deep(image, content)
        return _decode(image, deep)


@contextmanager
def _opened(source: Source, max_pixels: int, content: bytes | None = None) -> Iterator[Image.Image]:
    """Yield a Pillow image whose header was read; whatever is raised inside becomes an `ImageError`.

    ``content`` is what the file holds; None leaves it to Pillow to read as little as it needs.
    """
    name = "the given data" if isinstance(source, bytes) else os.fspath(source)
    if content is None:
        content = source if isinstance(source, bytes) else None
    if content == b"" or (content is None and _size_of(Path(name)) == 0):
        raise ImageError(f"{name} is empty, expected a picture")
    opened: Any = io.BytesIO(content) if content is not None else Path(name)
    with _PILLOW_SETTINGS, _quiet_pillow():
        try:
            with Image.open(opened, formats=_readable()) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(
                        f"{name} claims {image.width}x{image.height} pixels, expected at most {max_pixels}; "
                        "if that is no decompression bomb, raise max_pixels"
                    )
                yield image
        except UnidentifiedImageError:
            raise ImageError(
                f"{name} is not a picture that can be read, expected PNG, JPEG, WebP, TIFF or AVIF"
            ) from None
        except MissingExtraError as error:
            raise MissingExtraError(f"{name}: {error}; or reduce it to 8 bits") from error
        except ImageError as error:
            raise error if name in str(error) else ImageError(f"{name} {error}") from None
        except MemoryError:
            raise ImageError(f"{name} does not fit into memory when decoded") from None
        except Exception as error:
            # Decoders answer hostile bytes with nearly any exception: OSError, SyntaxError, struct.error, ...
            raise ImageError(f"{name} is damaged or cut off: {error}") from error


def from_pil(image: Image.Image) -> Picture:
    """Take over a Pillow image of any common mode, as `read_image` would from a file.

    Raises:
        ImageError: if its mode is not one that can be read, or it has no pixels.
    """
    if 0 in image.size:
        raise ImageError(f"the image measures {image.width}x{image.height}, expected at least one pixel")
    with _PILLOW_SETTINGS, _quiet_pillow():
        try:
            return _decode(image.copy(), False)
        except ImageError as error:
            raise ImageError(f"the image {error}") from None
        except OSError as error:
            raise ImageError(f"the image is damaged or cut off: {error}") from error


def write_image(path: str | os.PathLike[str], picture: Picture, quality: int | None = None) -> None:
    """Write a picture in the format that the suffix names; an existing file is replaced as a whole.

    16 bits per channel are kept by PNG and TIFF, AVIF keeps 12 of them, JPEG and WebP 8.

    Args:
        path: where to; its suffix is one of `SUFFIXES`.
        picture: what to write; its profile is kept wherever it fits the written layout, its metadata are
            corrected to its size.
        quality: 1 to 100 for lossy compression; None is lossless, 95 for JPEG and 90 for AVIF, which are
            written 4:4:4.

    Raises:
        ArgumentError: for an unknown suffix, a wrong quality, or alpha in a JPEG file.
        ImageError: if the format cannot hold the picture, or the file cannot be written.
        MissingExtraError: the picture has 16 bits per channel, and libvips is missing.
    """
    target = Path(path)
    check_output(target.suffix, quality, picture.alpha is not None)
    try:
        with replacing(target) as temporary:
            save_picture(temporary, target.suffix, picture, quality)
    except OSError as error:
        raise ImageError(f"{target} cannot be written: {error.strerror or error}") from error


def encode_image(picture: Picture, suffix: str, quality: int | None = None) -> bytes:
    """Return the content of the file that `write_image` would write; ``suffix`` is ".png" or the like."""
    check_output(suffix, quality, picture.alpha is not None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        save_picture(path, suffix, picture, quality)
        return path.read_bytes()


def check_output(suffix: str, quality: int | None, has_alpha: bool) -> str:
    """Return the format that a suffix names. Raises `ArgumentError` as `write_image` does."""
    file_format = SUFFIXES.get(suffix.lower())
    if file_format is None:
        raise ArgumentError("suffix", suffix, f"one of {', '.join(SUFFIXES)}")
    if quality is not None and not 1 <= quality <= 100:
        raise ArgumentError("quality", quality, "1 to 100, or None")
    if file_format == "JPEG" and has_alpha:
        raise ArgumentError("suffix", suffix, "a format with transparency", "write .png, or drop the alpha")
    return file_format


def save_picture(path: Path, suffix: str, picture: Picture, quality: int | None = None) -> None:
    """Write a picture to ``path``, whatever it is called, in the format of ``suffix``; see `write_image`.

    Raises `OSError` as the file system does, `ImageError` where the format cannot hold the picture.
    """
    file_format = check_output(suffix, quality, picture.alpha is not None)
    if file_format in ("JPEG", "WEBP"):
        picture = picture.reduced()
    height, width = picture.pixels.shape[:2]
    metadata = picture.metadata.fitted(width, height)
    is_plain_gray = picture.is_gray and picture.alpha is None and file_format in ("PNG", "TIFF")
    if picture.pixels.dtype == np.uint16 and not is_plain_gray:
        layers = [picture.pixels[..., :1] if picture.is_gray else picture.pixels]
        layers += [] if picture.alpha is None else [picture.alpha[..., None]]
        pixels = np.concatenate(layers, axis=2)
        icc = profile_if_fitting(picture.icc, is_gray=picture.is_gray)
        write_rows(
            path,
            file_format,
            pixels.shape,
            pixels.dtype,
            [pixels],
            quality=quality,
            icc=icc,
            metadata=metadata,
        )
        return
    _save_by_pillow(path, file_format, picture, quality, metadata)


def _save_by_pillow(
    path: Path, file_format: str, picture: Picture, quality: int | None, metadata: Metadata
) -> None:
    if picture.pixels.dtype == np.uint16:
        image = Image.fromarray(np.ascontiguousarray(picture.pixels[..., 0]))
    else:
        image = Image.fromarray(picture.pixels)
        if picture.is_gray and file_format not in ("WEBP", "AVIF"):
            image = image.convert("L")
        if picture.alpha is not None:
            image.putalpha(Image.fromarray(picture.alpha))
    options = {**save_options(file_format, metadata), **_options(file_format, quality)}
    icc = profile_if_fitting(picture.icc, is_gray=image.mode in ("L", "LA", "I;16"))
    if icc is not None:
        options["icc_profile"] = icc
    try:
        with path.open("wb") as file:
            image.save(file, file_format, **options)
        if file_format == "TIFF" and metadata.exif is not None:
            add_exif_to_tiff(path, metadata.exif)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(
            f"a picture of {image.width}x{image.height} cannot be written as {file_format}: {error}"
        ) from error


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else len(_read_bytes(path))
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, expected a picture") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings, and its own pixel limit: ``max_pixels`` is checked instead."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _readable() -> list[str]:
    return sorted(f for f in set(SUFFIXES.values()) if f != "AVIF" or features.check("avif"))


def _is_deep(image: Image.Image) -> bool:
    return image.mode in _DEEP_GRAY_MODES or ";16" in str(getattr(image, "tile", ""))


def _needs_vips(image: Image.Image, content: bytes) -> bool:
    """Whether Pillow would reduce the picture to 8 bits."""
    if image.format == "AVIF":
        return has_vips() and RowReader(content).bits > 8
    return _is_deep(image) and image.mode not in _DEEP_GRAY_MODES


def _decode_deep(image: Image.Image, content: bytes) -> Picture:
    reader = RowReader(content)
    pixels = reader.read(0, reader.height)
    color, alpha = split_channels(pixels)
    is_cmyk = image.mode == "CMYK"
    if image.format == "PNG":
        image.load()  # metadata may follow behind the pixels
    return Picture(
        pixels=color,
        alpha=alpha,
        is_gray=reader.channels < 3,
        icc=None if is_cmyk else image.info.get("icc_profile") or None,
        mode=image.mode,
        notes=("CMYK was converted to RGB.",) if is_cmyk else (),
        format=str(image.format),
        metadata=read_metadata(image),
    )


def _decode(image: Image.Image, deep: bool) -> Picture:
    mode, icc, file_format = image.mode, image.info.get("icc_profile") or None, str(image.format or "")
    notes = []
    is_deep = _is_deep(image)
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1:
        notes.append(f"It holds {n_frames} pictures; only the first was read.")
    image.load()
    metadata = read_metadata(image)
    try:
        image = turned_upright(image)
    except Exception:
        # A picture with broken EXIF data is still a picture.
        notes.append("Its EXIF data is damaged; the orientation was ignored.")
    has_alpha = image.has_transparency_data and mode not in _DEEP_GRAY_MODES
    if is_deep and not deep:
        notes.append("16 bits per channel were reduced to 8.")
    if mode in _DEEP_GRAY_MODES and "transparency" in image.info:
        notes.append("Its transparent gray level was ignored.")
    if mode in _DEEP_GRAY_MODES:
        levels = _gray_levels(image)
        pixels: Levels = (levels if deep else reduced(levels))[..., None].repeat(3, axis=2)
    else:
        if mode == "CMYK":
            image = _from_cmyk(image, icc)
            icc = None
            notes.append("CMYK was converted to RGB.")
        if image.mode == "F" or not _can_convert(image):
            raise ImageError(f'has pixels of the kind "{mode}", expected gray, RGB, palette or CMYK')
        pixels = np.array(image.convert("RGBA" if has_alpha else "RGB"), np.uint8)
    return Picture(
        pixels=np.ascontiguousarray(pixels[..., :3]),
        alpha=np.ascontiguousarray(pixels[..., 3]) if has_alpha else None,
        is_gray=mode in _GRAY_MODES or mode in _DEEP_GRAY_MODES,
        icc=icc,
        mode=mode,
        notes=tuple(notes),
        format=file_format,
        metadata=metadata,
    )


def _can_convert(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")


def _gray_levels(image: Image.Image) -> NDArray[np.uint16]:
    levels = np.array(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ImageError("has 32-bit gray levels, expected 8 or 16 bits per channel")
    return levels.astype(np.uint16)


def _from_cmyk(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Convert CMYK to sRGB by its profile, or by Pillow's plain formula without a usable one."""
    if icc is not None:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(icc)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _options(file_format: str, quality: int | None) -> dict[str, Any]:
    if file_format == "JPEG":
        return {"quality": quality or _QUALITY[file_format], "subsampling": 0}
    if file_format == "AVIF":
        return {"quality": quality or _QUALITY[file_format], "subsampling": "4:4:4"}
    if file_format == "WEBP":
        # "exact" keeps the colors under fully transparent pixels.
        return {"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True}
    return {"compression": "tiff_adobe_deflate"} if file_format == "TIFF" else {}


def profile_if_fitting(icc: bytes | None, is_gray: bool) -> bytes | None:
    """The profile, if its header says that it describes such pixels; a wrong one spoils the file."""
    return icc if icc is not None and icc[16:20] == (b"GRAY" if is_gray else b"RGB ") else None
