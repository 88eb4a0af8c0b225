"""Every registered backbone: shapes, sites, parameters, costs, tiles, radius."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cadyq.backbones import BACKBONES, Backbone, build_backbone
from cadyq.backbones.carn import CARN
from cadyq.backbones.edsr import EDSR
from cadyq.backbones.idn import IDN, bicubic_upscale, rgb_to_ycbcr, ycbcr_to_rgb
from cadyq.backbones.srresnet import SRResNet
from cadyq.errors import ArgumentError
from cadyq.quant.context import Context, TileContext
from cadyq.quant.pams import PAMS
from cadyq.quant.site import Site, sites_of

SCALES = (2, 3, 4)
# Forms beside the default one, in which the same tests must hold.
FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BACKBONES),
    ("srresnet", {"keras": True}),
    ("srresnet", {"norm": False}),
    ("idn", {"bicubic": "torch"}),
    ("idn", {"luma": True}),
    ("carn", {"groups": 4, "shared": True}),
    ("carn", {"multi": True}),
]
# As deep as needed to cross several tiles, no deeper.
SHALLOW: dict[str, dict[str, Any]] = {
    "edsr": {"channels": 16, "n_blocks": 4},
    "srresnet": {"channels": 16, "n_blocks": 4},
    "idn": {"n_blocks": 2},
    "carn": {"channels": 16},
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def make(name: str, scale: int, **config: Any) -> Backbone:
    """Float64 network in eval mode whose batch norms, slopes and biases are not those of initialization."""
    network = build_backbone(name, scale=scale, **config).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.3, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(0, 0.5)
    return network


def picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, dtype=torch.float64)


def macs(network: nn.Module, *kinds: Any, pixels: int = 320 * 180) -> float:
    return sum(site.macs_per_pixel for site in sites_of(network, *kinds)) * pixels


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "config"), FORMS)
def test_output_is_scale_times_larger(name: str, config: dict[str, Any], scale: int) -> None:
    network = make(name, scale, **SHALLOW[name], **config)
    lr = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    assert network(lr).shape == (2, 3, 9 * scale, 12 * scale)
    assert network.scale == network.config["scale"] == scale
    assert network.name == name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "config"), FORMS)
def test_without_weights_the_output_is_a_picture_in_0_1(
    name: str, config: dict[str, Any], scale: int
) -> None:
    network = make(name, scale, **SHALLOW[name], **config)
    for parameter in network.parameters():
        parameter.zero_()
    lr = torch.full((1, 3, 7, 8), 0.25, dtype=torch.float64)
    result = network(lr)
    if name == "idn":
        expected = torch.full_like(result, 0.25)
    elif config.get("keras"):
        expected = torch.full_like(result, 0.5)
    else:
        expected = torch.tensor([0.4488, 0.4371, 0.4040]).double().view(1, 3, 1, 1).expand_as(result)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_sites_of_a_float_network_are_the_identity(
    name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(name, 4, **SHALLOW[name], **config)
    lr = picture(11, 13)
    expected = network(lr)
    monkeypatch.setattr(Site, "forward", lambda self, x, ctx: x)
    assert torch.equal(network(lr), expected)


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_state_and_config_make_the_same_network(name: str, config: dict[str, Any]) -> None:
    network = make(name, 3, **SHALLOW[name], **config)
    other = build_backbone(name, **network.config).double().eval()
    other.load_state_dict(network.state_dict(), strict=True)
    lr = picture(8, 9)
    assert torch.equal(other(lr), network(lr))
    pointers = [value.data_ptr() for value in network.state_dict().values() if value.numel()]
    assert len(pointers) == len(set(pointers)), "a weight has two names; safetensors refuses that"


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda: EDSR(4), 1_517_571),
        (lambda: SRResNet(4), 1_546_838),
        (lambda: SRResNet(4, keras=True), 1_550_659),
        *((lambda s=s: IDN(s), 590_915) for s in SCALES),
        (lambda: IDN(4, luma=True), 552_769),
        (lambda: CARN(4), 1_111_875),
        (lambda: CARN(4, multi=True), 1_591_939),
        (lambda: CARN(4, groups=4, shared=True), 294_147),
        (lambda: CARN(4, groups=4, shared=True, multi=True), 414_787),
    ],
)
def test_parameter_counts(network: Any, expected: int) -> None:
    assert network().n_parameters() == expected


def test_keras_srresnet_counts_its_statistics() -> None:
    network = SRResNet(4, keras=True)
    statistics = sum(b.numel() for k, b in network.named_buffers() if "running" in k)
    assert statistics == 4_224
    assert network.n_parameters() + statistics == 1_554_883


def test_every_parameter_of_carn() -> None:
    """The table in its docstring, and the sum that the supplement prints."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    expected = {False: (664_704, 147_712, 332_352, 295_424), True: (68_160, 37_120, 83_520, 74_240)}
    for mobile, counts in expected.items():
        network = CARN(4, groups=4 if mobile else 1, shared=mobile, multi=True)
        blocks = sum(count(cascade.blocks) for cascade in network.body)  # type: ignore[arg-type,union-attr]
        assert (blocks, *(count(network.ups[str(s)]) for s in SCALES)) == counts
        fusions = count(network.fusions) + sum(count(c.fusions) for c in network.body)  # type: ignore[arg-type,union-attr]
        assert (count(network.entry), fusions, count(network.exit)) == (1_792, 148_224, 1_731)
    network = CARN(4, multi=True)
    body = sites_of(network, "body")
    selectors, clips, mean = sum(3 * (site.channels + 3) for site in body), 3 * len(body), 2 * (9 + 3)
    assert network.n_parameters() + selectors + clips + mean == 1_595_635


