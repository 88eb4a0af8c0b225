"""Placement and number formats as far as a CPU can tell, and the board's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import crops, network

from cadyq.backbones import build_backbone
from cadyq.data.crops import PairedCrops
from cadyq.errors import ArgumentError, MissingExtraError, UnsupportedError
from cadyq.training.board import Board
from cadyq.training.device import Device, ResidentCrops
from cadyq.training.loop import Recipe, to_tensor, train


def test_patches_cut_on_the_device_are_the_samplers() -> None:
    data = crops()
    data.hr[:] = np.random.default_rng(1).integers(0, 256, data.hr.shape)
    sampler = PairedCrops(data, 10, seed=3)
    places = sampler.places(40)
    assert len({place.pose for place in places}) == 8
    expected = [to_tensor(a) for a in sampler.cut(places)]
    for a, b in zip(ResidentCrops(data, Device()).cut(places, 10), expected, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_is_for_networks_without_quantizers() -> None:
    device = Device("cpu", "bfloat16")
    floating = build_backbone("edsr", scale=2, channels=8, n_blocks=1)
    x = torch.rand(1, 3, 8, 8)
    with device.autocast(floating):
        assert floating(x).dtype == torch.float32  # the mean is added in float32
        assert floating.head(x).dtype == torch.bfloat16
    with device.autocast(network()):
        assert floating.head(x).dtype == torch.float32


def test_impossible_devices_are_refused() -> None:
    with pytest.raises(ArgumentError, match="device"):
        Device("tpuu")
    with pytest.raises(ArgumentError, match="precision"):
        Device("cpu", "float16")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="device = cpu"):
            Device("cuda")


def test_board_gets_curves_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path / "board")
    recipe = Recipe(
        steps=50, batch=1, patch=8, small_patch=8, bits="mixed", validate_every=25, validation_crops=1
    )
    train(network(), crops(), recipe, tmp_path / "run", validation=crops(), board=board, log=lambda _: None)
    board.close()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = events.Tags()
    assert {"l1", "rate", "validation/psnr_db", "validation/fqr"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("validation/psnr_db")] == [25, 50]
    assert tags["images"] == ["validation"]


def test_missing_tensorboard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="cadyq\\[tensorboard\\]"):
        Board(tmp_path)
