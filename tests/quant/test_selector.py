"""Bit selectors and sites: straight-through values and gradients against a derivation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cadyq.backbones import build_backbone
from cadyq.config import Quantization
from cadyq.errors import UnsupportedError
from cadyq.functional.losses import attention_map, attention_transfer, bit_loss
from cadyq.quant.context import Context, TileContext
from cadyq.quant.convert import calibrate, convert, observe
from cadyq.quant.layers import Conv2d
from cadyq.quant.selector import SELECTOR_INPUTS, BitSelector
from cadyq.quant.site import Site, sites_of

CANDIDATES = (3, 4, 6, 8)


def dynamic(backbone: str = "srresnet", bits: tuple[int, ...] = CANDIDATES, **kw: object) -> nn.Module:
    torch.manual_seed(0)
    args = {"channels": 8, "n_blocks": 2} if backbone in ("srresnet", "edsr") else {}
    extra = {"norm": False} if backbone == "srresnet" else {}
    network = build_backbone(backbone, scale=2, **args, **extra).eval()
    config = Quantization(bits=bits, dynamic=True, **kw)  # type: ignore[arg-type]
    result = convert(network, config)
    calibrate(result, observe(network, [torch.rand(4, 3, 24, 24)]), config)
    return result


@pytest.mark.parametrize("log_features", [True, False])
def test_everything_starts_at_the_largest_candidate(log_features: bool) -> None:
    network = dynamic(log_features=log_features)
    ctx = Context.of(torch.rand(5, 3, 20, 20))
    network(torch.rand(5, 3, 20, 20), ctx)
    for record in ctx.records:
        if record.kind == "body":
            assert record.bits.tolist() == [8.0] * 5


def test_site_gradients_agree_with_an_independent_derivation() -> None:
    """Bits, feature, selector and clip, all written out by hand in float64."""
    torch.manual_seed(1)
    conv = Conv2d(4, 4, 3)
    site = Site(conv)
    from cadyq.quant.pams import PAMS

    site.quantizer = PAMS(4, CANDIDATES)
    site.selector = BitSelector(4, CANDIDATES, log_features=False)
    site.double()
    with torch.no_grad():
        site.quantizer.clip.copy_(torch.rand(4) + 0.5)
        site.selector.linear.weight.copy_(torch.randn(4, 6))
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    lr = torch.rand(3, 3, 7, 7, dtype=torch.float64)
    ctx = Context.of(lr, soft=True)
    y = site(x, ctx)
    record = ctx.records[0]
    g = torch.randn_like(y)
    assert record.expected_bits is not None
    leaves = (x, site.quantizer.clip, site.selector.linear.weight, site.selector.linear.bias)
    loss = (y * g).sum() + 0.3 * bit_loss([record.bits], [record.expected_bits])
    ours = torch.autograd.grad(loss, leaves)

    # By hand.
    clip = site.quantizer.clip.detach()
    weight, bias = site.selector.linear.weight.detach(), site.selector.linear.bias.detach()
    v = torch.cat([ctx.gradient, x.detach().flatten(2).std(2)], 1)
    p = (v @ weight.T + bias).softmax(1)
    b = torch.tensor([float(c) for c in CANDIDATES], dtype=torch.float64)
    assert torch.equal(record.bits, b[p.argmax(1)])
    dx, dclip = torch.zeros_like(x), torch.zeros_like(clip)
    dp = torch.zeros_like(p)
    for k in range(4):
        a, q = clip[k], 2 ** (b[k] - 1) - 1
        u = (x.detach() / a).clamp(-1, 1)
        quantised = (u * q).round() / q * a
        if k == int(p[0].argmax()):
            torch.testing.assert_close(y[0], quantised[0])
        dp[:, k] = (g * quantised).sum((1, 2, 3))
        inside = (x.detach().abs() < a).double()
        dx += p[:, k].view(-1, 1, 1, 1) * g * inside
        slope = inside * ((u * q).round() / q - u) + (1 - inside) * x.detach().sign()
        dclip[k] = (p[:, k].view(-1, 1, 1, 1) * g * slope).sum()
    expected = (p * b).sum(1, keepdim=True)
    dp += 0.3 * b / expected
    dz = p * (dp - (p * dp).sum(1, keepdim=True))
    for ours_i, by_hand in zip(ours, (dx, dclip, dz.T @ v, dz.sum(0)), strict=True):
        torch.testing.assert_close(ours_i, by_hand, rtol=1e-9, atol=1e-10)


def test_every_candidate_is_exercised_by_force_and_by_random_selectors() -> None:
    network = dynamic()
    seen: set[int] = set()
    for seed in range(6):
        torch.manual_seed(seed)
        for site in sites_of(network, "body"):
            assert site.selector is not None
            nn.init.normal_(site.selector.linear.weight, std=3)
            nn.init.normal_(site.selector.linear.bias)
        lr = torch.rand(8, 3, 16, 16) * torch.rand(8, 1, 1, 1)
        ctx = Context.of(lr)
        network(lr, ctx)
        seen |= {int(v) for r in ctx.records if r.kind == "body" for v in r.bits}
    assert seen == set(CANDIDATES)


@pytest.mark.parametrize("inputs", list(SELECTOR_INPUTS))
def test_ablations_see_only_what_they_should(inputs: str) -> None:
    selector = BitSelector(6, (4, 8), inputs, log_features=False)  # type: ignore[arg-type]
    gradient, deviation = torch.rand(3, 2), torch.rand(3, 6)
    base = selector.features(gradient, deviation)
    uses_gradient, kind = SELECTOR_INPUTS[inputs]  # type: ignore[index]
    assert (not torch.equal(base, selector.features(gradient + 1, deviation))) == uses_gradient
    assert (not torch.equal(base, selector.features(gradient, deviation + 1))) == bool(kind)
    assert base.shape[1] == selector.linear.in_features


def test_skip_leaves_the_stream_untouched_and_counts_zero() -> None:
    network = dynamic(bits=(0, 4, 8))
    lr = torch.rand(2, 3, 20, 20)
    first = {
        s.name: (0 if s.selector is not None and s.selector.has_zero else 4)
        for s in sites_of(network, "body")
    }
    ctx = Context.of(lr)
    ctx.force_bits = dict(first)
    ctx.block_outputs = []
    network(lr, ctx)
    assert all(float(r.bits.sum()) == 0 for r in ctx.records if r.kind == "body")
    assert all(torch.equal(a, ctx.block_outputs[0]) for a in ctx.block_outputs)


def test_skip_is_refused_where_blocks_have_no_skip() -> None:
    with pytest.raises(UnsupportedError, match="skip"):
        convert(build_backbone("idn", scale=2), Quantization(bits=(0, 4, 8), dynamic=True))


def test_skip_gate_carries_gradient() -> None:
    network = dynamic(bits=(0, 4, 8)).train()
    lr = torch.rand(2, 3, 16, 16)
    ctx = Context.of(lr, soft=True)
    network(lr, ctx).square().mean().backward()
    for site in sites_of(network, "body"):
        assert site.selector is not None
        grad = site.selector.linear.bias.grad
        assert grad is not None and float(grad.abs().sum()) > 0


@pytest.mark.parametrize(
    "config", [{"edges": "integer", "stream_bits": 16}, {"channel_power": 0.8}, {"skips": True}]
)
def test_tiles_that_choose_alike_equal_the_whole_image(config: dict[str, object]) -> None:
    network = dynamic(**config).double()
    lr = torch.rand(1, 3, 45, 61, dtype=torch.float64)
    whole, tiles = Context.of(lr), TileContext(lr, 32)
    whole.force_bits = tiles.force_bits = 6
    a, b = network(lr, whole), network(lr, tiles)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_losses_by_hand() -> None:
    bits = [torch.tensor([4.0, 8.0])]
    expected = [torch.tensor([5.0, 7.0], requires_grad=True)]
    loss = bit_loss(bits, expected)
    assert loss.item() == pytest.approx(4 / 5 + 8 / 7)
    (grad,) = torch.autograd.grad(loss, expected)
    torch.testing.assert_close(grad, torch.tensor([1 / 5, 1 / 7]))
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)

    def attention(x: Tensor) -> Tensor:
        m = (x**2).mean(1).flatten(1)
        return m / m.norm(dim=1, keepdim=True)

    assert float(attention_transfer(a, attention_map(b))) == pytest.approx(
        float(((attention(a) - attention(b)) ** 2).mean())
    )
    assert float(attention_transfer(a, attention_map(a * 3))) == pytest.approx(0, abs=1e-12)
    x = a.double().requires_grad_()
    goal = attention(b.double())
    written, composed = (
        torch.autograd.grad(loss, x)[0]
        for loss in (attention_transfer(x, goal), ((attention(x) - goal) ** 2).mean())
    )
    torch.testing.assert_close(written, composed)