@pytest.mark.parametrize(("name", "n_body"), [("edsr", 32), ("srresnet", 32), ("idn", 24), ("carn", 18)])
def test_body_sites(name: str, n_body: int) -> None:
    network = build_backbone(name)
    body = sites_of(network, "body")
    assert len(body) == len({site.name for site in body}) == n_body
    assert all(site.name and site.conv is not None for site in body)


def test_sites_that_are_nonneg_see_no_negative_value(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Site.forward

    def check(self: Site, x: Tensor, ctx: Context) -> Tensor:
        assert not self.nonneg or float(x.min()) >= 0, self.name
        return original(self, x, ctx)

    monkeypatch.setattr(Site, "forward", check)
    for name, config in FORMS:
        make(name, 4, **SHALLOW[name], **config)(picture(8, 8))


def test_a_shared_block_records_every_use() -> None:
    network = make("carn", 2, channels=16, groups=4, shared=True)
    lr = picture(8, 8)
    ctx = Context.of(lr)
    network(lr, ctx)
    assert len([record for record in ctx.records if record.kind == "body"]) == 18


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_of_their_own_compute_the_same(shared: bool) -> None:
    network = make("carn", 4, channels=16, groups=4, shared=shared, multi=True)
    alone, lr = network.unshared(), picture(8, 12)
    assert torch.equal(alone(lr), network(lr))
    body = sites_of(alone, "body")
    assert len(body) == 18 and len({id(site.conv) for site in body}) == 18
    assert list(alone.ups) == ["4"] and not alone.config["shared"]


@pytest.mark.parametrize(
    ("name", "kinds", "giga"),
    [
        ("edsr", ("body",), 135.90),
        ("srresnet", ("body",), 135.90),
        ("idn", ("body",), 54.68),
        ("idn", ("fixed",), 4.45),
    ],
)
def test_bitops_at_720p(name: str, kinds: tuple[str, ...], giga: float) -> None:
    """2 MACs at 32 bit, LR 320x180 (supplement, tables S3 and S7)."""
    assert 2e-9 * macs(build_backbone(name), *kinds) == pytest.approx(giga, rel=0.005)


def test_srresnet_batch_norm_is_the_rest_of_the_printed_bitops() -> None:
    network = SRResNet(4)
    norms = [m for m in network.body.modules() if isinstance(m, nn.BatchNorm2d)]
    norm = 2e-9 * sum(m.num_features for m in norms) * 320 * 180
    assert norm == pytest.approx(0.236, rel=0.005)
    assert 2e-9 * macs(network, "body") + norm == pytest.approx(136.13, rel=0.005)


def test_carn_bitops_at_4k() -> None:
    assert 2e-9 / 16 * macs(CARN(4), "body", pixels=960 * 540) == pytest.approx(43.0, rel=0.005)


@pytest.mark.parametrize("size", [(37, 53), (19, 66), (16, 16)])
@pytest.mark.parametrize("tile", [16, 24, 33, 64])
@pytest.mark.parametrize("name", BACKBONES)
def test_tiles_equal_the_whole_picture(name: str, tile: int, size: tuple[int, int]) -> None:
    network = make(name, 2, **SHALLOW[name])
    lr = picture(*size)
    expected = network(lr)
    ctx = TileContext(lr, tile)
    torch.testing.assert_close(network(lr, ctx), expected, rtol=0, atol=1e-9)
    assert float(ctx.area.sum()) == size[0] * size[1]


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_tiles_in_several_batches_equal_the_whole_picture(name: str, config: dict[str, Any]) -> None:
    network = make(name, 3, **SHALLOW[name], **config)
    lr = picture(41, 35)
    whole = Context.of(lr)
    expected = network(lr, whole)
    ctx = TileContext(lr, 16, max_batch_pixels=3 * 32 * 32)
    torch.testing.assert_close(network(lr, ctx), expected, rtol=0, atol=1e-9)
    assert [r.name for r in ctx.records] == [r.name for r in whole.records]
    assert all(len(r.bits) == ctx.n_tiles for r in ctx.records)


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_quantized_tiles_equal_the_whole_picture_where_all_bits_are_equal(
    name: str, config: dict[str, Any]
) -> None:
    network = make(name, 2, **SHALLOW[name], **config)
    for site in sites_of(network, "body", "fixed", "edge", "skip"):
        site.quantizer = PAMS(site.channels, [4], signed=not site.nonneg).double()
    lr = picture(37, 29)
    ctx = TileContext(lr, 16)
    torch.testing.assert_close(network(lr, ctx), network(lr), rtol=0, atol=1e-9)
    assert {float(bits) for record in ctx.records for bits in record.bits} == {4.0}


@pytest.mark.parametrize("name", BACKBONES)
def test_full_depth_in_tiles(name: str) -> None:
    network = make(name, 4)
    lr = picture(17, 23)
    torch.testing.assert_close(network(lr, TileContext(lr, 16)), network(lr), rtol=0, atol=1e-9)


@pytest.mark.parametrize("keras", [False, True])
def test_folded_srresnet_equals_the_unfolded(keras: bool) -> None:
    network = make("srresnet", 4, channels=16, n_blocks=3, keras=keras)
    assert isinstance(network, SRResNet)
    with torch.enable_grad():
        folded = network.folded()
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    lr = picture(10, 12)
    torch.testing.assert_close(folded(lr), network(lr), rtol=0, atol=1e-9)
    assert folded.folded() is folded


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", BACKBONES)
def test_radius_is_a_bound(name: str, scale: int) -> None:
    config = {key: value for key, value in SHALLOW[name].items() if key == "channels"}
    network = make(name, scale, **{**config, **({"channels": 8} if "channels" in config else {})})
    n, center = 2 * network.radius + 7, network.radius + 3
    lr = picture(3, n)
    other = lr.clone()
    other[:, :, 1, center] += 1
    changed = (network(other) - network(lr)).abs().amax((0, 1, 2)).view(n, scale).amax(1)
    columns = changed.nonzero().flatten()
    assert int((columns - center).abs().max()) <= network.radius


@pytest.mark.parametrize("scale", SCALES)
def test_bicubic_is_matlabs_or_torchs(scale: int) -> None:
    x = picture(5, 6)
    torch.testing.assert_close(
        bicubic_upscale(x, scale, "torch"), F.interpolate(x, scale_factor=scale, mode="bicubic")
    )
    # Keys' kernel with a = -0.5 reproduces parabolas; a = -0.75 does not. Away from the border only.
    t = torch.arange(12, dtype=torch.float64)
    parabola = (t**2).view(1, 1, 1, -1).expand(1, 1, 3, -1)
    fine = (torch.arange(12 * scale, dtype=torch.float64) + 0.5) / scale - 0.5
    result = bicubic_upscale(parabola, scale)[0, 0, 0]
    inner = slice(2 * scale, -2 * scale)
    torch.testing.assert_close(result[inner], (fine**2)[inner])
    assert bicubic_upscale(picture(1, 1), scale).shape == (1, 3, scale, scale)


def test_bicubic_border_is_symmetric() -> None:
    x = picture(6, 7)
    mirrored = torch.cat((x.flip(3), x, x.flip(3)), 3)
    torch.testing.assert_close(bicubic_upscale(mirrored, 3)[..., 21:42], bicubic_upscale(x, 3))


def test_bicubic_is_differentiable() -> None:
    with torch.enable_grad():
        x = picture(4, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda v: bicubic_upscale(v, 3), (x,))


def test_ycbcr_is_studio_range_and_invertible() -> None:
    x = picture(4, 5)
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x)
    white = rgb_to_ycbcr(torch.ones(1, 3, 1, 1, dtype=torch.float64)) * 255
    torch.testing.assert_close(white.flatten(), torch.tensor([235.0, 128.0, 128.0]).double())


