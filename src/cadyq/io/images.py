"""Pictures in and out: the only code of the package that opens picture files.

Whatever a file holds, the rest of the package sees 8-bit RGB (`Picture`); what was lost or set aside on the
way is said in `Picture.notes`.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from cadyq.errors import ArgumentError, ImageError
from cadyq.io.files import write_atomic

__all__ = ["MAX_PIXELS", "SUFFIXES", "Picture", "encode_image", "from_pil", "read_image", "write_image"]

Source: TypeAlias = "str | os.PathLike[str] | bytes"

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Suffixes of the files that can be read and written, in lower case, and their formats."""

MAX_PIXELS = 178_956_970
"""Pixels above which a picture is taken for a decompression bomb, unless the caller says otherwise."""

_GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")
_DEEP_GRAY_MODES = ("I", "I;16", "I;16B", "I;16L")
_JPEG_QUALITY = 95

# Pillow's warnings and its pixel limit are process-wide; two readers must not restore each other's setting.
_PILLOW_SETTINGS = threading.Lock()


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright.

    Attributes:
        pixels: uint8 RGB, ``(H, W, 3)``; a gray picture has three equal channels.
        alpha: uint8 opacity, ``(H, W)``, or None for an opaque picture. Colors are not multiplied by it.
        is_gray: whether the file had no color; it is then written without color, too.
        icc: the color profile that ``pixels`` are meant in, or None for sRGB.
        mode: the file's own pixel layout, in Pillow's terms ("RGB", "P", "CMYK", "I;16", ...).
        notes: what was reduced, converted or ignored while reading, one sentence each.
    """

    pixels: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    is_gray: bool = False
    icc: bytes | None = None
    mode: str = "RGB"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ArgumentError("pixels", f"{self.pixels.dtype}{list(shape)}", "a non-empty uint8 (H, W, 3)")
        if self.alpha is not None and (self.alpha.dtype != np.uint8 or self.alpha.shape != shape[:2]):
            found = f"{self.alpha.dtype}{list(self.alpha.shape)}"
            raise ArgumentError("alpha", found, f"uint8 {list(shape[:2])}, as the pixels")


def read_image(source: Source, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF file of any common layout.

    EXIF's orientation is applied. Palettes become RGB, transparent colors become alpha, CMYK is converted to
    RGB (by its profile if it has one), 16 bits per channel are reduced to 8, and of an animation or a
    multi-page file the first picture is taken.

    Args:
        source: a path, or the content of such a file.
        max_pixels: width times height above which the file is refused before it is decoded.

    Raises:
        ImageError: if the file is missing, unreadable, empty, not a picture, damaged, or too large.
    """
    name = "the given data" if isinstance(source, bytes) else os.fspath(source)
    content = source if isinstance(source, bytes) else _read_bytes(Path(source))
    if not content:
        raise ImageError(f"{name} is empty, expected a picture")
    with _PILLOW_SETTINGS, _quiet_pillow():
        try:
            with Image.open(io.BytesIO(content), formats=sorted(set(SUFFIXES.values()))) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(
                        f"{name} claims {image.width}x{image.height} pixels, expected at most {max_pixels}; "
                        "if that is no decompression bomb, raise max_pixels"
                    )
                return _decode(image)
        except UnidentifiedImageError:
            raise ImageError(
                f"{name} is not a picture that can be read, expected PNG, JPEG, WebP or TIFF"
            ) from None
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
            return _decode(image.copy())
        except ImageError as error:
            raise ImageError(f"the image {error}") from None
        except OSError as error:
            raise ImageError(f"the image is damaged or cut off: {error}") from error


def write_image(path: str | os.PathLike[str], picture: Picture, quality: int | None = None) -> None:
    """Write a picture in the format that the suffix names; an existing file is replaced as a whole.

    Args:
        path: where to; its suffix is one of `SUFFIXES`.
        picture: what to write; its profile is kept wherever it fits the written layout.
        quality: 1 to 100 for lossy compression; None is lossless, and 95 for JPEG. JPEG is written 4:4:4.

    Raises:
        ArgumentError: for an unknown suffix, a wrong quality, or alpha in a JPEG file.
        ImageError: if the format cannot hold the picture, or the file cannot be written.
    """
    target = Path(path)
    content = encode_image(picture, target.suffix, quality)
    try:
        write_atomic(target, content)
    except OSError as error:
        raise ImageError(f"{target} cannot be written: {error.strerror or error}") from error


def encode_image(picture: Picture, suffix: str, quality: int | None = None) -> bytes:
    """Return the content of the file that `write_image` would write; ``suffix`` is ".png" or the like."""
    file_format = SUFFIXES.get(suffix.lower())
    if file_format is None:
        raise ArgumentError("suffix", suffix, f"one of {', '.join(SUFFIXES)}")
    if quality is not None and not 1 <= quality <= 100:
        raise ArgumentError("quality", quality, "1 to 100, or None")
    if file_format == "JPEG" and picture.alpha is not None:
        raise ArgumentError("suffix", suffix, "a format with transparency", "write .png, or drop the alpha")
    image = Image.fromarray(picture.pixels)
    if picture.is_gray and file_format != "WEBP":
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    options = _options(file_format, quality)
    if picture.icc is not None and _profile_fits(picture.icc, image.mode):
        options["icc_profile"] = picture.icc
    buffer = io.BytesIO()
    try:
        image.save(buffer, file_format, **options)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"a picture of {image.width}x{image.height} cannot be written as {file_format}: {error}"
        ) from error
    return buffer.getvalue()


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


def _decode(image: Image.Image) -> Picture:
    mode, icc = image.mode, image.info.get("icc_profile") or None
    notes = []
    is_deep = ";16" in str(getattr(image, "tile", ""))
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1:
        notes.append(f"It holds {n_frames} pictures; only the first was read.")
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        # A picture with broken EXIF data is still a picture.
        notes.append("Its EXIF data is damaged; the orientation was ignored.")
    if is_deep or mode in _DEEP_GRAY_MODES:
        notes.append("16 bits per channel were reduced to 8.")
    if mode in _DEEP_GRAY_MODES:
        if "transparency" in image.info:
            notes.append("Its transparent gray level was ignored.")
        image = _shallow(image)
    elif mode == "CMYK":
        image = _from_cmyk(image, icc)
        icc = None
        notes.append("CMYK was converted to RGB.")
    has_alpha = image.has_transparency_data
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
    )


def _can_convert(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")


def _shallow(image: Image.Image) -> Image.Image:
    """Reduce gray levels 0..65535 to 0..255, rounded to the nearest."""
    levels = np.array(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ImageError("has 32-bit gray levels, expected 8 or 16 bits per channel")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


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
        return {"quality": quality or _JPEG_QUALITY, "subsampling": 0}
    if file_format == "WEBP":
        # "exact" keeps the colors under fully transparent pixels.
        return {"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True}
    return {"compression": "tiff_adobe_deflate"} if file_format == "TIFF" else {}


def _profile_fits(icc: bytes, mode: str) -> bool:
    """Tell by the profile's header whether it describes pixels of this mode; a wrong one spoils the file."""
    return icc[16:20] == (b"GRAY" if mode in ("L", "LA") else b"RGB ")
