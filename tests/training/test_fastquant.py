"""The native candidate mixture against torch, and both against autograd of the composed expression."""

from __future__ import annotations

import pytest
import torch

from cadyq.errors import ArgumentError
from cadyq.training import fastconv, fastquant

ISAS = fastconv.isas()
every_isa = pytest.mark.parametrize(
    "isa",
    ISAS
    or [pytest.param("none", marks=pytest.mark.skip(reason="the native training kernels are not built"))],
)
Tensors = dict[str, torch.Tensor]


def make(dtype: torch.dtype, channels: int = 20, height: int = 35) -> Tensors:
    """Values that also fall on clips, zeros and halfway between levels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, channels, height, 9, generator=generator, dtype=torch.float64) * 1.5
    scale = 2.0 ** torch.randint(-2, 3, (channels,), generator=generator).double()
    clip = torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64)
    levels = torch.tensor([1.0, 8.0, 127.0], dtype=torch.float64)
    halves = (torch.arange(x.numel()) % 17 - 8).view(x.shape) / 16.0
    exact = torch.rand(x.shape, generator=generator) < 0.3
    x = torch.where(exact, halves * scale.view(1, -1, 1, 1), x).to(torch.float32).to(dtype)
    prob = torch.softmax(torch.randn(4, 3, generator=generator, dtype=torch.float64), 1)
    return {
        "x": x.contiguous(memory_format=torch.channels_last).requires_grad_(),
        "prob": prob.float().to(dtype).requires_grad_(),
        "clip": clip.float().to(dtype).requires_grad_(),
        "levels": levels.to(dtype),
        "chosen": torch.tensor([0, 1, 2, 1]),
        "scale": scale.to(dtype),
    }


def gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(x.dtype)


def outcome(t: Tensors, signed: bool) -> Tensors:
    y = fastquant.mixture(**t, signed=signed)
    grads = torch.autograd.grad(y, (t["x"], t["prob"], t["clip"]), gradient(t["x"]))
    return {"y": y.detach(), **dict(zip(("x", "prob", "clip"), grads, strict=True))}


def composed(t: Tensors, signed: bool) -> Tensors:
    """sum_k P_k Q_k(x) out of plain operations with a straight-through round."""
    s = t["scale"].view(1, -1, 1, 1)
    soft = torch.zeros_like(t["x"])
    hard = torch.zeros_like(t["x"])
    for k in range(3):
        a, q = t["clip"][k], t["levels"][k]
        v = t["x"] / s
        # Written with where, whose gradient at a bound is the outside one.
        low = -a if signed else torch.zeros_like(a)
        clipped = torch.where(v >= a, a, torch.where(v <= low, low, v))
        u = clipped / a
        u = u + (torch.round(u * q) / q - u).detach()
        value = u * a * s
        soft = soft + t["prob"][:, k].view(-1, 1, 1, 1) * value
        hard += value.detach() * (t["chosen"] == k).view(-1, 1, 1, 1)
    grads = torch.autograd.grad(soft, (t["x"], t["prob"], t["clip"]), gradient(t["x"]))
    return {"y": hard, **dict(zip(("x", "prob", "clip"), grads, strict=True))}


def assert_close(got: Tensors, want: Tensors, tolerance: float) -> None:
    for key, value in want.items():
        error = float((got[key].double() - value.double()).abs().max() / value.abs().max())
        assert error < tolerance, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("signed", [True, False])
def test_torch_fallback_is_the_gradient_of_the_composed_expression(signed: bool) -> None:
    t = make(torch.float64)
    assert_close(outcome(t, signed), composed(t, signed), 1e-12)


@every_isa
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("channels", [1, 16, 20, 64])
def test_native_equals_torch(isa: str, signed: bool, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    t = make(torch.float32, channels)
    got = outcome(t, signed)
    monkeypatch.setattr(fastquant, "_native", None)
    want = outcome(t, signed)
    assert torch.equal(got["y"], want["y"]), "the forward rounds differently"
    assert_close(got, want, 2e-5)


@every_isa
def test_no_dependence_on_threads(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(make(torch.float32), True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[key], results[0][key]) for r in results[1:] for key in r)


def test_shapes_are_checked() -> None:
    t = make(torch.float32)
    with pytest.raises(ArgumentError, match="chosen"):
        fastquant.mixture(**{**t, "chosen": torch.tensor([0])}, signed=True)
    with pytest.raises(ArgumentError, match="x is"):
        fastquant.mixture(**{**t, "x": torch.randn(4, 4)}, signed=True)


@every_isa
@pytest.mark.parametrize("shape", [(3, 20, 35, 9), (1, 64, 1, 2), (2, 5, 48, 48), (2, 3, 1, 1)])
def test_deviation_is_that_of_float64(
    shape: tuple[int, ...], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    generator = torch.Generator().manual_seed(5)
    # Means far above the deviations: sums of squares alone would lose half of their digits.
    x = (
        torch.randn(shape, generator=generator) * 0.01
        + torch.randn(shape[:2], generator=generator)[..., None, None] * 9
    )
    x = x.contiguous(memory_format=torch.channels_last)
    expected = x.double().flatten(2).std(2) if shape[2] * shape[3] > 1 else torch.zeros(shape[:2]).double()
    torch.testing.assert_close(fastquant.deviation(x).double(), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(fastquant.deviation(torch.full(shape, 7.25)), torch.zeros(shape[:2]))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_quantizer_is_the_same_with_and_without_gradients(needs_gradient: bool) -> None:
    from cadyq.quant.pams import PAMS, mixture_implementation

    quantizer, choice = PAMS(20, (4, 6, 8)), torch.tensor([0, 1, 2, 1])
    x = make(torch.float32)["x"].detach().requires_grad_(needs_gradient)
    with torch.set_grad_enabled(needs_gradient):
        expected = quantizer(x, choice, None)
        with mixture_implementation(fastquant.mixture):
            found = quantizer(x, choice, None)
    assert torch.equal(found, expected) and found.requires_grad == needs_gradient