def test_luma_idn_takes_y_alone() -> None:
    network = make("idn", 2, n_blocks=1, luma=True)
    lr = picture(8, 9)
    y = network(rgb_to_ycbcr(lr)[:, :1])
    assert y.shape == (1, 1, 16, 18)
    torch.testing.assert_close(rgb_to_ycbcr(network(lr))[:, :1], y)


def test_multi_scale_carn_equals_each_single_one() -> None:
    multi = make("carn", 4, channels=16, multi=True)
    assert isinstance(multi, CARN)
    lr = picture(7, 8)
    for scale in SCALES:
        multi.use_scale(scale)
        single = make("carn", scale, channels=16)
        state = {k: v for k, v in multi.state_dict().items() if k in single.state_dict()}
        single.load_state_dict(state)
        assert torch.equal(multi(lr), single(lr))
        assert multi.exit_site.macs_per_pixel == single.exit_site.macs_per_pixel  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="scale is 3"):
        make("carn", 2, channels=16).use_scale(3)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vdsr", {}),
        ("idn", {"scale": 5}),
        ("idn", {"bicubic": "cv2"}),
        ("carn", {"scale": 1}),
        ("edsr", {"x": 1}),
    ],
)
def test_wrong_arguments_are_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        build_backbone(name, **config)
