"""Rows in and out through libvips: equal to whole pictures, and what goes wrong is told as it is."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cadyq.errors import ImageError
from cadyq.functional.alpha import fill_transparent
from cadyq.io.images import read_image
from cadyq.io.stream import FileRows, RowReader, has_vips, write_rows

pytestmark = pytest.mark.skipif(not has_vips(), reason="pyvips is not installed")

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 301, 57


def _pieces(pixels, rows):
    return (pixels[top : top + rows] for top in range(0, len(pixels), rows))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_round_trip(tmp_path, file_format, dtype, channels):
    pixels = RNG.integers(0, np.iinfo(dtype).max + 1, (HEIGHT, WIDTH, channels)).astype(dtype)
    for rows in (1, 50, HEIGHT):
        write_rows(tmp_path / "a", file_format, pixels.shape, np.dtype(dtype), _pieces(pixels, rows))
        reader = RowReader(tmp_path / "a")
        assert (reader.height, reader.width, reader.channels, reader.dtype) == (*pixels.shape, dtype)
        parts = [reader.read(top, min(top + 77, HEIGHT)) for top in range(0, HEIGHT, 77)]
        np.testing.assert_array_equal(np.concatenate(parts), pixels)


def test_orientation_palette_and_bilevel(tmp_path):
    rgb = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    exif = Image.Exif()
    image = Image.fromarray(rgb)
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for suffix in (".png", ".tif", ".webp"):
            path = tmp_path / f"turned{suffix}"
            image.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
            rows = FileRows(path)
            np.testing.assert_array_equal(rows.read(0, rows.shape[0]), read_image(path).pixels)
    for odd in (image.quantize(9), image.convert("1")):
        odd.save(tmp_path / "odd.png")
        rows = FileRows(tmp_path / "odd.png")
        np.testing.assert_array_equal(rows.read(0, 20), read_image(tmp_path / "odd.png").pixels)


def test_hidden_colors_are_filled_as_in_the_whole_picture(tmp_path):
    rgba = RNG.integers(0, 256, (400, 150, 4)).astype(np.uint8)
    rgba[..., 3] = np.where(np.kron(RNG.random((16, 6)) < 0.7, np.ones((25, 25))), 0, rgba[..., 3])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    whole = fill_transparent(rgba[..., :3], rgba[..., 3])
    rows = FileRows(tmp_path / "a.png")
    for top in range(0, 400, 48):
        rows.forget(max(0, top - 48))
        first, last = max(0, top - 48), min(400, top + 96)
        np.testing.assert_array_equal(rows.read(first, last), whole[first:last])
        np.testing.assert_array_equal(rows.alpha(first, last), rgba[first:last, :, 3])


def test_what_the_rows_raise_is_passed_on(tmp_path):
    def broken():
        yield np.zeros((100, WIDTH, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "a", "PNG", (HEIGHT, WIDTH, 3), np.dtype(np.uint8), broken())


def test_what_cannot_be_read_or_written(tmp_path):
    shape, dtype = (HEIGHT, WIDTH, 3), np.dtype(np.uint8)
    with pytest.raises(ImageError, match="cannot be written"):
        write_rows(tmp_path / "none" / "a", "PNG", shape, dtype, [np.zeros(shape, np.uint8)])
    noise = RNG.integers(0, 256, shape).astype(np.uint8)
    write_rows(tmp_path / "a", "PNG", shape, dtype, [noise])
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cut\.png is damaged"):
        RowReader(tmp_path / "cut.png").read(0, HEIGHT)
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    with pytest.raises(ImageError, match=r"a\.svg"):
        RowReader(tmp_path / "a.svg")


def test_a_tiff_beyond_four_gigabytes_is_a_bigtiff(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    pixels = RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    monkeypatch.setattr("cadyq.io.stream._BIGTIFF_BYTES", 1 << 26)
    from cadyq.io.metadata import Metadata

    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    metadata = Metadata(exif.tobytes())
    write_rows(tmp_path / "a.tif", "TIFF", pixels.shape, np.dtype(np.uint8), [pixels], metadata=metadata)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert file.pages[0].tags["Make"].value == "Maker"
        assert file.pages[0].tags["ExifTag"].value["DateTimeOriginal"] == "2020:01:02 03:04:05"
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, pixels)


CLOSED_WHILE_ANOTHER_WARNS = """
import io, logging
import numpy as np
from PIL import Image
from cadyq.io.stream import vips

file = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(file, "JPEG")

def damaged():
    image = vips().Image.new_from_buffer(file.getvalue()[:-600], "", access="sequential", fail_on="none")
    region = vips().Region.new(image)
    region.fetch(0, 0, 64, 64)
    return image, region

class Collector(logging.Handler):
    def emit(self, record):
        held.clear()

logging.getLogger("pyvips").addHandler(Collector(logging.WARNING))
held, other = [damaged()], damaged()
del other
held.clear()
"""


def test_a_warning_of_libvips_cannot_meet_another():
    # The handler collects as Python's garbage collection may at any time; GLib aborted the process.
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_WHILE_ANOTHER_WARNS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
