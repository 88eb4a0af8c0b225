"""Native training convolutions against torch in float64, for every instruction set that runs here."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadyq.errors import ArgumentError
from cadyq.training import fastconv

ISAS = fastconv.isas()
native = pytest.mark.skipif(not ISAS, reason="the native training kernels are not built")
every_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("none", marks=native)])

CASES: dict[str, dict[str, Any]] = {
    "plain": {"ci": 64, "co": 64},
    "relu": {"ci": 64, "co": 64, "act": "relu"},
    "residual": {"ci": 16, "co": 16, "residual": True},
    "relu before a residual": {"ci": 16, "co": 24, "act": "relu", "residual": True},
    "leaky": {"ci": 32, "co": 48, "act": "leaky"},
    "leaky, negative slope": {"ci": 16, "co": 16, "act": "leaky", "slope": -0.5},
    "prelu": {"ci": 16, "co": 16, "act": "prelu"},
    "prelu, one slope": {"ci": 16, "co": 16, "act": "prelu1"},
    "odd channels": {"ci": 13, "co": 21, "act": "prelu"},
    "shuffle": {"ci": 64, "co": 256, "shuffle": 2, "act": "prelu"},
    "shuffle 3, odd": {"ci": 16, "co": 45, "shuffle": 3, "act": "relu", "residual": True},
    "groups": {"ci": 64, "co": 48, "groups": 4, "act": "leaky"},
    "groups of 12": {"ci": 48, "co": 32, "groups": 4},
    "groups, prelu": {"ci": 32, "co": 32, "groups": 2, "act": "prelu", "shuffle": 2},
    "head": {"ci": 3, "co": 64, "act": "relu"},
    "head, shuffle": {"ci": 1, "co": 36, "shuffle": 2, "act": "prelu"},
    "tail": {"ci": 64, "co": 3},
    "tail, prelu": {"ci": 24, "co": 4, "act": "prelu"},
    "tail, shuffle": {"ci": 24, "co": 4, "shuffle": 2, "act": "prelu"},
    "depthwise": {"ci": 6, "co": 6, "groups": 6},
    "1x1": {"ci": 192, "co": 64, "k": 1, "act": "relu"},
    "1x1 odd": {"ci": 19, "co": 7, "k": 1, "act": "prelu", "residual": True},
    "1x1 shuffle": {"ci": 16, "co": 32, "k": 1, "act": "leaky", "shuffle": 2},
    "1x1 groups": {"ci": 16, "co": 32, "k": 1, "groups": 2},
    "no bias": {"ci": 16, "co": 16, "bias": False},
}


def make(
    case: dict[str, Any], n: int = 2, h: int = 13, w: int = 18
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Random float64 tensors of a case, and the options of `fastconv.conv2d`."""
    generator = torch.Generator().manual_seed(1)
    ci, co, k, r, groups = (
        case.get(key, d) for key, d in (("ci", 8), ("co", 8), ("k", 3), ("shuffle", 1), ("groups", 1))
    )

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t = {"x": random(n, ci, h, w), "weight": random(co, ci // groups, k, k) / (k * (ci // groups) ** 0.5)}
    if case.get("bias", True):
        t["bias"] = random(co)
    if case.get("residual"):
        t["residual"] = random(n, co // r**2, h * r, w * r)
    if str(case.get("act", "")).startswith("prelu"):
        t["slopes"] = random(1 if case["act"] == "prelu1" else co // r**2)
    return t, {"shuffle": r, "groups": groups}


def call(case: dict[str, Any], t: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    act = case.get("act")
    activation: Any = act
    if act == "leaky":
        activation = ("leaky", case.get("slope", 0.1))
    elif act is not None and act.startswith("prelu"):
        activation = ("prelu", t["slopes"])
    return fastconv.conv2d(
        t["x"], t["weight"], t.get("bias"), activation, residual=t.get("residual"), **options
    )


def outcome(
    case: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format = torch.channels_last, **size: int
) -> dict[str, torch.Tensor]:
    """Result and all gradients."""
    tensors, options = make(case, **size)
    t = {}
    for key, value in tensors.items():
        value = value.to(dtype)
        value = value.contiguous(memory_format=layout) if value.dim() == 4 and key != "weight" else value
        t[key] = value.requires_grad_()
    y = call(case, t, options)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, list(t.values()), g.contiguous(memory_format=layout))
    return {"y": y.detach(), **dict(zip(t, grads, strict=True))}


def assert_close(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    for key, value in want.items():
        assert got[key].shape == value.shape
        error = (got[key].double() - value).abs().max() / value.abs().max()
        assert error < tolerance, f"{key}: relative error {float(error):.1e}"


@every_isa
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_match_float64(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    assert_close(outcome(CASES[name], torch.float32), outcome(CASES[name], torch.float64))


@every_isa
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 5), (3, 4, 4), (1, 33, 7), (2, 48, 48)])
def test_any_image_size(size: tuple[int, int, int], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    n, h, w = size
    for case in (CASES["relu"], CASES["head"], CASES["tail"], CASES["1x1 odd"]):
        want = outcome(case, torch.float64, n=n, h=h, w=w)
        assert_close(outcome(case, torch.float32, n=n, h=h, w=w), want)


@every_isa
def test_any_memory_layout(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", isa)
    want = outcome(CASES["relu"], torch.float32)
    got = outcome(CASES["relu"], torch.float32, torch.contiguous_format)
    assert all(torch.equal(got[key], want[key]) for key in want)
    wide = torch.randn(2, 40, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 3, 3)
    torch.testing.assert_close(
        fastconv.conv2d(wide[:, 8:24, 1:8], weight),
        F.conv2d(wide[:, 8:24, 1:8], weight, padding=1),
        rtol=1e-4,
        atol=1e-3,
    )


@native
@pytest.mark.parametrize("name", ["prelu", "shuffle", "head", "tail", "1x1"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(outcome(CASES[name], torch.float32, n=4, h=40, w=40))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in other)


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    native = fastconv._native
    x, weight = (
        torch.randn(2, 32, 40, 40).contiguous(memory_format=torch.channels_last),
        torch.randn(32, 32, 3, 3),
    )
    ours, childs = (torch.zeros(2, 32, 40, 40).contiguous(memory_format=torch.channels_last) for _ in "ab")

    def run(to: Tensor) -> None:
        native.conv_forward(x, weight, None, None, to, None, 0, 1.0, None, 1, 1, 2)

    run(ours)  # the parent's threads exist from here on
    child = os.fork()
    if child == 0:  # nothing of torch's may run here: its threads are gone
        run(childs)
        os._exit(0 if ours.numpy().tobytes() == childs.numpy().tobytes() else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that do not exist")
    assert os.waitstatus_to_exitcode(status) == 0


@native
def test_gradient_reaches_a_computed_weight() -> None:
    w = torch.randn(16, 16, 3, 3, requires_grad=True)
    x = torch.randn(1, 16, 8, 8)
    fastconv.conv2d(x, w * 2).square().sum().backward()  # type: ignore[no-untyped-call]
    got, w.grad = w.grad, None
    F.conv2d(x, w * 2, padding=1).square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got, w.grad, rtol=1e-4, atol=1e-2)


@native
def test_nan_is_not_hidden() -> None:
    x = torch.zeros(1, 16, 8, 8)
    x[0, 3, 4, 4] = float("nan")
    assert fastconv.conv2d(x, torch.randn(16, 16, 3, 3), activation="relu").isnan().any()


def test_a_layer_that_shuffles_equals_two_steps() -> None:
    from cadyq.quant.layers import Conv2d, conv2d_implementation

    layer, x = Conv2d(8, 16, 3), torch.randn(1, 8, 9, 9)
    seen: list[torch.Size] = []
    layer.register_forward_hook(lambda _m, _x, y: seen.append(y.shape))
    expected = F.pixel_shuffle(layer(x), 2)
    torch.testing.assert_close(layer.shuffled(x, 2), expected)
    assert len(seen) == 2  # who listens sees the convolution's own result
    with fastconv.use(), conv2d_implementation(fastconv.conv2d_like):
        torch.testing.assert_close(layer.shuffled(x, 2), expected, rtol=1e-4, atol=1e-4)


def test_conv2d_like_routes_only_what_it_covers() -> None:
    x = torch.randn(1, 8, 9, 9)
    modules = [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 9, padding=4),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding="same"),
    ]
    assert not fastconv.enabled()
    with fastconv.use():
        assert fastconv.enabled() == fastconv.available()
        for module in modules:
            expected = module(x)
            torch.testing.assert_close(fastconv.conv2d_like(module, x), expected, rtol=1e-4, atol=1e-4)
            shuffled = fastconv.conv2d_like(module, x, shuffle=2)
            torch.testing.assert_close(shuffled, F.pixel_shuffle(expected, 2), rtol=1e-4, atol=1e-4)
        with fastconv.use(False):
            assert not fastconv.enabled()
    assert not fastconv.enabled()


def test_falls_back_where_native_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    want = outcome(CASES["shuffle"], torch.float64)
    monkeypatch.setattr(fastconv, "_native", None)
    assert not fastconv.available() and fastconv.isas() == []
    assert_close(outcome(CASES["shuffle"], torch.float32), want)


def test_arguments_are_checked() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with pytest.raises(ArgumentError, match="activation"):
        fastconv.conv2d(x, w, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="weight"):
        fastconv.conv2d(x, torch.randn(4, 4, 2, 2))
    with pytest.raises(ArgumentError, match="shuffle"):
        fastconv.conv2d(x, w, shuffle=0)


@native
def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADYQ_ISA", "mmx")
    with pytest.raises(ValueError, match="mmx"):
        fastconv.conv2d(torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3))


def test_few_outputs_with_large_kernels_equal_torch():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(8, 3, 9, padding=4).double()
    x = torch.randn(2, 8, 11, 14, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 11, 14, dtype=torch.float64)
    leaves = (x, conv.weight, conv.bias)
    with fastconv.use():
        ours = fastconv.conv2d_like(conv, x)
    torch.testing.assert_close(ours, conv(x))
    a = torch.autograd.grad((ours * weight).sum(), leaves)
    b = torch.autograd.grad((conv(x) * weight).sum(), leaves)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)
