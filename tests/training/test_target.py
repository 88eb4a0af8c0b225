"""The controlled weight of the bit loss: bounded, two-sided, and it reaches its target in a real training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import crops, network

from cadyq.errors import CheckpointError
from cadyq.quant.site import sites_of
from cadyq.training.budget import find_budget
from cadyq.training.loop import Recipe, train
from cadyq.training.target import BitController


def test_weight_pushes_towards_the_target_and_is_bounded() -> None:
    controller = BitController(5.0, limit=3.0)
    assert controller.weight() == 0.0
    for _ in range(500):
        controller.observe(8.0)
    assert controller.weight() == 3.0
    for _ in range(500):
        controller.observe(4.0)
    assert controller.weight() == -3.0


def test_it_settles_on_a_plant_that_follows_slowly() -> None:
    """Bits move against the weight and drift up by themselves; in the end they stand at the target."""
    controller, bits = BitController(5.0), 8.0
    for _ in range(3000):
        bits = min(8.0, max(4.0, bits - 0.02 * controller.weight() + 0.005))
        controller.observe(bits)
    assert bits == pytest.approx(5.0, abs=0.02)
    assert controller.multiplier == pytest.approx(0.25, abs=0.05)


def test_state_goes_on_and_nonsense_is_refused() -> None:
    one, other = BitController(5.0), BitController(5.0)
    one.observe(7.0)
    other.restore(one.state())
    assert one.weight() == other.weight() != 0
    with pytest.raises(CheckpointError, match="controller"):
        other.restore({})


@pytest.mark.parametrize("target", [3.5, 6.5])
def test_training_reaches_the_target(tmp_path: Path, target: float) -> None:
    """The running mean of the last steps' bits, with {2, 4, 8}; two targets, so that no drift can pass for it."""
    recipe = Recipe(
        steps=150, batch=4, patch=8, small_patch=8, bits="selector", target_fqr=target, lr_selector=1e-2
    )
    torch.manual_seed(0)
    net = network()
    with torch.no_grad():
        for site in sites_of(net, "body"):
            assert site.selector is not None
            torch.nn.init.normal_(site.selector.linear.weight, std=0.1)
    train(net, crops(), recipe, tmp_path, log=lambda _: None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["controller"]["fqr"] == pytest.approx(target, abs=0.5)


@pytest.mark.parametrize("target", [4.0, 5.5, 8.0, 9.0])
def test_budget_is_found_on_a_staircase(target: float) -> None:
    """Mean bits move in steps; the nearest one is found, or the end where there is none."""
    knob, found = find_budget(lambda b: min(8.0, max(4.0, round(6 + b / 3, 1))), target)
    assert found == min(8.0, target)
    assert find_budget(lambda b: 6.0, 6.01) == (0.0, 6.0)
    assert abs(knob) <= 32
