"""The split by photo, the cache, and the sampler's promises: matching pairs, equal sequences, saved state."""

import json
import os

import numpy as np
import pytest

from cadyq.data.crops import (
    CropArrays,
    PairedCrops,
    load_crops,
    posed,
    read_manifest,
    read_split,
    split_of,
)
from cadyq.errors import ArgumentError, DataError, ImageError
from cadyq.functional.resize import downscale
from cadyq.io.images import Picture, write_image

RNG = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path):
    """A training folder of 40 photos with two crops each."""
    train = tmp_path / "data" / "train"
    (train / "a").mkdir(parents=True)
    lines = ["file,source,photo,crop_rank"]
    for i in range(80):
        write_image(train / f"a/{i}.png", Picture(RNG.integers(0, 256, (12, 12, 3)).astype(np.uint8)))
        lines.append(f'a/{i}.png,here,"photo, {i // 2}",{i % 2}')
    (train / "manifest.csv").write_text("\n".join(lines))
    return tmp_path / "data"


def _numbered(scale=2, n=3, side=8):
    """Crops in which every low-resolution pixel is unique, and its block in the large one equals it."""
    lr = np.arange(n * side * side * 3, dtype=np.uint32) % 251
    lr = lr.astype(np.uint8).reshape(n, side, side, 3)
    return CropArrays(lr, lr.repeat(scale, axis=1).repeat(scale, axis=2))


def test_the_committed_split_follows_the_rule():
    split = read_split()
    assert len(split) == 304
    assert all(split_of(*photo) == part for photo, part in split.items())
    assert sum(part == "validation" for part in split.values()) == 21


def test_photos_are_not_torn_apart(root, tmp_path):
    parts = {part: load_crops(part, 2, tmp_path / "cache", root) for part in ("train", "validation")}
    crops = read_manifest(root)
    validation = [crop for crop in crops if split_of(crop.source, crop.photo) == "validation"]
    assert 0 < len(validation) < 20
    assert len(parts["validation"].hr) == len(validation)
    assert sum(len(part.hr) for part in parts.values()) == 80


def test_cached_arrays(root, tmp_path):
    cache = tmp_path / "deep" / "cache"
    crops = load_crops("train", 3, cache, root, limit=5)
    assert crops.hr.shape == (5, 12, 12, 3)
    assert crops.lr.shape == (5, 4, 4, 3)
    np.testing.assert_array_equal(crops.lr[2], downscale(np.array(crops.hr[2]), 3))
    assert not crops.hr.flags.writeable
    before = {name: os.stat(cache / name).st_mtime_ns for name in os.listdir(cache)}
    load_crops("train", 3, cache, root, limit=5)
    assert {name: os.stat(cache / name).st_mtime_ns for name in os.listdir(cache)} == before
    # Another scale shares the large pictures; a changed file shares nothing.
    load_crops("train", 2, cache, root, limit=5)
    assert len(os.listdir(cache)) == 3
    os.utime(
        root / "train" / next(c.file for c in read_manifest(root) if split_of(*c[1:]) == "train"), (1, 1)
    )
    load_crops("train", 2, cache, root, limit=5)
    assert len(os.listdir(cache)) == 5


def test_damaged_folders(root, tmp_path):
    cache = tmp_path / "cache"
    first = next(root / "train" / c.file for c in read_manifest(root) if split_of(*c[1:]) == "train")
    write_image(first, Picture(np.zeros((12, 11, 3), np.uint8)))
    with pytest.raises(DataError, match="crop 1 measures"):
        load_crops("train", 2, cache, root)
    first.write_bytes(b"")
    with pytest.raises(ImageError, match="is empty"):
        load_crops("train", 2, cache, root)
    assert os.listdir(cache) == []
    first.unlink()
    with pytest.raises(DataError, match="in the manifest, but does not exist"):
        load_crops("train", 2, cache, root)
    manifest = root / "train" / "manifest.csv"
    for text, message in [("file,photo\na,b", "source"), ("file,source,photo\n", "lists no crops")]:
        manifest.write_text(text)
        with pytest.raises(DataError, match=message):
            load_crops("train", 2, cache, root)
    manifest.unlink()
    with pytest.raises(DataError, match="list of training crops"):
        load_crops("train", 2, cache, root)


@pytest.mark.parametrize("augment", [False, True])
def test_pairs_show_the_same_place(augment):
    lr, hr = PairedCrops(_numbered(), 3, seed=1, augment=augment).batch(64)
    assert lr.shape == (64, 3, 3, 3)
    assert hr.shape == (64, 6, 6, 3)
    np.testing.assert_array_equal(lr.repeat(2, axis=1).repeat(2, axis=2), hr)


def test_all_poses_and_places_are_drawn():
    crops = _numbered(n=1, side=3)
    lr, _ = PairedCrops(crops, 2, seed=0).batch(2000)
    drawn = {patch.tobytes() for patch in lr}
    places = [crops.lr[0, y : y + 2, x : x + 2] for y in (0, 1) for x in (0, 1)]
    assert drawn == {np.ascontiguousarray(posed(p, k)).tobytes() for p in places for k in range(8)}
    assert len(drawn) == 32


def test_equal_seeds_and_saved_states_give_equal_batches():
    first, second = (PairedCrops(_numbered(), 3, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.batch(4)[0], second.batch(4)[0])
    state = json.loads(json.dumps(first.state()))
    expected = [first.batch(5) for _ in range(3)]
    third = PairedCrops(_numbered(), 3, seed=0)
    third.restore(state)
    for lr, hr in expected:
        result = third.batch(5)
        np.testing.assert_array_equal(result[0], lr)
        np.testing.assert_array_equal(result[1], hr)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairedCrops(_numbered(), 9, 0), "patch is 9"),
        (lambda: PairedCrops(_numbered()._replace(hr=_numbered(n=2).hr), 3, 0), "pairs that differ"),
        (lambda: PairedCrops(_numbered(), 3, 0).batch(0), "n is 0"),
        (lambda: PairedCrops(_numbered(), 3, 0).restore({"state": 1}), "what state"),
        (lambda: load_crops("test", 2, "cache"), "split is 'test'"),
        (lambda: load_crops("train", 1, "cache"), "scale is 1"),
        (lambda: load_crops("train", 2, "cache", border="wrap"), "border is"),
        (lambda: load_crops("train", 2, "cache", limit=0), "limit is 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_the_given_photos_are_all_assigned(pictures_root):
    photos = {(crop.source, crop.photo) for crop in read_manifest(pictures_root)}
    assert photos == set(read_split())


def test_given_crops(pictures_root, tmp_path):
    crops = load_crops("validation", 4, tmp_path, pictures_root, limit=3)
    assert crops.hr.shape == (3, 384, 384, 3)
    assert crops.lr.shape == (3, 96, 96, 3)
