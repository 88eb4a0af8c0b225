"""The best checkpoint is chosen by validation, within the share that counts, and nearness to a target comes first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import crops, network, weights

from cadyq.training import loop
from cadyq.training.loop import Recipe, train
from cadyq.training.validate import Validation, mean_bits, validate


@pytest.mark.parametrize(("share", "best_step"), [(1.0, 2), (0.5, 6)])
def test_best_within_the_last_share_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, best_step: int
) -> None:
    """Invented figures: 30, 10, 20, 15 dB after 2, 4, 6, 8 steps."""
    figures = iter([30.0, 10.0, 20.0, 15.0])
    averages = []

    def invented(net: torch.nn.Module, *_: object, **__: object) -> Validation:
        averages.append([p.detach().clone() for p in net.parameters()])
        return Validation(next(figures), 8.0, 1)

    monkeypatch.setattr(loop, "validate", invented)
    recipe = Recipe(steps=8, batch=1, patch=8, small_patch=8, validate_every=2, best_share=share)
    net = network()
    outcome = train(net, crops(), recipe, tmp_path, validation=crops(), log=lambda _: None)
    assert outcome.validation is not None and outcome.validation.psnr_db == {2: 30.0, 6: 20.0}[best_step]
    for a, b in zip(weights(net), averages[best_step // 2 - 1], strict=True):
        assert torch.equal(a, b)


def test_a_target_comes_before_quality() -> None:
    near, far, dear = Validation(29.0, 5.05, 1), Validation(30.0, 5.5, 1), Validation(31.0, 8.0, 1)
    assert loop._better(near, far, 5.0) and not loop._better(dear, far, 5.0)
    assert loop._better(far, near, 0.0)
    assert loop._better(Validation(29.1, 4.95, 1), near, 5.0)


def test_validation_measures_tiles_and_follows_the_budget() -> None:
    net = network()
    few, many = (validate(net, crops(), 2, tile=24, budget=b) for b in (-20.0, 20.0))
    assert few.fqr == 2.0 and many.fqr == 8.0 and few.n_images == 2
    assert few.psnr_db != many.psnr_db
    assert mean_bits(net, crops(), 2, tile=24, budget=-20.0) == few.fqr
