"""Plans: round trip, and refusal of everything that is not one."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest

from cadyq.engine.plan import Block, Layer, Part, Plan
from cadyq.engine.plan_arrays import from_arrays, to_arrays
from cadyq.engine.synthetic import Shape, random_plan
from cadyq.errors import CheckpointError

SHAPE = Shape(channels=8, blocks=1, bits=(0, 4, 8), tile=8, stages=(2,), head=3, tail=3)
# Together these hold every kind of array.
SHAPES = (
    SHAPE,
    replace(SHAPE, quantized_skip=True, bicubic="symmetric"),
    replace(SHAPE, bits=(8,), distilled=True, own_range=True, collapsed=True),
)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape):
    plan = random_plan(shape)
    arrays, meta = to_arrays(plan)
    again, meta_again = to_arrays(from_arrays(arrays, json.loads(json.dumps(meta))))
    assert meta == meta_again
    assert arrays.keys() == again.keys()
    for key in arrays:
        np.testing.assert_array_equal(arrays[key], again[key])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_missing_array_is_refused(shape):
    arrays, meta = to_arrays(random_plan(shape))
    for key in arrays:
        with pytest.raises(CheckpointError, match="plan"):
            from_arrays({k: v for k, v in arrays.items() if k != key}, meta)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_array_of_another_shape_or_type_is_refused(shape):
    arrays, meta = to_arrays(random_plan(shape))
    for key, value in arrays.items():
        for wrong in (value[:-1], value.astype(np.complex64)):
            with pytest.raises(CheckpointError, match="plan"):
                from_arrays({**arrays, key: wrong}, meta)


@pytest.mark.parametrize("n", [0, 131071, 131073, 10**9])
def test_a_deflated_array_of_another_length_is_refused(n):
    arrays, meta = to_arrays(random_plan(SHAPE))
    key = next(key for key in arrays if key.endswith(".table16"))
    coder = zlib.compressobj()
    # The last one would be a gigabyte: no more than was announced is unpacked.
    chunks = [coder.compress(bytes(min(10**6, n - at))) for at in range(0, n, 10**6)]
    stream = np.frombuffer(b"".join((*chunks, coder.flush())), np.uint8)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="an array has"):
        from_arrays({**arrays, key: stream}, meta)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "found", [{}, {"dtype": "float64", "shape": [2]}, {"dtype": "int8", "shape": [1 << 40]}]
)
def test_a_deflated_array_of_another_kind_is_refused(found):
    arrays, meta = to_arrays(random_plan(SHAPE))
    meta["steps"][-1]["table16"] = found
    with pytest.raises(CheckpointError, match="damaged"):
        from_arrays(arrays, meta)


def test_fuzzed_metadata_is_refused_or_harmless():
    arrays, meta = to_arrays(random_plan(SHAPE))
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
            from_arrays(arrays, loaded).validate()


def test_foreign_version_is_refused():
    arrays, meta = to_arrays(random_plan(SHAPE))
    with pytest.raises(CheckpointError, match="version"):
        from_arrays(arrays, {**meta, "version": 99})


def _edit(plan: Plan, index: int, **fields: object) -> Plan:
    steps = list(plan.steps)
    steps[index] = replace(steps[index], **fields)
    return replace(plan, steps=tuple(steps))


def _layer(block: Block, i: int, **fields: object) -> tuple[Layer, ...]:
    return tuple(replace(layer, **fields) if j == i else layer for j, layer in enumerate(block.layers))


def test_semantic_errors_are_named():
    plan = random_plan(SHAPE)
    layer, block = plan.steps[1], plan.steps[2]
    assert isinstance(layer, Layer)
    assert isinstance(block, Block)
    wide = replace(layer.conv, factor=np.full_like(layer.conv.factor, 1e5))
    with pytest.raises(CheckpointError, match="largest result"):
        _edit(plan, 1, conv=wide).validate()
    with pytest.raises(CheckpointError, match="read before"):
        _edit(plan, 1, src=(Part(5, 0, 3),)).validate()
    second = block.layers[1].conv
    bare = replace(second, site=None, factor=second.factor[:1])
    with pytest.raises(CheckpointError, match=r"layer 1: site"):
        _edit(plan, 2, layers=_layer(block, 1, conv=bare)).validate()
    with pytest.raises(CheckpointError, match=r"channels"):
        _edit(plan, 2, layers=_layer(block, 0, src=(Part(block.src, 1, 8),))).validate()
    with pytest.raises(CheckpointError, match=r"layer 0: dst"):
        _edit(plan, 2, layers=_layer(block, 0, dst=block.dst)).validate()
    with pytest.raises(CheckpointError, match=r"groups"):
        _edit(plan, 2, layers=_layer(block, 1, conv=replace(second, groups=3))).validate()
    with pytest.raises(CheckpointError, match="tile"):
        replace(plan, tile=1000).validate()
