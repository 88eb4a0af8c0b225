"""What a picture file says besides its pixels: EXIF, XMP and resolution, carried over and corrected.

EXIF is parsed and written by Pillow. Pixels are always upright here, so the orientation is dropped; the
embedded thumbnail shows the old picture and is dropped, too.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

__all__ = [
    "Metadata",
    "add_exif_to_tiff",
    "orientation_of",
    "read_metadata",
    "save_options",
    "turned_upright",
]

_EXIF_IFD, _GPS_IFD, _XMP_TAG, _ORIENTATION = 0x8769, 0x8825, 700, 0x0112
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
# In a TIFF file the main directory also describes how its own pixels are stored; only these describe the picture.
_ABOUT_THE_PICTURE = frozenset(
    {270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, _EXIF_IFD, _GPS_IFD, *range(40091, 40096)}
)
_XMP_WIDTH = ("exif:PixelXDimension", "tiff:ImageWidth")
_XMP_HEIGHT = ("exif:PixelYDimension", "tiff:ImageLength")


@dataclass(frozen=True)
class Metadata:
    """What is carried over from one file to another.

    Attributes:
        exif: EXIF data with its header, as Pillow takes it, or None.
        xmp: the XMP packet, or None.
        dpi: horizontal and vertical resolution in dots per inch, or None.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None

    def fitted(self, width: int, height: int) -> Metadata:
        """Return it for a picture of another size: the dimensions that EXIF and XMP name are corrected."""
        exif, xmp = self.exif, self.xmp
        if exif is not None:
            parsed = _parsed(exif)
            parsed.pop(_ORIENTATION, None)
            inner = parsed.get_ifd(_EXIF_IFD)
            if inner:
                inner[_PIXEL_WIDTH], inner[_PIXEL_HEIGHT] = width, height
            exif = parsed.tobytes()
        if xmp is not None:
            for names, value in ((_XMP_WIDTH, width), (_XMP_HEIGHT, height)):
                for name in map(str.encode, names):
                    # XMP writes a property as an attribute or as an element.
                    pattern = rb"(%s(?:\s*=\s*[\"']|>))\d+" % re.escape(name)
                    xmp = re.sub(pattern, rb"\g<1>%d" % value, xmp)
        return Metadata(exif, xmp, self.dpi)

    def exif_with_resolution(self) -> bytes | None:
        """EXIF that also states the resolution, for formats that have no other place for it."""
        if self.dpi is None:
            return self.exif
        parsed = _parsed(self.exif) if self.exif is not None else Image.Exif()
        parsed[_X_RESOLUTION], parsed[_Y_RESOLUTION] = self.dpi
        parsed[_RESOLUTION_UNIT] = 2  # inches
        return parsed.tobytes()


def read_metadata(image: Image.Image) -> Metadata:
    """Take over what an opened Pillow image says; its pixels need not be decoded. Broken parts are left out."""
    try:
        exif = _copied(image)
        exif.pop(_ORIENTATION, None)
        about = exif.tobytes() if set(exif) - {_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT} else None
    except Exception:
        # Pillow answers damaged EXIF data with nearly any exception; a picture without it is still a picture.
        about = None
    xmp = image.info.get("xmp")
    if xmp is None:
        # In a PNG file's older kinds of text, whose bytes Pillow takes for Latin-1.
        text = image.info.get("XML:com.adobe.xmp")
        xmp = text.encode("latin-1", "replace") if isinstance(text, str) else None
    return Metadata(about, _upright(xmp) if isinstance(xmp, bytes) else None, _resolution(image))


def save_options(file_format: str, metadata: Metadata) -> dict[str, Any]:
    """Options of Pillow's ``save`` that write the metadata into a file of this format.

    EXIF in TIFF is not among them, as Pillow cannot write it with compression: see `add_exif_to_tiff`.
    """
    options: dict[str, Any] = {}
    has_resolution = file_format in ("PNG", "JPEG", "TIFF")
    exif = metadata.exif if has_resolution else metadata.exif_with_resolution()
    # A JPEG segment ends after 64 KiB; there is no standard way to continue EXIF.
    longest = 65_500 if file_format == "JPEG" else 1 << 30
    if exif is not None and len(exif) < longest and file_format != "TIFF":
        options["exif"] = exif
    if metadata.dpi is not None and has_resolution:
        options["dpi"] = metadata.dpi
    if metadata.xmp is not None and len(metadata.xmp) < longest:
        if file_format == "PNG":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
        elif file_format == "TIFF":
            options["tiffinfo"] = {_XMP_TAG: metadata.xmp}
        else:
            options["xmp"] = metadata.xmp
    return options


