"""PSNR by hand, SSIM against scikit-image, the bootstrap on samples with a known answer."""

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from cadyq.errors import ArgumentError
from cadyq.functional.fidelity import paired_bootstrap, psnr_y, ssim_y
from cadyq.functional.image import luma


def _pair(height, width, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height), 2 * np.arange(width))[..., None] % 256
    hr = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)
    noise = rng.normal(scale=12, size=hr.shape)
    return (hr + noise).clip(0, 255).astype(np.uint8), hr


def test_psnr_of_a_gray_step():
    hr = np.full((20, 20, 3), 100, np.uint8)
    sr = hr + np.uint8(5)
    step = 5 * (65.481 + 128.553 + 24.966) / 255
    assert psnr_y(sr, hr, 4) == pytest.approx(20 * math.log10(255 / step), abs=1e-12)
    assert psnr_y(hr, hr, 4) == math.inf


def test_the_shaved_edge_does_not_count():
    sr, hr = _pair(40, 40)
    spoiled = sr.copy()
    spoiled[:4] = spoiled[-4:] = 0
    spoiled[:, :4] = spoiled[:, -4:] = 255
    assert psnr_y(spoiled, hr, 4) == psnr_y(sr, hr, 4) != psnr_y(spoiled, hr, 3)
    assert ssim_y(spoiled, hr, 4) == ssim_y(sr, hr, 4)


@pytest.mark.parametrize(("height", "width"), [(19, 19), (60, 45), (300, 33)])
def test_ssim_equals_scikit_image(height, width):
    sr, hr = _pair(height, width)
    expected = structural_similarity(
        luma(sr)[4:-4, 4:-4],
        luma(hr)[4:-4, 4:-4],
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim_y(sr, hr, 4) == pytest.approx(expected, abs=1e-9)
    assert ssim_y(hr, hr, 4) == pytest.approx(1.0)


def test_bootstrap_interval():
    rng = np.random.default_rng(1)
    b = rng.normal(30, 5, 100)
    mean, low, high = paired_bootstrap(b + rng.normal(0.1, 0.2, 100), b, 2000)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 10, rel=0.25)
    assert paired_bootstrap(b + 1, b, 10) == pytest.approx((1, 1, 1))
    assert paired_bootstrap(b, b[::-1], 500, seed=3) == paired_bootstrap(b, b[::-1], 500, seed=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr_y(*_shapes((9, 9, 3), (9, 8, 3)), 0), "equal to the other's"),
        (lambda: psnr_y(*_shapes((9, 9), (9, 9)), 0), "sr.shape"),
        (lambda: psnr_y(*_shapes((8, 9, 3), (8, 9, 3)), 4), "after shaving 4"),
        (lambda: psnr_y(*_shapes((8, 9, 3), (8, 9, 3)), -1), "shave is -1"),
        (lambda: ssim_y(*_shapes((18, 19, 3), (18, 19, 3)), 4), "at least 11x11"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "equally long"),
        (lambda: paired_bootstrap([], []), "non-empty"),
        (lambda: paired_bootstrap([math.inf], [1.0]), "finite"),
        (lambda: paired_bootstrap([1.0], [1.0], 0), "n_resamples"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def _shapes(*shapes):
    return [np.zeros(shape, np.uint8) for shape in shapes]
