"""The training loop: resumes exactly, learns, refuses nonsense; selectors from measured errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import crops, network, weights
from torch import Tensor

from cadyq.backbones import Backbone
from cadyq.data.crops import CropArrays
from cadyq.errors import ArgumentError, CheckpointError
from cadyq.quant.context import Context
from cadyq.quant.selector import BitSelector
from cadyq.quant.site import sites_of
from cadyq.training.loop import DivergenceError, Recipe, to_tensor, train
from cadyq.training.supervise import SHARPNESS, chosen_bits, fit_selectors, measure, set_budget

RECIPE = Recipe(
    steps=12,
    batch=2,
    patch=16,
    small_patch=12,
    small_share=0.5,
    bits="mixed",
    w_reg=1e-3,
    w_teacher=0.5,
    degrade=True,
)


def test_resumed_run_equals_uninterrupted_one(tmp_path: Path) -> None:
    teacher = network(1)
    whole = train(network(), crops(), RECIPE, tmp_path / "a", teacher=teacher, log=lambda _: None)
    for stop_at in (5, 9, 99):
        count = iter(range(100))
        partial = network(5)  # resumes from the folder, whatever it starts from
        if stop_at == 5:
            partial = network()
        train(
            partial,
            crops(),
            RECIPE,
            tmp_path / "b",
            teacher=teacher,
            log=lambda _: None,
            stop=lambda c=count, n=stop_at: next(c) >= n,  # type: ignore[misc]
        )
    for a, b in zip(weights(whole.network), weights(partial), strict=True):
        assert torch.equal(a, b)


def test_damage_reaches_the_network(tmp_path: Path) -> None:
    """The first loss of a damaged run differs from the clean one's: same patches, other pixels."""
    seen = []
    for folder, damaged in (("clean", False), ("damaged", True)):
        net = network()
        recipe = Recipe(steps=1, batch=4, patch=16, degrade=damaged)
        train(net, crops(), recipe, tmp_path / folder, log=lambda _: None)
        seen.append(torch.load(tmp_path / folder / "state.pt", weights_only=True)["running"])
    assert seen[0] != seen[1]


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    train(network(), crops(), Recipe(steps=1, batch=1, patch=8), tmp_path, log=lambda _: None)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(network(), crops(), Recipe(steps=2, batch=1, patch=8), tmp_path, log=lambda _: None)


