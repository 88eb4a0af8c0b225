"""Any folder of pictures as training data."""

import numpy as np
import pytest

from cadyq.data.folders import load_folder, load_training
from cadyq.errors import ArgumentError, DataError
from cadyq.functional.resize import downscale
from cadyq.io.images import Picture, write_image


@pytest.fixture
def folder(tmp_path):
    """Four pictures of different sizes, one of them too small."""
    rng = np.random.default_rng(0)
    path = tmp_path / "photos"
    path.mkdir()
    for name, shape in {"a": (60, 72), "b": (48, 50), "c": (90, 49), "d": (20, 200)}.items():
        write_image(path / f"{name}.png", Picture(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)))
    return path


def test_crops_cover_every_picture_and_match_it(folder, tmp_path):
    from cadyq.io.images import read_image

    crops = load_folder(folder, 2, tmp_path / "cache", side=48)
    assert crops.hr.shape[1:] == (48, 48, 3) and crops.lr.shape[1:] == (24, 24, 3)
    assert len(crops.hr) == 4 + 1 + 2  # a: 2 rows of 2, b: 1, c: 0 and 36 (the last multiple of 12)
    whole = read_image(folder / "a.png").pixels
    assert np.array_equal(crops.hr[3], whole[12:60, 24:72])
    # Cut from the whole picture's low-resolution version: inside, it differs from the crop's own at the border.
    assert np.array_equal(crops.lr[3], downscale(whole, 2)[6:30, 12:36])
    assert not np.array_equal(crops.lr[3], downscale(whole[12:60, 24:72], 2))


def test_second_time_nothing_is_decoded(folder, tmp_path, monkeypatch):
    first = load_folder(folder, 2, tmp_path / "cache", side=48)
    monkeypatch.setattr("cadyq.data.folders.read_image", None)
    again = load_folder(folder, 2, tmp_path / "cache", side=48)
    assert np.array_equal(first.lr, again.lr) and np.array_equal(first.hr, again.hr)


def test_pictures_part_between_the_splits(folder, tmp_path):
    parts = [load_folder(folder, 2, tmp_path / "cache", split, side=48) for split in ("train", "validation")]
    assert all(len(part.hr) for part in parts)
    assert sum(len(part.hr) for part in parts) == len(load_folder(folder, 2, tmp_path / "cache", side=48).hr)


def test_what_cannot_be_used_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="smaller than 384x384"):
        load_folder(folder, 2, tmp_path / "cache")
    with pytest.raises(DataError, match="does not exist"):
        load_folder(tmp_path / "nowhere", 2, tmp_path / "cache")
    with pytest.raises(DataError, match="two are the least"):
        (tmp_path / "empty").mkdir()
        load_folder(tmp_path / "empty", 2, tmp_path / "cache")
    with pytest.raises(ArgumentError, match="scale"):
        load_folder(folder, 1, tmp_path / "cache")


def test_div2k_is_asked_for_by_name(tmp_path):
    with pytest.raises(DataError, match="cadyq download DIV2K"):
        load_training("DIV2K", "train", 4, tmp_path / "cache", tmp_path)
    rng = np.random.default_rng(1)
    for name in ("DIV2K_train_HR", "DIV2K_valid_HR"):
        (tmp_path / name).mkdir()
        picture = Picture(rng.integers(0, 256, (400, 390, 3), dtype=np.uint8))
        write_image(tmp_path / name / "0001.png", picture)
    train = load_training("DIV2K", "train", 4, tmp_path / "cache", tmp_path)
    valid = load_training("DIV2K", "validation", 4, tmp_path / "cache", tmp_path)
    assert train.hr.shape == (2, 384, 384, 3) and not np.array_equal(train.hr, valid.hr)
