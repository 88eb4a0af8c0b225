"""Calibration: a float network of the user's becomes a content-aware model file."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import user_networks as user
from networks import scene

from cadyq.backbones import build_backbone
from cadyq.calibrate import CLIP_SHARES, calibrate, cut_crops
from cadyq.cli import main
from cadyq.errors import ArgumentError, CheckpointError, MissingExtraError, UnsupportedError
from cadyq.io.images import Picture, write_image
from cadyq.io.models import save_model
from cadyq.io.modules import load_module
from cadyq.quant.convert import scale_together
from cadyq.quant.infer import run_tiles
from cadyq.quant.site import sites_of
from cadyq.training.float_target import FloatTarget, site_gains
from cadyq.upscale import load

CODE = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, 1, 1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
                                  for _ in range(2))
        self.tail = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x):
        y = self.head(x)
        for block in self.body:
            y = y + block(y)
        return 0.3 * self.tail(y) + F.interpolate(x, scale_factor=2)

def broken():
    raise OSError("no such thing")

number = 3
"""


def pictures(n=8, side=64):
    return [scene(side, side, seed=k) for k in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of LR pictures, code, and weights for it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("user")
    (path / "images").mkdir()
    for k, pixels in enumerate(pictures()):
        write_image(path / "images" / f"{k}.png", Picture(pixels, None, False, None))
    (path / "net.py").write_text(CODE)
    torch.manual_seed(3)
    module = load_module(f"{path / 'net.py'}:Net")
    for name, parameter in module.named_parameters():
        parameter.data.mul_(3.0 if name.startswith("body") else 1.0)  # so that the body's bits matter
    torch.save({"params": {f"module.{k}": v for k, v in module.state_dict().items()}}, path / "w.pth")
    return path


@pytest.fixture(scope="module")
def calibrated(folder):
    module = load_module(f"{folder / 'net.py'}:Net", weights=folder / "w.pth")
    said = []
    result = calibrate(
        module, folder / "images", steps=4, tile=16, value_range="0:1", report=lambda *args: said.append(args)
    )
    return module, result, said


def test_the_result_has_the_wanted_bits_and_is_near_the_float_network(calibrated):
    module, result, _ = calibrated
    assert result.record["fqr"] == pytest.approx(5.5, abs=0.4)
    assert result.record["steps"] == 4
    assert result.record["psnr_to_float_db_most_bits"] > result.record["psnr_to_float_db"] > 30
    # The figure is not taken on trust: the float module itself, on one of the pictures.
    lr = torch.from_numpy(pictures()[0]).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        error = (result.network(lr).clamp(0, 1) - module(lr).clamp(0, 1)).square().mean()
    assert 10 * torch.log10(1 / error) > 30


def test_content_decides(calibrated, folder, tmp_path):
    _, result, _ = calibrated
    assert result.save(tmp_path / "m.safetensors", license="MIT") == ""
    model = load(tmp_path / "m.safetensors")
    assert model.tile == 16 and model.metadata["license"] == "MIT"
    found = model.upscale(pictures()[0])
    assert found.pixels.shape == (128, 128, 3)
    assert found.runtime == "engine"
    simulated = model.upscale(pictures()[0], runtime="torch")
    assert np.abs(found.pixels.astype(int) - simulated.pixels.astype(int)).mean() < 0.5
    per_tile = np.mean(list(found.bits.values()), axis=0)
    assert per_tile.max() - per_tile.min() > 0.5


def test_what_the_engine_cannot_run_is_written_without_a_plan(calibrated, tmp_path, monkeypatch):
    _, result, _ = calibrated
    result.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.plan.safetensors").exists()

    def refuse(*_):
        raise UnsupportedError("no integer form")

    monkeypatch.setattr("cadyq.deploy.lower", refuse)
    assert "no integer form" in result.save(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.plan.safetensors").exists()
    assert load(tmp_path / "m.safetensors").upscale(pictures()[0]).runtime == "torch"


def test_progress_is_told(calibrated):
    said = calibrated[2]
    assert {"upscaling with the float network", "fine-tuning", "measuring sites"} <= {
        what for what, _, _ in said
    }
    assert all(0 <= done <= total for _, done, total in said)


def test_it_is_the_same_twice(calibrated, folder):
    module, result, _ = calibrated
    again = calibrate(module, folder / "images", steps=4, tile=16, value_range="0:1")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            result.network.state_dict().values(), again.network.state_dict().values(), strict=True
        )
    )


