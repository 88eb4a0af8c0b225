"""Files in, files out: the model and the size that fit, streamed and in memory alike, no seams, no crash."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import scene
from PIL import Image

import cadyq
from cadyq import bands, pictures
from cadyq.errors import ArgumentError
from cadyq.estimate import estimate, measure_rates
from cadyq.functional.resize import imresize
from cadyq.io import shipped
from cadyq.io.images import read_image, write_image
from cadyq.io.stream import has_vips
from cadyq.pictures import Wanted, prepare

MODEL = "srresnet-x4-pams8"
vips = pytest.mark.skipif(not has_vips(), reason="pyvips is not installed")


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut even small pictures into blocks and bands."""
    monkeypatch.setattr(bands, "_BLOCK_WIDTH", 64)
    monkeypatch.setattr(bands, "_BLOCK_PIXELS", 48 * 64)


def _source(path, kind):
    pixels = scene(110, 90)
    if kind.startswith("deep"):
        pixels = pixels.astype(np.uint16) * 257 + np.arange(90, dtype=np.uint16)[:, None]
    alpha = None
    if "alpha" in kind:
        alpha = np.where(pixels[..., 0] > pixels.max() // 3, pixels[..., 1], 0).astype(pixels.dtype)
    is_gray = "gray" in kind
    if is_gray:
        pixels = pixels[..., :1].repeat(3, axis=2)
    write_image(path, cadyq.Picture(np.ascontiguousarray(pixels), alpha, is_gray))
    return path


@vips
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("rgb", {}),
        ("gray alpha", {}),
        ("deep gray", {}),
        ("deep alpha", {}),
        ("rgb", {"width": 333}),
        ("deep alpha", {"width": 600, "height": 90}),
    ],
)
def test_streamed_equals_in_memory(tmp_path, monkeypatch, small_blocks, kind, size):
    source = _source(tmp_path / "in.png", kind)
    results = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(pictures, "STREAM_PIXELS", limit)
        target = tmp_path / f"out{limit}.png"
        said = prepare(source, target, Wanted(model=MODEL, threads=1, **size)).run()
        assert said["streamed"] == (limit == 0)
        results.append((read_image(target, deep=True), said))
    (whole, told), (streamed, streamed_told) = results
    np.testing.assert_array_equal(streamed.pixels, whole.pixels)
    if whole.alpha is not None:
        np.testing.assert_array_equal(streamed.alpha, whole.alpha)
    assert (streamed.is_gray, streamed.pixels.dtype) == (whole.is_gray, whole.pixels.dtype)
    assert told["fqr"] == streamed_told["fqr"]
    height, width = whole.pixels.shape[:2]
    assert (width, height) == (told["width"], told["height"])
    assert (width, height) == {1: (333, 407), 2: (600, 90)}.get(len(size), (360, 440))


@vips
@pytest.mark.parametrize("model", [MODEL, "srresnet-x4-cadyq"])
def test_strips_and_blocks_show_no_seams_on_gradients(tmp_path, monkeypatch, small_blocks, model):
    """Mean second difference across the borders of blocks is at most 1.2 times that inside."""
    monkeypatch.setattr(pictures, "STREAM_PIXELS", 0)
    y, x = np.mgrid[0:120, 0:120]
    across, inside = [], []
    tile = cadyq.load(model).tile
    for slope_y, slope_x in ((1.5, 0), (0.7, 0.7)):
        ramp = (30 + slope_y * y + slope_x * x).clip(0, 255).astype(np.uint8)
        Image.fromarray(ramp).save(tmp_path / "in.png")
        prepare(tmp_path / "in.png", tmp_path / "out.png", Wanted(model=model, threads=1)).run()
        pixels = read_image(tmp_path / "out.png").pixels[..., 0].astype(float)
        for plane in (pixels, pixels.T):
            second = np.abs(np.diff(plane, 2, axis=0))[15:-15, 16:-16]
            is_border = np.isin((np.arange(len(second)) + 16) % (4 * tile), (4 * tile - 1, 0))
            across.append(second[is_border].mean())
            inside.append(second[~is_border].mean())
    assert np.mean(across) <= 1.2 * np.mean(inside)


