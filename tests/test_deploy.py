"""A model file and the plan beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from networks import QUANTIZATION, build_network, scene

from cadyq.config import Quantization
from cadyq.deploy import write_plan
from cadyq.errors import ArgumentError, CheckpointError
from cadyq.io.models import save_model
from cadyq.io.shipped import plan_path
from cadyq.upscale import describe, load


def saved(path: Path, quantization: Quantization | None) -> Path:
    """A small EDSR, converted so."""
    save_model(path, build_network("edsr", quantization), quantization, training={})
    return path


def test_a_model_without_a_plan_gets_one_when_it_is_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.safetensors", QUANTIZATION)
    lr = scene(20, 28)
    made = load(path)
    assert plan_path(path) is None
    found = made.upscale(lr)
    assert found.runtime == "engine"
    assert write_plan(path) == ""
    assert plan_path(path) == tmp_path / "net.plan.safetensors"
    stored = load(path)
    np.testing.assert_array_equal(stored.upscale(lr).pixels, found.pixels)
    on_torch = made.upscale(lr, runtime="torch").pixels
    assert np.abs(found.pixels.astype(int) - on_torch).max() <= 1
    assert describe(path)["runtime"] == "engine"


def test_a_network_without_integer_form_says_why(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.safetensors", Quantization())
    model = load(path)
    assert model.plan is None
    assert "edges 'float'" in model.no_plan_because
    assert "edges 'float'" in describe(path)["no_plan_because"]
    with pytest.raises(ArgumentError, match="edges 'float'"):
        model.upscale(scene(20, 28), runtime="engine")


def test_a_plan_does_not_outlive_its_network(tmp_path: Path) -> None:
    """It would go on to be run in the new network's place."""
    path = saved(tmp_path / "net.safetensors", QUANTIZATION)
    write_plan(path)
    saved(path, Quantization())
    assert plan_path(path) is None
    assert "edges 'float'" in write_plan(path)
    assert "float network" in write_plan(saved(path, None))


def test_a_broken_model_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="net"):
        write_plan(path)
