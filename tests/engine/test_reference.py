"""The specification itself, against independent computations."""

from __future__ import annotations

import numpy as np
import pytest

from cadyq.engine import reference
from cadyq.engine.run import Engine
from cadyq.engine.synthetic import Shape, random_picture, random_plan
from cadyq.errors import ArgumentError

SHAPE = Shape(channels=8, blocks=1, bits=(0, 4, 8), tile=8, stages=(2,), head=3, tail=3)


def test_accumulate_against_loops():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (6, 7, 3)), rng.integers(-127, 128, (2, 3, 3, 3)).astype(np.int8)
    acc = reference.accumulate(x, w)
    for y, z, o in [(0, 0, 0), (3, 4, 1), (2, 1, 0)]:
        assert acc[y, z, o] == (x[y : y + 3, z : z + 3] * w[o].astype(np.int64)).sum()


def test_accumulate_against_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, w = rng.integers(-127, 128, (9, 8, 4)), rng.integers(-127, 128, (5, 3, 3, 4)).astype(np.int8)
    expected = torch.nn.functional.conv2d(
        torch.tensor(x).permute(2, 0, 1)[None].double(), torch.tensor(w).permute(0, 3, 1, 2).double()
    )
    np.testing.assert_array_equal(reference.accumulate(x, w), expected[0].permute(1, 2, 0).numpy())


def test_deviations_are_unbiased_standard_deviations():
    values = np.random.default_rng(2).integers(-3000, 3000, (9, 11, 4)).astype(np.int16)
    expected = values.reshape(-1, 4).std(axis=0, ddof=1) * 0.25
    np.testing.assert_allclose(reference.deviations(values, 0.25), expected, rtol=1e-12)
    assert not reference.deviations(values[:1, :1], 0.25).any()
    extreme = np.full((256, 256, 1), -32768, np.int16)
    extreme[::2] = 32767
    np.testing.assert_allclose(reference.deviations(extreme, 1.0), 32767.75, rtol=1e-6)


def test_gradients_of_a_ramp():
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 20, axis=0)
    g = reference.gradients(ramp, 10)
    np.testing.assert_allclose(g[0, 4], [2 / 255, 0])


def test_shuffle_orders_rows_columns_channels():
    x = np.arange(12).reshape(1, 1, 12)
    np.testing.assert_array_equal(reference.shuffle(x, 2)[1, 0], [6, 7, 8])


def test_wrong_arguments_are_named():
    plan = random_plan(SHAPE)
    engine = Engine(plan, 1, "reference")
    with pytest.raises(ArgumentError, match="image"):
        engine.upscale(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ArgumentError, match="choice"):
        engine.upscale(random_picture(9, 9), choice=np.full((2, 2, 2), 7, np.int8))
    with pytest.raises(ArgumentError, match="exited"):
        engine.upscale(random_picture(9, 9), exited=np.zeros((1, 2), bool))
    with pytest.raises(ArgumentError, match="isa"):
        Engine(plan, 1, "mmx")
    with pytest.raises(ArgumentError, match="threads"):
        Engine(plan, 0)


def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("CADYQ_ISA", "reference")
    assert Engine(random_plan(SHAPE)).isa == "reference"


def test_without_native_module_it_says_so(monkeypatch):
    monkeypatch.delenv("CADYQ_ISA", raising=False)
    monkeypatch.setattr("cadyq.engine.run._native", lambda: None)
    with pytest.warns(RuntimeWarning, match="native"):
        assert Engine(random_plan(SHAPE)).isa == "reference"
