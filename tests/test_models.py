"""The models that ship: whole, described, and the same network on both runtimes."""

from pathlib import Path

import numpy as np
import pytest

from cadyq.audit import audit
from cadyq.io.checkpoints import load_checkpoint
from cadyq.io.images import read_image
from cadyq.io.shipped import model_path, plan_path, shipped_models
from cadyq.upscale import load

SAMPLE = Path(__file__).parents[1] / "docs" / "sample.png"
pytestmark = pytest.mark.skipif(not shipped_models(), reason="no model ships with this build")


@pytest.fixture(scope="module")
def crop():
    return read_image(SAMPLE).pixels[40:136, 10:106]


def test_weights_together_stay_small():
    folder = model_path(shipped_models()[0]).parent
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6


@pytest.mark.parametrize("name", shipped_models())
def test_record(name):
    _, metadata = load_checkpoint(model_path(name))
    assert metadata["license"] == "Apache-2.0"
    assert metadata["training"]
    assert metadata["figures"]["Urban100"]["n_images"] == 100
    # Networks for damaged pictures give up some of the clean ones, small ones all over.
    least = {"idn-x2": 30.7, "idn-x4": 25.15}.get(name[:6], 25.6 if "photo" in name else 25.8)
    assert metadata["figures"]["Urban100"]["psnr_db"] > least


@pytest.mark.parametrize("name", shipped_models())
def test_engine_and_torch_agree(name, crop):
    model = load(name)
    ours, theirs = model.upscale(crop), model.upscale(crop, runtime="torch")
    assert (ours.runtime, theirs.runtime) == ("engine", "torch")
    same = np.mean([np.mean(ours.bits[site] == theirs.bits[site]) for site in ours.bits])
    assert same >= 0.97
    difference = np.abs(ours.pixels.astype(int) - theirs.pixels.astype(int))
    assert difference.mean() < 1.0


def test_the_content_aware_model_spends_bits_by_content_and_passes_the_audit(crop):
    model = load("srresnet-x4-cadyq")
    flat = np.full_like(crop, 128)
    busy, calm = model.upscale(crop), model.upscale(flat)
    assert calm.fqr < busy.fqr < 8
    assert len({int(b) for bits in busy.bits.values() for b in bits.ravel()}) == 3
    assert audit(model, crop[:48, :48]).is_clean


def test_every_plan_belongs_to_a_model():
    for name in shipped_models():
        plan = plan_path(name)
        assert plan is not None
        _, of_plan = load_checkpoint(plan)
        _, of_model = load_checkpoint(model_path(name))
        assert of_plan["figures"] == of_model["figures"]
