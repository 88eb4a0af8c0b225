"""What a file is survives upscaling: formats x properties, each told by a reader that did not write the file."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from cadyq.io.images import SUFFIXES, Picture, read_image, write_image
from cadyq.io.metadata import Metadata
from cadyq.io.stream import has_vips
from cadyq.pictures import Wanted, prepare

exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
vipsheader = pytest.mark.skipif(shutil.which("vipsheader") is None, reason="vipsheader is not installed")
vips = pytest.mark.skipif(not has_vips(), reason="pyvips is not installed")

MODEL = "srresnet-x4-pams8"
HEIGHT, WIDTH = 10, 14
RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(0, 256, (5, 7, 3)), np.ones((2, 2, 1))).astype(np.uint8)
DEEP = np.kron(RNG.integers(0, 65536, (5, 7, 4)), np.ones((2, 2, 1))).astype(np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b"<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF "
    b"xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description rdf:about='' "
    b"xmlns:dc='http://purl.org/dc/elements/1.1/' xmlns:tiff='http://ns.adobe.com/tiff/1.0/' "
    b"xmlns:exif='http://ns.adobe.com/exif/1.0/' tiff:Orientation='6' exif:PixelXDimension='14'>"
    b"<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>Lagoon</rdf:li></rdf:Alt></dc:title>"
    b"<tiff:ImageLength>10</tiff:ImageLength></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
)
OUTPUTS = (".png", ".tif", ".jpg", ".webp", ".avif")
KINDS = ("rgb", "gray", "rgba", "gray+alpha", "palette", "palette+alpha", "cmyk")
DEEP_KINDS = ("rgb16", "gray16", "rgba16", "gray16+alpha")


def _exif():
    exif = Image.Exif()
    exif[0x010F], exif[0x8298], exif[0x0112] = "Maker", "(c) someone", 6
    exif.get_ifd(0x8769).update(
        {0x9003: "2020:01:02 03:04:05", 0x829A: IFDRational(1, 125), 0xA002: WIDTH, 0xA003: HEIGHT}
    )
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 7.0, 30.0)})
    return exif


def _source(path, kind):
    """A file of a kind, with everything a file can say, lying on its side."""
    image = {
        "rgb": lambda: Image.fromarray(RGB),
        "gray": lambda: Image.fromarray(RGB[..., 0]),
        "rgba": lambda: Image.fromarray(np.dstack([RGB, RGB[..., :1]])),
        "gray+alpha": lambda: Image.fromarray(RGB[..., :2]),
        "palette": lambda: Image.fromarray(RGB).quantize(16),
        "palette+alpha": lambda: Image.fromarray(RGB).quantize(16),
        "cmyk": lambda: Image.fromarray(RGB).convert("CMYK"),
    }[kind]()
    options = {"exif": _exif(), "dpi": (240, 240), "icc_profile": SRGB}
    if kind == "palette+alpha":
        options["transparency"] = bytes(range(0, 256, 16))
    if path.suffix == ".tif":
        options["exif"][700] = XMP
        options["exif"] = options["exif"].tobytes()
    elif path.suffix == ".png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    else:
        options["xmp"] = XMP
    image.save(path, **options)


def _deep_source(path, kind):
    channels = {"gray16": 1, "gray16+alpha": 2, "rgb16": 3, "rgba16": 4}[kind]
    alpha = DEEP[..., 3] if channels in (2, 4) else None
    color = DEEP[..., :3] if channels > 2 else DEEP[..., :1].repeat(3, axis=2)
    exif = _exif()
    exif.pop(0x0112)
    metadata = Metadata(exif.tobytes(), XMP.replace(b"tiff:Orientation='6'", b""), (240.0, 240.0))
    write_image(path, Picture(color, alpha, channels < 3, SRGB, metadata=metadata))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Upscale a file of each kind into each format: {(kind, suffix): path}."""
    folder = tmp_path_factory.mktemp("fidelity")
    result = {}
    for kind in KINDS + (DEEP_KINDS if has_vips() else ()):
        deep = kind in DEEP_KINDS
        source = folder / f"{kind}{'.tif' if kind in ('cmyk', 'rgb16') else '.png'}"
        (_deep_source if deep else _source)(source, kind)
        for suffix in OUTPUTS:
            if "a" in kind.replace("gray", "").replace("palette", "") and suffix == ".jpg":
                continue  # no transparency in JPEG
            target = folder / f"out-{kind}{suffix}"
            prepare(source, target, Wanted(model=MODEL, threads=1)).run()
            result[kind, suffix] = target
    return result


