"""Every layout of picture file, every way a file can be broken, and what must survive writing."""

import contextlib
import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from cadyq.errors import ArgumentError, ImageError
from cadyq.io.images import Picture, encode_image, read_image, write_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _content(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _png(width, height, depth, color, rows, extra=()):
    """A PNG file from scratch, for layouts that Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".PNG"])
@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("is_gray", [False, True])
def test_lossless_round_trip(tmp_path, suffix, alpha, is_gray):
    pixels = np.repeat(RGB[..., :1], 3, axis=2) if is_gray else RGB
    path = tmp_path / f"picture{suffix}"
    write_image(path, Picture(pixels, alpha, is_gray))
    result = read_image(path)
    np.testing.assert_array_equal(result.pixels, pixels)
    if alpha is None:
        assert result.alpha is None
    else:
        np.testing.assert_array_equal(result.alpha, alpha)
    # WebP has no gray layout.
    assert result.is_gray == (is_gray and suffix != ".webp")
    assert result.notes == ()
    assert os.listdir(tmp_path) == [path.name]


def test_jpeg_and_lossy_webp_obey_quality():
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    for suffix in (".jpg", ".jpeg", ".webp"):
        fine, coarse = (encode_image(Picture(smooth), suffix, quality) for quality in (95, 10))
        assert len(fine) > len(coarse)
        assert np.abs(read_image(fine).pixels.astype(int) - smooth).mean() < 2


def test_palette_with_and_without_transparency():
    image = Image.fromarray(RGB // 64 * 64).quantize(8)
    np.testing.assert_array_equal(read_image(_content(image)).pixels, np.array(image.convert("RGB")))
    result = read_image(_content(image, transparency=b"\x00\x80\xff"))
    np.testing.assert_array_equal(result.alpha[np.array(image) == 1], 0x80)
    assert (result.alpha[np.array(image) > 2] == 255).all()
    assert result.mode == "P"


def test_transparent_color_of_an_rgb_png():
    image = Image.fromarray(RGB)
    result = read_image(_content(image, transparency=tuple(RGB[2, 3].tolist())))
    assert result.alpha[2, 3] == 0
    assert result.alpha[0, 0] == 255


def test_one_bit():
    bits = Image.fromarray(RGB[..., 0] > 127)
    assert bits.mode == "1"
    result = read_image(_content(bits))
    assert result.is_gray
    np.testing.assert_array_equal(result.pixels[..., 1], np.where(RGB[..., 0] > 127, 255, 0))


def test_cmyk_with_and_without_profile():
    image = Image.fromarray(RGB).convert("CMYK")
    # Not a profile for CMYK, so it cannot be used: the plain formula must step in.
    for options in ({}, {"icc_profile": SRGB}):
        result = read_image(_content(image, "TIFF", **options))
        np.testing.assert_array_equal(result.pixels, np.array(image.convert("RGB")))
        assert result.icc is None
        assert result.notes == ("CMYK was converted to RGB.",)


def test_cmyk_jpeg_is_not_inverted():
    smooth = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (1, 32, 3))
    content = _content(Image.fromarray(smooth).convert("CMYK"), "JPEG", quality=95)
    result = read_image(content)
    assert result.mode == "CMYK"
    assert np.abs(result.pixels.astype(int) - smooth).mean() < 2


def test_transparent_level_of_a_deep_png_is_mentioned():
    row = b"\x00" + np.array([7, 9], ">u2").tobytes()
    result = read_image(_png(2, 1, 16, 0, row, [(b"tRNS", b"\x00\x07")]))
    assert result.alpha is None
    assert result.notes[-1] == "Its transparent gray level was ignored."


def test_damaged_exif_data_does_not_spoil_the_picture():
    content = _content(Image.fromarray(RGB), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(content).pixels, RGB)


def test_sixteen_bits_are_reduced_and_said_so():
    deep = np.array([[0, 128, 129, 65535, 32768]], np.uint16)
    result = read_image(_content(Image.fromarray(deep)))
    assert result.pixels[0, :, 0].tolist() == [0, 0, 1, 255, 128]
    assert result.is_gray
    assert "16 bits" in result.notes[0]
    row = b"\x00" + np.array([[0, 65535, 0x8000]], ">u2").tobytes()
    color = read_image(_png(1, 1, 16, 2, row))
    assert color.pixels.tolist() == [[[0, 255, 128]]]
    assert "16 bits" in color.notes[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = _content(Image.fromarray(RGB), "PNG", exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    np.testing.assert_array_equal(read_image(content).pixels, expected)
    assert (expected.shape == (9, 6, 3)) == (orientation > 4)


def test_profile_survives_where_it_fits(tmp_path):
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        write_image(path, Picture(RGB, icc=SRGB))
        assert read_image(path).icc == SRGB
    # An RGB profile in a gray file would be invalid.
    assert read_image(encode_image(Picture(RGB, is_gray=True, icc=SRGB), ".png")).icc is None


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    result = read_image(_content(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(result.pixels, RGB)
    assert "only the first" in result.notes[0]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_truncated_files(file_format):
    large = Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    content = _content(large, file_format)
    for length in (len(content) // 2, len(content) - 200, 30):
        with pytest.raises(ImageError, match=r"cut off|not a picture"):
            read_image(content[:length])


def test_files_that_are_no_pictures(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("This is no picture, whatever its name says.")
    cases = [
        (tmp_path / "missing.png", "does not exist"),
        (tmp_path, "is a folder"),
        (empty, "is empty"),
        (text, "is not a picture"),
    ]
    for path, message in cases:
        with pytest.raises(ImageError, match=message) as caught:
            read_image(path)
        assert str(path) in str(caught.value)


def test_decompression_bomb_is_refused_before_decoding():
    bomb = _png(60000, 60000, 8, 2, b"")
    with pytest.raises(ImageError, match="60000x60000 pixels"):
        read_image(bomb)
    with pytest.raises(ImageError, match="raise max_pixels"):
        read_image(_content(Image.fromarray(RGB)), max_pixels=53)
    assert read_image(_content(Image.fromarray(RGB)), max_pixels=54).pixels.shape == (6, 9, 3)


def test_pixels_of_unknown_kind():
    with pytest.raises(ImageError, match='pixels of the kind "F"'):
        read_image(_content(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"))
    with pytest.raises(ImageError, match="32-bit gray"):
        read_image(_content(Image.fromarray(np.full((3, 3), 1 << 20, np.int32)), "TIFF"))


def test_a_flipped_byte_never_escapes_as_another_error():
    contents = [_content(Image.fromarray(RGB), f) for f in ("PNG", "JPEG", "WEBP", "TIFF")]
    for content in contents:
        for position in range(0, len(content), 3):
            spoiled = bytearray(content)
            spoiled[position] ^= 0xFF
            with contextlib.suppress(ImageError):
                read_image(bytes(spoiled), max_pixels=10**6)


def test_pillow_settings_are_left_alone_by_threads():
    content = _content(Image.fromarray(RGB))
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    threads = [threading.Thread(target=read_image, args=(content,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_failed_writing_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, Picture(RGB))
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ImageError, match="No space left"):
        write_image(path, Picture(255 - RGB))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ArgumentError, match=r"suffix is '\.bmp'"):
        write_image(tmp_path / "a.bmp", Picture(RGB))
    with pytest.raises(ArgumentError, match="drop the alpha"):
        write_image(tmp_path / "a.jpg", Picture(RGB, ALPHA))
    with pytest.raises(ArgumentError, match="quality is 0"):
        encode_image(Picture(RGB), ".jpg", 0)
    with pytest.raises(ArgumentError, match="pixels is"):
        Picture(RGB[..., 0])
    with pytest.raises(ArgumentError, match="alpha is"):
        Picture(RGB, ALPHA.T)
    with pytest.raises(ImageError, match="cannot be written as WEBP"):
        encode_image(Picture(np.zeros((1, 16384, 3), np.uint8)), ".webp")
    with pytest.raises(ImageError, match="No such file"):
        write_image(tmp_path / "none" / "a.png", Picture(RGB))
    assert os.listdir(tmp_path) == []
