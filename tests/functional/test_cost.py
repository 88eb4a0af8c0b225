"""Costs against figures printed in the supplement, or worked out by hand."""

import numpy as np
import pytest

from cadyq.errors import ArgumentError
from cadyq.functional.cost import (
    PAPER_OVERHEAD,
    bitops,
    conv_macs,
    energy_joules,
    fqr,
    grid_overhead,
    tile_overhead,
    zero_share,
)


def test_bitops_of_the_published_body():
    # EDSR-baseline's 32 body convolutions at 720p output, in float: 135.9 G.
    macs = conv_macs(180, 320, 64, 64, 3)
    assert bitops(32 * macs, 32, 32) / 1e9 == pytest.approx(135.90, abs=0.01)
    assert bitops(np.full((1, 32), macs), 8, np.full((1, 32), 8)) / 1e9 == pytest.approx(
        135.90 / 16, abs=0.01
    )
    assert bitops(macs, 8, 0) == 0


def test_grouped_convolutions():
    assert conv_macs(2, 3, 48, 32, 3, groups=4) == 6 * 48 * 32 * 9 // 4


def test_fqr_plain_and_by_area():
    bits = [[4, 8], [8, 8], [0, 0]]
    assert fqr(bits) == pytest.approx((6 + 8 + 0) / 3)
    assert fqr(bits, [1, 2, 1]) == pytest.approx((6 + 16) / 4)


def test_zero_share():
    bits = [[0, 8], [8, 8], [0, 0], [4, 4]]
    assert zero_share(bits) == (0.5, 0.25, 0.375)
    assert zero_share(bits, [0, 1, 3, 0]) == (0.75, 0.75, 0.75)


def test_three_overheads():
    assert pytest.approx(1.0188, abs=1e-4) == PAPER_OVERHEAD
    assert grid_overhead(180, 320) == pytest.approx(1.0375)
    assert grid_overhead(540, 960) == pytest.approx(1.103, abs=5e-4)
    assert tile_overhead(96, 96, 96) == 1
    # Two tiles side by side: the hidden layer of each reads one column of the other.
    assert tile_overhead(10, 20, 10) == pytest.approx((2 * 10 * 11 + 200) / 400)
    assert tile_overhead(180, 320, 48, rings=(0, 0)) == 1


def test_energy_model():
    assert energy_joules(1e12, 8, 8) == pytest.approx(0.2 + 0.1)
    assert energy_joules(1e12, 8, 4) == pytest.approx(0.1 + 0.1)
    assert energy_joules(1e12, 32, 32) == pytest.approx(4.6)
    assert energy_joules([1e12, 1e12], 8, [0, 8]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv_macs(0, 1, 1, 1, 1), "height is 0"),
        (lambda: conv_macs(1, 1, 6, 4, 1, 4), "groups is 4"),
        (lambda: bitops(1, -8, 8), "weight_bits is"),
        (lambda: fqr([8, 8]), "bits is"),
        (lambda: fqr([[8, -1]]), "bits is"),
        (lambda: fqr([[8]], [1, 2]), "areas is"),
        (lambda: zero_share([[8]], [0]), "areas is"),
        (lambda: tile_overhead(9, 9, 3, ()), "rings is"),
        (lambda: tile_overhead(9, 9, 0), "tile is 0"),
        (lambda: grid_overhead(9, 0), "width is 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