@pytest.fixture(scope="module")
def told(made):
    """What exiftool says about every file, with the group before each tag."""
    names = [str(path) for path in made.values()]
    done = subprocess.run(
        ["exiftool", "-j", "-G1", "-n", "-a", *names], capture_output=True, text=True, check=False
    )
    return dict(zip(made, json.loads(done.stdout), strict=True))


def _any(said, *tags):
    return next((value for name, value in said.items() if name.split(":")[-1] in tags), None)


@exiftool
def test_exif_xmp_profile_and_resolution_are_carried_over(told):
    for (kind, suffix), said in told.items():
        where = f"{kind}{suffix}: {said}"
        turned = kind in KINDS
        width, height = (4 * HEIGHT, 4 * WIDTH) if turned else (4 * WIDTH, 4 * HEIGHT)
        assert said.get("IFD0:Make") == "Maker", where
        assert said.get("IFD0:Copyright") == "(c) someone", where
        assert said.get("ExifIFD:DateTimeOriginal") == "2020:01:02 03:04:05", where
        assert said.get("ExifIFD:ExposureTime") == 1 / 125, where
        assert (said["ExifIFD:ExifImageWidth"], said["ExifIFD:ExifImageHeight"]) == (width, height), where
        assert said.get("GPS:GPSLatitudeRef") == "N", where
        assert said.get("GPS:GPSLatitude") == pytest.approx(48.125), where
        assert said.get("IFD0:Orientation", 1) == 1, where
        assert said.get("XMP-tiff:Orientation", 1) == 1, where
        assert said.get("XMP-dc:Title") == "Lagoon", where
        assert said.get("XMP-exif:ExifImageWidth") == width, where
        assert said.get("XMP-tiff:ImageHeight") == height, where
        per_inch = (
            said.get("IFD0:XResolution")
            or said.get("JFIF:XResolution")
            or said["PNG-pHYs:PixelsPerUnitX"] / 39.37
        )
        assert per_inch == pytest.approx(240, abs=0.01), where
        if kind in ("rgb", "rgba", "palette", "palette+alpha", "rgb16", "rgba16"):
            assert _any(said, "ProfileDescription", "ProfileClass") is not None, where


@exiftool
def test_layout_and_size(told):
    for (kind, suffix), said in told.items():
        size = (4 * HEIGHT, 4 * WIDTH) if kind in KINDS else (4 * WIDTH, 4 * HEIGHT)
        found = (_any(said, "ImageWidth"), _any(said, "ImageHeight"))
        if suffix != ".avif":
            assert found == size, (kind, suffix)
        if suffix == ".png":
            assert said["PNG:BitDepth"] == (16 if kind in DEEP_KINDS else 8)
            expected = {"gray": 0, "gray16": 0, "gray+alpha": 4, "gray16+alpha": 4}
            assert said["PNG:ColorType"] == expected.get(kind, 6 if "alpha" in kind or "rgba" in kind else 2)


