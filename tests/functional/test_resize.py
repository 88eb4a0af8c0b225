"""The resizer against a direct double loop over pixels and taps, written from the rules alone."""

import math

import numpy as np
import pytest

from cadyq.errors import ArgumentError
from cadyq.functional.resize import downscale, imresize, mod_crop


def _kernel(distance):
    d = abs(distance)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d <= 2 else 0.0


def _direct_line(line, n_out, factor, border, rounds):
    """Resize one line of numbers, one output at a time."""
    n = len(line)
    stretch = min(factor, 1.0)
    result = []
    for position in range(1, n_out + 1):
        center = position / factor + 0.5 * (1 - 1 / factor)
        first = math.floor(center - 2 / stretch)
        taps = [first + k for k in range(math.ceil(4 / stretch) + 2)]
        weights = [stretch * _kernel(stretch * (center - tap)) for tap in taps]
        norm = sum(weights)
        total = 0.0
        for tap, weight in zip(taps, weights, strict=True):
            source = tap - 1
            while not 0 <= source < n:
                if border == "replicate":
                    source = 0 if source < 0 else n - 1
                else:
                    source = -1 - source if source < 0 else 2 * n - 1 - source
            total += weight / norm * float(line[source])
        result.append(min(max(math.floor(total + 0.5), 0), rounds) if rounds else total)
    return result


def _direct(image, factor, border, rounds):
    height, width = (math.ceil(factor * n) for n in image.shape)
    upright = [_direct_line(image[:, x], height, factor, border, rounds) for x in range(image.shape[1])]
    half_way = np.array(upright).T
    return np.array([_direct_line(row, width, factor, border, rounds) for row in half_way])


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
@pytest.mark.parametrize("factor", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 0.7])
@pytest.mark.parametrize("shape", [(12, 24), (17, 23), (5, 3), (1, 7)])
def test_equals_the_direct_loop(factor, border, shape):
    # Black and white pixels make the kernel overshoot, so the clipping between the passes is seen as well.
    image = np.random.default_rng(1).choice([0, 7, 128, 255], shape).astype(np.uint8)
    expected = _direct(image, factor, border, 255)
    result = imresize(image, factor, border)
    assert result.dtype == np.uint8
    assert int((result != expected).sum()) == 0


def test_other_dtypes():
    rng = np.random.default_rng(2)
    deep = rng.integers(0, 65536, (13, 11)).astype(np.uint16)
    np.testing.assert_array_equal(imresize(deep, 1 / 3), _direct(deep, 1 / 3, "symmetric", 65535))
    real = rng.normal(size=(13, 11))
    np.testing.assert_allclose(imresize(real, 2), _direct(real, 2, "symmetric", None), atol=1e-14)
    single = imresize(real.astype(np.float32), 2)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, imresize(real, 2), atol=1e-6)


def test_fixture_by_hand():
    # At factor 1/2 the taps lie 0.25, 0.75, 1.25 and 1.75 output pixels from the center; their weights are
    # dyadic fractions, hence exact.
    near, far, third, last = (_kernel(d) / 2 for d in (0.25, 0.75, 1.25, 1.75))
    assert (near, far, third, last) == (0.43359375, 0.11328125, -0.03515625, -0.01171875)
    step = np.array([[0, 0, 0, 0, 255, 255, 255, 255]], np.uint8)
    # Of the second output's taps, those from the second to the right of the center on are white: 16.93.
    beyond = round(255 * (far + third + last))
    assert beyond == 17
    assert imresize(step, (1, 4))[0].tolist() == [0, beyond, 255 - beyond, 255]
    ramp = np.array([[0], [10], [20], [30]], np.uint8)
    # Symmetric rows: 20 10 0 | 0 10 20 30 | 30 20; the first output's center lies between 0 and 10.
    first = near * (0 + 10) + far * (0 + 20) + third * (10 + 30) + last * (20 + 30)
    assert imresize(ramp, (2, 1))[:, 0].tolist() == [math.floor(first + 0.5), math.floor(30 - first + 0.5)]


def test_channels_are_independent_and_large_pictures_are_cut_into_blocks():
    image = np.random.default_rng(3).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    result = imresize(image, 1 / 4)
    assert result.shape == (175, 225, 3)
    for channel in range(3):
        np.testing.assert_array_equal(result[..., channel], imresize(image[..., channel], 1 / 4))


def test_the_smaller_factor_goes_first():
    image = np.random.default_rng(4).choice([0, 255], (16, 16)).astype(np.uint8)
    columns_first = imresize(imresize(image, (16, 4)), (32, 4))
    np.testing.assert_array_equal(imresize(image, (32, 4)), columns_first)


def test_a_flat_picture_stays_flat_and_a_factor_of_one_changes_nothing():
    flat = np.full((9, 10), 131, np.uint8)
    assert (imresize(flat, 1 / 3) == 131).all()
    image = np.random.default_rng(5).integers(0, 256, (9, 10)).astype(np.uint8)
    np.testing.assert_array_equal(imresize(image, 1.0), image)


def test_downscale_crops_to_a_multiple():
    image = np.random.default_rng(6).integers(0, 256, (26, 31, 3)).astype(np.uint8)
    assert mod_crop(image, 4).shape == (24, 28, 3)
    np.testing.assert_array_equal(downscale(image, 4), imresize(image[:24, :28], 1 / 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imresize(np.zeros((2, 2), np.int32), 2), "image.dtype is 'int32'"),
        (lambda: imresize(np.zeros(2, np.uint8), 2), "image.shape"),
        (lambda: imresize(np.zeros((0, 2), np.uint8), 2), "image.shape"),
        (lambda: imresize(np.zeros((2, 2), np.uint8), -1), "size is -1"),
        (lambda: imresize(np.zeros((2, 2), np.uint8), float("nan")), "size is nan"),
        (lambda: imresize(np.zeros((2, 2), np.uint8), (0, 4)), "size is"),
        (lambda: imresize(np.zeros((2, 2), np.uint8), 2, "wrap"), "border is 'wrap'"),
        (lambda: mod_crop(np.zeros((3, 9), np.uint8), 4), "at least 4 pixels"),
        (lambda: mod_crop(np.zeros((3, 9), np.uint8), 0), "multiple is 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
