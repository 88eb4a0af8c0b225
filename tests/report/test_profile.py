"""Profiles add up, on both runtimes."""

import numpy as np
import pytest
from networks import scene

from cadyq.functional.cost import energy_joules
from cadyq.report.profile import profile
from cadyq.upscale import load


@pytest.mark.parametrize("runtime", ["engine", "torch"])
def test_sums(folder_of_networks, runtime):
    name = "srresnet-cadyq" if runtime == "engine" else "carn-cadyq"
    model = load(folder_of_networks / f"{name}.safetensors")
    if runtime == "torch":
        model.plan = model.engine = None
    picture = scene(40, 56)
    found = profile(model, picture, threads=1, repeats=1)
    result = model.upscale(picture, threads=1)
    assert found.runtime == runtime == result.runtime
    assert found.n_tiles == result.grid[0] * result.grid[1]
    body = {c.name: c for c in found.convs if c.stage == "body"}
    assert set(body) == {site.name for site in model.sites}
    for site in model.sites:
        cost = body[site.name]
        areas = result.areas.ravel()
        assert cost.macs == pytest.approx(site.macs_per_pixel * 40 * 56)
        assert cost.bits == pytest.approx(np.average(result.bits[site.name].ravel(), weights=areas))
        energy = energy_joules(site.macs_per_pixel * areas, 8, result.bits[site.name].ravel())
        assert cost.energy_j == pytest.approx(energy)
    assert found.body_bitops_g == pytest.approx(result.bitops / 1e9)
    assert found.bitops_g > found.body_bitops_g
    assert found.seconds >= found.seconds_min > 0
    assert {"input and head", "body", "tail and output"} <= set(found.stages)
    assert found.parameters > 0
    assert found.storage_bytes == (folder_of_networks / f"{name}.safetensors").stat().st_size
    assert "Horowitz" in found.to_mapping()["energy_model"]


def test_whole_network_is_counted(folder_of_networks):
    """Operations of head and tail are those of the torch network's own convolutions."""
    engine = profile(
        load(folder_of_networks / "srresnet-pams.safetensors"), scene(24, 24), threads=1, repeats=1
    )
    model = load(folder_of_networks / "srresnet-pams.safetensors")
    model.plan = model.engine = None
    torch = profile(model, scene(24, 24), threads=1, repeats=1)
    rescale = sum(
        c.macs for c in engine.convs if c.name.startswith("1x1")
    )  # a change of grid, no convolution of torch
    assert engine.macs_g * 1e9 - rescale == pytest.approx(torch.macs_g * 1e9)