def test_fine_tuning_brings_it_nearer(folder):
    module = load_module(f"{folder / 'net.py'}:Net", weights=folder / "w.pth")
    kwargs = dict(images=pictures(4, 48), bits=(2, 4), target_fqr=2.5, tile=16, value_range="0:1")
    without, with_steps = (calibrate(module, steps=steps, **kwargs).record for steps in (0, 40))
    assert with_steps["psnr_to_float_db"] > without["psnr_to_float_db"] + 0.3


def test_the_time_is_kept(folder):
    module = load_module(f"{folder / 'net.py'}:Net")
    record = calibrate(module, pictures(4, 48), minutes=0.15, tile=16).record
    assert record["steps"] > 0 and record["seconds"] < 60


def test_an_edge_with_a_few_huge_values_keeps_16_bits():
    torch.manual_seed(0)
    module = user.Resnet(peak=1.0).eval()
    with torch.no_grad():
        # One channel of the plane before the upsampler is a thousand times larger, and hardly used.
        module.end.weight[0] *= 3000
        module.tail[0].weight[:, 0] /= 3000
    result = calibrate(module, pictures(4, 48), steps=0, tile=16, value_range="0:1")
    assert result.quantization.channel_power == 0.8
    bits = {s.name: s.static_bits for s in sites_of(result.network, "edge")}
    grids = {s.name: float(s.grid) for s in sites_of(result.network)}
    assert 8 in bits.values()
    if bits["layers.tail.0.site"] == 16:
        assert grids["layers.tail.0.site"] > 0


def test_site_gains_are_spread_where_not_all_can_be_measured(folder):
    network = build_backbone("edsr", scale=2, channels=8, n_blocks=2).eval()
    crops = np.stack(pictures(2, 32))
    from cadyq.config import Quantization
    from cadyq.quant.convert import convert

    base = convert(network, Quantization(bits=(4, 8), dynamic=True)).eval()
    target = FloatTarget.of(network, crops, 16, lambda *_: None)
    errors = {4: torch.tensor([3.0]), 8: torch.tensor([1.0])}
    names = [s.name for s in sites_of(base, "body")]
    gains = site_gains(partial(run_tiles, base), names, target, [0, 1], 32, 2, errors, lambda *_: None)
    assert list(gains) == names and all(g[8] == 0 and g[4] > 0 for g in gains.values())
    assert gains[names[1]] == gains[names[2]] != gains[names[0]]


def test_a_network_with_shared_blocks_of_ours(tmp_path):
    torch.manual_seed(0)
    network = build_backbone("carn", scale=2, channels=16, groups=4, shared=True, multi=True).eval()
    result = calibrate(network, pictures(2, 48), steps=1, tile=16)
    assert result.save(tmp_path / "m.safetensors") == ""  # the engine runs it
    bits = load(tmp_path / "m.safetensors").upscale(pictures(1, 48)[0]).bits
    assert sum(name.startswith("body") for name in bits) >= 18


def test_crops_are_of_one_size_and_from_all_large_pictures():
    crops = cut_crops([*pictures(3, 200), scene(20, 300)], n=7)
    assert crops.shape == (9, 96, 96, 3)
    assert cut_crops(pictures(5, 44), n=100).shape == (5, 40, 40, 3)
    with pytest.raises(ArgumentError, match="at least 32x32"):
        cut_crops(pictures(2, 31))
    with pytest.raises(ArgumentError, match="0 pictures"):
        cut_crops([])
    with pytest.raises(ArgumentError, match="uint8"):
        cut_crops([np.zeros((40, 40, 3))])


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": (6,)},
        {"bits": (0, 4)},
        {"target_fqr": 9},
        {"steps": -1},
        {"minutes": 0},
        {"tile": 4},
        {"x": 1},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ArgumentError):
        calibrate(user.Compact(), pictures(1), **settings)