@vipsheader
@vips
def test_depth_and_channels_by_libvips(made):
    for (kind, suffix), path in made.items():
        if suffix == ".avif":
            continue  # read by hardly any packaged libvips
        words = subprocess.run(["vipsheader", path], capture_output=True, text=True, check=True).stdout
        deep = kind in DEEP_KINDS and suffix in (".png", ".tif")
        assert (" ushort," in words) == deep, (kind, suffix, words)
        channels = 1 if kind.startswith("gray") and suffix in (".png", ".tif", ".jpg") else 3
        channels += "alpha" in kind or "rgba" in kind
        assert f" {channels} band" in words, (kind, suffix, words)


@vips
def test_tiff_by_tifffile(made):
    tifffile = pytest.importorskip("tifffile")
    for (kind, suffix), path in made.items():
        if suffix != ".tif":
            continue
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            assert page.dtype == (np.uint16 if kind in DEEP_KINDS else np.uint8), kind
            assert page.tags["ExifTag"].value["DateTimeOriginal"] == "2020:01:02 03:04:05", kind
            assert page.tags["XMP"].value.startswith(b"<?xpacket"), kind
            assert {"rgb": 3, "rgb16": 3, "rgba16": 4}.get(kind, page.samplesperpixel) == page.samplesperpixel


@vips
@pytest.mark.parametrize(
    ("kind", "suffix"),
    # Pillow does not know TIFF files of gray and opacity with 16 bits.
    [(k, s) for k in DEEP_KINDS for s in (".png", ".tif") if (k, s) != ("gray16+alpha", ".tif")],
)
def test_sixteen_bits_pass_unharmed(tmp_path, kind, suffix):
    path = tmp_path / f"deep{suffix}"
    _deep_source(path, kind)
    picture = read_image(path, deep=True)
    assert picture.pixels.dtype == np.uint16
    assert picture.notes == ()
    np.testing.assert_array_equal(picture.pixels[..., 0], DEEP[..., 0])
    if "alpha" in kind or "rgba" in kind:
        np.testing.assert_array_equal(picture.alpha, DEEP[..., 3])
    assert picture.metadata.dpi == pytest.approx((240, 240), abs=0.01)
    assert np.abs(read_image(path).pixels[..., 0] - DEEP[..., 0] / 257).max() <= 1


@vips
def test_twelve_bits_of_avif(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint16)
    write_image(tmp_path / "deep.avif", Picture(ramp), quality=100)
    picture = read_image(tmp_path / "deep.avif", deep=True)
    assert picture.pixels.dtype == np.uint16
    assert len(np.unique(picture.pixels)) > 1000
    assert np.abs(picture.pixels.astype(int) - ramp).max() < 200


def test_sixteen_bits_without_libvips(tmp_path, monkeypatch):
    from cadyq.errors import MissingExtraError

    if has_vips():
        write_image(tmp_path / "color.png", Picture(DEEP[..., :3].copy()))
    gray = np.ascontiguousarray(DEEP[..., :1].repeat(3, axis=2))
    monkeypatch.setitem(__import__("sys").modules, "pyvips", None)
    write_image(tmp_path / "gray.png", Picture(gray, is_gray=True))
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png", deep=True).pixels, gray)
    with pytest.raises(MissingExtraError, match=r"cadyq\[photo\]"):
        write_image(tmp_path / "other.png", Picture(DEEP[..., :3].copy()))
    assert not (tmp_path / "other.png").exists()
    if (tmp_path / "color.png").exists():
        with pytest.raises(MissingExtraError, match=r"color\.png"):
            read_image(tmp_path / "color.png", deep=True)
        assert read_image(tmp_path / "color.png").pixels.dtype == np.uint8


def test_metadata_that_is_broken_or_too_long_spoils_no_picture(tmp_path):
    picture = Picture(
        RGB, metadata=Metadata(xmp=b"<" + b"x" * 100_000, exif=_exif().tobytes(), dpi=(1e-3, 5.0))
    )
    for suffix in SUFFIXES:
        write_image(tmp_path / f"a{suffix}", picture)
        assert read_image(tmp_path / f"a{suffix}").pixels.shape == RGB.shape
