"""Checkpoints: killed runs go on exactly, damaged newest ones are passed over, the last few are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import crops, network, weights

from cadyq.errors import CheckpointError
from cadyq.training.loop import Recipe, train

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"
RECIPE = Recipe(steps=8, batch=1, patch=8, bits="mixed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_killed_run_ends_bit_identical() -> None:
    import cadyq

    environment = {**os.environ, "PYTHONPATH": str(Path(cadyq.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--steps", "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "bit-identical after 3 kills" in done.stdout


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = train(network(), crops(), RECIPE, tmp_path / "a", log=lambda _: None)
    count = iter(range(100))
    train(
        network(),
        crops(),
        RECIPE,
        tmp_path / "b",
        log=lambda _: None,
        save_every=2,
        keep=3,
        stop=lambda: next(count) >= 6,
    )
    names = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert names == ["state.1.pt", "state.2.pt", "state.pt"]
    steps = [torch.load(tmp_path / "b" / name, weights_only=True)["step"] for name in names]
    assert sorted(steps) == [4, 6, 6]
    (tmp_path / "b" / "state.pt").write_bytes(b"cut off")
    again = train(network(), crops(), RECIPE, tmp_path / "b", log=lambda _: None)
    for a, b in zip(weights(whole.network), weights(again.network), strict=True):
        assert torch.equal(a, b)


def test_only_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="delete the folder to start again"):
        train(network(), crops(), RECIPE, tmp_path, log=lambda _: None)
