"""PSNR and SSIM of a table are those of scikit-image: same window, same border."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cadyq.data.sets import load_pairs
from cadyq.functional.image import luma
from cadyq.report.lab import Request


def test_against_scikit_image(bench, data_root):
    network = bench.find("srresnet", 4, "CADyQ")
    found, status = bench.measure(Request(bench.subject(network), "Urban100"))
    assert status == "measured"
    model = bench.subject(network).load()
    psnr, ssim = [], []
    for pair, _ in zip(load_pairs("Urban100", 4, root=data_root), found.rows, strict=False):
        sr = model.upscale(pair.lr, threads=1).pixels
        a, b = (luma(p)[4:-4, 4:-4] for p in (sr, pair.hr))
        psnr.append(peak_signal_noise_ratio(b, a, data_range=255))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim.append(structural_similarity(b, a, data_range=255, **options))
    assert found.summary.psnr_db == pytest.approx(np.mean(psnr), abs=1e-4)
    assert found.summary.ssim == pytest.approx(np.mean(ssim), abs=1e-4)
