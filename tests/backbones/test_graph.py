"""Users' networks, traced: the same function, with sites, blocks, planes and a tail in the right places."""

import json

import numpy as np
import pytest
import torch
import user_networks as user
from networks import scene
from torch import nn
from torch.nn import functional as F

from cadyq.audit import audit
from cadyq.backbones import build_backbone
from cadyq.backbones.adopt import adopt
from cadyq.backbones.graph import Graph, flatten
from cadyq.config import Quantization
from cadyq.engine.runtime import EngineRuntime
from cadyq.errors import ArgumentError, UnsupportedError
from cadyq.io.models import load_model, save_model
from cadyq.lowering import lower
from cadyq.quant.context import Context, TileContext
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.quant.infer import run_tiles
from cadyq.quant.site import Site, sites_of
from cadyq.upscale import Model

NETWORKS = {
    "carn_m": (lambda: user.CarnM(16), 4),
    "resnet": (lambda: user.Resnet(peak=1.0), None),
    "rrdb": (user.Rrdb, None),
    "distillation": (user.Distillation, None),
    "compact": (user.Compact, None),
}
CONVERSION = Quantization(
    bits=(4, 6, 8), dynamic=True, edges="integer", stream_bits=16, channel_power=0.8, tile=16
)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def make(name):
    """The user's module, and the function it is, with batch norms that are not those of initialization."""
    build, scale = NETWORKS[name]
    module = build().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.3, 1.5)
            layer.weight.uniform_(0.5, 1.5)
    return module, scale, (lambda x: module(x, scale)) if scale else module


def traced(name, **options):
    module, scale, function = make(name)
    return adopt(module, torch.rand(2, 3, 32, 32), scale=scale, value_range="0:1", **options), function


def quantized(graph):
    """With selectors that spread over all candidates."""
    network = convert(graph, CONVERSION).eval()
    calibrate(network, observe(graph, [torch.rand(2, 3, 24, 24)]), CONVERSION)
    network.share_grids()
    for site in sites_of(network, "body"):
        nn.init.normal_(site.selector.linear.weight)
    return network


