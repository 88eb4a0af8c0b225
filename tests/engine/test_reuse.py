"""Reuse is exact: on a sequence of pictures the result is that of computing each alone."""

import dataclasses

import numpy as np
import pytest
from networks import QUANTIZATION, save_network

from cadyq.deploy import lowered
from cadyq.engine.reuse import ReusingRuntime
from cadyq.engine.runtime import EngineRuntime
from cadyq.io.models import load_model
from cadyq.io.plans import load_plan
from cadyq.io.shipped import plan_path

TILE = 16
FORMS = {
    "dynamic": QUANTIZATION,
    "static": dataclasses.replace(QUANTIZATION, bits=(8,), dynamic=False),
}


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def small(folder, form):
    plan = lowered(load_model(save_network(folder / f"{form}.safetensors", "srresnet", FORMS[form])))
    # Two blocks of two 3x3 convolutions, where the real network has 16.
    return dataclasses.replace(plan, radius=plan.radius - 14 * 2)


@pytest.fixture(scope="module", params=list(FORMS))
def loaded(request, tmp_path_factory):
    return small(tmp_path_factory.mktemp("reuse"), request.param)


def check(loaded, pictures, actives=None, tile=TILE, radius=None):
    """Compare with fresh runs; return the reusing runtime."""
    plain = EngineRuntime(loaded.plan)
    reusing = ReusingRuntime(loaded.plan, loaded.radius if radius is None else radius)
    for i, picture in enumerate(pictures):
        active = None if actives is None else actives[i]
        reusing.begin()
        found = reusing.run_tiles(picture, tile, active=active, threads=1)
        expected = plain.run_tiles(picture, tile, active=active, threads=1)
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        for name in expected.bits:
            np.testing.assert_array_equal(found.bits[name], expected.bits[name])
    return reusing


def moving(height, width, n, size=6, step=5):
    """A small patch of noise that wanders over a still picture of stripes."""
    y, x = np.mgrid[0:height, 0:width]
    still = np.stack([120 + 60 * np.sin(x / 9), 90 + 0.4 * y, 255 - y], axis=2).clip(0, 255).astype(np.uint8)
    for i in range(n):
        picture = still.copy()
        picture[20 : 20 + size, 10 + i * step : 10 + i * step + size] = noise(size, size, i)
        yield picture


def test_something_moves(loaded):
    reusing = check(loaded, moving(40, 330, 3))
    assert reusing.n_computed < reusing.n_tiles


def test_a_shipped_network():
    loaded = load_plan(plan_path("srresnet-x4-cadyq"))
    reusing = check(loaded, moving(27, 290, 2))
    assert reusing.n_computed < reusing.n_tiles


def test_nothing_moves(loaded):
    picture = noise(40, 50)
    reusing = check(loaded, [picture, picture.copy(), picture.copy()])
    assert reusing.n_computed == reusing.n_tiles / 3


def test_everything_changes_and_sizes_too(loaded):
    check(loaded, [noise(40, 50), noise(40, 50, 1), noise(33, 70, 2), noise(33, 70, 2)])


def test_one_pixel_at_an_edge(loaded):
    first = next(moving(37, 290, 1))
    second = first.copy()
    second[-1, -1] ^= 3
    reusing = check(loaded, [first, second, first])
    assert reusing.n_computed < reusing.n_tiles


def test_tiles_that_exit_and_come_back(loaded):
    picture = next(moving(48, 260, 1))
    cells = 3 * 17
    gone = np.ones(cells, bool)
    gone[[3, 20, 44]] = False
    check(loaded, [picture, picture, picture], [np.ones(cells, bool), gone, np.ones(cells, bool)])


def test_the_radius_matters(tmp_path):
    """Without the radius results are wrong: the comparison can fail."""
    with pytest.raises(AssertionError):
        check(small(tmp_path, "dynamic"), moving(40, 290, 2), radius=0)


def test_forced_bits_are_not_remembered(loaded):
    picture = noise(32, 32)
    reusing = ReusingRuntime(loaded.plan, loaded.radius)
    plain = EngineRuntime(loaded.plan).run_tiles(picture, TILE, threads=1)
    for force in (8, None):
        reusing.begin()
        found = reusing.run_tiles(picture, TILE, force=force, threads=1)
    np.testing.assert_array_equal(found.pixels, plain.pixels)
