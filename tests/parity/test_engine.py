"""The native engine equals the NumPy reference: no differing integer, whatever the plan, shape or threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadyq.engine import reference
from cadyq.engine.run import Engine, available_isas
from cadyq.engine.runtime import with_budget
from cadyq.engine.synthetic import Shape, random_picture, random_plan

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native module is not built")

SMALL = {
    "prelu": Shape(channels=64, blocks=2, bits=(0, 4, 6, 8), tile=24, stages=(2,)),
    "relu": Shape(
        channels=48, blocks=2, bits=(0, 2, 4, 8), tile=16, act="relu", stages=(3,), stage_act="none", tail=3
    ),
    "static": Shape(channels=64, blocks=2, tile=16, stages=(2,), head=3, tail=3),
    "saturating": Shape(channels=32, blocks=3, bits=(4, 8), tile=20, stages=(2,), gain=25.0, tail=5),
    "grey": Shape(channels=32, blocks=2, bits=(0, 3, 5), tile=13, stages=(4,), colors=1, tail=7),
    "wide": Shape(channels=96, blocks=1, bits=(7, 8), tile=9, stages=(2,), tail=3),
    "quantized skip": Shape(
        channels=64, blocks=2, bits=(0, 4, 8), tile=16, act="relu", quantized_skip=True, stages=(2,), tail=3
    ),
    "fusions": Shape(
        channels=64, blocks=2, bits=(0, 5, 8), tile=16, rectify=True, fusions=True, head=3, head_bits=8,
        stages=(3,), stage_act="relu", tail=3,
    ),
    "grouped": Shape(
        channels=20, blocks=2, bits=(4, 8), tile=12, rectify=True, fusions=True, groups=4, stages=(2,), tail=3
    ),
    "distilled": Shape(
        channels=64, blocks=1, bits=(4, 8), tile=20, distilled=True, head=3, head_bits=8, stages=(2,), tail=3,
        bicubic="symmetric",
    ),
    "distilled, thin": Shape(
        channels=20, blocks=2, bits=(3, 8), tile=12, distilled=True, stages=(3,), tail=5, collapsed=True,
        bicubic="replicate",
    ),
    "own range": Shape(channels=64, blocks=1, bits=(4, 8), tile=12, own_range=True, stages=(2,), tail=3),
    "own range, skipped": Shape(
        channels=32, blocks=2, bits=(4, 8), tile=12, own_range=True, quantized_skip=True, stages=(2,), tail=3
    ),
    "collapsed": Shape(channels=64, blocks=1, tile=16, head=3, stages=(2, 2), tail=5, collapsed=True),
}  # fmt: skip


def assert_equal(plan, image, threads=2, portable=True, before=None, **masks):
    """Compare every instruction set with one run of the reference, and return that.

    ``before`` is a picture that the same engine has upscaled before, whose values it leaves behind.
    """
    expected = reference.run(plan, image, **masks)
    for isa in available_isas():
        if isa == "portable" and not portable:
            continue
        engine = Engine(plan, threads, isa)
        if before is not None:
            engine.upscale(before)
        got = engine.upscale(image, **masks)
        np.testing.assert_array_equal(got.choice, expected.choice)
        np.testing.assert_array_equal(got.bits, expected.bits)
        np.testing.assert_array_equal(got.image, expected.image)
    return expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (37, 50)])
def test_equal_to_reference(name, size):
    shape = SMALL[name]
    assert_equal(random_plan(shape, 1), random_picture(*size, colors=shape.colors))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(sorted(SMALL)),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    threads=st.integers(1, 3),
)
def test_fuzzed_shapes(height, width, seed, name, dtype, threads):
    shape = SMALL[name]
    image = random_picture(height, width, seed, dtype, shape.colors)
    assert_equal(random_plan(shape, seed), image, threads)


@pytest.mark.parametrize("name", ["static", "quantized skip", "fusions", "saturating"])
@pytest.mark.parametrize("size", [(210, 9), (6, 290), (52, 270)])
def test_pictures_larger_than_a_region(name, size):
    """Layers of a block advance together by strips of rows; regions meet, and their last strips are short."""
    plan = random_plan(replace(SMALL[name], bits=(8,)), 6)
    for threads in (1, 3):
        assert_equal(plan, random_picture(*size), threads, portable=False)


@pytest.mark.parametrize("name", ["prelu", "relu"])
def test_every_candidate_is_exercised(name):
    shape = SMALL[name]
    plan, image = random_plan(shape, 3), random_picture(60, 70)
    seen = set()
    rng = np.random.default_rng(0)
    rows, cols = reference.tile_grid(60, 70, plan.tile)
    for _ in range(2):
        choice = np.stack([rng.integers(0, len(s.bits), (rows, cols)) for s in plan.sites], axis=-1).astype(
            np.int8
        )
        seen |= set(np.unique(assert_equal(plan, image, choice=choice).bits))
    assert seen == set(shape.bits)


def test_selectors_choose_different_candidates():
    seen: set[int] = set()
    offsets = set()
    for seed in range(2, 7):
        plan = random_plan(SMALL["prelu"], seed)
        offsets |= {s.selector.log_offset for s in plan.sites}
        seen |= set(np.unique(assert_equal(plan, random_picture(50, 61)).bits))
    assert len(seen) >= 3
    assert len(offsets) == 2  # plain and logarithmic inputs


def test_sums_are_exact_in_the_largest_tile():
    """Values as large as they can be: where one more rounding error would change a choice, no set differs."""
    shape = Shape(channels=32, blocks=1, bits=(4, 8), tile=256, stages=(2,), gain=300.0, head=3, tail=3)
    plan, image = random_plan(shape, 5), random_picture(256, 256)

    def chosen(isa: str, budget: float) -> int:
        return int(Engine(with_budget(plan, budget), 1, isa).upscale(image).choice[0, 0, 0])

    fast = available_isas()[0]
    low, high = -1e3, 1e3
    assert (chosen(fast, low), chosen(fast, high)) == (0, 1)
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if chosen(fast, middle) == 0 else (low, middle)
    for isa in available_isas():
        assert (chosen(isa, low), chosen(isa, high)) == (0, 1), isa


def test_exited_tiles():
    plan, image = random_plan(SMALL["prelu"], 4), random_picture(60, 70)
    exited = np.zeros(reference.tile_grid(60, 70, plan.tile), bool)
    exited[0, 1] = exited[1, 1] = True
    result = assert_equal(plan, image, exited=exited)
    assert not result.bits[exited].any()


def test_large_exited_areas():
    plan = random_plan(Shape(channels=32, blocks=1, bits=(4, 8), tile=12, stages=(2,), tail=5), 1)
    for seed in range(2):
        exited = np.random.default_rng(seed).random((9, 11)) < 0.8
        result = assert_equal(plan, random_picture(105, 130, seed), portable=False, exited=exited)
        assert exited.any() and not result.bits[exited].any()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(sorted(SMALL)),
    share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    is_fixed=st.booleans(),
    threads=st.integers(1, 3),
)
def test_fuzzed_exits(height, width, seed, name, share, is_fixed, threads):
    # Where nothing is chosen, neighboring tiles are computed as one.
    shape = replace(SMALL[name], bits=(8,)) if is_fixed else SMALL[name]
    plan, rng = random_plan(shape, seed), np.random.default_rng(seed)
    exited = rng.random(reference.tile_grid(height, width, plan.tile)) < share
    image = random_picture(height, width, seed, colors=shape.colors)
    before = random_picture(height, width, seed + 1, colors=shape.colors)
    assert_equal(plan, image, threads, portable=False, before=before, exited=exited)


def test_engine_is_reusable_across_sizes():
    plan = random_plan(SMALL["prelu"], 5)
    engine = Engine(plan, 2)
    for size, dtype in [
        ((30, 41), np.uint8),
        ((64, 20), np.uint16),
        ((30, 41), np.uint8),
        ((3, 70), np.uint8),
    ]:
        image = random_picture(*size, 1, dtype)
        np.testing.assert_array_equal(engine.upscale(image).image, reference.run(plan, image).image)


def test_equal_bits_do_not_depend_on_the_tiling():
    image = random_picture(45, 70)
    shape = Shape(channels=64, blocks=2, bits=(4, 8), stages=(2,), tail=3)
    results = []
    for tile in (16, 33, 96):
        plan = random_plan(Shape(**{**shape.__dict__, "tile": tile}), 1)
        choice = np.full((*reference.tile_grid(45, 70, tile), 4), 1, np.int8)
        results.append(Engine(plan, 2).upscale(image, choice).image)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_full_size_network():
    assert_equal(random_plan(Shape(blocks=2, bits=(0, 4, 6, 8)), 1), random_picture(49, 101), portable=False)
