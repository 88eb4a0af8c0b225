"""Networks name themselves by their records."""

import dataclasses

import pytest
from networks import QUANTIZATION, save_network

from cadyq.config import Quantization, to_mapping
from cadyq.errors import ArgumentError
from cadyq.io.shipped import shipped_models
from cadyq.report.networks import _method, find, read_network, scan


def test_scan(folder_of_networks):
    found = {n.name: n for n in scan([folder_of_networks], shipped=False)}
    methods = {name: n.method for name, n in found.items()}
    assert methods == {
        "srresnet-float": "FP32",
        "srresnet-pams": "PAMS",
        "srresnet-cadyq": "CADyQ",
        "srresnet-photo": "CADyQ",
        "carn-cadyq": "CADyQ",
        "carn-cadyq-48": "CADyQ{4;8}",
        "edsr-linq": "LinQ",
    }
    assert found["srresnet-cadyq"].runtime == "engine"
    assert found["edsr-linq"].runtime == "torch"
    assert found["srresnet-cadyq"].schedule == "short (7 updates)"
    assert found["edsr-linq"].schedule == "full"
    assert found["srresnet-photo"].degradation == "photo"
    assert found["srresnet-cadyq"].digest() != found["srresnet-pams"].digest()


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        (Quantization(quantizer="daq", bits=(4,)), "DAQ"),
        (Quantization(quantizer="pams", bits=(6,)), "PAMS 6"),
        (Quantization(quantizer="lsq", bits=(8,), skips=True), "FQSR"),
        (Quantization(quantizer="lsq", bits=(4, 6, 8), dynamic=True, skips=True), "FQSR-CADyQ"),
        (Quantization(quantizer="linq", bits=(4, 6, 8), dynamic=True), "LinQ-CADyQ"),
        (Quantization(bits=(2, 4, 6, 8), dynamic=True), "CADyQ{2;4;6;8}"),
        (Quantization(bits=(4, 6, 8), dynamic=True, selector_inputs="layer"), "CADyQ [layer]"),
    ],
)
def test_methods(quantization, method):
    assert _method(to_mapping(quantization)) == method


def test_find_takes_the_longest_trained_and_no_photo_network(folder_of_networks):
    networks = scan([folder_of_networks], shipped=False)
    base = find(networks, "srresnet", 4, "CADyQ")
    assert base is not None
    assert base.name == "srresnet-cadyq"
    longer = dataclasses.replace(base, name="zz", training={"steps": 9000})
    assert find([*networks, longer], "srresnet", 4, "CADyQ") is longer
    assert find(networks, "idn", 4, "CADyQ") is None


def test_one_file_and_wrong_folder(tmp_path, raises_clearly):
    path = save_network(tmp_path / "mine.safetensors", "edsr", QUANTIZATION)
    assert read_network(path).name == "mine"
    raises_clearly(ArgumentError, lambda: scan([tmp_path / "none"]), "none", "folder")


@pytest.mark.skipif(
    "srresnet-x4-exit" not in shipped_models(), reason="the model does not ship with this build"
)
def test_a_network_whose_cells_exit_stands_for_no_row_of_the_paper():
    assert read_network("srresnet-x4-exit").method == "PAMS + exit"
