"""Finding data sets in every allowed layout, and the pairs made from them."""

import numpy as np
import pytest
from PIL import Image

from cadyq.data.sets import DATA_SETS, data_root, find_pictures, load_pairs
from cadyq.errors import ArgumentError, DataError, ImageError
from cadyq.functional.fidelity import psnr_y, ssim_y
from cadyq.functional.resize import downscale, imresize
from cadyq.io.images import Picture, write_image

RNG = np.random.default_rng(0)


def _fill(folder, n, shape=(26, 31)):
    folder.mkdir(parents=True)
    for i in range(n):
        write_image(folder / f"{i}.png", Picture(RNG.integers(0, 256, (*shape, 3)).astype(np.uint8)))


def test_pairs_of_an_ordinary_folder(tmp_path):
    _fill(tmp_path / "photos", 2)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".hidden.png").write_text("no picture")
    pairs = list(load_pairs(tmp_path / "photos", 4, "replicate"))
    assert [pair.name for pair in pairs] == ["0", "1"]
    for pair in pairs:
        assert pair.hr.shape == (24, 28, 3)
        np.testing.assert_array_equal(pair.lr, downscale(pair.hr, 4, "replicate"))


@pytest.mark.parametrize("layout", ["eval/Set5", "Set5", "Set5/HR", "benchmark/Set5/HR"])
def test_layouts(tmp_path, layout, monkeypatch):
    _fill(tmp_path / layout, 5)
    assert len(find_pictures("Set5", tmp_path)) == 5
    monkeypatch.setenv("CADYQ_DATA", str(tmp_path))
    assert len(find_pictures("Set5")) == 5


def test_a_set_under_another_name(tmp_path):
    _fill(tmp_path / "DIV2K_valid_HR", 100, (1, 1))
    assert len(find_pictures("DIV2K", tmp_path)) == 100


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("CADYQ_DATA", raising=False)
    with pytest.raises(DataError, match="environment variable CADYQ_DATA"):
        load_pairs("Set5", 4)
    monkeypatch.setenv("CADYQ_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"CADYQ_DATA is '.*none', expected an existing folder"):
        data_root()
    with pytest.raises(DataError, match="Set5 was not found in"):
        load_pairs("Set5", 4, root=tmp_path)
    with pytest.raises(DataError, match="source is 'Set6'"):
        load_pairs("Set6", 4, root=tmp_path)
    with pytest.raises(DataError, match="holds no pictures"):
        load_pairs(tmp_path, 4)
    _fill(tmp_path / "Set5", 4)
    with pytest.raises(DataError, match="holds 4 pictures, expected 5"):
        load_pairs("Set5", 4, root=tmp_path)
    with pytest.raises(ArgumentError, match="scale is 1"):
        load_pairs(tmp_path / "Set5", 1)
    with pytest.raises(ArgumentError, match="border is 'wrap'"):
        load_pairs(tmp_path / "Set5", 4, "wrap")
    (tmp_path / "Set5" / "0.png").write_bytes(b"")
    pairs = load_pairs(tmp_path / "Set5", 4)
    with pytest.raises(ImageError, match=r"0\.png is empty"):
        next(pairs)


def test_sets_are_described():
    assert all(known.n_pictures > 0 and known.description.endswith(".") for known in DATA_SETS.values())


def test_bicubic_reaches_its_published_figures(pictures_root):
    # Set5 x4, MATLAB bicubic: 28.42 dB and 0.8104 in every paper's table.
    pairs = list(load_pairs("Set5", 4, root=pictures_root))
    enlarged = [(imresize(pair.lr, 4), pair.hr) for pair in pairs]
    assert np.mean([psnr_y(*both, 4) for both in enlarged]) == pytest.approx(28.42, abs=0.02)
    assert np.mean([ssim_y(*both, 4) for both in enlarged]) == pytest.approx(0.8104, abs=0.001)


@pytest.mark.parametrize("name", ["Set14", "Urban100", "Large2K", "Large4K"])
def test_the_given_sets_are_complete(pictures_root, name):
    assert len(find_pictures(name, pictures_root)) == DATA_SETS[name].n_pictures


@pytest.mark.parametrize("room", ["test2k/HR/X4", "test2K/HR/x4", "Test2K/HR", "Test2K"])
def test_layouts_of_classsr(tmp_path, room):
    folder = tmp_path / room
    folder.mkdir(parents=True)
    for index in range(1201, 1301):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    found = find_pictures("Test2K", tmp_path)
    assert [found[0].stem, found[-1].stem, len(found)] == ["1201", "1300", 100]
