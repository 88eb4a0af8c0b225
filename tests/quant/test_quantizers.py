"""Quantisers against independent float64 derivations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cadyq.functional.quantize import (
    GAUSSIAN_STEP,
    quantize_clipped,
    quantize_grid,
    quantize_weight,
    round_ste,
)
from cadyq.quant.convert import ACT_QUANTIZERS
from cadyq.quant.daq import DAQ
from cadyq.quant.linq import LinQ
from cadyq.quant.lsq import LSQ
from cadyq.quant.pams import PAMS
from cadyq.quant.quantizer import ActQuantizer

BITS = (2, 3, 4, 5, 6, 7, 8)


def quantizer_of(kind: type[ActQuantizer], signed: bool = True, channels: int = 5) -> ActQuantizer:
    torch.manual_seed(3)
    q = kind(channels, BITS, signed).double()
    for p in q.parameters():
        p.data = torch.rand(len(BITS), dtype=torch.float64) + (0.05 if kind is LSQ else 0.7)
    q.channel_scale = None if kind is DAQ else torch.rand(channels, dtype=torch.float64) + 0.5
    return q


def composed(x: Tensor, clip: Tensor, q: Tensor, signed: bool) -> Tensor:
    low = -clip if signed else torch.zeros_like(clip)
    return round_ste(torch.minimum(torch.maximum(x, low), clip) / clip * q) / q * clip


@pytest.mark.parametrize("signed", [True, False])
def test_written_out_gradient_equals_autograds(signed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64).requires_grad_()
    clip = (torch.rand(3, 4, 1, 1, dtype=torch.float64) + 0.4).requires_grad_()
    q = torch.tensor([1.0, 7.0, 127.0], dtype=torch.float64).view(3, 1, 1, 1)
    weight = torch.randn_like(x)
    ours = torch.autograd.grad((quantize_clipped(x, clip, q, signed) * weight).sum(), (x, clip))
    theirs = torch.autograd.grad((composed(x, clip, q, signed) * weight).sum(), (x, clip))
    assert torch.equal(quantize_clipped(x, clip, q, signed), composed(x, clip, q, signed))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_order_of_operations_matters() -> None:
    clip, q = torch.rand(200, 1) + 0.5, torch.tensor(127.0)
    x = (torch.arange(127) + 0.5) * clip / q  # ties, where one rounding more decides
    other = torch.round(x / (clip / q)) * (clip / q)
    moved = (quantize_clipped(x, clip, q) - other).abs() > 0.5 * clip / q
    assert 0 < int(moved.sum()) < moved.numel() / 2


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", list(ACT_QUANTIZERS))
def test_levels_at_most_two_to_the_bits(name: str, signed: bool) -> None:
    if name == "daq" and not signed:
        pytest.skip("DAQ centres every channel: it has no unsigned form")
    q = quantizer_of(ACT_QUANTIZERS[name], signed)
    x = torch.randn(len(BITS), 5, 40, 40, dtype=torch.float64)
    x = x if signed else x.abs()
    y = q(x, torch.arange(len(BITS)), None)
    for i, b in enumerate(BITS):
        for c in range(5):
            assert len(torch.unique(y[i, c])) <= 2**b


@pytest.mark.parametrize("name", list(ACT_QUANTIZERS))
def test_batch_equals_one_by_one(name: str) -> None:
    q = quantizer_of(ACT_QUANTIZERS[name])
    x = torch.randn(len(BITS), 5, 9, 7, dtype=torch.float64)
    choice = torch.arange(len(BITS)).flip(0)
    whole = q(x, choice, None)
    for i in range(len(BITS)):
        torch.testing.assert_close(whole[i : i + 1], q(x[i : i + 1], choice[i : i + 1], None), rtol=0, atol=0)


@pytest.mark.parametrize("name", list(ACT_QUANTIZERS))
def test_mixture_equals_naive_mixture(name: str) -> None:
    """Forward: the chosen candidate. Backward: the gradient of sum_k P_k Q_k(x)."""
    q = quantizer_of(ACT_QUANTIZERS[name])
    x = torch.randn(3, 5, 8, 8, dtype=torch.float64).requires_grad_()
    probs = torch.rand(3, len(BITS), dtype=torch.float64).softmax(1).requires_grad_()
    choice = torch.tensor([0, 3, 6])
    weight = torch.randn(3, 5, 8, 8, dtype=torch.float64)
    leaves = (x, probs, *q.parameters())
    y = q(x, choice, probs)
    torch.testing.assert_close(y, q(x, choice, None), rtol=0, atol=0)
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    full = [q.quantize(x, torch.full((3,), k)) for k in range(len(BITS))]
    naive = sum(probs[:, k].view(-1, 1, 1, 1) * full[k] for k in range(len(BITS)))
    theirs = torch.autograd.grad((naive * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_linq_never_clips() -> None:
    q = LinQ(3, (8,), True)
    x = torch.randn(2, 3, 10, 10) * 100
    y = q(x, torch.zeros(2, dtype=torch.long), None)
    assert float((y - x).abs().max()) <= float(x.abs().max()) / 127 / 2 * 1.001
    zero = torch.zeros(1, 3, 4, 4)
    assert torch.equal(q(zero, torch.zeros(1, dtype=torch.long), None), zero)


def test_unsigned_uses_all_codes() -> None:
    x = torch.linspace(0, 1, 100000).view(1, 1, 100, 1000)
    choice = torch.zeros(1, dtype=torch.long)
    assert len(torch.unique(PAMS(1, (4,), signed=False)(x, choice, None))) == 16
    assert len(torch.unique(PAMS(1, (4,), signed=True)(x, choice, None))) == 8


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_steps_minimise_the_squared_error(bits: int) -> None:
    z = torch.linspace(-9, 9, 200001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    half = 2 ** (bits - 1)

    def error(step: float) -> float:
        code = torch.clamp(torch.floor(z / step), -half, half - 1) + 0.5
        return float(((code * step - z) ** 2 * density).sum())

    best = GAUSSIAN_STEP[bits - 1]
    assert error(best) <= min(error(best * 0.985), error(best * 1.015))


def test_folded_input_scale_is_exact() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    s = torch.rand(1, 4, 1, 1, dtype=torch.float64) + 0.3
    folded = quantize_weight(w, 8, True, s)
    codes = (folded * s) / ((w * s).abs().amax((1, 2, 3), keepdim=True) / 127)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert int(codes.round().abs().max()) == 127


def test_grid_saturates_and_rounds() -> None:
    x = torch.tensor([0.26, -0.26, 1e9, -1e9])
    y = quantize_grid(x, torch.tensor(0.5))
    assert y.tolist() == [0.5, -0.5, 32767 * 0.5, -32767 * 0.5]
