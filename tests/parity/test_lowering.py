"""Every backbone and quantiser in integers: the network that torch simulates, and the reference to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from networks import QUANTIZATION, build_network, scene
from torch import nn
from torch.nn import functional as F

from cadyq.backbones import BACKBONES
from cadyq.backbones.blocks import Backbone
from cadyq.config import Quantization
from cadyq.engine import reference
from cadyq.engine.plan import Block, ImageOut, Layer
from cadyq.engine.run import Engine
from cadyq.engine.runtime import EngineRuntime
from cadyq.errors import UnsupportedError
from cadyq.lowering import lower
from cadyq.quant import infer
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.quant.layers import Conv2d
from cadyq.quant.site import Site

INTEGER = {"edges": "integer", "stream_bits": 16, "tile": 16}
QUANTIZERS = {
    "PAMS": Quantization(bits=(4, 6, 8), dynamic=True, channel_power=0.8, **INTEGER),
    "LinQ": Quantization(quantizer="linq", bits=(4, 6, 8), dynamic=True, channel_power=0.5, **INTEGER),
    "FQSR": Quantization(quantizer="lsq", bits=(4, 8), dynamic=True, skips=True, **INTEGER),
    "static": Quantization(bits=(8,), unsigned=False, per_channel_weights=False, **INTEGER),
}
VARIANTS = {
    "carn, groups": ("carn", {"groups": 4, "shared": True}),
    "idn, torch's bicubic": ("idn", {"bicubic": "torch", "scale": 2}),
    "srresnet, mean": ("srresnet", {"keras": False, "scale": 3}),
    "edsr x2": ("edsr", {"scale": 2}),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small convolutions of torch wait longer for each other than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_network(network, plan, tile, rgb, largest=1):
    """The engine's choices and pixels are those of the network on torch, but for rounding."""
    ours, theirs = Engine(plan, 2).upscale(rgb), infer.run_tiles(network, rgb, tile)
    # A site that is used again reports its last use, on torch as well.
    last = {site.name: ours.bits[..., i].ravel() for i, site in enumerate(plan.sites)}
    equal = np.mean([np.mean(theirs.bits[name] == bits) for name, bits in last.items()])
    difference = np.abs(ours.image.astype(int) - theirs.pixels[0].astype(int))
    assert equal >= 0.97
    assert difference.mean() < 0.25
    assert difference.max() <= largest
    assert ours.image.std() > 1
    return ours


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
@pytest.mark.parametrize("name", list(BACKBONES))
def test_same_network_as_on_torch(name, quantizer):
    config, rgb = QUANTIZERS[quantizer], scene(37, 50, seed=9)
    network = build_network(name, config)
    plan = lower(network, config, collapsed=False)
    found = assert_same_network(network, plan, config.tile, rgb)
    assert not config.dynamic or len(np.unique(found.bits)) > 1
    collapsed = lower(network, config)
    if len(collapsed.steps) < len(plan.steps):  # no rounding between the layers of the tail
        assert_same_network(network, collapsed, config.tile, rgb, largest=4)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants(variant):
    name, options = VARIANTS[variant]
    config = QUANTIZERS["PAMS"]
    network = build_network(name, config, **options)
    plan = lower(network, config, collapsed=False)
    assert_same_network(network, plan, config.tile, scene(37, 50, seed=3))


@pytest.mark.parametrize("quantizer", ["PAMS", "LinQ", "FQSR"])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_native_equals_reference(name, quantizer):
    config = QUANTIZERS[quantizer]
    plan = lower(build_network(name, config, seed=1), config)
    for size, dtype in (((21, 35), np.uint8), ((1, 1), np.uint16), ((18, 3), np.uint16)):
        rgb = scene(*size, seed=2).astype(dtype) * (dtype(257) if dtype == np.uint16 else dtype(1))
        exited = np.zeros(reference.tile_grid(*size, config.tile), bool)
        exited[0, -1] = size[1] > 30
        expected = reference.run(plan, rgb, exited=exited)
        for threads in (1, 3):
            found = Engine(plan, threads).upscale(rgb, exited=exited)
            np.testing.assert_array_equal(found.image, expected.image)
            np.testing.assert_array_equal(found.choice, expected.choice)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_16_bit_pictures(name):
    config = QUANTIZERS["PAMS"]
    plan, rgb = lower(build_network(name, config), config), scene(20, 30, seed=4)
    eight, sixteen = (Engine(plan, 1).upscale(x).image for x in (rgb, rgb.astype(np.uint16) * 257))
    assert sixteen.dtype == np.uint16
    assert np.abs(sixteen / 257 - eight).max() <= 1
    assert len(np.unique(sixteen)) > 256


def test_tiles_equal_the_whole_picture_where_bits_are_equal():
    for name in BACKBONES:
        config = QUANTIZERS["PAMS"]
        plan, rgb = lower(build_network(name, config), config), scene(40, 45, seed=5)
        results = []
        for tile in (13, 16, 64):
            own = dataclasses.replace(plan, tile=tile)
            choice = np.zeros((*reference.tile_grid(40, 45, tile), len(plan.sites)), np.int8)
            results.append(Engine(own, 2).upscale(rgb, choice).image)
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


def test_the_tail_without_nonlinearity_becomes_one_convolution():
    config = QUANTIZERS["static"]
    network = build_network("edsr", config)
    plan = lower(network, config)
    last, end = plan.steps[-2:]
    assert isinstance(last, Layer)
    assert isinstance(end, ImageOut)
    assert (last.conv.kernel, last.conv.c_out, last.shuffle) == (5, 48, 4)
    assert last.borders is not None
    # Activations in the tail forbid it.
    assert lower(build_network("carn", config), config).steps[-2].borders is None


