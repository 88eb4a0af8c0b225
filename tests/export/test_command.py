"""`cadyq export`."""

import json

import pytest
from networks import save_network, scene
from PIL import Image

from cadyq import cli
from cadyq.cli.export import FORMS
from cadyq.config import Quantization
from cadyq.export import onnx as exporter

pytest.importorskip("onnxruntime")


@pytest.fixture
def photos(tmp_path):
    """A folder of HR pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(scene(96, 128, seed=i)).save(folder / f"{i}.png")
    return folder


def _run(capsys, *arguments):
    code = cli.main([str(a) for a in ("export", *arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_forms_are_the_modules():
    assert exporter.FORMS == FORMS


def test_dynamic_network(capsys, tmp_path, photos, model_files):
    """A model file without a plan is lowered on the way."""
    target = tmp_path / "a.onnx"
    code, out, err = _run(
        capsys, model_files["srresnet"], "-o", target, "--check", photos, "--threads", 1, "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["form"], found["storage_bytes"]) == ("dynamic", target.stat().st_size)
    assert found["check"]["n_images"] == 2
    assert found["check"]["max_difference"] <= 1
    assert found["check"]["decisions_equal"] >= 0.99


def test_static_network(capsys, tmp_path, photos):
    static = Quantization(bits=(8,), edges="integer", stream_bits=16, channel_power=0.8)
    model = save_network(tmp_path / "m.safetensors", "srresnet", static)
    target = tmp_path / "a.onnx"
    arguments = (model, "-o", target, "--form", "qdq", "--calibration", photos, "--check", photos)
    code, out, err = _run(capsys, *arguments, "--limit", 1, "--threads", 1)
    assert (code, err) == (0, "")
    assert "qdq, opset 17" in out
    assert "1 pictures" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model"], 2, "one of the shipped models"),
        (["srresnet-x4-pams8", "--form", "qdq"], 2, "calibration"),
        (["srresnet-x4-cadyq", "--form", "qdq", "--calibration", "PHOTOS"], 6, "dynamic"),
        (["srresnet-x4-pams8", "--limit", "0"], 2, "limit"),
    ],
)
def test_mistakes(capsys, tmp_path, photos, arguments, code, words):
    arguments = [photos if a == "PHOTOS" else a for a in arguments]
    found, _, err = _run(capsys, *arguments, "-o", tmp_path / "out" / "a.onnx")
    assert found == code
    assert words in err
    assert not (tmp_path / "out").exists()


def test_no_network_to_export(capsys, tmp_path):
    """Float networks have no integers to export."""
    model = save_network(tmp_path / "m.safetensors", "srresnet", None)
    code, _, err = _run(capsys, model, "-o", tmp_path / "a.onnx")
    assert (code, "quantize it first" in err) == (6, True)
