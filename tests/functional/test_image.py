"""Luma, gradients and cell statistics against scikit-image, hand-made pictures and a loop over cells."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import rgb2ycbcr

from cadyq.errors import ArgumentError
from cadyq.functional.image import (
    CELL_STATISTICS,
    cell_statistics,
    gradient,
    gray,
    laplacian,
    luma,
    sobel,
    to_levels,
)

RNG = np.random.default_rng(0)


def test_luma_is_bt601():
    rgb = RNG.integers(0, 256, (7, 5, 3)).astype(np.uint8)
    np.testing.assert_allclose(luma(rgb), rgb2ycbcr(rgb)[..., 0], atol=1e-9)
    ends = luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    np.testing.assert_allclose(ends, [[16, 235]])


def test_to_levels_rounds_half_up_and_clips():
    values = np.array([-1, 0.4999 / 255, 0.5 / 255, 2.5 / 255, 1.0, 7.0, np.nan, np.inf, -np.inf])
    assert to_levels(values).tolist() == [0, 0, 1, 3, 255, 255, 0, 255, 0]


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_levels(levels / np.float32(255)), levels)


def test_derivatives_equal_an_independent_library():
    light = RNG.random((9, 13))
    dx, dy = sobel(light)
    np.testing.assert_allclose(dx, ndimage.sobel(light, 1, mode="nearest") / 8, atol=1e-14)
    np.testing.assert_allclose(dy, ndimage.sobel(light, 0, mode="nearest") / 8, atol=1e-14)
    np.testing.assert_allclose(laplacian(light), ndimage.laplace(light, mode="nearest"), atol=1e-13)


def test_gradient_of_a_ramp():
    ramp = np.tile(np.arange(10) / 10, (4, 1))
    # Eight inner columns rise by 0.1; the two outer ones see half of it, for the border is replicated.
    assert gradient(ramp) == pytest.approx(((8 * 0.1 + 2 * 0.05) / 10, 0.0))
    assert gradient(ramp.T) == pytest.approx((0.0, 0.09))
    assert gradient(np.full((1, 1), 0.7)) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(32, 48), (37, 50), (5, 40), (7, 3), (1, 1)])
def test_cell_statistics_equal_a_loop(shape, dtype):
    levels = RNG.integers(0, np.iinfo(dtype).max + 1, (*shape, 3)).astype(dtype)
    result = cell_statistics(levels, 16)
    assert result.shape == (-(-shape[0] // 16), -(-shape[1] // 16), len(CELL_STATISTICS))
    shift, unit = (8, 65280) if dtype == np.uint8 else (16, 65535)
    light = (levels.astype(np.int64) @ np.array([19595, 38470, 7471]) >> shift) / unit
    np.testing.assert_allclose(light, gray(levels / np.iinfo(dtype).max), atol=2e-5)
    dx, dy = sobel(light)
    edge = np.abs(laplacian(light))
    for row, column in np.ndindex(result.shape[:2]):
        box = np.s_[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        expected = [
            np.abs(dx[box]).mean(),
            np.abs(dy[box]).mean(),
            edge[box].mean(),
            np.percentile(edge[box], 95, method="lower"),
            edge[box].max(),
            light[box].std(),
        ]
        np.testing.assert_allclose(result[row, column], expected, atol=1e-12)


def test_single_precision_is_kept():
    assert gray(RNG.random((20, 20, 3)).astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: luma(np.zeros((2, 2, 3))),
        lambda: luma(np.zeros((2, 2), np.uint8)),
        lambda: gray(np.zeros((2, 2, 3), np.uint8)),
        lambda: sobel(np.zeros((2, 2, 3))),
        lambda: cell_statistics(np.zeros((2, 2), np.uint8), 4),
        lambda: cell_statistics(np.zeros((2, 2, 3)), 4),
        lambda: cell_statistics(np.zeros((0, 2, 3), np.uint8), 4),
        lambda: cell_statistics(np.zeros((2, 2, 3), np.uint8), 0),
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(ArgumentError, match="expected"):
        call()
