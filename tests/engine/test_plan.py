"""Plans: round trip, and refusal of everything that is not one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest

from cadyq.engine.plan import Block, Layer, Plan
from cadyq.engine.synthetic import Shape, random_plan
from cadyq.errors import CheckpointError

SHAPE = Shape(channels=8, blocks=1, bits=(0, 4, 8), tile=8, stages=(2,), head=3, tail=3)


def test_round_trip():
    plan = random_plan(SHAPE)
    arrays, meta = plan.to_arrays()
    again, meta_again = Plan.from_arrays(arrays, json.loads(json.dumps(meta))).to_arrays()
    assert meta == meta_again
    assert arrays.keys() == again.keys()
    for key in arrays:
        np.testing.assert_array_equal(arrays[key], again[key])


def test_every_missing_array_is_refused():
    arrays, meta = random_plan(SHAPE).to_arrays()
    for key in arrays:
        with pytest.raises(CheckpointError, match="plan"):
            Plan.from_arrays({k: v for k, v in arrays.items() if k != key}, meta)


def test_every_array_of_another_shape_or_type_is_refused():
    arrays, meta = random_plan(SHAPE).to_arrays()
    for key, value in arrays.items():
        for wrong in (value[:-1], value.astype(np.complex64)):
            with pytest.raises(CheckpointError, match="plan"):
                Plan.from_arrays({**arrays, key: wrong}, meta)


def test_fuzzed_metadata_is_refused_or_harmless():
    arrays, meta = random_plan(SHAPE).to_arrays()
    text = json.dumps(meta)
    rng = np.random.default_rng(0)
    for _ in range(300):
        at = int(rng.integers(len(text)))
        damaged = text[:at] + chr(int(rng.integers(32, 127))) + text[at + 1 :]
        try:
            loaded = json.loads(damaged)
        except ValueError:
            continue
        with contextlib.suppress(CheckpointError):
            Plan.from_arrays(arrays, loaded).validate()


def test_foreign_version_is_refused():
    arrays, meta = random_plan(SHAPE).to_arrays()
    with pytest.raises(CheckpointError, match="version"):
        Plan.from_arrays(arrays, {**meta, "version": 99})


def _edit(plan: Plan, index: int, **fields: object) -> Plan:
    steps = list(plan.steps)
    steps[index] = replace(steps[index], **fields)
    return replace(plan, steps=tuple(steps))


def test_semantic_errors_are_named():
    plan = random_plan(SHAPE)
    layer = plan.steps[1]
    assert isinstance(layer, Layer)
    wide = replace(layer.conv, factor=np.full_like(layer.conv.factor, 1e5))
    with pytest.raises(CheckpointError, match="largest result"):
        _edit(plan, 1, conv=wide).validate()
    with pytest.raises(CheckpointError, match="read before"):
        _edit(plan, 3, residual=3).validate()
    block = plan.steps[2]
    assert isinstance(block, Block)
    first, second = block.convs
    bad = replace(second, site=None, factor=second.factor[:1])
    with pytest.raises(CheckpointError, match=r"convolution 1"):
        _edit(plan, 2, convs=(first, bad)).validate()
    with pytest.raises(CheckpointError, match="tile"):
        replace(plan, tile=1000).validate()