def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    source = ["calibrate", f"{folder / 'net.py'}:Net", "--weights", str(folder / "w.pth"), "-o", str(out)]
    options = ["--images", str(folder / "images"), "--steps", "1", "--tile", "16", "--json", "--threads", "1"]
    assert main([*source, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scale"] == 2 and record["steps"] == 1 and record["model"] == str(out)
    picture = str(folder / "images" / "0.png")
    assert main(["audit", str(out), picture]) == 0
    assert main(["info", str(out)]) == 0
    assert "backbone: graph" in capsys.readouterr().out
    assert main(["upscale", picture, "--model", str(out), "-o", str(tmp_path / "x2.png")]) == 0


def test_command_line_says_what_is_wrong(folder, tmp_path, capsys):
    def run(source, *more, out="o.safetensors"):
        images = ["--images", str(folder / "images"), "-o", str(tmp_path / out)]
        code = main(["calibrate", str(source), *images, *more])
        return code, capsys.readouterr().err

    (tmp_path / "bad.py").write_text(
        "from torch import nn\nNet = nn.Sequential(nn.Conv2d(3, 3, 3), nn.GELU())\n"
    )
    code, said = run(f"{tmp_path / 'bad.py'}:Net")
    assert code == UnsupportedError.exit_code and "layer '1': GELU" in said
    assert run(f"{folder / 'net.py'}:Nothing")[0] == ArgumentError.exit_code
    assert "no such thing" in run(f"{folder / 'net.py'}:broken")[1]
    assert run(f"{folder / 'net.py'}:number")[0] == ArgumentError.exit_code
    assert run(f"{folder / 'other.py'}:Net")[0] == ArgumentError.exit_code
    assert run(folder / "none.pth")[0] == ArgumentError.exit_code
    assert run(folder / "w.pth", "--weights", "x")[0] == ArgumentError.exit_code
    assert run(f"{folder / 'net.py'}:Net", "--bits", "four")[0] == ArgumentError.exit_code
    assert run(f"{folder / 'net.py'}:Net", out="none/o.safetensors")[0] == ArgumentError.exit_code
    assert (
        run(f"{folder / 'net.py'}:Net", "--weights", str(folder / "net.py"))[0] == CheckpointError.exit_code
    )
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_float_model_file_of_ours_is_taken_and_a_quantized_one_refused(tmp_path, calibrated):
    network = build_backbone("edsr", scale=2, channels=8, n_blocks=1)
    save_model(tmp_path / "float.safetensors", network, None)
    assert load_module(tmp_path / "float.safetensors").config == network.config
    calibrated[1].save(tmp_path / "q.safetensors")
    with pytest.raises(ArgumentError, match="quantized already"):
        load_module(tmp_path / "q.safetensors")


def test_weights_that_only_spandrel_might_know(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    with pytest.raises(MissingExtraError, match="pip install spandrel"):
        load_module(folder / "w.pth")


def test_networks_that_spandrel_loads(tmp_path):
    pytest.importorskip("spandrel", reason="spandrel is not installed")
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    makers = {
        "compact": lambda: Compact(num_feat=16, num_conv=3, upscale=4),
        "esrgan": lambda: ESRGAN(num_filters=16, num_blocks=1, scale=4),
    }
    for name, make in makers.items():
        torch.save(make().state_dict(), tmp_path / f"{name}.pth")
        module = load_module(tmp_path / f"{name}.pth")
        result = calibrate(module, pictures(4, 48), steps=2, tile=16)
        assert result.network.scale == 4
        assert result.record["psnr_to_float_db"] > 25
        result.save(tmp_path / f"{name}.safetensors")
        assert load(tmp_path / f"{name}.safetensors").upscale(pictures()[0]).pixels.shape == (256, 256, 3)


@pytest.mark.parametrize(("best", "expected"), [(2.0, 2.0), (1.0, 1.0), (0.1, 0.5)])
def test_clips_shrink_together_while_the_error_falls(best, expected):
    clips = torch.tensor([2.0, 4.0, 6.0])

    def error():
        return float((clips[0] - best) ** 2)

    least = scale_together([clips[0], clips[2]], CLIP_SHARES, error, while_falling=True)
    assert clips.tolist() == [expected, 4.0, 3 * expected]
    assert least == pytest.approx((expected - best) ** 2)