def test_a_collapsed_tail_is_exact_at_every_border():
    """In float64 the collapsed convolution is the chain, on pictures of every size."""
    from cadyq.lowering.collapse import _composed, _run
    from cadyq.lowering.trace import Node

    torch.manual_seed(0)
    first, second, third = Conv2d(5, 12, 3), Conv2d(3, 12, 3), Conv2d(3, 2, 3)
    parts = [
        Node("conv", (), 12, 1, first), Node("shuffle", (), 3, 2, value=2),
        Node("conv", (), 12, 2, second), Node("shuffle", (), 3, 4, value=2), Node("conv", (), 2, 4, third),
    ]  # fmt: skip
    with torch.no_grad():
        weight, bias = _composed(parts, 5, 2, 4)
        for height, width in ((1, 1), (1, 6), (2, 1), (3, 2), (7, 5)):
            x = torch.rand(1, 5, height, width, dtype=torch.float64)
            expected = _run(parts, x)
            found = torch.zeros_like(expected)
            padded = F.pad(x, (2, 2, 2, 2))
            for y in range(height):
                for z in range(width):
                    row = 3 if height == 1 else 1 if y == 0 else 2 if y == height - 1 else 0
                    column = 3 if width == 1 else 1 if z == 0 else 2 if z == width - 1 else 0
                    v = 4 * row + column
                    out = (weight[v] * padded[0, :, y : y + 5, z : z + 5]).sum((1, 2, 3)) + bias[v]
                    block = out.view(4, 4, 2).permute(2, 0, 1)
                    found[0, :, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4] = block
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Unusual(Backbone):
    """Operations that no backbone uses: chunk, narrow, a product, an enlargement by torch, sums of stored values."""

    name, radius = "unusual", 6

    def __init__(self, scale=2):
        super().__init__(scale, {})
        self.head = Conv2d(3, 12, 3)
        self.head_site = Site(self.head, "edge", bits=16)
        self.body = Unusual.Body()
        self.stream = Site(None, "stream", channels=12)
        self.tail = Conv2d(12, 3 * scale**2, 3)
        self.tail_site = Site(self.tail, "edge", on_stream=True)
        self.shuffle = nn.PixelShuffle(scale)
        self._finish()

    class Body(nn.Module):
        halo, residual = 3, True

        def __init__(self):
            super().__init__()
            self.wide, self.left, self.join = Conv2d(12, 16, 3), Conv2d(8, 8, 3, groups=2), Conv2d(16, 12, 3)
            self.sites = nn.ModuleList([Site(self.wide, on_stream=True), Site(self.left), Site(self.join)])
            self.act = nn.LeakyReLU(0.2)

        def forward(self, x, ctx):
            left, right = self.act(self.wide(self.sites[0](x, ctx))).chunk(2, 1)
            left = F.relu(self.left(self.sites[1](left, ctx)))
            return x + self.join(self.sites[2](torch.cat([right, left], 1), ctx))

    def _forward(self, lr, ctx):
        x = self.stream(self.act(self.head(self.head_site(lr * 2 - 1, ctx))), ctx)
        x = self.stream(ctx.run(self.body, x), ctx)
        y = self.shuffle(self.tail(self.tail_site(x, ctx)))
        return (F.interpolate(lr, scale_factor=2, mode="bilinear") + y).clamp(0, 1)

    act = staticmethod(F.relu)


def test_a_network_of_ones_own():
    torch.manual_seed(0)
    base, config = Unusual().eval(), QUANTIZERS["PAMS"]
    network = convert(base, config).eval()
    crops = torch.from_numpy(np.stack([scene(24, 24, k) for k in range(3)])).permute(0, 3, 1, 2) / 255
    calibrate(network, observe(base, [crops.float()]), config)
    plan = lower(network, config)
    assert [type(step).__name__ for step in plan.steps] == ["ImageIn", "Layer", "Block", "Layer", "ImageOut"]
    assert isinstance(plan.steps[2], Block)
    rgb = scene(30, 41, seed=6)
    assert_same_network(network, plan, config.tile, rgb)
    np.testing.assert_array_equal(Engine(plan, 2).upscale(rgb).image, reference.run(plan, rgb).image)


class Odd(Unusual):
    """An operation without integer form."""

    def _forward(self, lr, ctx):
        return super()._forward(lr.softmax(1), ctx)


def test_what_cannot_be_lowered_is_named():
    config = QUANTIZERS["PAMS"]
    with pytest.raises(UnsupportedError, match="softmax"):
        lower(convert(Odd().eval(), config), config)
    with pytest.raises(UnsupportedError, match="batch_norm"):
        lower(build_network("srresnet", config, norm=True), config)
    with pytest.raises(UnsupportedError, match="DAQ"):
        lower(
            convert(Unusual().eval(), Quantization(quantizer="daq", bits=(4,), **INTEGER)),
            Quantization(quantizer="daq", bits=(4,), **INTEGER),
        )


@pytest.mark.parametrize(("name", "most"), [("idn", 0.02), ("edsr", 0.3)])  # without it 0.21 and 0.75
def test_the_simulated_network_adds_as_the_engine_does(name: str, most: float) -> None:
    """Both addends of a block's sum lie on a 16-bit grid; rounding the sum alone moves one code in three hundred."""
    network = build_network(name)
    engine = EngineRuntime(lower(network, QUANTIZATION, collapsed=False))
    picture = scene(48, 64).astype(np.uint16) * 257
    ours, theirs = (
        found.pixels.astype(int)
        for found in (
            engine.run_tiles(picture, 16, force=8),
            infer.run_tiles(network.double(), picture, 16, force=8),
        )
    )
    # The result's own grid has about four of 65,535 levels to a step.
    assert np.mean(np.abs(ours - theirs) > 4) < most
