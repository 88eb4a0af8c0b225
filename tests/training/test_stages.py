"""Stages from one file: float, 8 bit, content-aware; their model files; warm starts; the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cadyq.backbones import build_backbone
from cadyq.cli import main
from cadyq.config import Quantization
from cadyq.errors import ArgumentError, CheckpointError
from cadyq.functional.budget import budget_for
from cadyq.io.images import Picture, write_image
from cadyq.io.models import load_model, save_model
from cadyq.quant.site import sites_of
from cadyq.training import stages
from cadyq.training.budget import spread
from cadyq.training.validate import mean_bits
from cadyq.training.warmstart import warm_start
from cadyq.upscale import load

CONFIG = """
[network]
backbone = "edsr"
scale = 4
channels = 8
n_blocks = 2

[data]
source = "{data}"

[stages.float]
steps = 30
batch = 4
patch = 12
small_patch = 8
lr = 1e-3
validate_every = 10
validation_crops = 2

[stages.static]
init = "float"
teacher = "float"
w_teacher = 0.5
steps = 10
batch = 4
patch = 12
small_patch = 8
validation_crops = 2

[stages.static.quantization]
bits = [8]
edges = "integer"
stream_bits = 16

[stages.cadyq]
init = "static"
teacher = "static"
w_attention = 100.0
fit_crops = 2
target_fqr = 5.0
bits = "mixed"
steps = 10
batch = 4
patch = 12
small_patch = 8
validation_crops = 2

