"""The audit passes honest networks of every kind and catches those that only claim their bits."""

import types

import numpy as np
import pytest
import torch
from networks import build_network, save_network, scene

from cadyq.audit import _count_levels, audit
from cadyq.backbones import BACKBONES
from cadyq.config import Quantization
from cadyq.errors import ArgumentError
from cadyq.functional.exit import ExitRule
from cadyq.upscale import MODES, load

KINDS = {
    "pams": Quantization(bits=(4, 6, 8), dynamic=True, tile=16),
    "linq": Quantization(quantizer="linq", bits=(3, 5), dynamic=True, tile=16),
    "daq": Quantization(quantizer="daq", bits=(4,), tile=16),
    "full": Quantization(quantizer="lsq", bits=(2, 4, 8), dynamic=True, edges="integer", skips=True, tile=16),
    "zero": Quantization(bits=(0, 4, 8), dynamic=True, edges="integer", stream_bits=16, tile=16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_honest_networks_are_clean(models, backbone, mode):
    found = audit(models[backbone], scene(40, 53), mode=mode)
    assert found.is_clean
    assert {row.status for row in found.rows} == {"ok"}
    body = [row for row in found.rows if row.kind == "body"]
    assert len(body) == sum(site.kind == "body" for site in models[backbone].sites)
    assert all(row.group == "channel" and 0 < row.levels <= row.allowed for row in body)
    cells = 12 if mode == "tiles" else 1
    assert all(row.n_cells == cells for row in body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", ["srresnet", "edsr"])
def test_every_kind_of_network_is_clean(tmp_path, backbone, kind):
    model = load(save_network(tmp_path / "m.safetensors", backbone, KINDS[kind]))
    found = audit(model, scene(33, 40))
    assert found.is_clean, [row for row in found.rows if row.violations]
    head = found.rows[0]
    assert head.status == ("ok" if kind in ("full", "zero") else "float")
    assert {row.group for row in found.rows if row.kind == "body"} == {
        "channel" if kind == "daq" else "layer"
    }


def test_float_network_claims_nothing(tmp_path):
    found = audit(load(save_network(tmp_path / "m.safetensors", "edsr", None)), scene(20, 20))
    assert found.is_clean
    assert {row.status for row in found.rows} == {"float"}
    assert found.fqr == 32


def _past_the_site(self, x, ctx):
    """SRResNet's block with the released reference's slip: conv1 gets the feature before quantization."""
    self.site1(x, ctx)
    h = self.act(self.norm1(self.conv1(x)))
    return x + self.norm2(self.conv2(self.site2(h, ctx)))


def _without_the_site(self, x, ctx):
    """A block that never asks its first site."""
    h = self.act(self.norm1(self.conv1(x)))
    return x + self.norm2(self.conv2(self.site2(h, ctx)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forward", [_past_the_site, _without_the_site])
def test_wrong_networks_fail(model_files, forward, mode):
    model = load(model_files["srresnet"])
    block = model.loaded.network.body[1]
    block.forward = types.MethodType(forward, block)
    if forward is _without_the_site:
        # Its bits would be missing from the count, which is an error of its own.
        model.sites = [site for site in model.sites if site.name != "body.1.site1"]
    found = audit(model, scene(40, 53), mode=mode)
    assert not found.is_clean
    assert [row.conv for row in found.rows if row.violations] == ["body.1.conv1"]
    assert found.to_mapping()["clean"] is False


def test_wrong_count_of_bits_fails(model_files):
    """A quantizer with more levels than it says."""
    model = load(model_files["edsr"])
    site = model.loaded.network.body[0].site1
    honest = site.quantizer.levels
    site.quantizer.levels = lambda choice: 2 * honest(choice) + 1
    found = audit(model, scene(40, 53))
    assert "body.0.conv1" in [row.conv for row in found.rows if row.violations]


def test_exited_cells_are_not_looked_at(tmp_path):
    rule = ExitRule((1.0, 0, 0, 0, 0, 0), 0.0, float(np.log(0.02)))
    model = load(save_network(tmp_path / "m.safetensors", "srresnet", exit_rule=rule))
    image = scene(48, 48)
    image[:, :16] = 9
    found = audit(model, image)
    assert found.is_clean
    exited = model.upscale(image).exited
    assert exited > 0
    assert {row.n_cells for row in found.rows if row.kind == "body"} == {round(9 * (1 - exited))}
    gone = audit(model, np.full((20, 20, 3), 7, np.uint8))
    assert {row.status for row in gone.rows} == {"not run"}


def test_hooks_are_removed(model_files):
    model = load(model_files["edsr"])
    audit(model, scene(16, 16))
    network = model.loaded.network
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_counting():
    x = torch.tensor([[[[0.0, 1, 1, 2]], [[5, 5, 5, 5]]], [[[0, 0, 0, 0]], [[float("nan")] * 4]]])
    assert _count_levels(x, by_channel=True) == [3, 4]
    assert _count_levels(x, by_channel=False) == [4, 5]


def test_wrong_argument(raises_clearly):
    raises_clearly(ArgumentError, lambda: audit(build_network("edsr", None), scene(9, 9)), "cadyq.load")
