"""A model file and the plan beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from networks import QUANTIZATION, build_network, scene

from cadyq.config import Quantization
from cadyq.deploy import remove_plan, write_plan
from cadyq.errors import CheckpointError
from cadyq.io.models import save_model
from cadyq.io.shipped import plan_path
from cadyq.upscale import load


def saved(path: Path, quantization: Quantization | None) -> Path:
    """A small EDSR, converted so."""
    save_model(path, build_network("edsr", quantization), quantization, training={})
    return path


def test_the_plan_is_what_is_run_then(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.safetensors", QUANTIZATION)
    lr = scene(20, 28)
    on_torch = load(path).upscale(lr).pixels
    assert write_plan(path) == ""
    assert plan_path(path) == tmp_path / "net.plan.safetensors"
    model = load(path)
    assert model.plan is not None
    assert np.abs(model.upscale(lr).pixels.astype(int) - on_torch).max() <= 1


def test_a_network_without_integer_form_keeps_no_plan_of_another_one(tmp_path: Path) -> None:
    """The old plan would go on to be run in the new network's place."""
    path = saved(tmp_path / "net.safetensors", QUANTIZATION)
    write_plan(path)
    saved(path, Quantization())
    assert "edges 'float'" in write_plan(path)
    assert plan_path(path) is None
    remove_plan(path)  # there is none any more
    assert "float network" in write_plan(saved(path, None))


def test_a_broken_model_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="net"):
        write_plan(path)
