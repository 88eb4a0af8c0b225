"""The recipes inside the package: the paper's against its table, ours readable, and the schedules they describe."""

import pytest

from cadyq.backbones import BACKBONES
from cadyq.errors import ArgumentError
from cadyq.training.recipe import Recipe
from cadyq.training.stages import read_training, recipe_names

# Table S6 of the supplement, in its order of rows: IDN, EDSR-baseline, SRResNet, CARN.
S6 = {
    "epochs": {"idn": 300, "edsr": 300, "srresnet": 300, "carn": 600},
    "lr": dict.fromkeys(BACKBONES, 1e-4),
    "decay": dict.fromkeys(BACKBONES, 0.5),
    "decay_epochs": {"idn": (150,), "edsr": (150,), "srresnet": (150,), "carn": (400,)},
    "lr_selector": {"idn": 1e-4, "edsr": 1e-4, "srresnet": 1e-4, "carn": 1e-3},
    "w_reg": dict.fromkeys(BACKBONES, 1e-4),
    "w_reg_step": dict.fromkeys(BACKBONES, 1e-6),
}
# Section C: "ADAM ...; the mini-batch size is 16, and the input patch size during training is 48x48; the initial
# learning rate is set as 0.01 for the learnable scale parameter; each epoch consists of 100 iterations".
SECTION_C = {"batch": 16, "patch": 48, "lr_clip": 0.01, "clip_unit": "gray", "epoch": 100, "schedule": "step"}
# Main text: weights of attention transfer at the body's end and at the blocks.
MAIN = {"w_attention_end": 1e3, "w_attention": 1e2}
# What the paper does not have.
OURS = {"warmup": 0, "ema": 0.0, "small_share": 0.0, "lr_by_rms": False, "clip_norm": 0.0, "target_fqr": 0.0}


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_papers_settings(backbone, scale):
    training = read_training(f"paper/{backbone}-x{scale}")
    assert (training.backbone, training.scale, training.data) == (backbone, scale, "DIV2K")
    stage = training.stage("cadyq")
    for name, column in S6.items():
        assert getattr(stage.recipe, name) == column[backbone], name
    for name, value in {**SECTION_C, **MAIN, **OURS}.items():
        assert getattr(stage.recipe, name) == value, name
    assert stage.init == stage.teacher == "static" and stage.recipe.bits == "selector"
    assert stage.quantization is not None
    assert (stage.quantization.quantizer, stage.quantization.bits) == ("pams", (4, 6, 8))
    assert training.stage("static").init == "float" and training.stage("static").quantization.bits == (8,)
    # "The selector's learning rate scheduling" is the network's: one schedule moves all groups.
    recipe = stage.recipe
    last = recipe.decay_epochs[0] * 100
    assert [recipe.rate(s) for s in (0, last - 1, last, recipe.steps - 1)] == [1.0, 1.0, 0.5, 0.5]
    assert recipe.bit_weight(0) == 1e-4
    assert recipe.bit_weight(100 * 299) == pytest.approx(1e-4 + 299e-6)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ours_has_three_stages_that_follow_each_other(backbone, scale):
    training = read_training(f"{backbone}-x{scale}")
    assert [s.name for s in training.stages] == ["float", "static", "cadyq"]
    assert [s.init for s in training.stages] == ["", "float", "static"]
    assert training.stage("cadyq").recipe.target_fqr == 5.0
    assert (training.backbone, training.scale) == (backbone, scale)


def test_every_recipe_is_one_of_these():
    names = {f"{folder}{b}-x{s}" for folder in ("", "paper/") for b in BACKBONES for s in (2, 4)}
    assert set(recipe_names()) == names


def test_shortened_schedule_keeps_its_shape():
    recipe = read_training("paper/edsr-x4").stage("cadyq").recipe
    short = recipe.shortened(3000)
    assert (short.epoch, short.steps, short.epochs) == (10, 3000, 300)
    assert [short.rate(s) for s in (1499, 1500)] == [1.0, 0.5]
    assert short.bit_weight(2990) == recipe.bit_weight(29900)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[network]\nbackbone = 'edsr'\nscale = 4\n[stages.a]\nsteps = 1\ncolour = 3", "colour"),
        ("[network]\nbackbone = 'edsr'\nscale = 4\n[stages.a]\nlr = 1.0", "steps or epochs"),
        ("[network]\nbackbone = 'vdsr'\nscale = 4\n[stages.a]\nsteps = 1", "edsr"),
        ("[network]\nbackbone = 'edsr'\nscale = 4", "stages.NAME"),
        ("[net]\n", "network, data or stages"),
        (
            "[network]\nbackbone = 'edsr'\nscale = 4\n[stages.a]\nsteps = 1\nschedule = 'linear'",
            "cosine, step",
        ),
        ("[network]\nbackbone = 'edsr'\nscale = 4\n[stages.a]\nsteps = 1\nclips = 'min'", "mse or max"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=words):
        read_training(path)


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="paper/carn-x2"):
        read_training("resnet")


def test_warmup_and_cosine():
    recipe = Recipe(steps=100, warmup=10)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(99) == pytest.approx(0.0102, abs=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": 0},
        {"ema": 1.0},
        {"best_share": 1.5},
        {"schedule": "step"},
        {"target_fqr": 5.0, "bits": "largest"},
        {"clip_unit": "volts"},
    ],
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong)) if "schedule" not in wrong else "decay_epochs"):
        Recipe(steps=10, **wrong)
