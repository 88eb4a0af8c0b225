"""Judging and filling of cells that exit: native code against its specification, to the last bit."""

import numpy as np
import pytest

from cadyq.engine import exits as native
from cadyq.errors import ArgumentError
from cadyq.functional import exit as plain
from cadyq.functional.exit import BandPlace, ExitRule
from cadyq.functional.image import CELL_STATISTICS
from cadyq.native import load_native

needs_native = pytest.mark.skipif(load_native("_engine") is None, reason="the native engine is not built")
CASES = range(40)


def picture(rng, dtype):
    height, width = rng.integers(1, 90, 2)
    levels = rng.integers(0, np.iinfo(dtype).max + 1, (height, width, 3))
    # Parts without noise, whose numbers are equal or zero.
    levels[: rng.integers(0, height + 1), : rng.integers(0, width + 1)] //= int(rng.choice([1, 40, 1 << 16]))
    return levels.astype(dtype)


@needs_native
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("case", CASES)
def test_scores(case, dtype):
    rng = np.random.default_rng(case)
    rule = ExitRule(tuple(rng.normal(0, 1, len(CELL_STATISTICS))), 0.3, 0.0)
    levels, cell = picture(rng, dtype), int(rng.integers(1, 40))
    found = native.exit_scores(rule, levels, cell, threads=1 + case % 3)
    np.testing.assert_array_equal(found, rule.scores(levels, cell))


@needs_native
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("case", CASES)
def test_fill(case, dtype):
    rng = np.random.default_rng(case)
    levels, cell, scale, fade = picture(rng, dtype), *map(int, rng.integers((3, 2, 0), (24, 5, 4)))
    height, width = levels.shape[:2]
    exits = rng.random((-(-height // cell), -(-width // cell))) < rng.choice([0.1, 0.5, 0.9])
    first = int(rng.integers(0, len(exits)))
    last = int(rng.integers(first, len(exits))) + 1
    top, bottom = max(0, first * cell - 3), min(height, last * cell + 3)
    rows = (min(height, last * cell) - first * cell) * scale
    band = rng.integers(0, np.iinfo(dtype).max + 1, (rows, width * scale, 3)).astype(dtype)
    expected = band.copy()
    place = BandPlace(top, height, first, scale, cell, fade)
    plain.fill_exits(expected, levels[top:bottom], exits, place)
    native.fill_exits(band, levels[top:bottom], exits, place, threads=1 + case % 3)
    np.testing.assert_array_equal(band, expected)


def test_shares_of_a_cross_fade():
    near = np.zeros((3, 3), bool)
    near[1, 0] = True
    assert plain.fade_shares(near, (6, 8), 4)[3].tolist() == [1, 3, 5, 7, 8, 8, 8, 8]
    near[:] = False
    near[2, 2] = True
    shares = plain.fade_shares(near, (6, 8), 4)
    assert shares[5, 7] == 1
    assert (shares[0] == 8).all()
    assert (shares[:, 0] == 8).all()


def test_rule_refuses_what_it_cannot_be():
    with pytest.raises(ArgumentError, match="fade"):
        ExitRule((0.0,) * 6, 0.0, 0.0, fade=-1)
    with pytest.raises(ArgumentError, match="weights"):
        ExitRule((0.0,) * 5, 0.0, 0.0)