def test_divergence_is_named(tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("tail.bias").fill_(float("nan"))
    with pytest.raises(DivergenceError, match="step 0"):
        train(net, crops(), Recipe(steps=2, batch=1, patch=8), tmp_path, log=lambda _: None)


def test_recipe_refuses_zero_steps() -> None:
    with pytest.raises(ArgumentError, match="steps"):
        Recipe(steps=0)


def test_the_schedule_follows_the_time_where_it_is_given(tmp_path: Path) -> None:
    """Ten steps that take the time of all hundred train as ten steps do that are all there are."""
    share = 0.0

    def elapsed() -> float:
        nonlocal share
        now, share = share, share + 0.05  # asked twice a step
        return now

    def trained(name: str, steps: int, warmup: int, **options: Any) -> Tensor:
        net = network()
        recipe = Recipe(steps, batch=2, patch=8, warmup=warmup, lr=1e-3)
        outcome = train(net, crops(), recipe, tmp_path / name, log=lambda _: None, **options)
        assert outcome.steps == 10
        return net.get_parameter("tail.weight").detach()

    def stop() -> bool:
        return elapsed() >= 0.999

    timed = trained("timed", 100, 10, stop=stop, elapsed=elapsed)
    counted, start = trained("counted", 10, 1), network().get_parameter("tail.weight").detach()
    assert (timed - counted).norm() < 0.3 * (counted - start).norm()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    net, data = network(), crops()
    lr, hr = to_tensor(data.lr), to_tensor(data.hr)

    def error() -> float:
        with torch.no_grad():
            return float((net(lr) - hr).abs().mean())

    before = error()
    train(net, data, Recipe(steps=40, batch=4, patch=16, lr=1e-3, ema=0.9), tmp_path, log=lambda _: None)
    assert error() < 0.9 * before


def test_chosen_bits_train_the_weights_and_leave_the_selectors(tmp_path: Path) -> None:
    def selectors(net: Backbone) -> list[torch.Tensor]:
        return [s.selector.linear.weight.detach().clone() for s in sites_of(net, "body") if s.selector]

    for bits in ("chosen", "selector"):
        net = network()
        before, head = selectors(net), weights(network())[0]
        recipe = Recipe(steps=2, batch=2, patch=16, lr=1e-3, ema=0.0, w_reg=1.0, bits=bits)
        train(net, crops(), recipe, tmp_path / bits, log=lambda _: None)
        kept = all(torch.equal(a, b) for a, b in zip(before, selectors(net), strict=True))
        assert kept == (bits == "chosen")
        assert not torch.equal(weights(net)[0], head)


def test_selectors_give_more_bits_to_what_needs_them() -> None:
    """On pictures that are half flat, half texture, measured sensitivities send the bits to the texture."""
    net, data = network(), crops(8)
    ctx = Context.of(to_tensor(data.lr))
    ctx.force_bits = 8
    # The truth is near to what the network makes of them, so that fewer bits must lose something.
    with torch.no_grad():
        hr = net(to_tensor(data.lr), ctx).permute(0, 2, 3, 1).mul(255).round().numpy()
    hr += np.random.default_rng(0).integers(-2, 3, hr.shape)
    flat_and_texture = CropArrays(data.lr, hr.clip(0, 255).astype(np.uint8))
    seen = measure(net, flat_and_texture, n_crops=8, n_site_crops=1, tile=24)
    target = seen.target().view(8, 2, 2)
    assert float(target[:, :, 1].mean()) > float(target[:, :, 0].mean())
    fit_selectors(net, seen)
    for shift in np.linspace(-25, 5, 121):
        set_budget(net, float(shift))
        ctx = Context.of(to_tensor(np.concatenate([data.lr[:, :24, :24], data.lr[:, :24, 24:]])))
        net(to_tensor(np.concatenate([data.lr[:, :24, :24], data.lr[:, :24, 24:]])), ctx)
        bits = torch.stack([r.bits for r in ctx.records if r.kind == "body"], 1).mean(1)
        if 2.2 < float(bits.mean()) < 7.8:
            assert float(bits[8:].mean()) > float(bits[:8].mean())
            break
        set_budget(net, -float(shift))
    else:
        pytest.fail("no budget between the extremes was found")


def test_where_fewer_bits_lose_nothing_all_tiles_choose_alike() -> None:
    """Noise around no loss at all must not become sensitivities of 10^12."""
    net, data = network(), crops(4)
    seen = measure(net, data, n_crops=4, n_site_crops=1, tile=24)
    fewest, most = min(seen.errors), max(seen.errors)
    seen.errors[fewest] = seen.errors[most] + torch.tensor([1.0, -1.0]).repeat(len(seen.group_error) // 2)
    seen.group_error = torch.ones_like(seen.group_error)
    assert torch.equal(seen.target(), torch.ones_like(seen.group_error))
    fit_selectors(net, seen)
    for site in sites_of(net, "body"):
        assert site.selector is not None
        assert chosen_bits(site, seen).unique().numel() == 1


def test_budget_shifts_every_selector_alike() -> None:
    net = network()
    before = [s.selector.linear.bias.clone() for s in sites_of(net, "body") if s.selector is not None]
    set_budget(net, 0.5)
    selectors = [s.selector for s in sites_of(net, "body") if s.selector is not None]
    for selector, old in zip(selectors, before, strict=True):
        assert isinstance(selector, BitSelector)
        expected = old - SHARPNESS * 0.5 * torch.arange(3)
        torch.testing.assert_close(selector.linear.bias.detach(), expected.detach())
