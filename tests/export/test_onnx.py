"""ONNX files compute what the engine computes, of standard operators alone."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from cadyq.engine.run import Engine
from cadyq.engine.synthetic import Shape, random_picture, random_plan
from cadyq.errors import ArgumentError, MissingExtraError, UnsupportedError
from cadyq.export.check import compare, open_session, run_session
from cadyq.export.onnx import export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"channels": 8, "blocks": 2, "head": 3, "tail": 3, "stages": (2,)}
SHAPES = {
    "static": Shape(**SMALL),
    "dynamic": Shape(**SMALL, bits=(4, 6, 8)),
    "skip": Shape(**SMALL, bits=(0, 4, 8)),
    "relu": Shape(**SMALL, bits=(4, 8), act="relu", stage_act="none"),
    "wide": Shape(**{**SMALL, "head": 9, "tail": 9, "channels": 32}, bits=(4, 8)),
    "saturated": Shape(**SMALL, bits=(4, 8), gain=20.0),
    "grey": Shape(**SMALL, bits=(4, 8), colors=1),
    "quantized skip": Shape(**SMALL, bits=(0, 4, 8), act="relu", quantized_skip=True),
    "fusions": Shape(**SMALL, bits=(0, 5, 8), rectify=True, fusions=True, head_bits=8, stage_act="relu"),
    "grouped": Shape(**SMALL, bits=(4, 8), rectify=True, fusions=True, groups=4),
    "distilled": Shape(
        **{**SMALL, "channels": 16}, bits=(4, 8), distilled=True, head_bits=8, bicubic="symmetric"
    ),
    "collapsed": Shape(**SMALL, bits=(3, 8), collapsed=True, bicubic="replicate"),
    "own range": Shape(**SMALL, bits=(4, 8), own_range=True),
}


def _pictures(n=4, colors=3):
    return [random_picture(20 + 3 * i, 33 - 2 * i, seed=i, colors=colors) // (i + 1) for i in range(n)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_engine(shape, tmp_path):
    plan = random_plan(shape, seed=6)
    export_onnx(plan, tmp_path / "a.onnx")
    found = compare(tmp_path / "a.onnx", plan, _pictures(colors=shape.colors), threads=1)
    assert found.n_images == 4
    assert found.max_difference <= 1
    assert found.share_different < 0.01  # 16 bits rounded to 8 instead of 8 at once
    assert found.decisions_equal == 1


def test_pictures_choose_differently():
    """Else the test above would not look at the choice."""
    plan = dataclasses.replace(random_plan(SHAPES["skip"], seed=6), tile=256)
    engine = Engine(plan, 1)
    chosen = np.stack([engine.upscale(p).choice[0, 0] for p in _pictures()])
    assert len(np.unique(chosen, axis=0)) > 1
    assert 0 in chosen[:, 0]


def test_every_patch_of_a_batch_decides_for_itself(tmp_path):
    plan = random_plan(SHAPES["skip"], seed=6)
    export_onnx(plan, tmp_path / "a.onnx")
    session = open_session(tmp_path / "a.onnx", 1)
    batch = np.stack([random_picture(24, 24, seed=i) // (i + 1) for i in range(4)])
    pixels, bits = run_session(session, batch)
    alone = [run_session(session, one[None]) for one in batch]
    np.testing.assert_array_equal(bits, np.concatenate([b for _, b in alone]))
    np.testing.assert_array_equal(pixels, np.concatenate([p for p, _ in alone]))
    assert len(np.unique(bits, axis=0)) > 1


def test_one_pixel(tmp_path):
    plan = random_plan(SHAPES["dynamic"])
    export_onnx(plan, tmp_path / "a.onnx")
    found = compare(tmp_path / "a.onnx", plan, [random_picture(1, 1)], threads=1)
    assert (found.decisions_equal, found.max_difference <= 1) == (1, True)


def test_budget(tmp_path):
    plan = random_plan(SHAPES["dynamic"])
    for budget, bits in ((-1e6, 4), (1e6, 8)):
        export_onnx(plan, tmp_path / "a.onnx", budget=budget)
        _, found = run_session(open_session(tmp_path / "a.onnx", 1), random_picture(16, 16)[None])
        assert (found == bits).all()


def test_file_says_what_it_is(tmp_path):
    plan = random_plan(SHAPES["dynamic"])
    export_onnx(plan, tmp_path / "a.onnx", metadata={"license": "Apache-2.0"})
    model = onnx.load(tmp_path / "a.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    record = {p.key: p.value for p in model.metadata_props}
    assert json.loads(record["sites"]) == [site.name for site in plan.sites]
    assert (record["scale"], record["license"]) == ("2", "Apache-2.0")
    assert [i.name for i in model.graph.input] == ["lr"]
    assert [o.name for o in model.graph.output] == ["sr", "bits"]


@pytest.mark.parametrize("name", ["static", "static relu"])
def test_qdq_runs_in_integers(name, tmp_path):
    act = {"act": "relu", "stage_act": "none"} if "relu" in name else {}
    plan = random_plan(dataclasses.replace(SHAPES["static"], **act))
    export_onnx(plan, tmp_path / "a.onnx", "qdq", calibration=_pictures())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    # Two per block, the body's end, the upsampler, the tail; the head reads 16 bits.
    assert kinds.count("QLinearConv") == 7
    assert kinds.count("Conv") + kinds.count("FusedConv") == 1
    found = compare(tmp_path / "a.onnx", plan, _pictures(), threads=1)
    assert found.psnr_db > 30


def test_refusals(tmp_path):
    path = tmp_path / "a.onnx"
    with pytest.raises(UnsupportedError, match="chooses its bits"):
        export_onnx(random_plan(SHAPES["dynamic"]), path, "qdq", calibration=_pictures())
    with pytest.raises(ArgumentError, match="calibration"):
        export_onnx(random_plan(SHAPES["static"]), path, "qdq")
    with pytest.raises(ArgumentError, match="form"):
        export_onnx(random_plan(SHAPES["static"]), path, "caffe")
    with pytest.raises(ArgumentError, match="pictures"):
        export_onnx(random_plan(SHAPES["static"]), path)
        compare(path, random_plan(SHAPES["static"]), [])


def test_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx.helper", None)
    with pytest.raises(MissingExtraError, match=r"cadyq\[onnx\]"):
        export_onnx(random_plan(SHAPES["static"]), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