[stages.cadyq.quantization]
bits = [4, 6, 8]
dynamic = true
tile = 24
edges = "integer"
stream_bits = 16
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages, by the command, on a folder of pictures."""
    base = tmp_path_factory.mktemp("train")
    (base / "photos").mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:384, 0:384]
    for i in range(8):
        smooth = 120 + 60 * np.sin(x / (7 + i)) + 40 * np.cos(y / (11 + i))
        noisy = smooth + rng.normal(0, 25, smooth.shape) * (x > 150)
        picture = np.repeat(noisy.clip(0, 255).astype(np.uint8)[:, :, None], 3, 2)
        write_image(base / "photos" / f"{i}.png", Picture(picture))
    config = base / "tiny.toml"
    config.write_text(CONFIG.format(data=base / "photos"))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_PLACING_CROPS", 2)
        patch.setattr(stages, "_TABLE_CROPS", 2)
        patch.setattr(stages, "_CALIBRATION_CROPS", 2)
        assert main(arguments(base)) == 0
    return base


def arguments(base: Path, *more: str) -> list[str]:
    return [
        "train",
        str(base / "tiny.toml"),
        "--run",
        str(base / "run"),
        "--cache",
        str(base / "cache"),
        *more,
    ]


def test_each_stage_leaves_a_model_with_its_record(trained: Path) -> None:
    for name, bits in (("float", None), ("static", (8,)), ("cadyq", (4, 6, 8))):
        model = load_model(trained / "run" / f"{name}.safetensors")
        assert (None if model.quantization is None else model.quantization.bits) == bits
        record = model.metadata["training"]
        assert record["stage"] == name and record["steps"] == record["recipe"]["steps"]
        assert record["data"]["n_crops"] == 6 and record["seconds"] >= 0
        assert 15 < record["validation"]["psnr_db"] < 60
        assert record["validation"]["n_images"] == 2  # of eight pictures
    assert (trained / "run" / "float.log").read_text().count("validation") == 4


def test_the_target_is_met_and_the_budgets_are_monotone(trained: Path) -> None:
    model = load_model(trained / "run" / "cadyq.safetensors")
    from cadyq.data.folders import load_folder

    crops = load_folder(trained / "photos", 4, trained / "cache", "train")
    some = spread(crops, 2)
    held_out = load_folder(trained / "photos", 4, trained / "cache", "validation")
    assert abs(mean_bits(model.network, held_out, 2, tile=24) - 5.0) <= 0.1
    assert len(model.budgets) >= 3 and model.budgets == sorted(model.budgets)
    knobs = [knob for _, knob in model.budgets]
    assert knobs == sorted(knobs)
    fqr, knob = model.budgets[-1]
    assert mean_bits(model.network, some, 2, tile=24, budget=knob) == pytest.approx(fqr, abs=0.02)
    assert budget_for(model.budgets, fqr) == knob
    with pytest.raises(ArgumentError, match="target_fqr"):
        budget_for(model.budgets, 9.0)
    with pytest.raises(ArgumentError, match="table"):
        budget_for([], 5.0)


def test_quantized_stages_run_on_the_engine_at_once(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(trained, "--json")) == 0
    report = json.loads(capsys.readouterr().out)["stages"]
    assert [s["runtime"] for s in report] == ["torch", "engine", "engine"]
    assert (
        main(["evaluate", str(trained / "run" / "cadyq.safetensors"), str(trained / "photos"), "--json"]) == 0
    )
    fqr = json.loads(capsys.readouterr().out)["fqr"]
    model = load(trained / "run" / "cadyq.safetensors")
    assert 4 <= fqr < 8 and model.plan is not None


def test_a_plan_of_a_removed_network_is_not_kept(trained: Path) -> None:
    model, plan = (trained / "run" / f"static{suffix}.safetensors" for suffix in ("", ".plan"))
    good = plan.read_bytes()
    model.unlink()
    plan.write_bytes((trained / "run" / "cadyq.plan.safetensors").read_bytes())
    assert main(arguments(trained, "--stage", "static")) == 0
    assert load(model).candidate_bits == [8]
    assert len(plan.read_bytes()) == len(good)


def test_what_is_done_is_not_done_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run" / "cadyq.safetensors").stat().st_mtime_ns
    assert main(arguments(trained, "--json")) == 0
    report = json.loads(capsys.readouterr().out)["stages"]
    assert [s["finished"] for s in report] == [True] * 3 and report[2]["fqr"] < 8
    assert (trained / "run" / "cadyq.safetensors").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_folder_is_refused(trained: Path) -> None:
    assert main(arguments(trained, "--steps", "5", "--stage", "float")) == CheckpointError.exit_code


def test_a_stage_asks_for_the_one_before(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = arguments(trained, "--stage", "static")
    alone[alone.index("--run") + 1] = str(trained / "other")
    assert main(alone) == ArgumentError.exit_code
    assert "--stage float" in capsys.readouterr().err


def test_time_slices_end_where_one_run_ends(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sliced = arguments(trained, "--stage", "float", "--minutes", "1e-9", "--json")
    sliced[sliced.index("--run") + 1] = str(trained / "sliced")
    assert main(sliced) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == [
        {"stage": "float", "finished": False, "model": None}
    ]
    sliced[sliced.index("1e-9")] = "5"
    assert main(sliced) == 0
    one, other = (load_model(trained / run / "float.safetensors").network for run in ("run", "sliced"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_eight_bit_start_is_the_eight_bit_network(trained: Path) -> None:
    """CADyQ starts as its teacher: with 8 bits everywhere, their pictures are the same."""
    from cadyq.data.folders import load_folder
    from cadyq.quant.context import Context

    crops = load_folder(trained / "photos", 4, trained / "cache", "train")
    training = stages.read_training(trained / "tiny.toml")
    session = stages.Session(trained / "run", crops, crops, log=lambda _: None)
    student, teacher = stages._networks(training, training.stage("cadyq"), session)
    assert teacher is not None
    x = torch.rand(1, 3, 24, 24)
    ctx = Context.of(x)
    ctx.force_bits = 8
    with torch.no_grad():
        torch.testing.assert_close(student(x, ctx), teacher(x), rtol=0, atol=1e-6)


def test_body_of_another_scale_is_taken_over() -> None:
    source = build_backbone("edsr", scale=4, channels=8, n_blocks=2)
    network = build_backbone("edsr", scale=2, channels=8, n_blocks=2)
    fresh = warm_start(network, source)
    assert all(name.startswith("up.") for name in fresh) is True
    assert torch.equal(
        network.get_parameter("body.1.conv2.weight"), source.get_parameter("body.1.conv2.weight")
    )
    with pytest.raises(CheckpointError, match="expected 'edsr'"):
        warm_start(network, build_backbone("idn", scale=2))
    with pytest.raises(CheckpointError, match="parameters fit"):
        warm_start(network, build_backbone("edsr", scale=2, channels=16, n_blocks=2))


def test_shared_grouped_carn_is_written_out() -> None:
    torch.manual_seed(0)
    source = build_backbone("carn", scale=4, channels=8, groups=4, shared=True, multi=True).eval()
    network = build_backbone("carn", scale=4, channels=8).eval()
    assert warm_start(network, source) == []
    # Without the ReLU before the 1x1 convolution they compute the same: make what it sees positive.
    with torch.no_grad():
        for cascade in source.body:
            cascade.blocks[0].conv2.bias.fill_(10.0)
        warm_start(network, source)
        x = torch.rand(1, 3, 12, 12)
        torch.testing.assert_close(network(x), source(x), rtol=1e-4, atol=1e-4)


def test_budgets_travel_with_the_model(tmp_path: Path) -> None:
    network = build_backbone("edsr", scale=2, channels=8, n_blocks=1)
    save_model(tmp_path / "a.safetensors", network, None, budgets=[(4.5, -0.1), (6.0, 0.2)])
    assert load_model(tmp_path / "a.safetensors").budgets == [(4.5, -0.1), (6.0, 0.2)]
    save_model(tmp_path / "b.safetensors", network, None)
    assert load_model(tmp_path / "b.safetensors").budgets == []
    assert Quantization().bits == (8,) and not sites_of(network, "body")[0].selector
