"""Damaged patches: repeatable, mild, and really damaged."""

import numpy as np
import pytest

from cadyq.data.degrade import degrade, through_jpeg
from cadyq.errors import ArgumentError


def patches(n=200, side=24):
    """Smooth patches with one sharp edge: uint8 (n, side, side, 3)."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:side, 0:side]
    base = 100 + 40 * np.sin(x / 5) + 3 * y + 60 * (x > side // 2)
    return (base[None, ..., None] + rng.uniform(-30, 30, (n, 1, 1, 3))).clip(0, 255).astype(np.uint8)


def psnr(a, b):
    """Per patch, (n,); infinite where nothing changed."""
    error = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def test_the_generator_decides_everything():
    lr = patches(20)
    first = degrade(lr, np.random.default_rng(1))
    assert np.array_equal(first, degrade(lr, np.random.default_rng(1)))
    assert not np.array_equal(first, degrade(lr, np.random.default_rng(2)))


def test_the_input_is_left_alone():
    lr = patches(20)
    copy = lr.copy()
    degrade(lr, np.random.default_rng(0))
    assert np.array_equal(lr, copy)


def test_damage_is_mild_and_some_patches_stay_clean():
    lr = patches()
    result = degrade(lr, np.random.default_rng(0))
    assert result.shape == lr.shape and result.dtype == np.uint8
    found = psnr(result, lr)
    clean = np.isinf(found).mean()
    assert 0.08 < clean < 0.35
    assert np.median(found[np.isfinite(found)]) > 30
    assert found.min() > 22


def test_blocks_begin_where_the_phase_says():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain = through_jpeg(image, 60)
    assert plain.shape == image.shape
    moved = through_jpeg(image, 60, phase=(8, 3))
    assert moved.shape == image.shape and not np.array_equal(plain, moved)
    # A whole block of offset filled with a whole block changes nothing at the remaining ones.
    shifted = through_jpeg(image, 60, "4:4:4", phase=(8, 8))
    assert np.array_equal(shifted, through_jpeg(image, 60, "4:4:4"))


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(ArgumentError, match="lr"):
        degrade(bad, np.random.default_rng(0))