def add_exif_to_tiff(path: Path, exif: bytes) -> None:
    """Give a finished TIFF or BigTIFF file EXIF data: its directory moves to the end, with more entries."""
    parsed = _parsed(exif)
    with path.open("r+b") as file:
        start = file.read(16)
        order, is_big = ("<" if start[:2] == b"II" else ">"), 43 in start[2:4]
        count, offset, n_entry = (order + "Q", order + "Q", 20) if is_big else (order + "H", order + "L", 12)
        file.seek(struct.unpack(offset, start[8:] if is_big else start[4:8])[0])
        (n_old,) = struct.unpack(count, file.read(struct.calcsize(count)))
        old = file.read(n_old * n_entry)
        added = TiffImagePlugin.ImageFileDirectory_v2(start if is_big else start[:8])
        for tag in sorted(_ABOUT_THE_PICTURE & set(parsed)):
            added[tag] = parsed.get_ifd(tag) if tag in (_EXIF_IFD, _GPS_IFD) else parsed[tag]
        end = file.seek(0, io.SEEK_END)
        end += file.write(b"\0" * (-end % 8))
        # What does not fit into an entry lies behind all entries, the old ones included.
        content = added.tobytes(end + len(old))
        split = struct.calcsize(count) + len(added) * n_entry
        entries = old + content[struct.calcsize(count) : split]
        both = [entries[i : i + n_entry] for i in range(0, len(entries), n_entry)]
        both.sort(key=lambda entry: struct.unpack(order + "H", entry[:2]))
        file.write(struct.pack(count, len(both)) + b"".join(both) + content[split:])
        file.seek(8 if is_big else 4)
        file.write(struct.pack(offset, end))


def _copied(image: Image.Image) -> Image.Exif:
    """EXIF data apart from the image, which keeps its own."""
    found = _exif_of(image)
    if "exif" in image.info:
        return _parsed(image.info["exif"])  # its own byte order stays, which some fields depend on
    copy = Image.Exif()
    for tag in _ABOUT_THE_PICTURE:
        # Pillow does not list the inner directories of a TIFF file among its keys.
        value = dict(found.get_ifd(tag)) if tag in (_EXIF_IFD, _GPS_IFD) else found.get(tag)
        if value:
            copy[tag] = value
    return copy


def _exif_of(image: Image.Image) -> Image.Exif:
    """EXIF data as far as it can be had without decoding the pixels."""
    if image.format == "PNG" and "exif" not in image.info and getattr(image, "tile", None):
        return Image.Exif()  # it may follow behind the pixels
    return image.getexif()


def _parsed(exif: bytes) -> Image.Exif:
    parsed = Image.Exif()
    parsed.load(exif)
    return parsed


def _upright(xmp: bytes) -> bytes:
    """The packet without its statement about the orientation, which has been applied."""
    return re.sub(rb"\s*<tiff:Orientation>\d</tiff:Orientation>|\s*tiff:Orientation=[\"']\d[\"']", b"", xmp)


def _resolution(image: Image.Image) -> tuple[float, float] | None:
    found = image.info.get("dpi")
    try:
        exif = _exif_of(image)
        if found is None and exif.get(_RESOLUTION_UNIT, 2) in (2, 3):
            unit = 2.54 if exif.get(_RESOLUTION_UNIT) == 3 else 1.0
            found = (exif[_X_RESOLUTION] * unit, exif[_Y_RESOLUTION] * unit)
        across, down = map(float, found or ())
    except Exception:
        return None
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is not stated or damaged."""
    try:
        value = int(_exif_of(image).get(_ORIENTATION, 1))
    except Exception:
        return 1
    return value if 1 <= value <= 8 else 1


def turned_upright(image: Image.Image) -> Image.Image:
    """Apply EXIF's orientation, and drop it. Raises anything where the EXIF data is damaged."""
    ImageOps.exif_transpose(image, in_place=True)
    return image
