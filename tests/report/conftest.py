"""A folder of small networks, and of small pictures that go by the names of the real sets."""

import dataclasses

import pytest
from networks import QUANTIZATION, save_network, scene
from PIL import Image

from cadyq.config import Quantization
from cadyq.report.bench import Bench
from cadyq.report.lab import Lab
from cadyq.report.networks import scan

STATIC = dataclasses.replace(QUANTIZATION, bits=(8,), dynamic=False)


@pytest.fixture(scope="session")
def folder_of_networks(tmp_path_factory):
    """SRResNet float, PAMS and CADyQ; CARN CADyQ and {4, 8}; EDSR with LinQ; a photo network."""
    from cadyq.io.models import load_model, save_model

    folder = tmp_path_factory.mktemp("networks")
    lists = {
        "srresnet-float": ("srresnet", None),
        "srresnet-pams": ("srresnet", STATIC),
        "srresnet-cadyq": ("srresnet", QUANTIZATION),
        "srresnet-photo": ("srresnet", QUANTIZATION),
        "carn-cadyq": ("carn", QUANTIZATION),
        "carn-cadyq-48": ("carn", dataclasses.replace(QUANTIZATION, bits=(4, 8))),
        "edsr-linq": ("edsr", Quantization(quantizer="linq", bits=(8,))),
    }
    for name, (backbone, quantization) in lists.items():
        path = save_network(folder / f"{name}.safetensors", backbone, quantization)
        loaded = load_model(path)
        save_model(
            path, loaded.network, loaded.quantization, training={"steps": 40_000 if "edsr" in name else 7}
        )
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Folders that look like Urban100, Large2K and Large4K."""
    root = tmp_path_factory.mktemp("data")
    for name, count in (("Urban100", 100), ("Large2K", 6), ("Large4K", 4)):
        (root / "eval" / name).mkdir(parents=True)
        for k in range(count):
            side = 96 if k < 6 else 16
            Image.fromarray(scene(side, side + 24, seed=k)).save(root / "eval" / name / f"img_{k:03}.png")
    return root


@pytest.fixture
def bench(folder_of_networks, data_root, tmp_path):
    """A quick bench on those, with nothing measured yet."""
    lab = Lab(tmp_path / "store", root=str(data_root), quick=True, threads=1)
    networks = scan([folder_of_networks], shipped=False)
    return Bench(networks, lab, tmp_path, (folder_of_networks,))