def test_blocks_equal_the_whole_where_bits_agree(monkeypatch):
    model, picture = cadyq.load(MODEL), scene(110, 90)
    whole = model.upscale(picture, threads=1)
    monkeypatch.setattr(bands, "_BLOCK_WIDTH", 64)
    monkeypatch.setattr(bands, "_BLOCK_PIXELS", 48 * 64)
    np.testing.assert_array_equal(model.upscale(picture, threads=1).pixels, whole.pixels)


def test_exact_size_is_bicubic_of_the_network(tmp_path):
    Image.fromarray(scene(20, 30)).save(tmp_path / "in.png")
    full = cadyq.load(MODEL).upscale(tmp_path / "in.png").pixels
    for wanted, size in (
        ({"scale": 3}, (60, 90)),
        ({"height": 50}, (50, 75)),
        ({"width": 200}, (133, 200)),
        ({"width": 7, "height": 90}, (90, 7)),
    ):
        task = prepare(tmp_path / "in.png", tmp_path / "out.png", Wanted(**wanted))
        assert task.size == size
        assert any("bicubic" in note for note in task.notes)
        if "scale" not in wanted:
            prepare(tmp_path / "in.png", tmp_path / "out.png", Wanted(model=MODEL, **wanted)).run()
            np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, imresize(full, size))


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"scale": 0.5}, "scale"),
        ({"scale": 5}, "at most 4"),
        ({"scale": 2, "width": 9}, "together"),
        ({"width": 0}, "width"),
        ({"quality": 101}, "quality"),
        ({"depth": 12}, "depth"),
        ({"model": MODEL, "scale": 2}, "which is what"),
        ({"width": 70_000}, "65535"),
    ],
)
def test_what_cannot_be_had(tmp_path, wanted, word):
    Image.fromarray(scene(9, 9)).save(tmp_path / "in.png")
    with pytest.raises(ArgumentError, match=word):
        prepare(tmp_path / "in.png", tmp_path / "out.jpg", Wanted(**wanted))


def test_a_jpeg_gets_the_photo_network(tmp_path):
    chosen = {}
    for suffix in (".png", ".jpg"):
        Image.fromarray(scene(20, 20)).save(tmp_path / f"in{suffix}")
        chosen[suffix] = prepare(tmp_path / f"in{suffix}", tmp_path / "out.png", Wanted())
    # By content, not by name.
    (tmp_path / "lies.png").write_bytes((tmp_path / "in.jpg").read_bytes())
    lies = prepare(tmp_path / "lies.png", tmp_path / "out.png", Wanted())
    assert chosen[".jpg"].model_name == lies.model_name == "srresnet-x4-photo"
    assert "JPEG" in lies.why
    assert chosen[".png"].model_name == shipped.default_model(4) == "srresnet-x4-exit"


@vips
def test_estimates_grow_with_pixels_and_streaming_bounds_memory(tmp_path, monkeypatch):
    Image.fromarray(scene(30, 40)).save(tmp_path / "small.png")
    Image.fromarray(scene(1200, 600)).save(tmp_path / "large.png")
    small, large = (
        prepare(tmp_path / f"{name}.png", tmp_path / "out.png", Wanted(model=MODEL, threads=1))
        for name in ("small", "large")
    )
    rates = measure_rates(small)
    a, b = estimate(small, rates), estimate(large, rates)
    assert 0 < a.seconds < b.seconds
    assert 30e6 < a.memory_bytes < b.memory_bytes
    monkeypatch.setattr(pictures, "STREAM_PIXELS", 0)
    heights = []
    for height in (3000, 6000):
        Image.fromarray(np.zeros((height, 600), np.uint8)).save(tmp_path / "tall.png")
        tall = prepare(tmp_path / "tall.png", tmp_path / "out.png", Wanted(model=MODEL, threads=1))
        heights.append(estimate(tall, rates).memory_bytes)
    assert heights[0] == heights[1]


def test_corrupted_files_end_in_a_message():
    root = Path(__file__).parents[1]
    source = str(Path(cadyq.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, root / "scripts" / "fuzz_pictures.py", "--files", "147", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "147 files" in done.stdout
