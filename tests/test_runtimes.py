"""The integer engine and the fake-quantised torch network are the same network."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from cadyq.audit import audit
from cadyq.backbones import BACKBONES, build_backbone
from cadyq.config import Quantization
from cadyq.deploy import write_plan
from cadyq.engine import reference
from cadyq.errors import ArgumentError, CheckpointError, UnsupportedError
from cadyq.io.models import save_model
from cadyq.io.plans import LoadedPlan, load_plan, save_plan
from cadyq.lowering import lower
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.quant.site import sites_of
from cadyq.upscale import load


def network_of(bits=(4, 6, 8), **changes):
    torch.manual_seed(0)
    base = build_backbone("srresnet", scale=4, channels=16, n_blocks=2, keras=True, norm=False).eval()
    config = Quantization(
        bits=bits, dynamic=True, channel_power=0.8, edges="integer", stream_bits=16, tile=16, **changes
    )
    network = convert(base, config)
    calibrate(network, observe(base, [torch.rand(4, 3, 24, 24)]), config)
    for site in sites_of(network, "body"):
        torch.nn.init.normal_(site.selector.linear.weight, std=2)
        torch.nn.init.normal_(site.selector.linear.bias, std=0.3)
    return network.eval(), config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes")
    network, config = network_of()
    model = folder / "small-x4.safetensors"
    save_model(model, network, config)
    metadata = {"backbone": "srresnet", "scale": 4, "quantization": {}, "license": "Apache-2.0"}
    plan = LoadedPlan(lower(network, config), 1, network.radius, None, metadata)
    save_plan(folder / "small-x4.plan.safetensors", plan)
    return model


def picture(height=45, width=52):
    rng = np.random.default_rng(1)
    smooth = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    rough = rng.integers(0, 256, (height, width, 3))
    return np.where(np.arange(width)[None, :, None] < 24, smooth, rough).astype(np.uint8)


def test_engine_is_the_default_and_agrees_with_torch(files):
    model = load(files)
    ours = model.upscale(picture())
    theirs = model.upscale(picture(), runtime="torch")
    assert (ours.runtime, theirs.runtime) == ("engine", "torch")
    assert ours.pixels.shape == theirs.pixels.shape == (180, 208, 3)
    same = [np.mean(ours.bits[name] == theirs.bits[name]) for name in ours.bits]
    assert np.mean(same) >= 0.97
    assert len({int(b) for grid in ours.bits.values() for b in grid.ravel()}) >= 2
    assert ours.bitops == pytest.approx(theirs.bitops, rel=0.05)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_forced_bits_agree_closely(files, bits):
    model = load(files)
    ours = model.upscale(picture(), force_bits=bits)
    theirs = model.upscale(picture(), force_bits=bits, runtime="torch")
    difference = np.abs(ours.pixels.astype(int) - theirs.pixels.astype(int))
    assert all((grid == bits).all() for grid in ours.bits.values())
    assert difference.mean() < 0.2
    assert difference.max() <= 3


def test_native_equals_reference_through_the_whole_path(files):
    model, rgb = load(files), picture(33, 40)
    found = model.upscale(rgb)
    expected = reference.run(model.plan.plan, rgb)
    assert np.array_equal(found.pixels, expected.image)
    table = np.stack([found.bits[s.name] for s in model.sites], axis=-1)
    assert np.array_equal(table, expected.bits)


def test_budget_moves_bits_monotonically(files):
    model = load(files)
    rates = [model.upscale(picture(), budget=budget).fqr for budget in (-500.0, -0.5, 0.0, 0.5, 500.0)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (4.0, 8.0)


def test_zero_bits_and_wide_layers_are_lowered():
    network, config = network_of(bits=(0, 4, 8))
    plan = lower(network, config)
    assert plan.sites[0].bits == (0, 4, 8)
    assert plan.sites[1].bits == (4, 8)
    none = np.zeros((1, 1, 4), np.int8)
    assert reference.run(plan, picture(12, 12), choice=none).bits.sum() == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"edges": "float"}, "edges"),
        ({"quantizer": "daq", "channel_power": 0.0}, "DAQ"),
        ({"stream_bits": 0}, "stream_bits"),
    ],
)
def test_what_has_no_integer_form_is_named(change, word):
    network, config = network_of()
    with pytest.raises(UnsupportedError, match=word):
        lower(network, dataclasses.replace(config, **change))


def test_engine_is_refused_where_it_cannot_run(files):
    model = load(files)
    with pytest.raises(ArgumentError, match="runtime"):
        model.upscale(picture(), mode="image", runtime="engine")
    assert model.upscale(picture(), mode="image").runtime == "torch"


def test_damaged_plans_are_refused(files, tmp_path):
    content = bytearray(files.with_name("small-x4.plan.safetensors").read_bytes())
    rng = np.random.default_rng(0)
    for i in range(40):
        broken = bytearray(content)
        if i % 2:
            broken[int(rng.integers(len(broken)))] ^= 1 << int(rng.integers(8))
        else:
            broken = broken[: int(rng.integers(len(broken)))]
        path = tmp_path / "x.plan.safetensors"
        path.write_bytes(bytes(broken))
        with pytest.raises(CheckpointError):
            load_plan(path)


def test_the_audit_looks_at_the_network_on_torch_even_where_there_is_a_plan(files):
    result = audit(load(files), picture())
    assert result.is_clean
    assert {row.status for row in result.rows if row.kind == "body"} == {"ok"}
    assert not dataclasses.replace(result, rows=()).is_clean


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_with_a_plan_runs_in_integers(name, model_files, tmp_path):
    model = tmp_path / f"{name}.safetensors"
    shutil.copy(model_files[name], model)
    assert write_plan(model) == ""
    ours = load(model).upscale(picture(30, 40))
    theirs = load(model).upscale(picture(30, 40), runtime="torch")
    assert (ours.runtime, theirs.runtime) == ("engine", "torch")
    assert list(ours.bits) == list(theirs.bits)
    assert np.mean([np.mean(ours.bits[site] == theirs.bits[site]) for site in ours.bits]) >= 0.97
    assert ours.bitops == pytest.approx(theirs.bitops, rel=0.03)
    difference = np.abs(ours.pixels.astype(int) - theirs.pixels)  # a collapsed tail rounds less than torch's
    assert difference.mean() < 0.25
    assert difference.max() <= 8
    deep = load(model).upscale(picture(30, 40).astype(np.uint16) * 257)
    assert deep.runtime == "engine"
    assert np.abs(deep.pixels / 257 - ours.pixels).max() <= 1