def close(a, b):
    torch.testing.assert_close(a.clamp(0, 1), b.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_traced_network_is_the_same_function(name):
    graph, function = traced(name)
    for size in ((19, 26), (32, 8)):
        lr = torch.rand(2, 3, *size)
        close(graph(lr), function(lr))


@pytest.mark.parametrize("name", NETWORKS)
def test_its_description_is_json_and_makes_the_same_network(name):
    graph, _ = traced(name)
    other = build_backbone("graph", **json.loads(json.dumps(graph.config))).eval()
    other.load_state_dict(graph.state_dict(), strict=True)
    lr = torch.rand(1, 3, 9, 12)
    assert torch.equal(other(lr), graph(lr))
    assert [s.name for s in sites_of(other)] == [s.name for s in sites_of(graph)]


@pytest.mark.parametrize("bands", [0, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_and_bands_equal_the_whole_picture(name, bands):
    graph, _ = traced(name)
    lr = torch.rand(1, 3, 37, 21)
    ctx = TileContext(lr, 16, band_pixels=bands)
    close(graph(lr, ctx), graph(lr))
    assert all(len(record.bits) == ctx.n_tiles for record in ctx.records)
    assert any(op["op"] == "tail" for op in graph.ops)


@pytest.mark.parametrize("name", NETWORKS)
def test_radius_is_a_bound(name):
    graph, _ = traced(name)
    n, center = 2 * graph.radius + 7, graph.radius + 3
    lr = torch.rand(1, 3, 3, n, dtype=torch.float64)
    other = lr.clone()
    other[:, :, 1, center] += 1
    graph = graph.double()
    columns = (
        (graph(other) - graph(lr)).abs().amax((0, 1, 2)).view(n, graph.scale).amax(1).nonzero().flatten()
    )
    assert int((columns - center).abs().max()) <= graph.radius


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_that_are_nonneg_see_no_negative_value(name, monkeypatch):
    graph, _ = traced(name)
    original = Site.forward

    def check(self, x, ctx):
        assert not self.nonneg or float(x.min()) >= 0, self.name
        return original(self, x, ctx)

    monkeypatch.setattr(Site, "forward", check)
    graph(torch.rand(1, 3, 16, 16))


def test_what_is_nonneg_is_known():
    graph, _ = traced("carn_m")
    known = {s.name: s.nonneg for s in sites_of(graph, "body")}
    assert sum(known.values()) == len(known) - 1  # all but the first see a ReLU's result


@pytest.mark.parametrize("name", NETWORKS)
def test_features_on_a_stored_plane_lie_on_its_grid(name, monkeypatch):
    """What a site takes as stored is a multiple of its plane's step: the integer engine reads it as it is."""
    network = quantized(traced(name)[0])
    steps = {
        op["grid"]: float(network.streams[op["site"]].grid)
        for op in flatten(network.ops)
        if op["op"] == "stream"
    }
    grids = {
        f"layers.{path}.site": steps[op["site"]["grid"]]
        for path, op in _units(network)
        if op["site"]["grid"] is not None
    }
    seen = set()
    original = Site.forward

    def check(self, x, ctx):
        if self.name in grids:
            assert self.on_stream and grids[self.name] > 0
            codes = (x / grids[self.name]).double()
            assert float((codes - codes.round()).abs().max()) < 0.01, self.name
            seen.add(self.name)
        return original(self, x, ctx)

    monkeypatch.setattr(Site, "forward", check)
    network(torch.rand(1, 3, 16, 16))
    assert seen == set(grids) and seen


def _units(network):
    for op in network.ops:
        inside = f"{op['layer']}." if op["op"] == "block" else ""
        for inner in op.get("ops", [op]):
            if inner["op"] in ("conv", "deconv"):
                yield inside + inner["layer"], inner


@pytest.mark.parametrize("name", NETWORKS)
def test_the_quantized_network_passes_the_audit_and_its_file_loads(name, tmp_path):
    network = quantized(traced(name)[0])
    save_model(tmp_path / "m.safetensors", network, CONVERSION)
    loaded = load_model(tmp_path / "m.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    model = Model(loaded, name)
    result = model.upscale(picture)
    assert np.array_equal(result.pixels, run_tiles(network, picture, CONVERSION.tile).pixels[0])
    assert result.pixels.shape == (20 * network.scale, 27 * network.scale, 3)
    assert 4 < result.fqr < 8
    assert audit(model, picture).is_clean


@pytest.mark.parametrize("name", ["carn_m", "resnet", "compact"])
def test_the_integer_engine_computes_the_same(name):
    network = quantized(traced(name)[0])
    for site in sites_of(network, "body"):  # bits decided alike, whatever is rounded in the deviations
        nn.init.zeros_(site.selector.linear.weight)
    picture = scene(40, 52)
    result = EngineRuntime(lower(network, CONVERSION)).run_tiles(picture, CONVERSION.tile)
    expected = run_tiles(network, picture, CONVERSION.tile)
    difference = np.abs(result.pixels.astype(int) - expected.pixels.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize(
    ("name", "blocks", "halo", "n_body"),
    [
        ("carn_m", 9, 2, 27),
        ("resnet", 2, 2, 4),
        ("rrdb", 4, 3, 12),
        ("distillation", 1, 2, 2),
        ("compact", 3, 1, 3),
    ],
)
def test_blocks_are_found(name, blocks, halo, n_body):
    graph, _ = traced(name)
    found = [op for op in graph.ops if op["op"] == "block"]
    assert [op["halo"] for op in found] == [halo] * blocks
    assert len(sites_of(graph, "body")) == n_body
    assert all(op["residual"] for op in found) == (name in ("resnet", "rrdb"))


def test_the_head_takes_the_picture_with_16_bits_and_the_rest_between_blocks_8():
    graph, _ = traced("resnet")
    edges = {s.name: s.static_bits for s in sites_of(graph, "edge")}
    assert edges == {
        "layers.head.0.site": 16, "layers.end.site": 8, "layers.tail.0.site": 8, "layers.last.site": 8
    }  # fmt: skip
    assert not any(op["op"] == "affine" for op in flatten(graph.ops[1:-1])), "all constants are folded"


def test_a_layer_that_is_used_three_times_becomes_three():
    graph, _ = traced("carn_m")
    ctx = Context.of(torch.rand(1, 3, 8, 8))
    graph(torch.rand(1, 3, 8, 8), ctx)
    names = [record.name for record in ctx.records if record.kind == "body"]
    assert len(names) == len(set(names)) == 27


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_the_range_is_found_out(peak):
    module = user.Resnet(peak=peak).eval()
    for parameter in module.parameters():
        parameter.mul_(0.01)  # then the mean is what comes out
    graph = adopt(module, torch.rand(2, 3, 32, 32) * 0.2 + 0.35)
    lr = torch.rand(1, 3, 12, 12)
    close(graph(lr), module(lr * peak) / peak)


def test_a_deconvolution_that_is_cut_by_a_slice():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
            self.up = nn.ConvTranspose2d(8, 3, 7, 2, 2)

        def forward(self, x):
            h, w = x.shape[2:]
            return self.up(F.relu(self.body(self.head(x))))[:, :, : 2 * h, : 2 * w]

    module = Cut().eval()
    lr = torch.rand(1, 3, 11, 9)
    close(adopt(module, torch.rand(2, 3, 32, 32), value_range="0:1")(lr), module(lr))


class Small(nn.Module):
    """A network of which one part is the test's."""

    def __init__(self, part=None, body=None, tail=None):
        super().__init__()
        self.head, self.body = nn.Conv2d(3, 8, 3, 1, 1), body or nn.Conv2d(8, 8, 3, 1, 1)
        self.tail = tail or nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2))
        self.part = part

    def forward(self, x):
        y = self.head(x)
        y = self.part(y) if self.part is not None else y
        return self.tail(self.body(y))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (user.Attention(), ("product of two features", "supported are")),
        (Small(nn.InstanceNorm2d(8)), ("'part'", "InstanceNorm2d")),
        (Small(nn.Sequential(nn.ReLU(), nn.GELU())), ("'part.1'", "GELU")),
        (Small(body=nn.Conv2d(8, 8, 3, padding=2, dilation=2)), ("'body'", "dilation")),
        (Small(body=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), ("'body'", "reflect")),
        (Small(body=nn.Conv2d(8, 8, 4, padding="same")), ("'body'", "kernel")),
        (Small(body=nn.Conv2d(8, 8, 3)), ("'body'", "padding")),
        (Small(lambda x: x[:, :, 1:]), ("height or width",)),
        (Small(lambda x: x.flip(3)), ("flip",)),
        (Small(lambda x: F.avg_pool2d(x, 3, 1, 1)), ("avg_pool2d",)),
        (Small(lambda x: x if float(x.mean()) > 0 else -x), ("cannot be traced",)),
        (Small(lambda x: x * x.shape[3] / 24), ("depends on the picture's size",)),
        (Small(tail=nn.Conv2d(8, 3, 3, 1, 1)), ("1 times larger",)),
        (Small(body=nn.Identity()), ("nothing to choose",)),
    ],
)  # fmt: skip
def test_what_has_no_quantized_form_is_refused_by_name(module, words):
    with pytest.raises(UnsupportedError) as caught:
        adopt(module, torch.rand(2, 3, 32, 32))
    assert caught.value.exit_code == 6
    for word in words:
        assert word in str(caught.value)


def test_wrong_arguments_are_refused():
    pictures = torch.rand(2, 3, 32, 32)
    with pytest.raises(ArgumentError, match="value_range"):
        adopt(user.Compact(), pictures, value_range="0:100")
    with pytest.raises(ArgumentError, match="scale is 2, expected 4"):
        adopt(user.Compact(), pictures, scale=2)
    with pytest.raises(ArgumentError, match="forward of CarnM asks"):
        adopt(user.CarnM(8), pictures)


@pytest.mark.parametrize("ops", [[], [{"op": "spin", "in": ["x"], "out": "y"}], [{"op": "relu"}]])
def test_a_damaged_description_is_refused(ops):
    with pytest.raises(ArgumentError):
        build_backbone("graph", scale=2, ops=ops)


def test_our_own_backbone_is_taken_as_it_is():
    network = build_backbone("srresnet", scale=2, channels=8, n_blocks=1)
    adopted = adopt(network, torch.rand(2, 3, 32, 32))
    assert not isinstance(adopted, Graph) and not adopted.config["norm"]
