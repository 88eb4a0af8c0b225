"""Heat maps show where content is; the page needs nothing else."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from cadyq.io.shipped import shipped_models
from cadyq.report.explain import explain, write_explanation
from cadyq.upscale import load


@pytest.fixture(scope="module")
def half_flat(tmp_path_factory):
    """Left flat, right texture; three tiles of 32 each."""
    picture = np.full((64, 192, 3), 120, np.uint8)
    y, x = np.mgrid[:64, :96]
    texture = 128 + 60 * np.sin(0.9 * x + 0.35 * y) + np.random.default_rng(0).normal(0, 30, (64, 96))
    picture[:, 96:] = texture[..., None].clip(0, 255)
    path = tmp_path_factory.mktemp("half") / "half.png"
    Image.fromarray(picture).save(path)
    return path


@pytest.mark.skipif(
    "srresnet-x4-cadyq" not in shipped_models(), reason="the model does not ship with this build"
)
def test_texture_gets_more_bits_than_flat(half_flat, tmp_path):
    found = explain(load("srresnet-x4-cadyq"), half_flat, budgets=(-3, 0, 3), threads=1)
    mean = found.table.mean(axis=2)
    assert mean.shape == (2, 6)
    # The third column touches the edge between the halves.
    assert mean[:, 3:].min() > mean[:, :2].max()
    assert (found.gradient[:, 4:] > found.gradient[:, :2].max()).all()
    assert found.deviation is not None
    assert found.deviation.shape == (2, 6, 32)
    bits = [row["fqr"] for row in found.budgets]
    assert bits[0] < bits[1] < bits[2]
    nearness = [row["psnr_to_most_bits_db"] for row in found.budgets]
    assert nearness[0] < nearness[2]


@pytest.mark.skipif(
    "srresnet-x4-exit" not in shipped_models(), reason="the model does not ship with this build"
)
def test_budgets_are_measured_against_a_network_that_nobody_leaves(half_flat):
    found = explain(load("srresnet-x4-exit"), half_flat, budgets=(-6, 0, 1e6), threads=1)
    assert 0 < found.result.exited < 1
    nearness = [row["psnr_to_most_bits_db"] for row in found.budgets]
    assert nearness[0] < nearness[1] < nearness[2] == 100


def test_page_is_self_contained(folder_of_networks, half_flat, tmp_path):
    found = explain(
        load(folder_of_networks / "srresnet-cadyq.safetensors"), half_flat, budgets=(0,), threads=1
    )
    paths = {path.name: path for path in write_explanation(found, tmp_path / "out")}
    page = paths["explanation.html"].read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "@" not in re.sub(r"base64,[^\"]*", "", page)
    data = json.loads(re.search(r"const D=(.*);\n", page).group(1))
    assert np.array(data["bits"]).shape == (4, 12, len(found.sites))
    assert data == {**json.loads(paths["explanation.json"].read_text()), "palette": data["palette"]}
    shown = base64.b64decode(re.search(r'id="view"><img src="data:image/png;base64,([^"]*)"', page).group(1))
    assert shown[:4] == b"\x89PNG"
    for name in ("heat.png", "histogram.png", "inputs.png", "budgets.png"):
        with Image.open(paths[name]) as plot:
            assert plot.width >= 1400
